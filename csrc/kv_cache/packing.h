// Codes in and out of blocks, groups to codes and back, fp16 and fp8: what include/sparsekit/kv_cache.h says, element
// by element. Scalar code that the compiler vectorizes; internal linkage, no std: kernels of any instruction set may
// use it.
#pragma once

#include <cstdint>

#include "sparsekit/kv_cache.h"

namespace sparsekit {
namespace {

// ---- numbers

inline float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

/// fp16 bits under an fp32 exponent are 2^112 too small; the product is exact, also for denormals.
inline float half_to_float(uint16_t half) {
  uint32_t magnitude = uint32_t(half & 0x7fff) << 13;
  float value = (half & 0x7c00) == 0x7c00 ? bits_to_float(magnitude | 0x7f800000)
                                          : bits_to_float(magnitude) * bits_to_float(0x77800000);
  return half & 0x8000 ? -value : value;
}

/// Rounds to nearest even; overflows to infinity.
inline uint16_t float_to_half(float value) {
  uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and more
  if (magnitude < 0x38800000) {  // below 2^-14: in units of 2^-24, rounded by an addition
    uint32_t units = float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f);
    return uint16_t(sign | units);
  }
  magnitude += 0xfff + (magnitude >> 13 & 1);
  return uint16_t(sign | ((magnitude - 0x38000000) >> 13));
}

inline float bf16_to_float(uint16_t value) { return bits_to_float(uint32_t(value) << 16); }

inline uint16_t float_to_bf16(float value) {
  uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/// e4m3 (no infinity; 0x7f is NaN) as fp32: exact.
inline float fp8_to_float(uint8_t code) {
  if ((code & 0x7f) == 0x7f) return bits_to_float(0x7fc00000);
  float value = bits_to_float(uint32_t(code & 0x7f) << 20) * bits_to_float(0x7b800000);  // * 2^120
  return code & 0x80 ? -value : value;
}

/// Rounds to nearest even, saturates at 448. `value` is finite.
inline uint8_t float_to_fp8(float value) {
  uint32_t bits = float_to_bits(value), sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x43e00000) return uint8_t(sign | 0x7e);  // 448
  if (magnitude < 0x3c800000) {                              // below 2^-6: in units of 2^-9
    return uint8_t(sign | (float_to_bits(bits_to_float(magnitude) + 16384.f) - float_to_bits(16384.f)));
  }
  magnitude += 0x7ffff + (magnitude >> 20 & 1);
  magnitude = (magnitude - 0x3c000000) >> 20;
  return uint8_t(sign | (magnitude > 0x7e ? 0x7e : magnitude));
}

/// To the nearest integer, ties to even, for |value| < 2^22.
inline float round_even(float value) { return (value + 12582912.f) - 12582912.f; }

inline void load_row(const void* data, int64_t at, DType dtype, int32_t count, float* out) {
  switch (dtype) {
    case DType::f32: __builtin_memcpy(out, static_cast<const float*>(data) + at, count * sizeof(float)); break;
    case DType::f16:
      for (int32_t d = 0; d < count; ++d) out[d] = half_to_float(static_cast<const uint16_t*>(data)[at + d]);
      break;
    case DType::bf16:
      for (int32_t d = 0; d < count; ++d) out[d] = bf16_to_float(static_cast<const uint16_t*>(data)[at + d]);
      break;
    case DType::f64:
      for (int32_t d = 0; d < count; ++d) out[d] = float(static_cast<const double*>(data)[at + d]);
      break;
  }
}

inline void store_row(void* data, int64_t at, DType dtype, int32_t count, const float* x) {
  switch (dtype) {
    case DType::f32: __builtin_memcpy(static_cast<float*>(data) + at, x, count * sizeof(float)); break;
    case DType::f16:
      for (int32_t d = 0; d < count; ++d) static_cast<uint16_t*>(data)[at + d] = float_to_half(x[d]);
      break;
    case DType::bf16:
      for (int32_t d = 0; d < count; ++d) static_cast<uint16_t*>(data)[at + d] = float_to_bf16(x[d]);
      break;
    case DType::f64:
      for (int32_t d = 0; d < count; ++d) static_cast<double*>(data)[at + d] = x[d];
      break;
  }
}

// ---- blocks

/// Codes [32][dim] (one byte per element), of which a plane takes `width` bits from bit `shift` on, to words.
inline void pack_plane(const KvPacking& p, int32_t width, int32_t shift, const uint8_t* codes, uint32_t* words) {
  int32_t per_word = 32 / width, rows = (p.value_layout ? kv_block : p.dim) / per_word;
  int32_t columns = p.value_layout ? p.dim : kv_block;
  int32_t inner_stride = p.value_layout ? p.dim : 1, column_stride = p.value_layout ? 1 : p.dim;
  uint32_t mask = (1u << width) - 1;
  for (int32_t r = 0; r < rows; ++r) {
    for (int32_t c = 0; c < columns; ++c) {
      const uint8_t* first = codes + r * per_word * inner_stride + c * column_stride;
      uint32_t word = 0;
      for (int32_t e = 0; e < per_word; ++e) {
        word |= (uint32_t(first[e * inner_stride]) >> shift & mask) << (8 * (e % 4) + width * (e / 4));
      }
      words[r * columns + c] = word;
    }
  }
}

inline void pack_block(const KvPacking& p, const uint8_t* codes, uint8_t* block) {
  auto* words = reinterpret_cast<uint32_t*>(block);
  if (p.width() == 3) {
    pack_plane(p, 2, 0, codes, words);
    pack_plane(p, 1, 2, codes, words + 2 * p.dim);
  } else {
    pack_plane(p, p.width(), 0, codes, words);
  }
}

/// Codes of one plane, four at a time: (word >> width j) & mask are four neighbours of the inner index.
inline void unpack_plane(const KvPacking& p, int32_t width, int32_t shift, const uint32_t* words, uint8_t* codes) {
  int32_t per_word = 32 / width, rows = (p.value_layout ? kv_block : p.dim) / per_word;
  uint32_t mask = ((1u << width) - 1) * 0x01010101u;
  for (int32_t r = 0; r < rows; ++r) {
    for (int32_t j = 0; j < per_word / 4; ++j) {
      int32_t inner = r * per_word + 4 * j;
      if (p.value_layout) {
        const uint32_t* row = words + r * p.dim;
        uint8_t* to = codes + inner * p.dim;
        for (int32_t c = 0; c < p.dim; ++c) {
          uint32_t four = (row[c] >> (width * j) & mask) << shift;
          to[c] |= uint8_t(four);
          to[c + p.dim] |= uint8_t(four >> 8);
          to[c + 2 * p.dim] |= uint8_t(four >> 16);
          to[c + 3 * p.dim] |= uint8_t(four >> 24);
        }
      } else {
        for (int32_t c = 0; c < kv_block; ++c) {
          uint32_t four = (words[r * kv_block + c] >> (width * j) & mask) << shift, before;
          uint8_t* to = codes + c * p.dim + inner;
          __builtin_memcpy(&before, to, 4);
          four |= before;
          __builtin_memcpy(to, &four, 4);
        }
      }
    }
  }
}

inline void unpack_block(const KvPacking& p, const uint8_t* block, uint8_t* codes) {
  const auto* words = reinterpret_cast<const uint32_t*>(block);
  __builtin_memset(codes, 0, size_t(kv_block) * p.dim);
  if (p.width() == 3) {
    unpack_plane(p, 2, 0, words, codes);
    unpack_plane(p, 1, 2, words + 2 * p.dim, codes);
  } else {
    unpack_plane(p, p.width(), 0, words, codes);
  }
}

// ---- groups

constexpr float half_largest = 65504.f;

/// Rounds a scale to fp16, never a positive one to 0 (2^-24 is the smallest), never beyond the largest.
inline uint16_t round_scale(float scale) {
  uint16_t half = float_to_half(scale < half_largest ? scale : half_largest);
  return scale > 0 && half == 0 ? 1 : half;
}

/// Codes, scale and minimum of the group x[0], x[stride], ... . Codes have the same stride.
inline void quantize_group(const KvPacking& p, const float* x, int32_t count, int32_t stride, uint8_t* codes,
                           uint16_t* scale, uint16_t* minimum) {
  float low = half_largest, high = -half_largest, poison = 0;
  for (int32_t i = 0; i < count; ++i) {
    float value = x[i * stride];
    poison += value * 0.f;  // NaN where a value is NaN or infinite
    value = value > half_largest ? half_largest : value < -half_largest ? -half_largest : value;
    low = value < low ? value : low;
    high = value > high ? value : high;
  }
  if (poison != 0) {  // NaN
    *scale = 0x7e00;
    if (p.has_minima()) *minimum = 0x7e00;
    for (int32_t i = 0; i < count; ++i) codes[i * stride] = 0;
    return;
  }
  float largest = high > -low ? high : -low;
  if (p.bits == kv_fp8) {
    *scale = round_scale(largest / 448.f);
    float unit = half_to_float(*scale);
    for (int32_t i = 0; i < count; ++i) codes[i * stride] = float_to_fp8(unit > 0 ? x[i * stride] / unit : 0.f);
    return;
  }
  float levels = float((1 << p.bits) - 1), base = 0, top = levels, shift = 0;
  if (p.symmetric) {
    top = float((1 << (p.bits - 1)) - 1);
    *scale = round_scale(largest / top);
    shift = float(1 << (p.bits - 1));
  } else {
    *minimum = float_to_half(low + 0.f);  // no -0, which would depend on the order of a group
    base = half_to_float(*minimum);
    *scale = round_scale((high - low) / levels);
  }
  float unit = half_to_float(*scale), bottom = p.symmetric ? -top : 0.f;
  for (int32_t i = 0; i < count; ++i) {
    float step = unit > 0 ? (x[i * stride] - base) / unit : 0.f;
    step = step > top ? top : step < bottom ? bottom : step;
    codes[i * stride] = uint8_t(round_even(step) + shift);
  }
}

inline float dequantize(const KvPacking& p, uint8_t code, float scale, float minimum) {
  if (p.bits == kv_fp8) return scale * fp8_to_float(code);
  if (p.symmetric) return scale * (float(code) - float(1 << (p.bits - 1)));
  return scale * float(code) + minimum;
}

/// Index of an element's scale, relative to the scales of its unit() tokens. t is the token in the unit.
inline int64_t scale_index(const KvPacking& p, int32_t t, int32_t d) {
  return p.per_channel ? d
                       : (int64_t(t / kv_block) * p.groups_per_token() + d / p.group_size) * kv_block + t % kv_block;
}

/// Quantizes `count` <= unit() tokens x [count][dim] into codes [unit][dim] (0 past count) and their scales.
inline void quantize_unit(const KvPacking& p, const float* x, int32_t count, uint8_t* codes, uint16_t* scales,
                          uint16_t* minima) {
  if (count < p.unit()) __builtin_memset(codes + int64_t(count) * p.dim, 0, size_t(p.unit() - count) * p.dim);
  if (p.per_channel) {
    for (int32_t d = 0; d < p.dim; ++d) {
      quantize_group(p, x + d, count, p.dim, codes + d, scales + d, minima ? minima + d : nullptr);
    }
    return;
  }
  for (int32_t t = 0; t < p.unit(); ++t) {
    for (int32_t d = 0; d < p.dim; d += p.group_size) {
      int64_t at = scale_index(p, t, d);
      int32_t size = p.dim - d < p.group_size ? p.dim - d : p.group_size;
      if (t >= count) {
        scales[at] = 0;
        if (minima) minima[at] = 0;
        continue;
      }
      quantize_group(p, x + t * p.dim + d, size, 1, codes + t * p.dim + d, scales + at, minima ? minima + at : nullptr);
    }
  }
}

/// The dequantized row of token t of a unit, from its codes [dim].
inline void dequantize_row(const KvPacking& p, const uint8_t* codes, int32_t t, const uint16_t* scales,
                           const uint16_t* minima, float* out) {
  int32_t step = p.per_channel ? p.dim : p.group_size;
  for (int32_t first = 0; first < p.dim; first += step) {
    int32_t last = first + step < p.dim ? first + step : p.dim;
    if (p.per_channel) {
      for (int32_t d = 0; d < last; ++d) {
        out[d] = dequantize(p, codes[d], half_to_float(scales[d]), minima ? half_to_float(minima[d]) : 0.f);
      }
      continue;
    }
    int64_t at = scale_index(p, t, first);
    float scale = half_to_float(scales[at]), minimum = minima ? half_to_float(minima[at]) : 0.f;
    if (p.bits == kv_fp8) {
      for (int32_t d = first; d < last; ++d) out[d] = scale * fp8_to_float(codes[d]);
    } else {
      if (p.symmetric) minimum = -scale * float(1 << (p.bits - 1));  // exact: a power of two
      for (int32_t d = first; d < last; ++d) out[d] = scale * float(codes[d]) + minimum;
    }
  }
}

}  // namespace
}  // namespace sparsekit

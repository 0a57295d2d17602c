// Quantizes one tile: up to 128 tokens x 128 channels of one tensor, by a CTA of 8 warps.
//
// A warp holds its rows in registers, a lane 4 channels of each (groups along tokens: the 8 warps share minima and
// maxima through shared memory) or 16 channels of a quarter of them (groups inside a token: 2 to 8 neighbouring lanes;
// with 4 channels per lane the shuffles cost more than all the rest). Codes go, a byte each, through shared memory to
// the words of their block. Each input byte is read once, each output byte written once. Bound: memory, and close to it
// the integer pipe, half as wide as the fp32 one: per element a conversion, two extremes, a comparison and 3/4 of a
// byte permutation; clamping is the saturation of a multiply-add, rounding an addition.
//
// Bit-exact with packing.h, whose quotient is an IEEE division: a product with the (approximate) reciprocal gives the
// same code unless the quotient is within 1e-4 of a tie, and only then the division is done.
#pragma once

#include <cuda_fp8.h>

#include "kv_cache/cuda_format.cuh"

namespace sparsekit::cuda {

constexpr int kQuantizeThreads = 256, kQuantizeWarps = 8;
constexpr int kSlice = 128;           // channels of a tile
constexpr int kByteRow = kSlice + 4;  // bytes of a row of codes: 33 banks, so that a column of words is conflict-free
constexpr int kMostTokens = 128;      // of a tile
constexpr float kRound = 12582912.f;  // 1.5 * 2^23: a sum with it rounds to the nearest even integer

struct QuantizeShared {
  alignas(16) uint8_t codes[kMostTokens * kByteRow];
  union {
    alignas(16) float extremes[2][kQuantizeWarps][kSlice];         // per channel: lowest, highest of each warp
    alignas(16) uint16_t parameters[2][kSlice / 32][kMostTokens];  // per token: scales, minima of each group
  };
};

/// Scale, minimum and what codes are computed with: code = round(saturate((x - base) * slope + start) * span) + shift.
struct Group {
  float base, slope, start, span, unit;
  float shifted;  // kRound + shift
  bool poison;    // holds NaN or an infinity
  uint16_t scale, minimum;
};

/// Out of line: what is rare, or once per group.
static __device__ __noinline__ float divided(float a, float b) { return __fdiv_rn(a, b); }

__device__ __forceinline__ uint16_t round_scale(float scale) {
  const uint16_t half = half_bits(fminf(scale, kHalfLargest));
  return scale > 0 && half == 0 ? 1 : half;
}

__device__ __forceinline__ Group make_group(const Format& f, float low, float high) {
  Group g;
  g.poison = !(fabsf(low) <= 3.402823466e38f && fabsf(high) <= 3.402823466e38f);
  low = fminf(fmaxf(low, -kHalfLargest), kHalfLargest);
  high = fminf(fmaxf(high, -kHalfLargest), kHalfLargest);
  g.base = g.start = 0.f;
  g.shifted = kRound;
  g.span = 1.f;
  g.minimum = 0;
  const float largest = high > -low ? high : -low;
  if (f.fp8()) {
    g.scale = round_scale(divided(largest, 448.f));
  } else if (f.symmetric) {
    const float top = float((1 << (f.bits - 1)) - 1);  // codes 1 to 2 top + 1
    g.start = 0.5f;
    g.span = 2.f * top;
    g.shifted = kRound + 1.f;
    g.scale = round_scale(divided(largest, top));
  } else {
    g.span = float((1 << f.bits) - 1);
    g.minimum = half_bits(__fadd_rn(low, 0.f));  // no -0, which would depend on the order of a group
    g.base = half_value(g.minimum);
    g.scale = round_scale(divided(high - low, g.span));
  }
  if (g.poison) g.scale = g.minimum = 0x7e00;
  g.unit = g.poison ? 0.f : half_value(g.scale);
  g.slope = g.unit > 0.f ? __fdividef(1.f, g.unit * g.span) : 0.f;  // of fp8, span is 1
  return g;
}

/// e4m3 codes of two numbers.
__device__ __forceinline__ uint32_t fp8_codes(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
#else
  return fp8_code(low) | fp8_code(high) << 8;
#endif
}

/// Codes of two elements of a group, a byte each.
__device__ __forceinline__ uint32_t fp8_codes_of(const Group& g, float low, float high) {
  if (!(g.unit > 0.f)) return 0;
  // The quotient is within 2^-22 of the product with the reciprocal; nearly always the whole interval has one code.
  const float a = low * g.slope, b = high * g.slope;
  const uint32_t codes = fp8_codes(a * 0.9999995f, b * 0.9999995f);
  if (codes == fp8_codes(a * 1.0000005f, b * 1.0000005f)) return codes;
  return fp8_codes(divided(low, g.unit), divided(high, g.unit));
}

/// The code in the lowest byte, by an IEEE division as on the CPU. Out of line: 2 in 10,000 elements need it.
static __device__ __noinline__ float exact_code(float offset, float unit, float start, float span, float shifted) {
  const float middle = start * span;  // 0, or the symmetric formats' zero
  const float step = unit > 0.f ? __fdiv_rn(offset, unit) : 0.f;
  return fminf(fmaxf(step, -middle), span - middle) + (shifted + middle);
}

/// kRound + code; its lowest byte is the code. `distance`: how far the quotient is from the code.
__device__ __forceinline__ float code_of(const Group& g, float x, float& distance) {
  const float share = __saturatef(fmaf(x - g.base, g.slope, g.start));
  const float code = fmaf(share, g.span, g.shifted);
  distance = fabsf(fmaf(share, g.span, g.shifted - code));  // g.shifted - code is exact
  return code;
}

/// Bytes of the codes of four elements.
template <bool FP8>
__device__ __forceinline__ uint32_t codes_of(const Group& g0, const Group& g1, const Group& g2, const Group& g3,
                                             const float4& x) {
  if (FP8) {
    return (fp8_codes_of(g0, x.x, x.x) & 0xff) | (fp8_codes_of(g1, x.y, x.y) & 0xff) << 8 |
           (fp8_codes_of(g2, x.z, x.z) & 0xff) << 16 | (fp8_codes_of(g3, x.w, x.w) & 0xff) << 24;
  }
  float d0, d1, d2, d3;
  float c0 = code_of(g0, x.x, d0), c1 = code_of(g1, x.y, d1), c2 = code_of(g2, x.z, d2), c3 = code_of(g3, x.w, d3);
  if (d0 > 0.4999f || d1 > 0.4999f || d2 > 0.4999f || d3 > 0.4999f) {
    c0 = exact_code(x.x - g0.base, g0.unit, g0.start, g0.span, g0.shifted);
    c1 = exact_code(x.y - g1.base, g1.unit, g1.start, g1.span, g1.shifted);
    c2 = exact_code(x.z - g2.base, g2.unit, g2.start, g2.span, g2.shifted);
    c3 = exact_code(x.w - g3.base, g3.unit, g3.start, g3.span, g3.shifted);
  }
  return __byte_perm(__byte_perm(__float_as_uint(c0), __float_as_uint(c1), 0x0040),
                     __byte_perm(__float_as_uint(c2), __float_as_uint(c3), 0x0040), 0x5410);
}
template <bool FP8>
__device__ __forceinline__ uint32_t codes_of(const Group& g, const float4& x) {
  if (FP8) return fp8_codes_of(g, x.x, x.y) | fp8_codes_of(g, x.z, x.w) << 16;
  return codes_of<false>(g, g, g, g, x);
}

/// Extremes that keep a NaN.
__device__ __forceinline__ float lower(float a, float b) {
  float x;
  asm("min.NaN.f32 %0, %1, %2;\n" : "=f"(x) : "f"(a), "f"(b));
  return x;
}
__device__ __forceinline__ float higher(float a, float b) {
  float x;
  asm("max.NaN.f32 %0, %1, %2;\n" : "=f"(x) : "f"(a), "f"(b));
  return x;
}
__device__ __forceinline__ void widen(const float4& x, float& low, float& high) {
  low = lower(lower(low, x.x), lower(x.y, lower(x.z, x.w)));
  high = higher(higher(high, x.x), higher(x.y, higher(x.z, x.w)));
}

/// Which token of a tile, and which channel of its slice x[k] of this thread begins with.
template <int PER>
__device__ __forceinline__ void place_of(const Format& f, int k, int* t, int* d) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  *t = warp * PER + (f.per_channel ? k : k / 4 * 4 + lane / 8);
  *d = f.per_channel ? lane * 4 : lane % 8 * 16 + k % 4 * 4;
}

template <int PER, bool FP8>
__device__ __forceinline__ void codes_of_tile(const Format& f, int count, int slice, const float4 (&x)[PER],
                                              uint16_t* scales, uint16_t* minima, QuantizeShared& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, d = slice * kSlice + lane * 4;
  auto store = [&](int t, int column, uint32_t codes) {
    *reinterpret_cast<uint32_t*>(&shared.codes[t * kByteRow + column]) = t < count ? codes : 0u;
  };
  if (f.per_channel) {
    float low[4] = {kHalfLargest, kHalfLargest, kHalfLargest, kHalfLargest};
    float high[4] = {-kHalfLargest, -kHalfLargest, -kHalfLargest, -kHalfLargest};
#pragma unroll
    for (int k = 0; k < PER; ++k) {
      if (warp * PER + k >= count) continue;
      low[0] = lower(low[0], x[k].x), low[1] = lower(low[1], x[k].y);
      low[2] = lower(low[2], x[k].z), low[3] = lower(low[3], x[k].w);
      high[0] = higher(high[0], x[k].x), high[1] = higher(high[1], x[k].y);
      high[2] = higher(high[2], x[k].z), high[3] = higher(high[3], x[k].w);
    }
    *reinterpret_cast<float4*>(&shared.extremes[0][warp][lane * 4]) = make_float4(low[0], low[1], low[2], low[3]);
    *reinterpret_cast<float4*>(&shared.extremes[1][warp][lane * 4]) = make_float4(high[0], high[1], high[2], high[3]);
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kQuantizeWarps; ++w) {
      const float4 l = *reinterpret_cast<const float4*>(&shared.extremes[0][w][lane * 4]);
      const float4 h = *reinterpret_cast<const float4*>(&shared.extremes[1][w][lane * 4]);
      low[0] = lower(low[0], l.x), low[1] = lower(low[1], l.y);
      low[2] = lower(low[2], l.z), low[3] = lower(low[3], l.w);
      high[0] = higher(high[0], h.x), high[1] = higher(high[1], h.y);
      high[2] = higher(high[2], h.z), high[3] = higher(high[3], h.w);
    }
    Group groups[4];
    uint32_t sound = 0;  // a poisoned group's codes are 0
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      groups[c] = make_group(f, low[c], high[c]);
      if (!groups[c].poison) sound |= 0xffu << (8 * c);
    }
#pragma unroll
    for (int k = 0; k < PER; ++k)
      store(warp * PER + k, lane * 4, codes_of<FP8>(groups[0], groups[1], groups[2], groups[3], x[k]) & sound);
    if (warp == 0 && d < f.dim) {
      *reinterpret_cast<uint2*>(scales + d) = make_uint2(groups[0].scale | uint32_t(groups[1].scale) << 16,
                                                         groups[2].scale | uint32_t(groups[3].scale) << 16);
      if (minima)
        *reinterpret_cast<uint2*>(minima + d) = make_uint2(groups[0].minimum | uint32_t(groups[1].minimum) << 16,
                                                           groups[2].minimum | uint32_t(groups[3].minimum) << 16);
    }
    return;
  }
  const int lanes = f.group_size / 16;  // of a group: 2, 4 or 8
  const bool inside = slice * kSlice + lane % 8 * 16 < f.dim;
#pragma unroll
  for (int k = 0; k < PER; k += 4) {
    int t, column;
    place_of<PER>(f, k, &t, &column);
    float low = kHalfLargest, high = -kHalfLargest;
    if (inside) {
#pragma unroll
      for (int i = 0; i < 4; ++i) widen(x[k + i], low, high);
    }
#pragma unroll
    for (int step = 1; step < 8; step *= 2) {
      if (step >= lanes) break;
      low = lower(low, __shfl_xor_sync(0xffffffffu, low, step));
      high = higher(high, __shfl_xor_sync(0xffffffffu, high, step));
    }
    const Group g = make_group(f, low, high);
#pragma unroll
    for (int i = 0; i < 4; ++i) store(t, column + 4 * i, g.poison ? 0u : codes_of<FP8>(g, x[k + i]));
    if (lane % 8 % lanes == 0) {
      shared.parameters[0][lane % 8 / lanes][t] = t < count ? g.scale : uint16_t(0);
      shared.parameters[1][lane % 8 / lanes][t] = t < count ? g.minimum : uint16_t(0);
    }
  }
}

/// Words of one plane of WIDTH bits of the blocks of a tile, from the bytes in shared memory.
template <int WIDTH, int SHIFT>
__device__ __forceinline__ void pack_tile(const Format& f, int64_t plane, int slice, int blocks,
                                          const QuantizeShared& shared, uint8_t* codes) {
  constexpr int kPerWord = 32 / WIDTH;
  constexpr uint32_t kMask = ((1u << WIDTH) - 1) * 0x01010101u;
  const int channels = min(f.dim - slice * kSlice, kSlice), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (!f.value_layout) {  // lane = token, a warp writes one row of words
    const int rows = channels / kPerWord;
    for (int block = 0; block < blocks; ++block) {
      auto* to = reinterpret_cast<uint32_t*>(codes + block * f.block_bytes + plane) + slice * kSlice / kPerWord * 32;
      for (int r = warp; r < rows; r += kQuantizeWarps) {
        const uint8_t* from = &shared.codes[(block * 32 + lane) * kByteRow + r * kPerWord];
        uint32_t word = 0;
#pragma unroll
        for (int j = 0; j < kPerWord / 4; ++j)
          word |= (*reinterpret_cast<const uint32_t*>(from + 4 * j) >> SHIFT & kMask) << (WIDTH * j);
        to[r * 32 + lane] = word;
      }
    }
    return;
  }
  const int c = lane * 4;  // lane = 4 channels
  if (c >= channels) return;
  for (int row = warp; row < blocks * WIDTH; row += kQuantizeWarps) {
    const int r = row % WIDTH, block = row / WIDTH;
    uint32_t fours[4] = {};  // of tokens r * kPerWord + 4 j + i: 4 channels in 4 bytes
#pragma unroll
    for (int j = 0; j < kPerWord / 4; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int t = block * 32 + r * kPerWord + 4 * j + i;
        fours[i] |= (*reinterpret_cast<const uint32_t*>(&shared.codes[t * kByteRow + c]) >> SHIFT & kMask)
                    << (WIDTH * j);
      }
    }
    // A 4 x 4 transposition of bytes: word of a channel = its byte of each of the four.
    const uint32_t a = __byte_perm(fours[0], fours[1], 0x5140), b = __byte_perm(fours[2], fours[3], 0x5140);
    const uint32_t e = __byte_perm(fours[0], fours[1], 0x7362), g = __byte_perm(fours[2], fours[3], 0x7362);
    auto* to = reinterpret_cast<uint32_t*>(codes + block * f.block_bytes + plane) + r * f.dim + slice * kSlice + c;
    *reinterpret_cast<uint4*>(to) = make_uint4(__byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632),
                                               __byte_perm(e, g, 0x5410), __byte_perm(e, g, 0x7632));
  }
}

/// Words of the first `blocks` blocks of the codes in shared memory.
__device__ __forceinline__ void pack_blocks(const Format& f, int slice, int blocks, const QuantizeShared& shared,
                                            uint8_t* codes) {
  switch (f.width) {
    case 8: pack_tile<8, 0>(f, 0, slice, blocks, shared, codes); break;
    case 4: pack_tile<4, 0>(f, 0, slice, blocks, shared, codes); break;
    case 2: pack_tile<2, 0>(f, 0, slice, blocks, shared, codes); break;
    default:
      pack_tile<2, 0>(f, 0, slice, blocks, shared, codes);
      pack_tile<1, 2>(f, int64_t(8) * f.dim, slice, blocks, shared, codes);
  }
}

/// This thread's part of a tile: tokens 0 .. count - 1 of 8 * PER, rows at `row(t)` (const char*) in `dtype`; 0 behind.
template <int PER, class Row>
__device__ __forceinline__ void load_tile(const Format& f, DType dtype, int count, int slice, const Row& row,
                                          float4 (&x)[PER]) {
  auto load = [&](auto zero) {
#pragma unroll
    for (int k = 0; k < PER; ++k) {
      int t, d;
      place_of<PER>(f, k, &t, &d);
      d += slice * kSlice;
      x[k] = d < f.dim && t < count ? load4(reinterpret_cast<const decltype(zero)*>(row(t)) + d)
                                    : make_float4(0.f, 0.f, 0.f, 0.f);
    }
  };
  switch (dtype) {
    case DType::f32: load(float()); break;
    case DType::f16: load(__half()); break;
    default: load(__nv_bfloat16());
  }
}

/// Quantizes a tile. Codes of `blocks` blocks are written. Every thread of the CTA calls it.
template <int PER>
__device__ __forceinline__ void quantize_tile(const Format& f, int count, int blocks, int slice, const float4 (&x)[PER],
                                              const Place& to, QuantizeShared& shared) {
  __syncthreads();  // the shared memory may still be in use for the tile before
  if (f.fp8()) {
    codes_of_tile<PER, true>(f, count, slice, x, to.scales, to.minima, shared);
  } else {
    codes_of_tile<PER, false>(f, count, slice, x, to.scales, to.minima, shared);
  }
  __syncthreads();
  if (!f.per_channel) {
    const int first = slice * kSlice / f.group_size, tokens = blocks * kv_block;
    const int groups = (min(f.dim - slice * kSlice, kSlice) + f.group_size - 1) / f.group_size;
    for (int at = threadIdx.x; at < groups * tokens; at += kQuantizeThreads) {
      const int t = at % tokens, g = at / tokens;
      const int index = (t / kv_block * f.groups + first + g) * kv_block + t % kv_block;
      to.scales[index] = shared.parameters[0][g][t];
      if (to.minima) to.minima[index] = shared.parameters[1][g][t];
    }
  }
  pack_blocks(f, slice, blocks, shared, to.codes);
}

}  // namespace sparsekit::cuda

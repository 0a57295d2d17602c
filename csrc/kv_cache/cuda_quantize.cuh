// Quantizes one tile: up to 128 tokens x 128 channels of one tensor, by a CTA of 8 warps.
//
// A warp holds rows of 128 channels, 4 per lane, in registers: per token a group is 8 to 32 neighbouring lanes, per
// channel the 8 warps share minima and maxima through shared memory. Codes go, a byte each, through shared memory to
// the words of their block. Each input byte is read once, each output byte written once. Bound: memory; about 14
// instructions per element, where a copy at full bandwidth leaves room for 17.
//
// Bit-exact with packing.h, whose quotient is an IEEE division: a product with the reciprocal gives the same code
// unless the quotient is within 1e-4 of a tie, and only then the division is done.
#pragma once

#include "kv_cache/cuda_format.cuh"

namespace sparsekit::cuda {

constexpr int kQuantizeThreads = 256, kQuantizeWarps = 8;
constexpr int kSlice = 128;               // channels of a tile
constexpr int kByteRow = kSlice + 4;      // bytes of a row of codes: 33 banks, so that a column of words is conflict-free
constexpr int kMostTokens = 128;          // of a tile
constexpr float kRound = 12582912.f;      // 1.5 * 2^23: a sum with it rounds to the nearest even integer

struct QuantizeShared {
  alignas(16) uint8_t codes[kMostTokens * kByteRow];
  union {
    alignas(16) float extremes[2][kQuantizeWarps][kSlice];       // per channel: lowest, highest of each warp
    alignas(16) uint16_t parameters[2][kSlice / 32][kMostTokens];  // per token: scales, minima of each group
  };
};

/// Scale, minimum and what codes are computed with. low = -inf: the group holds NaN or an infinity.
struct Group {
  float base, unit, inverse, bottom, top;
  int shift;
  bool poison;
  uint16_t scale, minimum;
};

__device__ __forceinline__ uint16_t round_scale(float scale) {
  const uint16_t half = half_bits(fminf(scale, kHalfLargest));
  return scale > 0 && half == 0 ? 1 : half;
}

__device__ __forceinline__ Group make_group(const Format& f, float low, float high) {
  Group g;
  g.poison = low < -kHalfLargest;
  g.base = 0.f;
  g.shift = 0;
  g.minimum = 0;
  const float largest = high > -low ? high : -low;
  if (f.fp8()) {
    g.scale = round_scale(__fdiv_rn(largest, 448.f));
  } else if (f.symmetric) {
    g.top = float((1 << (f.bits - 1)) - 1);
    g.bottom = -g.top;
    g.shift = 1 << (f.bits - 1);
    g.scale = round_scale(__fdiv_rn(largest, g.top));
  } else {
    g.top = float((1 << f.bits) - 1);
    g.bottom = 0.f;
    g.minimum = half_bits(__fadd_rn(low, 0.f));  // no -0, which would depend on the order of a group
    g.base = half_value(g.minimum);
    g.scale = round_scale(__fdiv_rn(high - low, g.top));
  }
  if (g.poison) g.scale = g.minimum = 0x7e00;
  g.unit = g.poison ? 0.f : half_value(g.scale);
  g.inverse = g.unit > 0.f ? __frcp_rn(g.unit) : 0.f;
  return g;
}

template <bool FP8>
__device__ __forceinline__ uint32_t code_of(const Group& g, float x) {
  if (FP8) return g.unit > 0.f ? fp8_code(__fdiv_rn(x, g.unit)) : 0u;
  const float offset = x - g.base;
  float step = fminf(fmaxf(offset * g.inverse, g.bottom), g.top);
  float rounded = step + kRound;
  if (fabsf(step - (rounded - kRound)) > 0.4999f) {
    step = g.unit > 0.f ? fminf(fmaxf(__fdiv_rn(offset, g.unit), g.bottom), g.top) : 0.f;
    rounded = step + kRound;
  }
  // A poisoned group has unit 0: its codes are 0 whatever x is. fmaxf(NaN, bottom) is bottom.
  return g.poison ? 0u : uint32_t(__float_as_int(rounded) - __float_as_int(kRound) + g.shift);
}

__device__ __forceinline__ void widen(float x, float& low, float& high) {
  const bool finite = fabsf(x) <= 3.402823466e38f;
  const float value = fminf(fmaxf(x, -kHalfLargest), kHalfLargest);
  low = finite ? fminf(low, value) : -__builtin_huge_valf();
  high = fmaxf(high, value);
}

template <int PER, bool FP8>
__device__ __forceinline__ void codes_of_tile(const Format& f, int count, int slice, const float4 (&x)[PER],
                                              uint16_t* scales, uint16_t* minima, QuantizeShared& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, d = slice * kSlice + lane * 4;
  const bool inside = d < f.dim;
  if (f.per_channel) {
    float low[4] = {kHalfLargest, kHalfLargest, kHalfLargest, kHalfLargest};
    float high[4] = {-kHalfLargest, -kHalfLargest, -kHalfLargest, -kHalfLargest};
#pragma unroll
    for (int k = 0; k < PER; ++k) {
      if (warp * PER + k >= count) continue;
      widen(x[k].x, low[0], high[0]);
      widen(x[k].y, low[1], high[1]);
      widen(x[k].z, low[2], high[2]);
      widen(x[k].w, low[3], high[3]);
    }
    *reinterpret_cast<float4*>(&shared.extremes[0][warp][lane * 4]) = make_float4(low[0], low[1], low[2], low[3]);
    *reinterpret_cast<float4*>(&shared.extremes[1][warp][lane * 4]) = make_float4(high[0], high[1], high[2], high[3]);
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kQuantizeWarps; ++w) {
      const float4 l = *reinterpret_cast<const float4*>(&shared.extremes[0][w][lane * 4]);
      const float4 h = *reinterpret_cast<const float4*>(&shared.extremes[1][w][lane * 4]);
      low[0] = fminf(low[0], l.x), low[1] = fminf(low[1], l.y), low[2] = fminf(low[2], l.z);
      low[3] = fminf(low[3], l.w);
      high[0] = fmaxf(high[0], h.x), high[1] = fmaxf(high[1], h.y), high[2] = fmaxf(high[2], h.z);
      high[3] = fmaxf(high[3], h.w);
    }
    uint32_t codes[PER] = {};
    uint16_t scale[4], minimum[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const Group g = make_group(f, low[c], high[c]);
      scale[c] = g.scale;
      minimum[c] = g.minimum;
#pragma unroll
      for (int k = 0; k < PER; ++k) {
        const float value = c == 0 ? x[k].x : c == 1 ? x[k].y : c == 2 ? x[k].z : x[k].w;
        codes[k] |= code_of<FP8>(g, value) << (8 * c);
      }
    }
#pragma unroll
    for (int k = 0; k < PER; ++k) {
      const int t = warp * PER + k;
      *reinterpret_cast<uint32_t*>(&shared.codes[t * kByteRow + lane * 4]) = t < count ? codes[k] : 0u;
    }
    if (warp == 0 && inside) {
      *reinterpret_cast<uint2*>(scales + d) = make_uint2(scale[0] | uint32_t(scale[1]) << 16,
                                                         scale[2] | uint32_t(scale[3]) << 16);
      if (minima)
        *reinterpret_cast<uint2*>(minima + d) = make_uint2(minimum[0] | uint32_t(minimum[1]) << 16,
                                                           minimum[2] | uint32_t(minimum[3]) << 16);
    }
    return;
  }
  const int lanes = f.group_size / 4;  // of a group: 8, 16 or 32
#pragma unroll
  for (int k = 0; k < PER; ++k) {
    const int t = warp * PER + k;
    float low = kHalfLargest, high = -kHalfLargest;
    if (inside) {
      widen(x[k].x, low, high);
      widen(x[k].y, low, high);
      widen(x[k].z, low, high);
      widen(x[k].w, low, high);
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      if (step >= lanes) break;
      low = fminf(low, __shfl_xor_sync(0xffffffffu, low, step));
      high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, step));
    }
    const Group g = make_group(f, low, high);
    const uint32_t code = code_of<FP8>(g, x[k].x) | code_of<FP8>(g, x[k].y) << 8 | code_of<FP8>(g, x[k].z) << 16 |
                          code_of<FP8>(g, x[k].w) << 24;
    *reinterpret_cast<uint32_t*>(&shared.codes[t * kByteRow + lane * 4]) = t < count ? code : 0u;
    if (lane % lanes == 0) {
      shared.parameters[0][lane / lanes][t] = t < count ? g.scale : uint16_t(0);
      shared.parameters[1][lane / lanes][t] = t < count ? g.minimum : uint16_t(0);
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
  const int warp = threadIdx.x / 32, d = slice * kSlice + threadIdx.x % 32 * 4;
  auto load = [&](auto zero) {
#pragma unroll
    for (int k = 0; k < PER; ++k) {
      const int t = warp * PER + k;
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

// Decode attention on tensor cores: pieces that packed and plain caches share.
//
// M is tokens (or channels), N = 8 query rows of one key head: S^T = K Q^T and O^T = V^T P^T, m16n8k16. With 4 or 8
// query heads per key head nothing of a tile is wasted, and codes are the A operand: 256 of them per product. Scores
// come out with tokens in rows, the values' product needs them as B with tokens along k: one movmatrix per 8 tokens.
// A warp walks its own tiles of tokens with its own cp.async ring, without barriers; shared memory is only a
// deep prefetch buffer. The 4 warps of a CTA merge at the end, the CTAs of a head in cuda_decode_merge.cu. Bound:
// memory.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "common/cuda/launch.h"
#include "common/cuda/math.cuh"
#include "common/cuda/mma.cuh"
#include "common/cuda/shared_memory.cuh"
#include "kv_cache/cuda_decode.cuh"

namespace sparsekit::cuda {

constexpr int kDecodeWarps = 4, kDecodeThreads = 32 * kDecodeWarps;
constexpr int kColumns = 8;  // query rows of a CTA
constexpr uint32_t kAllLanes = 0xffffffffu;

/// Which part of the problem a CTA of the grid (heads and blocks of rows, sequences, slots) has.
struct CtaPlace {
  int64_t b, h;
  int first_row, slot;
};
__device__ __forceinline__ CtaPlace place_of_cta(const Decode& p) {
  const int blocks = (p.rows + kColumns - 1) / kColumns;
  return {blockIdx.y, blockIdx.x / blocks, int(blockIdx.x % blocks) * kColumns, int(blockIdx.z)};
}

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}
__device__ __forceinline__ uint2 load_shared_8(uint32_t address) {
  uint2 x;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];\n" : "=r"(x.x), "=r"(x.y) : "r"(address) : "memory");
  return x;
}
__device__ __forceinline__ uint16_t load_shared_2(uint32_t address) {
  uint16_t x;
  asm volatile("ld.shared.u16 %0, [%1];\n" : "=h"(x) : "r"(address) : "memory");
  return x;
}
__device__ __forceinline__ void store_shared_2(uint32_t address, uint16_t x) {
  asm volatile("st.shared.u16 [%0], %1;\n" ::"r"(address), "h"(x) : "memory");
}

/// The transpose of an 8x8 matrix of 16-bit elements: lane l held (row l / 4, columns 2 (l % 4) and + 1).
__device__ __forceinline__ uint32_t transposed(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(y) : "r"(x));
  return y;
}

__device__ __forceinline__ uint32_t bits_of(__half2 x) { return *reinterpret_cast<uint32_t*>(&x); }
__device__ __forceinline__ __half2 half2_of(uint32_t x) { return *reinterpret_cast<__half2*>(&x); }
__device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) {
  return bits_of(__hmul2(half2_of(a), half2_of(b)));
}

/// What a lane knows of its two query rows, columns 2t and 2t + 1 of every score tile: little, since it is kept in
/// registers all along.
struct Columns {
  int b, h, row;    // row: of the key head, of the first column; rows past p.rows are computed and dropped
  int least_limit;  // of all rows of the CTA: keys that they see are those before this one
  float factor[2];  // of a score as the products give it, times log2 e

  __device__ __forceinline__ bool used(const Decode& p, int c) const { return row + c < p.rows; }
  __device__ __forceinline__ int limit(const Decode& p, int c) const {
    return least_limit + min(row + c, p.rows - 1) % int(p.len_q);
  }
};

__device__ __forceinline__ Columns columns_of(const Decode& p, int64_t b, int64_t h, int first_row, int length) {
  return {int(b), int(h), first_row + 2 * int(threadIdx.x % 4), length - int(p.len_q) + 1, {1.f, 1.f}};
}

/// |scale|; its sign goes to the query, so that a maximum of products is one of scores. Not 0: -inf * 0 is NaN.
__device__ __forceinline__ float magnitude_of(float scale) { return fmaxf(fabsf(scale), 1e-30f); }

/// The online softmax of a lane's two columns; every sum carries the factor 2^exponent.
struct Softmax {
  float largest[2], total[2];  // total: of this lane's tokens only
  int exponent;
};

/// What is rare: softcap, bias and scores that are asked for, for the scores of a tile in units of log2; `at` is the
/// token of score x[4 s + 2 m + c / 2], or -1. Out of line, so that the loop around it stays in the instruction cache.
template <int STEPS>
__device__ __noinline__ void finish_scores(const Decode& p, const Columns& columns, float (&x)[STEPS * 8],
                                           const int (&at)[STEPS * 4]) {
  for (int c = 0; c < 2; ++c) {
    const bool used = columns.used(p, c);
    const float* bias = used ? p.bias(columns.b, columns.h, columns.row + c) : nullptr;
    float* scores = used ? p.scores_of(columns.b, columns.h, columns.row + c) : nullptr;
    const int limit = columns.limit(p, c);
    for (int i = c; i < STEPS * 8; i += 2) {
      const int token = at[i / 2];
      float score = x[i] * kLn2;
      if (p.softcap > 0.f) score = p.softcap * tanh_fast(score / p.softcap);
      if (token >= 0 && token < limit) {
        if (bias && token < p.bias_length) {
          const float add = bias[token];
          score = add == -kInfinity ? -kInfinity : score + add;  // a hidden key reaches nothing, not even by a NaN
        }
        if (scores && token < p.scores_length) scores[token] = score;
      }
      x[i] = score * kLog2e;
    }
  }
}

/// Scores of a tile, x + shift, to weights. x[s][m][c]: token `token(s, 2 m + c / 2)` of the head, column c % 2.
/// `hidden(s, i)` says that a token is none. O is rescaled where a maximum grew.
template <int STEPS, int TILES, class Token, class Hidden>
__device__ __forceinline__ void softmax_step(const Decode& p, const Columns& columns, bool masks, Softmax& state,
                                             float (&x)[STEPS][2][4], const float (&shift)[2], float (&out)[TILES][4],
                                             float (&extra)[4], const Token& token, const Hidden& hidden) {
  float factor[2] = {columns.factor[0], columns.factor[1]};
  float moved[2] = {shift[0] * factor[0], shift[1] * factor[1]};
  if (__builtin_expect(p.softcap > 0.f || p.key_bias || p.scores, 0)) {
    const Columns copy = columns;
    float scores[STEPS * 8];
    int at[STEPS * 4];
#pragma unroll
    for (int i = 0; i < STEPS * 8; ++i) scores[i] = fmaf(x[i / 8][i % 8 / 4][i % 4], factor[i % 2], moved[i % 2]);
#pragma unroll
    for (int i = 0; i < STEPS * 4; ++i) at[i] = hidden(i / 4, i % 4) ? -1 : token(i / 4, i % 4);
    finish_scores<STEPS>(p, copy, scores, at);
#pragma unroll
    for (int i = 0; i < STEPS * 8; ++i) x[i / 8][i % 8 / 4][i % 4] = scores[i];
    factor[0] = factor[1] = 1.f;
    moved[0] = moved[1] = 0.f;
  }
  if (__builtin_expect(masks, 0)) {
    const int limit[2] = {columns.limit(p, 0), columns.limit(p, 1)};
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int c = i % 2, a = i / 2;
        float& score = x[s][i / 4][i % 4];  // a shift that is NaN does not reach a token that is not seen
        score = token(s, a) >= limit[c] || hidden(s, a) ? -kInfinity : fmaf(score, factor[c], moved[c]);
      }
    }
    factor[0] = factor[1] = 1.f;
    moved[0] = moved[1] = 0.f;
  }
  float most[2] = {-kInfinity, -kInfinity};
#pragma unroll
  for (int s = 0; s < STEPS; ++s) {
#pragma unroll
    for (int i = 0; i < 8; ++i) most[i % 2] = fmaxf(most[i % 2], x[s][i / 4][i % 4]);
  }
#pragma unroll
  for (int c = 0; c < 2; ++c) most[c] = fmaf(most[c], factor[c], moved[c]);  // factors are not negative
  if (__any_sync(kAllLanes, most[0] > state.largest[0] || most[1] > state.largest[1])) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) most[c] = fmaxf(most[c], __shfl_xor_sync(kAllLanes, most[c], step));
      const float now = fmaxf(most[c], state.largest[c]);
      const float shrink = now == -kInfinity ? 1.f : exp2_fast(state.largest[c] - now);
      state.largest[c] = now;
      state.total[c] *= shrink;
      extra[c] *= shrink;
#pragma unroll
      for (int i = 0; i < TILES; ++i) {
        out[i][c] *= shrink;
        out[i][c + 2] *= shrink;
      }
    }
  }
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const float reference = state.largest[c] == -kInfinity ? 0.f : state.largest[c];
    const float offset = float(state.exponent) - reference + moved[c];
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& weight = x[s][i / 2][i % 2 * 2 + c];
        weight = exp2_fast(fmaf(weight, factor[c], offset));
        state.total[c] += weight;
      }
    }
  }
}

/// The end of a CTA: merges its warps and writes the split's state. `channel(i)` is the channel of out[i][0, 1]; that
/// of out[i][2, 3] is the next. out is final but for the factor 2^-exponent. Shared memory: kDecodeWarps * (DIM * 9 +
/// 16) floats. Every thread calls it.
template <int DIM, int TILES, class Channel>
__device__ __forceinline__ void finish_split(const Decode& p, int64_t b, int64_t h, int slot, int first_row,
                                             const Softmax& state, const float (&out)[TILES][4], const Channel& channel,
                                             float* shared) {
  constexpr int kStride = kColumns + 1;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, t = lane % 4;
  float total[2];
  const float unscaled = exp2f(-float(state.exponent));
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    total[c] = state.total[c] * unscaled;
#pragma unroll
    for (int step = 4; step < 32; step *= 2) total[c] += __shfl_xor_sync(kAllLanes, total[c], step);
  }
  float* states = shared + kDecodeWarps * DIM * kStride;  // [warp][column][largest, total]
  __syncthreads();                                        // every warp is done with the ring
#pragma unroll
  for (int i = 0; i < TILES; ++i) {
    float* to = shared + (warp * DIM + channel(i)) * kStride + 2 * t;
    to[0] = out[i][0] * unscaled;
    to[1] = out[i][1] * unscaled;
    to[kStride] = out[i][2] * unscaled;
    to[kStride + 1] = out[i][3] * unscaled;
  }
  if (lane < 4) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      states[(warp * kColumns + 2 * t + c) * 2] = state.largest[c];
      states[(warp * kColumns + 2 * t + c) * 2 + 1] = total[c];
    }
  }
  __syncthreads();
  const int rows = min(p.rows - first_row, kColumns);
  for (int at = threadIdx.x; at < rows * DIM; at += kDecodeThreads) {
    const int row = at / DIM, d = at % DIM;
    float largest = -kInfinity;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) largest = fmaxf(largest, states[(w * kColumns + row) * 2]);
    const float reference = largest == -kInfinity ? 0.f : largest;
    float sum = 0.f, all = 0.f;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) {
      const float weight = exp2f(states[(w * kColumns + row) * 2] - reference);
      all += weight * states[(w * kColumns + row) * 2 + 1];
      sum += weight * shared[(w * DIM + d) * kStride + row];
    }
    const int64_t to = p.state(b, h, slot, first_row + row);
    p.acc[to * DIM + d] = sum;
    if (d == 0) p.states[to] = make_float2(largest, all);
  }
}

constexpr size_t finish_bytes(int dim) { return sizeof(float) * kDecodeWarps * (size_t(dim) * 9 + 16); }

// ---- full precision: a plain cache, or sinks and ring of a packed one

/// Rows of one head in 16-bit elements, in tiles of 32 tokens.
/// Lane (g, t) reads (token 4 g + a, channels 32 q + 8 t ..) of keys and (token 8 t + i, channels 64 q + 8 g ..) of
/// values, 16 bytes (a chunk) each. In its slot a tile stands row by row; chunk c of token i at c ^ 4 (i / 4) of keys,
/// at c ^ 2 (i / 8) of values, modulo 8: no bank conflicts. (A warp copies whole rows: SWIZZLE in
/// cuda_decode_sm80_packed.cuh says why.)
/// Row i < tokens is token number `number(i)` of a head of `length`, and stands at element `offset(i, value)` of keys
/// or values; negative: its page is out of range.
template <class Element, int DIM, int SLOTS, class Number, class Offset>
__device__ __forceinline__ void attend_rows(const Decode& p, int64_t b, int64_t h, int slot, int first_row, int length,
                                            int tokens, const Number& number, Share share, const void* keys,
                                            const void* values, const Offset& offset, uint8_t* shared) {
  constexpr int kTokens = 32, kTile = kTokens * DIM * 2, kTiles = DIM / 16;
  constexpr bool kHalf = std::is_same<Element, __half>::value;
  constexpr int kPending = SLOTS > 1 ? SLOTS - 2 : 0;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  constexpr int kChunks = DIM / 8, kRows = 32 / kChunks;  // chunks of a row, rows of a copy
  const uint32_t ring = shared_address(shared) + warp * SLOTS * kTile;
  Columns columns = columns_of(p, b, h, first_row, length);
  columns.factor[0] = columns.factor[1] = magnitude_of(p.scale) * kLog2e;

  uint32_t query[DIM / 32][4];  // B: column g, channels 32 q + 8 t ..
  {
    const int row = first_row + g;
    const auto* from = static_cast<const Element*>(p.query.data) + (row < p.rows ? p.query_row(b, h, row) : 0);
#pragma unroll
    for (int q = 0; q < DIM / 32; ++q) {
      uint4 x = row < p.rows ? *reinterpret_cast<const uint4*>(from + 32 * q + 8 * t) : make_uint4(0, 0, 0, 0);
      const uint32_t sign = p.scale < 0.f ? 0x80008000u : 0u;
      query[q][0] = x.x ^ sign;
      query[q][1] = x.y ^ sign;
      query[q][2] = x.z ^ sign;
      query[q][3] = x.w ^ sign;
    }
  }
  Softmax state = {{-kInfinity, -kInfinity}, {0.f, 0.f}, kHalf ? 12 : 0};
  float out[kTiles][4] = {}, extra[4] = {};

  const int first = share.first + warp, count = max(0, (share.last - first + kDecodeWarps - 1) / kDecodeWarps);
  // Copy number n: keys (n even) or values of this warp's tile n / 2. Lane l finds the row of token l.
  auto start_copy = [&](int n) {
    if (n < 2 * count) {
      const bool value = n % 2;
      const int token = (first + n / 2 * kDecodeWarps) * kTokens + lane;
      const int64_t row = token < tokens ? offset(token, value) : -1;
      const auto* data = static_cast<const Element*>(value ? values : keys);
      const uint32_t to = ring + n % SLOTS * kTile;
      const Element* at = data + lane % kChunks * 8;
#pragma unroll
      for (int i = 0; i < kTokens / kRows; ++i) {
        const int place = i * kRows + lane / kChunks;
        const int64_t from = __shfl_sync(kAllLanes, row, place);
        const int moved = value ? 2 * (place >> 3) : 4 * (place >> 2 & 1);
        copy_async_16(to + i * 512 + (lane ^ moved) * 16, at + max(from, int64_t(0)), from >= 0);
      }
    }
    copy_async_commit();
  };
#pragma unroll
  for (int n = 0; n < SLOTS - 1; ++n) start_copy(n);
  for (int tile = 0; tile < count; ++tile) {
    if (SLOTS == 1) {
      __syncwarp();
      start_copy(2 * tile);
    }
    copy_async_wait<kPending>();
    __syncwarp();  // lanes read what others copied; and have read what is overwritten now
    if (SLOTS > 1) start_copy(2 * tile + SLOTS - 1);
    const int start = (first + tile * kDecodeWarps) * kTokens;
    const uint32_t key = ring + 2 * tile % SLOTS * kTile;
    // Products that follow each other go to different sums: one waits about 33 cycles for the one before it.
    float x[1][2][4] = {}, other[2][4] = {};
#pragma unroll
    for (int q = 0; q < DIM / 32; ++q) {
      uint4 k[4];
#pragma unroll
      for (int a = 0; a < 4; ++a) k[a] = load_shared(key + (4 * g + a) * (DIM * 2) + ((4 * q + t) ^ 4 * (g & 1)) * 16);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const uint32_t low[4] = {k[2 * m].x, k[2 * m + 1].x, k[2 * m].y, k[2 * m + 1].y};
        mma_m16n8k16<Element>(x[0][m], low, query[q][0], query[q][1]);
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const uint32_t high[4] = {k[2 * m].z, k[2 * m + 1].z, k[2 * m].w, k[2 * m + 1].w};
        mma_m16n8k16<Element>(other[m], high, query[q][2], query[q][3]);
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) x[0][i / 4][i % 4] += other[i / 4][i % 4];
    // Tokens whose page is out of range are none. Asked for only where it can matter: a table is in use.
    uint32_t exist = kAllLanes;
    const bool ends = start + kTokens > tokens || number(start + kTokens - 1) >= columns.least_limit;
    if (ends || p.plain.block_table) {
      const int token = start + lane;
      exist = __ballot_sync(kAllLanes, token < tokens && offset(token, false) >= 0);
    }
    const bool masks = ends || exist != kAllLanes;
    softmax_step<1, kTiles>(
        p, columns, masks, state, x, {0.f, 0.f}, out, extra, [&](int, int a) { return number(start + 4 * g + a); },
        [&](int, int a) { return !(exist >> (4 * g + a) & 1); });
    uint32_t weights[4];  // B: column g, tokens (8 t + a, 8 t + a + 4)
#pragma unroll
    for (int a = 0; a < 4; ++a)
      weights[a] = transposed(pack<Element>(x[0][a / 2][a % 2 * 2], x[0][a / 2][a % 2 * 2 + 1]));
    // Values of tokens without any weight are not multiplied: they may be NaN.
    uint32_t used = 0;
#pragma unroll
    for (int a = 0; a < 4; ++a) {
      used |= uint32_t((weights[a] & 0x7fff) != 0) << a;
      used |= uint32_t((weights[a] & 0x7fff0000) != 0) << (a + 4);
    }
#pragma unroll
    for (int step = 4; step < 32; step *= 2) used |= __shfl_xor_sync(kAllLanes, used, step);
    const bool drops = __any_sync(kAllLanes, used != 0xff);

    if (SLOTS == 1) {
      __syncwarp();
      start_copy(2 * tile + 1);
      copy_async_wait<0>();
      __syncwarp();
    } else {
      copy_async_wait<kPending>();
      __syncwarp();
      start_copy(2 * tile + SLOTS);
    }
    const uint32_t value = ring + (2 * tile + 1) % SLOTS * kTile;
#pragma unroll
    for (int q = 0; q < DIM / 64; ++q) {
      uint4 v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        v[i] = load_shared(value + (8 * t + i) * (DIM * 2) + (8 * q + (g ^ 2 * t)) * 16);
      }
      if (__builtin_expect(drops, 0)) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (!(used >> i & 1)) v[i] = make_uint4(0, 0, 0, 0);
        }
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int u = 0; u < 4; ++u) {
          auto word = [&](int i) { return u == 0 ? v[i].x : u == 1 ? v[i].y : u == 2 ? v[i].z : v[i].w; };
          const uint32_t even = word(2 * k), even_later = word(2 * k + 4);
          const uint32_t odd = word(2 * k + 1), odd_later = word(2 * k + 5);
          const uint32_t a[4] = {__byte_perm(even, even_later, 0x5410), __byte_perm(even, even_later, 0x7632),
                                 __byte_perm(odd, odd_later, 0x5410), __byte_perm(odd, odd_later, 0x7632)};
          mma_m16n8k16<Element>(out[q * 4 + u], a, weights[2 * k], weights[2 * k + 1]);
        }
      }
    }
  }
  copy_async_wait<0>();
  finish_split<DIM>(
      p, b, h, slot, first_row, state, out, [&](int i) { return i / 4 * 64 + 8 * g + i % 4 * 2; },
      reinterpret_cast<float*>(shared));
}

}  // namespace sparsekit::cuda

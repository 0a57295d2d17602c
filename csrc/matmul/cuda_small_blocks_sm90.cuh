// y = factor * act(x W^T + bias), or x W, of blocks with sides of 16 and 32, with mma.sync and TMA (Hopper).
//
// D is a tile of y^T: 256 features x 128 tokens. Each of 16 warps owns block rows, so that no sum changes hands: one of
// 16 features x 128 tokens, or one of 32 x 64. Lists are sorted and weights packed beforehand (cuda_small_blocks.h): a
// warp reads its weights as one stream, straight into operands, one unit ahead. x comes in chunks of 32 of the
// contraction x 128 tokens, those that any block row of the panel uses, through a ring that one more warp fills. Warps
// walk the ring each at its own pace, past the end of a tile into the next one: CTAs stay, one a multiprocessor.
//
// Bound: shared memory, 256 B for 2,048 (32: 4,096) products, as fast as mma.sync for 16 features and half of it for 32;
// L2, where few blocks share a chunk (at density d, 128 d / u flop for a byte of x, where u = 1 - (1 - d)^n of the
// chunks are loaded and n blocks may use one: 32 of 16 x 16, 8 of 32 x 32).
#pragma once

#include <cuda.h>

#include "common/cuda/barriers_sm90.cuh"
#include "common/cuda/tma_sm90.cuh"
#include "matmul/cuda_product.cuh"
#include "matmul/cuda_small_blocks.h"

namespace sparsekit::cuda {

#ifndef SMALL_GROUP
#define SMALL_GROUP 4
#endif
#ifndef SMALL_TOKENS
#define SMALL_TOKENS 128
#endif
#ifndef SMALL_AHEAD
#define SMALL_AHEAD 3
#endif
constexpr int kSmallTokens = SMALL_TOKENS, kSmallWarps = kSmallFeatures / 16, kSmallThreads = (kSmallWarps + 4) * 32;
constexpr int kSmallChunkBytes = kSmallChunk * kSmallTokens * 2;
constexpr int kSmallGroup = SMALL_GROUP, kSmallStages = (24 * 128 / SMALL_TOKENS) / SMALL_GROUP;  // chunks of a stage
constexpr int kSmallStageBytes = kSmallGroup * kSmallChunkBytes, kSmallRingBytes = kSmallStages * kSmallStageBytes;
constexpr int kSmallStaging = 1536;  // of a warp: 256 numbers, rows 16 bytes apart
constexpr int kSmallSharedBytes = kSmallRingBytes + kSmallWarps * kSmallStaging + kSmallStages * 16;

struct SmallCall {
  CUtensorMap x;
  ProductCall call;
  SmallBlocks blocks;
  int32_t tiles;
};

/// What a warp of TILES * 16 features has: sums[m][n][e] is feature 16 m + lane / 4 + 8 (e / 2), token 8 n + 2 (lane %
/// 4) + e % 2 of it.
template <class Element, int TILES>
struct SmallTile {
  static constexpr int kFeatures = 16 * TILES, kTokens = kSmallTokens / TILES, kN = kTokens / 8;

  float sums[TILES][kN][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < TILES; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[m][n][e] = 0.f;
  }

  /// One unit: its weights, and x at `address` (of this lane, for load_matrices), two loads ahead of the products.
  __device__ __forceinline__ void multiply(const uint4 (&weights)[TILES], uint32_t address) {
    constexpr int kAhead = SMALL_AHEAD;
    uint32_t b[kAhead][4];
#pragma unroll
    for (int i = 0; i < kAhead - 1; ++i) load_matrices(b[i], address + uint32_t(i * 16 * 64));
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) {
      const int n = 2 * i, ahead = i + kAhead - 1;
      if (ahead < kN / 2) load_matrices(b[ahead % kAhead], address + uint32_t(ahead * 16 * 64));
#pragma unroll
      for (int m = 0; m < TILES; ++m) {
        const uint32_t a[4] = {weights[m].x, weights[m].y, weights[m].z, weights[m].w};
        mma_m16n8k16<Element>(sums[m][n], a, b[i % kAhead][0], b[i % kAhead][1]);
        mma_m16n8k16<Element>(sums[m][n + 1], a, b[i % kAhead][2], b[i % kAhead][3]);
      }
    }
  }

  /// Finishes and writes the sums, 256 at a time through `staging`: a lane has 8 neighbours of y. The loop is not
  /// unrolled: it is long, and registers that it took would be missing in the products.
  __device__ __forceinline__ void store(const Output& out, int64_t token, int64_t feature, float* staging, int lane) {
    constexpr int kPassTokens = 16 / TILES;
    const bool first = out.output.feature == 1;
    const int step_t = first ? kFeatures + 4 : 1, step_f = first ? 1 : kPassTokens + 4;
    const int t = first ? lane / (kFeatures / 8) : lane % (kPassTokens / 8) * 8;
    const int f = first ? lane % (kFeatures / 8) * 8 : lane / (kPassTokens / 8);
    float* to = staging + lane % 4 * 2 * step_t + lane / 4 * step_f;
    const float* from = staging + t * step_t + f * step_f;
    const int64_t at_f = feature + f;
#pragma unroll 1
    for (int pass = 0; pass < kTokens / kPassTokens; ++pass) {
      if (token + pass * kPassTokens >= out.tokens) break;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        if (n / (kPassTokens / 8) != pass) continue;
#pragma unroll
        for (int m = 0; m < TILES; ++m)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            to[(n % (kPassTokens / 8) * 8 + e % 2) * step_t + (16 * m + e / 2 * 8) * step_f] = sums[m][n][e];
          }
      }
      __syncwarp();
      const int64_t at_t = token + pass * kPassTokens + t;
      const int count = int(min(max(first ? out.features - at_f : out.tokens - at_t, int64_t(0)), int64_t(8)));
      if (count > 0 && at_t < out.tokens && at_f < out.features) store_8(out, from, at_t, at_f, count, first);
      __syncwarp();
    }
  }

  template <Activation ACTIVATION>
  __device__ __forceinline__ static void activate_8(float (&x)[8]) {
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e] = activate_fast<ACTIVATION>(x[e]);
  }
  __device__ __forceinline__ static void store_8(const Output& out, const float* from, int64_t t, int64_t f, int count,
                                                 bool first) {
    float x[8];
    const float4 low = *reinterpret_cast<const float4*>(from), high = *reinterpret_cast<const float4*>(from + 4);
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w, x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
    if (out.bias) {
      const Element* bias = static_cast<const Element*>(out.bias) + f;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (e < count) x[e] += to_float(bias[first ? e : 0]);
      }
    }
    switch (out.activation) {
      case Activation::relu: activate_8<Activation::relu>(x); break;
      case Activation::gelu: activate_8<Activation::gelu>(x); break;
      case Activation::gelu_tanh: activate_8<Activation::gelu_tanh>(x); break;
      case Activation::silu: activate_8<Activation::silu>(x); break;
      case Activation::none: break;
    }
    const bool whole = out.vectors && count == 8;
    if (out.factor.data) {
      const Element* at = static_cast<const Element*>(out.factor.data) + t * out.factor.token + f * out.factor.feature;
      alignas(16) Element factor[8];
      if (whole) *reinterpret_cast<uint4*>(factor) = *reinterpret_cast<const uint4*>(at);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (e < count) x[e] *= to_float(whole ? factor[e] : at[e * (first ? out.factor.feature : out.factor.token)]);
      }
    }
    Element* to = static_cast<Element*>(out.output.data) + t * out.output.token + f * out.output.feature;
    if (whole) {
      *reinterpret_cast<uint4*>(to) = make_uint4(pack<Element>(x[0], x[1]), pack<Element>(x[2], x[3]),
                                                 pack<Element>(x[4], x[5]), pack<Element>(x[6], x[7]));
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (e < count) to[e] = from_float<Element>(x[e]);
      }
    }
  }
};

struct SmallRing {
  uint32_t stages, barriers;
  Ring<kSmallStages> ring;

  __device__ __forceinline__ uint32_t stage() const { return stages + uint32_t(ring.stage * kSmallStageBytes); }
  __device__ __forceinline__ uint32_t full() const { return barriers + uint32_t(ring.stage * 16); }
  __device__ __forceinline__ uint32_t empty() const { return full() + 8; }
};

/// A tile, as tile_at<16> orders them, and a list of it.
struct SmallWork {
  int token_tile = 0, panel = 0, chunks = 0;  // that the panel uses
  int units = 0, base = 0;                    // of the list; where its units begin

  __device__ __forceinline__ void at(const SmallCall& arguments, int tile) {
    constexpr unsigned kGroup = 16;
    const SmallBlocks& blocks = arguments.blocks;
    const unsigned per_group = unsigned(blocks.panels) * kGroup, group = unsigned(tile) / per_group;
    const unsigned within = unsigned(tile) - group * per_group;
    const unsigned size = min(kGroup, unsigned(arguments.call.token_tiles) - group * kGroup);
    panel = int(within / size);
    token_tile = int(group * kGroup + within - unsigned(panel) * size);
    chunks = blocks.counts[panel];
  }
  __device__ __forceinline__ void list_at(const SmallCall& arguments, int of_panel) {
    const SmallBlocks& blocks = arguments.blocks;
    const int list = panel * blocks.lists + of_panel;
    units = blocks.lengths[list];
    base = 0;
    if (list < arguments.call.lists) {
      base = int(list_extent(arguments.call.offsets, list, arguments.call.pattern.nnz).begin) * blocks.units;
    }
  }
};

/// The warp that loads x.
__device__ __forceinline__ void load_chunks(const SmallCall& arguments, SmallRing ring, int lane) {
  const SmallBlocks& blocks = arguments.blocks;
  SmallWork work, next;
  next.at(arguments, int(blockIdx.x));
  auto read_used = [&](const SmallWork& of, int first) {
    const int at = first + lane;
    return at < of.chunks ? blocks.used[int64_t(of.panel) * blocks.chunks + at] : 0;
  };
  int next_chunk = read_used(next, 0);
#pragma unroll 1
  for (int at = int(blockIdx.x); at < arguments.tiles; at += int(gridDim.x)) {
    work = next;
    const int count = work.chunks;
#pragma unroll 1
    for (int first = 0; first < max(count, 1); first += 32) {
      const int chunk = next_chunk;
      if (first + 32 < count) {
        next_chunk = read_used(work, first + 32);
      } else if (at + int(gridDim.x) < arguments.tiles) {
        next.at(arguments, at + int(gridDim.x));
        next_chunk = read_used(next, 0);
      }
#pragma unroll 1
      for (int i = 0; i < 32 && first + i < count; i += kSmallGroup) {
        mbarrier_wait(ring.empty(), ring.ring.parity ^ 1);
        const int here = min(count - first - i, kSmallGroup), mine = lane - i;
        if (lane == 0) mbarrier_expect(ring.full(), here * kSmallChunkBytes);
        __syncwarp();
        if (mine >= 0 && mine < here) {
          tma_load(ring.stage() + uint32_t(mine * kSmallChunkBytes), &arguments.x, chunk * kSmallChunk,
                   work.token_tile * kSmallTokens, 0, 0, ring.full());
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive(ring.full());
        ring.ring.advance();
      }
    }
  }
}

template <class Element, int TILES>
__global__ void __launch_bounds__(kSmallThreads, 1) small_blocks_kernel(const __grid_constant__ SmallCall arguments) {
  using Tile = SmallTile<Element, TILES>;
  constexpr int kNone = INT32_MAX, kLists = kSmallWarps / TILES;
  extern __shared__ __align__(1024) char shared[];
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  SmallRing ring;
  ring.stages = shared_address(shared);
  ring.barriers = ring.stages + uint32_t(kSmallRingBytes + kSmallWarps * kSmallStaging);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kSmallStages; ++i) {
      mbarrier_init(ring.barriers + uint32_t(i * 16), 1);
      mbarrier_init(ring.barriers + uint32_t(i * 16) + 8, kSmallWarps);
    }
    mbarrier_fence_init();
  }
  __syncthreads();
  if (warp >= kSmallWarps) {
    fewer_registers<32>();
    if (warp == kSmallWarps) load_chunks(arguments, ring, lane);
    return;
  }
  more_registers<(kSmallWarps == 16 ? 112 : 160)>();
  const ProductCall& call = arguments.call;
  float* staging = reinterpret_cast<float*>(shared + kSmallRingBytes + warp * kSmallStaging);
  const int of_panel = warp / TILES, tokens_before = warp % TILES * Tile::kTokens;
  const uint32_t lane_address =
      swizzled<64>(tokens_before + (lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);  // see address_columns16
  SmallWork work;
  const uint4* fragments;
  const int32_t* codes;
  uint4 now[TILES] = {}, next[TILES] = {};
  int group, next_group;
  auto load = [&](uint4 (&weights)[TILES], int unit) {
    if (unit >= work.units) return;
#pragma unroll
    for (int m = 0; m < TILES; ++m) weights[m] = __ldg(fragments + (unit * TILES + m) * 32);
  };
  auto load_codes = [&](int unit) { return unit + lane < work.units ? __ldg(codes + unit) : kNone; };
  auto begin = [&](int tile) {
    work.at(arguments, tile);
    work.list_at(arguments, of_panel);
    fragments = arguments.blocks.fragments + int64_t(work.base) * (TILES * 32) + lane;
    codes = arguments.blocks.codes + work.base + lane;
    load(now, 0);
    group = load_codes(0), next_group = load_codes(32);
  };
  begin(int(blockIdx.x));
#pragma unroll 1
  for (int at = int(blockIdx.x); at < arguments.tiles; at += int(gridDim.x)) {
    int unit = 0, code = __shfl_sync(0xffffffffu, group, 0);
    Tile tile;
    tile.clear();
#pragma unroll 1
    for (int first = 0; first < work.chunks; first += kSmallGroup) {
      mbarrier_wait(ring.full(), ring.ring.parity);
      const int end = 2 * (first + kSmallGroup);
      const uint32_t stage = ring.stage() + lane_address - uint32_t(first * kSmallChunkBytes);
#pragma unroll 1
      while (code < end) {
        load(next, unit + 1);
        const uint32_t address = (stage + uint32_t((code >> 1) * kSmallChunkBytes)) ^ uint32_t((code & 1) * 32);
        ++unit;
        if ((unit & 31) == 0) group = next_group, next_group = load_codes(unit + 32);
        code = __shfl_sync(0xffffffffu, group, unit & 31);
        tile.multiply(now, address);
#pragma unroll
        for (int m = 0; m < TILES; ++m) now[m] = next[m];
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(ring.empty());
      ring.ring.advance();
    }
    const int64_t token = int64_t(work.token_tile) * kSmallTokens + tokens_before;
    const int64_t feature = int64_t(work.panel * kLists + of_panel) * Tile::kFeatures;
    // The next tile's first weights arrive while this one is written.
    if (at + int(gridDim.x) < arguments.tiles) begin(at + int(gridDim.x));
    if (feature >= call.out.features || token >= call.out.tokens) continue;
    tile.store(call.out, token, feature, staging, lane);
  }
}

}  // namespace sparsekit::cuda

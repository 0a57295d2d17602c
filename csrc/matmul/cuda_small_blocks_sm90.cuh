// y = factor * act(x W^T + bias), or x W, of blocks with sides of 16 and 32, with mma.sync and TMA (Hopper).
//
// A CTA computes a tile of y^T: 256 features x 128 tokens. Each warp owns one block row, 16 or 32 features x 128
// tokens, so that no sum changes hands. Lists are sorted and weights packed beforehand (cuda_small_blocks.h): a warp
// reads its weights as one stream, straight into operands, units ahead. x comes in chunks of 32 of the contraction x
// 128 tokens, those that any block row of the panel uses, through a ring that one more warp fills. Warps walk the ring
// each at its own pace, past the end of a tile into the next one: CTAs stay, one a multiprocessor.
//
// Bound: shared memory, 256 B for 2,048 (32: 4,096) products, as fast as mma.sync for 16 features and half of it for
// 32; L2 where blocks are few: at density d, 128 d / u flop for a byte of x, where u = 1 - (1 - d)^n of the chunks are
// loaded and n blocks may use one (32 of 16 x 16, 8 of 32 x 32).
#pragma once

#include <cuda.h>

#include "common/cuda/barriers_sm90.cuh"
#include "common/cuda/tma_sm90.cuh"
#include "matmul/cuda_product.cuh"
#include "matmul/cuda_small_blocks.h"

namespace sparsekit::cuda {

constexpr int kSmallTokens = 128;
constexpr int kSmallChunkBytes = kSmallChunk * kSmallTokens * 2;
constexpr int kSmallGroup = 8, kSmallStages = 3;  // chunks of a stage
constexpr int kSmallStageBytes = kSmallGroup * kSmallChunkBytes, kSmallRingBytes = kSmallStages * kSmallStageBytes;
constexpr int kSmallStaging = 1536;  // of a warp: 256 numbers, rows 16 bytes apart
constexpr int kSmallSharedBytes = kSmallRingBytes + 16 * kSmallStaging + kSmallStages * 16;

// TILES of 16 features in a block row: warps that multiply, units of weights in registers (a power of 2), registers of
// both roles.
template <int TILES>
struct SmallShape {
  static constexpr int kWarps = kSmallFeatures / (16 * TILES), kThreads = kWarps * 32 + 128;
  static constexpr int kUnits = TILES == 1 ? 2 : 4;
  static constexpr int kRegisters = TILES == 1 ? 112 : 232, kLoadRegisters = TILES == 1 ? 32 : 40;
};

struct SmallCall {
  CUtensorMap x;
  ProductCall call;
  SmallBlocks blocks;
  int32_t tiles;
  bool plain;  // no bias, activation or factor; y in whole, aligned chunks of 8 features
};

/// What a warp has of a list of TILES * 16 features: sums[m][n][e] is feature 16 m + lane / 4 + 8 (e / 2), token 8 n +
/// 2 (lane % 4) + e % 2 of it.
template <class Element, int TILES>
struct SmallTile {
  static constexpr int kFeatures = 16 * TILES, kTokens = kSmallTokens, kN = kTokens / 8;

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
    constexpr int kAhead = 3;
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

  /// Writes the sums as they are, features contiguous and aligned: 1 KB at a time is turned round in `staging`.
  __device__ __forceinline__ void store_plain(const Output& out, int64_t token, int64_t feature, float* staging,
                                              int lane) const {
    constexpr int kRowBytes = 32 * TILES, kChunks = kRowBytes / 16, kRows = 32 / kChunks, kPassTokens = 32 / TILES;
    const uint32_t base = shared_address(staging);
    const int row = TILES == 1 ? lane / 16 * 8 + lane % 8 : lane % 8, chunk = TILES == 1 ? lane / 8 % 2 : lane / 8;
    auto place = [](int r, int c) {
      return uint32_t(r * kRowBytes + (c ^ (TILES == 1 ? r >> 2 & 1 : r >> 1 & 3)) * 16);
    };
    const uint32_t matrices = base + place(row, chunk);
    const int r = lane / kChunks, first = int(min(out.tokens - token, int64_t(kTokens)));
    const int64_t f = feature + lane % kChunks * 8;
    Element* to = static_cast<Element*>(out.output.data) + (token + r) * out.output.token + f;
    const uint32_t from[2] = {base + place(r, lane % kChunks), base + place(r + kRows, lane % kChunks)};
#pragma unroll
    for (int pass = 0; pass < kTokens / kPassTokens; ++pass) {
#pragma unroll
      for (int i = 0; i < kPassTokens / 8; i += 3 - TILES) {
        const int n = pass * (kPassTokens / 8) + i;
        const float (&low)[4] = sums[0][n];
        const float (&high)[4] = TILES == 1 ? sums[0][(n + 1) % kN] : sums[TILES - 1][n];
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(
                         matrices + uint32_t(i * 8 * kRowBytes)),
                     "r"(pack<Element>(low[0], low[1])), "r"(pack<Element>(low[2], low[3])),
                     "r"(pack<Element>(high[0], high[1])), "r"(pack<Element>(high[2], high[3]))
                     : "memory");
      }
      __syncwarp();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint4 v;
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "r"(from[half]));
        const int t = pass * kPassTokens + half * kRows;
        if (t + r < first && f < out.features) *reinterpret_cast<uint4*>(to + t * out.output.token) = v;
      }
      __syncwarp();
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

/// A tile, as tile_at<16> orders them.
struct SmallWork {
  int token_tile = 0, panel = 0, chunks = 0;  // that the panel uses

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
};

/// A list as its warp walks it.
template <class Element, int TILES, int RING>
struct SmallList {
  static constexpr int kNone = INT32_MAX;

  const uint4* fragments;
  const int32_t* codes;
  int units, unit, code;  // the next unit, and its code
  int group, next_group;  // codes of 64 units, one a lane
  uint4 weights[RING][TILES];

  __device__ __forceinline__ void load(uint4 (&to)[TILES], int at) const {
    if (at >= units) return;
#pragma unroll
    for (int m = 0; m < TILES; ++m) to[m] = __ldg(fragments + (at * TILES + m) * 32);
  }
  __device__ __forceinline__ int load_codes(int at) const {
    return at + int(threadIdx.x) % 32 < units ? __ldg(codes + at) : kNone;
  }
  __device__ __forceinline__ void begin(const SmallCall& arguments, int list) {
    const SmallBlocks& blocks = arguments.blocks;
    const int lane = int(threadIdx.x) % 32;
    units = blocks.lengths[list];
    int base = 0;
    if (list < arguments.call.lists) {
      base = int(list_extent(arguments.call.offsets, list, arguments.call.pattern.nnz).begin) * blocks.units;
    }
    fragments = blocks.fragments + int64_t(base) * (TILES * 32) + lane;
    codes = blocks.codes + base + lane;
#pragma unroll
    for (int i = 0; i < RING - 1; ++i) load(weights[i], i);
    group = load_codes(0), next_group = load_codes(32);
    unit = 0;
  }
  /// Multiplies what the list has before `end`; `stage`: where chunk 0 would be, of this lane. A unit's weights stay in
  /// the registers that they were loaded into: a move would wait for the load.
  __device__ __forceinline__ void multiply(SmallTile<Element, TILES>& tile, uint32_t stage, int end) {
#pragma unroll 1
    while (code < end) {
      switch (unit & (RING - 1)) {
        case 0: multiply_unit<0>(tile, stage); break;
        case 1: multiply_unit<1>(tile, stage); break;
        case 2: multiply_unit<2>(tile, stage); break;
        case 3: multiply_unit<3>(tile, stage); break;
      }
    }
  }
  template <int SLOT>
  __device__ __forceinline__ void multiply_unit(SmallTile<Element, TILES>& tile, uint32_t stage) {
    if constexpr (SLOT < RING) {
      load(weights[(SLOT + RING - 1) % RING], unit + RING - 1);
      const uint32_t address = (stage + uint32_t((code >> 1) * kSmallChunkBytes)) ^ uint32_t((code & 1) * 32);
      ++unit;
      if ((unit & 31) == 0) group = next_group, next_group = load_codes(unit + 32);
      code = __shfl_sync(0xffffffffu, group, unit & 31);
      tile.multiply(weights[SLOT], address);
    }
  }
};

/// The warp that loads x.
__device__ __forceinline__ void load_chunks(const SmallCall& arguments, SmallRing ring, int lane) {
  const SmallBlocks& blocks = arguments.blocks;
  const int step = int(gridDim.x);
  SmallWork work, next;
  next.at(arguments, int(blockIdx.x));
  auto read_used = [&](const SmallWork& of, int first) {
    const int at = first + lane;
    return at < of.chunks ? blocks.used[int64_t(of.panel) * blocks.chunks + at] : 0;
  };
  int next_chunk = read_used(next, 0);
#pragma unroll 1
  for (int at = int(blockIdx.x); at < arguments.tiles; at += step) {
    work = next;
    const int count = work.chunks;
#pragma unroll 1
    for (int first = 0; first < max(count, 1); first += 32) {
      const int chunk = next_chunk;
      if (first + 32 < count) {
        next_chunk = read_used(work, first + 32);
      } else if (at + step < arguments.tiles) {
        next.at(arguments, at + step);
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
__global__ void __launch_bounds__(SmallShape<TILES>::kThreads, 1)
    small_blocks_kernel(const __grid_constant__ SmallCall arguments) {
  using Shape = SmallShape<TILES>;
  constexpr int kWarps = Shape::kWarps;
  extern __shared__ __align__(1024) char shared[];
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  SmallRing ring;
  ring.stages = shared_address(shared);
  ring.barriers = ring.stages + uint32_t(kSmallRingBytes + 16 * kSmallStaging);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kSmallStages; ++i) {
      mbarrier_init(ring.barriers + uint32_t(i * 16), 1);
      mbarrier_init(ring.barriers + uint32_t(i * 16) + 8, kWarps);
    }
    mbarrier_fence_init();
  }
  __syncthreads();
  if (warp >= kWarps) {
    fewer_registers<Shape::kLoadRegisters>();
    if (warp == kWarps) load_chunks(arguments, ring, lane);
    return;
  }
  more_registers<Shape::kRegisters>();
  const Output& out = arguments.call.out;
  float* staging = reinterpret_cast<float*>(shared + kSmallRingBytes + warp * kSmallStaging);
  const int step = int(gridDim.x);
  const uint32_t lane_address = swizzled<64>((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);  // address_columns16
  SmallWork work;
  SmallList<Element, TILES, Shape::kUnits> list;
  auto begin = [&](int tile) {
    work.at(arguments, tile);
    list.begin(arguments, work.panel * kWarps + warp);
  };
  begin(int(blockIdx.x));
#pragma unroll 1
  for (int at = int(blockIdx.x); at < arguments.tiles; at += step) {
    SmallTile<Element, TILES> tile;
    tile.clear();
    list.code = __shfl_sync(0xffffffffu, list.group, 0);
#pragma unroll 1
    for (int first = 0; first < work.chunks; first += kSmallGroup) {
      mbarrier_wait(ring.full(), ring.ring.parity);
      const uint32_t stage = ring.stage() + lane_address - uint32_t(first * kSmallChunkBytes);
      list.multiply(tile, stage, 2 * (first + kSmallGroup));
      __syncwarp();
      if (lane == 0) mbarrier_arrive(ring.empty());
      ring.ring.advance();
    }
    const int64_t token = int64_t(work.token_tile) * kSmallTokens;
    const int64_t feature = int64_t(work.panel * kWarps + warp) * (16 * TILES);
    // The next tile's first weights arrive while this one is written.
    if (at + step < arguments.tiles) begin(at + step);
    if (feature >= out.features) continue;
    if (arguments.plain) {
      tile.store_plain(out, token, feature, staging, lane);
    } else {
      tile.store(out, token, feature, staging, lane);
    }
  }
}

}  // namespace sparsekit::cuda

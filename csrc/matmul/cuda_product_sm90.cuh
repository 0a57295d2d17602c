// y = factor * act(x W^T + bias), or x W, of blocks of 64 and 128, with wgmma and TMA (Hopper).
//
// D is a tile of y^T: 128 features of a block row x 256 tokens, or, of a block row of 64, 64 x 512 (see
// cuda_mainloop_sm90.cuh). CTAs stay, one a multiprocessor, and walk the tiles; the loading warp runs ahead of the two
// warpgroups that multiply, into the next tile while they write this one. The step that an index out of range would be
// is loaded from outside of both tensors: zeros.
//
// Output: where y is plain (features contiguous, no bias, activation, factor) the sums are rounded, transposed by
// stmatrix and stored by TMA, 64 features x 32 tokens at a time. Else 16 tokens at a time go through shared memory as
// fp32, in a loop that is not unrolled: activations are long.
//
// Bound: tensor cores for blocks of 128 from about a third dense on; L2 -> shared memory (7.5 TB/s) for blocks of 64;
// writing y (and reading x) at 5 %.
#pragma once

#include <cuda.h>

#include "matmul/cuda_mainloop_sm90.cuh"
#include "matmul/cuda_product.cuh"

namespace sparsekit::cuda {

struct ProductCall90 {
  CUtensorMap x, w, y;
  ProductCall call;
  int64_t tiles;
  bool plain;  // y has a map
};

/// Shared memory of the epilogue, of one warpgroup: whole tiles of 64 features x 32 tokens of 16 bits, or 16 tokens x
/// 68 of fp32. Its address is a multiple of 1024.
template <bool SPLIT>
struct Epilogue90 {
  static constexpr int kBuffers = SPLIT ? 2 : 1, kBufferBytes = 64 * 32 * 2;
  static constexpr int kPitch = 68;
  static constexpr int kBytes = SPLIT ? kBuffers * kBufferBytes : 5 * 1024;
  static_assert(16 * kPitch * 4 <= kBytes && kBuffers * kBufferBytes <= kBytes);
};

template <bool SPLIT>
constexpr int kProductBytes90 =
    Step<SPLIT>::kRingBytes + 2 * Epilogue90<SPLIT>::kBytes + Pipeline<SPLIT>::kBarrierBytes;

__device__ __forceinline__ void store_matrices_transposed(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

template <int PENDING>
__device__ __forceinline__ void tma_store_wait_read_but() {
  asm volatile("cp.async.bulk.wait_group.read %0;\n" ::"n"(PENDING) : "memory");
}

/// The warp that loads.
template <bool TA, bool TB, bool SPLIT>
__device__ __forceinline__ void load_tiles(const ProductCall90& arguments, Pipeline<SPLIT> pipeline) {
  const ProductCall& call = arguments.call;
  const int lane = int(threadIdx.x) % 32;
  const int parts_of_block = call.inner_size / 64, stored_rows = call.pattern.block_rows;
  for (int64_t at = blockIdx.x; at < arguments.tiles; at += gridDim.x) {
    const TileAt tile = tile_at<SPLIT ? 8 : 4>(call, at);
    const Extent list = list_extent(call.offsets, tile.list, call.pattern.nnz);
    const int32_t token = int32_t(tile.token_tile * Step<SPLIT>::kN), feature = tile.part * Step<SPLIT>::kM;
    const int64_t end = max(list.end, list.begin + 1);  // a list without entries: one step of zeros
    for (int64_t first = list.begin; first < end; first += 32) {
      // 32 entries at a time, so that the next ones' indices do not wait for memory one by one.
      int32_t neighbour_of = -1, place_of = 0;
      if (first + lane < list.end) {
        const int64_t neighbour = index_at(call.neighbour, first + lane);
        const int64_t place = TA ? index_at(call.place, first + lane) : first + lane;
        const bool good = neighbour >= 0 && neighbour < call.neighbours && place >= 0 && place < call.pattern.nnz;
        if (good) neighbour_of = int32_t(neighbour), place_of = int32_t(place);
      }
      const int count = int(min(end - first, int64_t(32)));
      for (int i = 0; i < count; ++i) {
        const int32_t neighbour = __shfl_sync(0xffffffffu, neighbour_of, i);
        const int32_t place = __shfl_sync(0xffffffffu, place_of, i);
        for (int part = 0; part < parts_of_block; ++part) {
          mbarrier_wait(pipeline.empty(), pipeline.ring.parity ^ 1);
          if (elect_lane()) {
            const bool good = neighbour >= 0;
            const int32_t inner = neighbour * call.inner_size + part * 64;
            const int32_t stored = good ? place * stored_rows : kNowhere;
            const uint32_t a = pipeline.stage(), b = a + Step<SPLIT>::kBytesA, full = pipeline.full();
            mbarrier_expect(full, Step<SPLIT>::kBytes);
            if constexpr (TA) {
#pragma unroll
              for (int m = 0; m < Step<SPLIT>::kM; m += 64) {
                tma_load(a + m * 128, &arguments.w, feature + m, stored + part * 64, 0, 0, full);
              }
            } else {
              tma_load(a, &arguments.w, part * 64, stored + feature, 0, 0, full);
            }
            if constexpr (TB) {
#pragma unroll
              for (int n = 0; n < Step<SPLIT>::kN; n += 64) {
                tma_load(b + n * 128, &arguments.x, token + n, good ? inner : kNowhere, 0, 0, full);
              }
            } else {
#pragma unroll
              for (int n = 0; n < Step<SPLIT>::kN; n += 256) {
                tma_load(b + n * 128, &arguments.x, good ? inner : 0, good ? token + n : kNowhere, 0, 0, full);
              }
            }
            mbarrier_arrive(full);
          }
          __syncwarp();
          pipeline.ring.advance();
        }
      }
    }
  }
}

/// d[4 j + 2 r + c] of a thread is feature 16 warp + lane / 4 + 8 r, token 8 j + 2 (lane % 4) + c of its warpgroup.
template <class Element, int BUFFERS>
__device__ __forceinline__ void store_plain(const ProductCall90& arguments, const float (&d)[kSums], uint32_t staging,
                                            int64_t token, int64_t feature, int group) {
  const int thread = int(threadIdx.x) % kGroupThreads, warp = thread / 32, lane = thread % 32;
  // Lane l gives the address of row l % 8 (a token) of matrix l / 8: (r, j) = (0, 0), (1, 0), (0, 1), (1, 1).
  const int row = lane / 16 * 8 + lane % 8, chunk = 2 * warp + lane / 8 % 2;
  const uint32_t to = staging + uint32_t(row * 128 + ((chunk ^ (row & 7)) * 16));
#pragma unroll
  for (int q = 0; q < 8; ++q) {
    if (token + 32 * q >= arguments.call.out.tokens) break;
    // The tile before may have ended with either buffer.
    if (thread == 0) q == 0 ? tma_store_wait_read_but<0>() : tma_store_wait_read_but<BUFFERS - 1>();
    named_barrier_sync(1 + group, kGroupThreads);
    const uint32_t buffer = uint32_t(q % BUFFERS * (64 * 32 * 2));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = 4 * (4 * q + 2 * half);
      const uint32_t packed[4] = {pack<Element>(d[at], d[at + 1]), pack<Element>(d[at + 2], d[at + 3]),
                                  pack<Element>(d[at + 4], d[at + 5]), pack<Element>(d[at + 6], d[at + 7])};
      store_matrices_transposed(to + buffer + uint32_t(half * 16 * 128), packed);
    }
    fence_async_proxy();
    named_barrier_sync(1 + group, kGroupThreads);
    if (thread == 0) {
      tma_store(&arguments.y, staging + buffer, int32_t(feature), int32_t(token) + 32 * q, 0, 0);
      tma_store_commit();
    }
  }
}

template <class Element>
__device__ __forceinline__ void store_finished(const ProductCall90& arguments, const float (&d)[kSums], float* staging,
                                               int64_t token, int64_t feature, int group) {
  constexpr int kPitch = Epilogue90<true>::kPitch;
  const Output& out = arguments.call.out;
  const int thread = int(threadIdx.x) % kGroupThreads, warp = thread / 32, lane = thread % 32;
  const bool first = out.output.feature == 1;
  // 8 neighbours of the output: features of a token, or tokens of a feature.
  const int t = first ? thread / 8 : thread % 2 * 8, f = first ? thread % 8 * 8 : thread / 2;
  const int features = int(min(int64_t(64), out.features - feature));
#pragma unroll 1
  for (int q = 0; q < 16; ++q) {
    if (token + 16 * q >= out.tokens) break;
    named_barrier_sync(1 + group, kGroupThreads);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (i != q) continue;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int at_t = e / 4 * 8 + lane % 4 * 2 + e % 2, at_f = 16 * warp + lane / 4 + e / 2 % 2 * 8;
        staging[at_t * kPitch + at_f] = d[8 * i + e];
      }
    }
    named_barrier_sync(1 + group, kGroupThreads);
    const int tokens = int(min(int64_t(16), out.tokens - token - 16 * q));
    if (t >= tokens || f >= features) continue;
    const int count = min(8, first ? features - f : tokens - t);
    const int64_t at_token = token + 16 * q + t, at_feature = feature + f;
    Element* to =
        static_cast<Element*>(out.output.data) + at_token * out.output.token + at_feature * out.output.feature;
    alignas(16) Element results[8];
    const bool whole = out.vectors && count == 8;
    if (whole && out.factor.data) {
      const Element* factor =
          static_cast<const Element*>(out.factor.data) + at_token * out.factor.token + at_feature * out.factor.feature;
      *reinterpret_cast<uint4*>(results) = *reinterpret_cast<const uint4*>(factor);
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if (e >= count) continue;
      const int64_t et = first ? at_token : at_token + e, ef = first ? at_feature + e : at_feature;
      float x = staging[(first ? t : t + e) * kPitch + (first ? f + e : f)];
      if (out.bias) x += to_float(static_cast<const Element*>(out.bias)[ef]);
      x = activate(out.activation, x);
      if (out.factor.data) {
        x *= to_float(
            whole ? results[e]
                  : static_cast<const Element*>(out.factor.data)[et * out.factor.token + ef * out.factor.feature]);
      }
      results[e] = from_float<Element>(x);
    }
    if (whole) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(results);
    } else {
      for (int e = 0; e < count; ++e) to[e] = results[e];
    }
  }
}

template <class Element, bool TA, bool TB, bool SPLIT>
__global__ void __launch_bounds__(kThreads90, 1) product_kernel_90(const __grid_constant__ ProductCall90 arguments) {
  extern __shared__ __align__(1024) char shared[];
  const uint32_t base = shared_address(shared);
  Pipeline<SPLIT> pipeline;
  pipeline.stages = base;
  pipeline.barriers = base + Step<SPLIT>::kRingBytes + 2 * Epilogue90<SPLIT>::kBytes;
  if (threadIdx.x == 0) pipeline.init();
  __syncthreads();
  const ProductCall& call = arguments.call;
  const int group = int(threadIdx.x) / kGroupThreads;
  if (group == 2) {
    fewer_registers<40>();
    if (threadIdx.x < 2 * kGroupThreads + 32) load_tiles<TA, TB, SPLIT>(arguments, pipeline);
    return;
  }
  more_registers<232>();
  const int staging = Step<SPLIT>::kRingBytes + group * Epilogue90<SPLIT>::kBytes;
  const int parts_of_block = call.inner_size / 64;
  float d[kSums];
  for (int64_t at = blockIdx.x; at < arguments.tiles; at += gridDim.x) {
    const TileAt tile = tile_at<SPLIT ? 8 : 4>(call, at);
    const Extent list = list_extent(call.offsets, tile.list, call.pattern.nnz);
    multiply<Element, TA, TB, SPLIT>(d, pipeline, max(list.end - list.begin, int64_t(1)) * parts_of_block, group);
    const int64_t token = tile.token_tile * Step<SPLIT>::kN + Step<SPLIT>::n_of(group);
    const int64_t feature = tile.list * call.list_size + tile.part * Step<SPLIT>::kM + Step<SPLIT>::m_of(group);
    if (feature >= call.out.features) continue;
    if (arguments.plain) {
      store_plain<Element, Epilogue90<SPLIT>::kBuffers>(arguments, d, base + staging, token, feature, group);
    } else {
      store_finished<Element>(arguments, d, reinterpret_cast<float*>(shared + staging), token, feature, group);
    }
  }
  if (arguments.plain) tma_store_wait_read();
}

/// In cuda_product_sm90_<dtype>.cu: a kernel, its shared memory.
struct ProductKernel90 {
  void (*kernel)(ProductCall90);
  int shared_bytes;
};
ProductKernel90 product_kernel_90_bf16(bool ta, bool tb, bool split);
ProductKernel90 product_kernel_90_f16(bool ta, bool tb, bool split);

template <class Element>
ProductKernel90 product_kernel_90_of(bool ta, bool tb, bool split) {
  auto of = [&](auto s) -> ProductKernel90 {
    constexpr bool S = decltype(s)::value;
    constexpr int kBytes = kProductBytes90<S>;
    if (ta)
      return {tb ? product_kernel_90<Element, true, true, S> : product_kernel_90<Element, true, false, S>, kBytes};
    return {tb ? product_kernel_90<Element, false, true, S> : product_kernel_90<Element, false, false, S>, kBytes};
  };
  return split ? of(std::true_type()) : of(std::false_type());
}

}  // namespace sparsekit::cuda

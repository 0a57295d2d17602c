// values[p] = the block p of a b, of blocks of multiples of 64, with wgmma and TMA (Hopper): the gradient of a weight.
//
// D is 128 rows of a block row x up to 256 columns of its blocks one after the other (two of 128, four of 64), or, of
// blocks of 64 rows, 64 x 512 (see cuda_mainloop_sm90.cuh). Boxes of 64 columns come from the blocks' columns of b, one
// lane each. As on Ampere, CTAs find their row by bisection of crow; those of a row share its boxes evenly, since a
// last tile that is nearly empty takes as long as a full one (a fifth of the time at 13 blocks of 64).
//
// Bound: as the product's; values are written once, in pairs of 4 bytes, after a loop over all tokens.
#pragma once

#include <cuda.h>

#include "matmul/cuda_mainloop_sm90.cuh"
#include "matmul/cuda_sddmm_sm80.cuh"

namespace sparsekit::cuda {

struct SddmmCall90 {
  CUtensorMap a, b;
  BlockSddmm call;
};

template <bool SPLIT>
constexpr int kSddmmBytes90 = Step<SPLIT>::kRingBytes + Pipeline<SPLIT>::kBarrierBytes + 16;

// TA: a has rows contiguous (dy^T). TB: b has columns contiguous (x).
template <class Element, bool TA, bool TB, bool SPLIT>
__global__ void __launch_bounds__(kThreads90, 1) sddmm_kernel_90(const __grid_constant__ SddmmCall90 arguments) {
  constexpr int kM = Step<SPLIT>::kM, kN = Step<SPLIT>::kN, kBoxes = kN / 64;
  extern __shared__ __align__(1024) char shared[];
  const BlockSddmm& call = arguments.call;
  const BlockSparsePattern& pattern = call.pattern;
  const int R = pattern.block_rows, C = pattern.block_cols;
  const uint32_t base = shared_address(shared);
  Pipeline<SPLIT> pipeline;
  pipeline.stages = base;
  pipeline.barriers = base + Step<SPLIT>::kRingBytes;
  volatile int64_t* found_row =
      reinterpret_cast<int64_t*>(shared + Step<SPLIT>::kRingBytes + Pipeline<SPLIT>::kBarrierBytes);
  if (threadIdx.x == 0) {
    pipeline.init();
    int64_t low = 0, high = (pattern.rows + R - 1) / R;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      const int64_t offset = min(max(index_at(pattern.crow, middle), int64_t(0)), pattern.nnz);
      (first_tile(offset, middle, C, kN) <= int64_t(blockIdx.x) ? low : high) = middle;
    }
    *found_row = low;
  }
  __syncthreads();
  const int64_t row = *found_row;
  const Extent list = list_extent(pattern.crow, row, pattern.nnz);
  const int64_t tile = int64_t(blockIdx.x) - first_tile(list.begin, row, C, kN);
  const int64_t all_boxes = (list.end - list.begin) * (C / 64), tiles = (all_boxes + kBoxes - 1) / kBoxes;
  if (tile < 0 || tile >= tiles) return;
  const int64_t first = tile * all_boxes / tiles * 64, end = (tile + 1) * all_boxes / tiles * 64;  // of its columns
  const int boxes = int(end - first) / 64;
  const int part = int(blockIdx.y) * kM;  // rows of the block before these
  const int32_t steps = int32_t((call.inner + 63) / 64);
  const int group = int(threadIdx.x) / kGroupThreads;

  if (group == 2) {
    fewer_registers<40>();
    if (threadIdx.x >= 2 * kGroupThreads + 32) return;
    const int lane = int(threadIdx.x) % 32;
    int32_t column = kNowhere;  // of the box that this lane loads
    if (lane < boxes) {
      const int64_t at = first + 64 * lane, block = index_at(pattern.col, list.begin + at / C);
      if (block >= 0 && block < (pattern.cols + C - 1) / C) column = int32_t(block * C + at % C);
    }
    const int32_t a_row = int32_t(row * R + part);
    for (int32_t step = 0; step < steps; ++step) {
      mbarrier_wait(pipeline.empty(), pipeline.ring.parity ^ 1);
      const uint32_t a = pipeline.stage(), b = a + Step<SPLIT>::kBytesA, full = pipeline.full();
      const int32_t inner = step * 64;
      if (lane == 0) mbarrier_expect(full, Step<SPLIT>::kBytesA + boxes * 8192);
      __syncwarp();
      if (lane < boxes) {
        if constexpr (TB) {
          tma_load(b + lane * 8192, &arguments.b, column, inner, 0, 0, full);
        } else {
          tma_load(b + lane * 8192, &arguments.b, inner, column, 0, 0, full);
        }
      } else if (lane < boxes + kM / 64) {
        const int m = (lane - boxes) * 64;
        if constexpr (TA) {
          tma_load(a + m * 128, &arguments.a, a_row + m, inner, 0, 0, full);
        } else {
          tma_load(a + m * 128, &arguments.a, inner, a_row + m, 0, 0, full);
        }
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(full);
      pipeline.ring.advance();
    }
    return;
  }
  more_registers<232>();
  // Not SPLIT: the first half of the boxes and the others. Who has none multiplies one that nobody reads.
  const int half = (boxes + 1) / 2, before = SPLIT || group == 0 ? 0 : half;
  const int mine = SPLIT ? boxes : group == 0 ? half : boxes - half;
  const int b_of = Step<SPLIT>::kBytesA + before * 8192;
  float d[kSums];
  switch (mine) {
    case 0:
    case 1: multiply<Element, TA, TB, SPLIT, 1>(d, pipeline, steps, group, b_of); break;
    case 2: multiply<Element, TA, TB, SPLIT, 2>(d, pipeline, steps, group, b_of); break;
    case 3: multiply<Element, TA, TB, SPLIT, 3>(d, pipeline, steps, group, b_of); break;
    default: multiply<Element, TA, TB, SPLIT, 4>(d, pipeline, steps, group, b_of);
  }

  // d[4 j + 2 r + c] is row 16 warp + lane / 4 + 8 r, column 8 j + 2 (lane % 4) + c.
  const int thread = int(threadIdx.x) % kGroupThreads, warp = thread / 32, lane = thread % 32;
  Element* values = static_cast<Element*>(call.values);
  const int r = part + Step<SPLIT>::m_of(group) + 16 * warp + lane / 4;
#pragma unroll
  for (int box = 0; box < 4; ++box) {
    if (box >= mine) break;
    const int64_t at = first + 64 * (before + box);
    Element* to = values + ((list.begin + at / C) * R + r) * C + at % C + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int from = 4 * (8 * box + j) + 2 * half;
        *reinterpret_cast<uint32_t*>(to + half * 8 * C + 8 * j) = pack<Element>(d[from], d[from + 1]);
      }
    }
  }
}

struct SddmmKernel90 {
  void (*kernel)(SddmmCall90);
  int shared_bytes;
};
SddmmKernel90 sddmm_kernel_90_bf16(bool ta, bool tb, bool split);
SddmmKernel90 sddmm_kernel_90_f16(bool ta, bool tb, bool split);

template <class Element>
SddmmKernel90 sddmm_kernel_90_of(bool ta, bool tb, bool split) {
  auto of = [&](auto s) -> SddmmKernel90 {
    constexpr bool S = decltype(s)::value;
    constexpr int kBytes = kSddmmBytes90<S>;
    if (ta) return {tb ? sddmm_kernel_90<Element, true, true, S> : sddmm_kernel_90<Element, true, false, S>, kBytes};
    return {tb ? sddmm_kernel_90<Element, false, true, S> : sddmm_kernel_90<Element, false, false, S>, kBytes};
  };
  return split ? of(std::true_type()) : of(std::false_type());
}

}  // namespace sparsekit::cuda

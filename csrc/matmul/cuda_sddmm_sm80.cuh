// values[p] = the block p of a b, with mma.sync (sm_80 and later): the gradient of a block-sparse weight.
//
// A CTA computes BM rows of a block row x BN columns of its blocks, which stand one after the other: 128 columns are
// eight blocks of 16 or one of 128, so that what is read of `a` serves all of them. Steps of 128 bytes of the inner
// dimension (tokens) come through a ring of STAGES with cp.async. How many CTAs a row needs stands in crow, on the
// device: as many as there could be at most are launched, each finds its row by bisection, and some find nothing to do.
//
// Bound: as the product's, (BM + BN) * 128 bytes of L2 for BM BN kStep products.
#pragma once

#include "matmul/cuda_tiles.cuh"

namespace sparsekit::cuda {

/// First CTA of block row i: ascending, and the next row's is beyond what row i needs.
__host__ __device__ __forceinline__ int64_t first_tile(int64_t offset, int64_t row, int block_cols, int bn) {
  return offset * block_cols / bn + row;
}

template <class ElementType, int BM_, int BN_, int WARPS_M_, int WARPS_N_, int STAGES_, bool ALIGNED_>
struct SddmmTile {
  using Element = ElementType;
  static constexpr int BM = BM_, BN = BN_, WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, STAGES = STAGES_;
  static constexpr bool ALIGNED = ALIGNED_;
  static constexpr int kThreads = 32 * WARPS_M * WARPS_N;
  static constexpr int kStageBytes = (BM + BN) * 128;
  static constexpr int kStagedBytes = BM * (BN + 4) * 4;
  static constexpr int kSharedBytes = STAGES * kStageBytes > kStagedBytes ? STAGES * kStageBytes : kStagedBytes;
};

// AT: a has rows contiguous (as dy^T). BT: b has columns contiguous (as x).
template <class Tile, bool AT, bool BT>
__global__ void __launch_bounds__(Tile::kThreads, 2) sddmm_kernel(const __grid_constant__ BlockSddmm call) {
  using Element = typename Tile::Element;
  constexpr bool ALIGNED = Tile::ALIGNED;
  constexpr int BM = Tile::BM, BN = Tile::BN, STAGES = Tile::STAGES, kThreads = Tile::kThreads;
  constexpr int MT = BM / Tile::WARPS_M / 16, NT = BN / Tile::WARPS_N / 16, kWidth = kChunk<Element>;

  extern __shared__ __align__(1024) char shared[];
  __shared__ int32_t column_of[BN];  // of b, or -1
  __shared__ int64_t found_row;
  const uint32_t base = shared_address(shared);
  const BlockSparsePattern& pattern = call.pattern;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int m = warp % Tile::WARPS_M * (16 * MT), n = warp / Tile::WARPS_M * (16 * NT);
  const int R = pattern.block_rows, C = pattern.block_cols;
  const int64_t row_blocks = (pattern.rows + R - 1) / R, col_blocks = (pattern.cols + C - 1) / C;

  if (threadIdx.x == 0) {
    int64_t low = 0, high = row_blocks;  // the row is in [low, high)
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      const int64_t offset = min(max(index_at(pattern.crow, middle), int64_t(0)), pattern.nnz);
      (first_tile(offset, middle, C, BN) <= int64_t(blockIdx.x) ? low : high) = middle;
    }
    found_row = low;
  }
  __syncthreads();
  const int64_t row = found_row;
  const Extent list = list_extent(pattern.crow, row, pattern.nnz);
  const int64_t first = (int64_t(blockIdx.x) - first_tile(list.begin, row, C, BN)) * BN;  // column of the row's blocks
  if (first < 0 || first >= (list.end - list.begin) * C) return;

  for (int i = int(threadIdx.x); i < BN; i += kThreads) {
    const int64_t at = first + i, entry = list.begin + at / C;
    int32_t column = -1;
    if (entry < list.end) {
      const int64_t block = index_at(pattern.col, entry);
      if (block >= 0 && block < col_blocks && block * C + at % C < pattern.cols) column = int32_t(block * C + at % C);
    }
    column_of[i] = column;
  }
  const int row_of_block = int(blockIdx.y) * BM;  // inside the block
  const int64_t a_row = row * R + row_of_block;
  const int rows = int(min(int64_t(min(BM, R - row_of_block)), pattern.rows - a_row));
  const int steps = int((call.inner + kStep<Element> - 1) / kStep<Element>);
  const Element* a = static_cast<const Element*>(call.a);
  const Element* b = static_cast<const Element*>(call.b);
  auto load = [&](int step) {
    const uint32_t stage = base + uint32_t(step % STAGES * Tile::kStageBytes);
    const int64_t inner = int64_t(step) * kStep<Element>;
    const int left = int(min(call.inner - inner, int64_t(kStep<Element>)));
    load_tile<Element, AT, BM, kThreads, ALIGNED>(stage, [&](int r, int k) -> Span<Element> {
      if (r >= rows || k >= left) return {a, 0};
      return {a + (a_row + r) * call.a_row + (inner + k) * call.a_inner, min(AT ? rows - r : left - k, kWidth)};
    });
    load_tile<Element, BT, BN, kThreads, ALIGNED>(stage + BM * 128, [&](int c, int k) -> Span<Element> {
      const int64_t column = column_of[c];
      if (column < 0 || k >= left) return {b, 0};
      const int count = BT ? int(min(pattern.cols - column, int64_t(kWidth))) : left - k;
      return {b + (inner + k) * call.b_inner + column * call.b_col, min(count, kWidth)};
    });
  };

  Sums<Element, MT, NT> sums;
  sums.clear();
  __syncthreads();
#pragma unroll 1
  for (int step = 0; step < STAGES - 1; ++step) {
    if (step < steps) load(step);
    copy_async_commit();
  }
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<STAGES - 2>();
    __syncthreads();
    if (step + STAGES - 1 < steps) load(step + STAGES - 1);
    copy_async_commit();
    const uint32_t stage = base + uint32_t(step % STAGES * Tile::kStageBytes);
    multiply_step<Element, AT, BM, BT, BN, MT, NT>(sums, stage, stage + BM * 128, m, n, lane, call.tf32);
    if (step % 8 == 7) sums.fold();
  }
  sums.fold();
  copy_async_wait<0>();
  __syncthreads();
  constexpr int kPitch = BN + 4;
  float* staged = reinterpret_cast<float*>(shared);
  stage_sums(sums, staged, kPitch, 1, m, n, lane);
  __syncthreads();

  Element* values = static_cast<Element*>(call.values);
  const bool vectors = C % kWidth == 0 && reinterpret_cast<uintptr_t>(values) % 16 == 0;
  const int64_t end = (list.end - list.begin) * C;
  const int block_left = R - row_of_block;
  for (int i = int(threadIdx.x); i < BM * BN / kWidth; i += kThreads) {
    const int r = i / (BN / kWidth), c = i % (BN / kWidth) * kWidth;
    if (r >= block_left) continue;
    alignas(16) Element results[kWidth];
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {  // padding is 0 even where a has a NaN
      const bool inside = r < rows && column_of[c + e] >= 0;
      results[e] = from_float<Element>(inside ? staged[r * kPitch + c + e] : 0.f);
    }
    const int64_t at = first + c;
    if (vectors) {
      if (at >= end) continue;
      Element* to = values + ((list.begin + at / C) * R + row_of_block + r) * C + at % C;
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(results);
    } else {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        if (at + e >= end) continue;
        values[((list.begin + (at + e) / C) * R + row_of_block + r) * C + (at + e) % C] = results[e];
      }
    }
  }
}

struct SddmmKernel {
  void (*kernel)(BlockSddmm);
  int bm, bn, threads, shared_bytes;
};

template <class Tile, bool AT, bool BT>
SddmmKernel sddmm_kernel_of() {
  return {sddmm_kernel<Tile, AT, BT>, Tile::BM, Tile::BN, Tile::kThreads, Tile::kSharedBytes};
}
template <class Tile>
SddmmKernel sddmm_kernel_of(bool at, bool bt) {
  if (at) return bt ? sddmm_kernel_of<Tile, true, true>() : sddmm_kernel_of<Tile, true, false>();
  return bt ? sddmm_kernel_of<Tile, false, true>() : sddmm_kernel_of<Tile, false, false>();
}

/// In cuda_sddmm_sm80_<dtype>.cu; `rows` of a block.
struct SddmmChoice {
  bool at, bt, aligned;
  int rows;
};
SddmmKernel sddmm_kernel_bf16(const SddmmChoice& choice);
SddmmKernel sddmm_kernel_f16(const SddmmChoice& choice);
SddmmKernel sddmm_kernel_f32(const SddmmChoice& choice);

template <class Element>
SddmmKernel sddmm_kernel_16bit(const SddmmChoice& c) {
  if (!c.aligned) return sddmm_kernel_of<SddmmTile<Element, 32, 64, 2, 2, 2, false>>(c.at, c.bt);
  if (c.rows <= 32) return sddmm_kernel_of<SddmmTile<Element, 32, 128, 2, 4, 4, true>>(c.at, c.bt);
  if (c.rows <= 64) return sddmm_kernel_of<SddmmTile<Element, 64, 128, 2, 4, 4, true>>(c.at, c.bt);
  return sddmm_kernel_of<SddmmTile<Element, 128, 128, 4, 2, 3, true>>(c.at, c.bt);
}

}  // namespace sparsekit::cuda

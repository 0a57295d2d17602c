// values[p] = the block p of a b, of blocks of 16 x 16, where a has rows contiguous and b columns (dW = dy^T x), with
// mma.sync (sm_80 and later): the blocks of many block rows and columns share both.
//
// By itself a row of blocks of 16 does 14 flop for each byte that it loads. Here a CTA computes the blocks that stand
// in 256 rows x 512 columns (a step of cuda_panels.h), up to 128 blocks of 16 x 16 or 32 of 32 x 32: as many as the
// sums of 8 warps have registers for, each in a place of its own. What is listed there decides only which columns of b
// are loaded and where each warp finds its operands.
//
// Bound: at 20 % 34 flop for a byte of L2, at 50 % 43; blocks of 16 by shared memory, 1 KB for 8192 flop (240 TFLOP/s
// on Hopper).
#pragma once

#include "matmul/cuda_panels.h"
#include "matmul/cuda_product.cuh"

namespace sparsekit::cuda {

constexpr int kSampledWindow = 512, kSampledThreads = 256, kSampledStages = 3, kSampledStep = 32;
constexpr int kSampledBytesA = kSampledStep * kPanelFeatures * 2, kSampledBytesB = kSampledStep * kSampledWindow * 2;
constexpr int kSampledStageBytes = kSampledBytesA + kSampledBytesB;
constexpr int kSampledSharedBytes = kSampledStages * kSampledStageBytes;

constexpr int kSampledOfWarp = 16, kSampledSlots = 8 * kSampledOfWarp;  // blocks

template <class Element>
__global__ void __launch_bounds__(kSampledThreads, 1)
    sampled_kernel(const __grid_constant__ BlockSddmm call, const __grid_constant__ Panels panels) {
  constexpr int R = 16, C = 16;
  extern __shared__ __align__(1024) char shared[];
  __shared__ PanelEntry entries[kSampledSlots];
  __shared__ PanelStep step_of;
  __shared__ int64_t panel_of;
  __shared__ unsigned columns_of;  // bit: a block of this column of the window is there
  const BlockSparsePattern& pattern = call.pattern;
  const uint32_t base = shared_address(shared);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;

  if (threadIdx.x == 0) {
    auto first_of = [&](int64_t panel) {
      return first_step(panels, panel, list_extent(pattern.crow, panel * panels.lists, pattern.nnz).begin);
    };
    int64_t low = 0, high = panels.panels;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first_of(middle) <= int64_t(blockIdx.x) ? low : high) = middle;
    }
    const int64_t step = int64_t(blockIdx.x) - first_of(low);
    panel_of = low;
    columns_of = 0;
    step_of = {0, 0, 0, 0};
    if (step >= 0 && step < panels.counts[low]) step_of = panels.steps[blockIdx.x];
  }
  __syncthreads();
  const int count = min(step_of.count, kSampledSlots);
  if (count <= 0) return;
  if (int(threadIdx.x) < kSampledSlots) {
    PanelEntry entry = {-1, 0};
    const int64_t at = int64_t(step_of.begin) + int(threadIdx.x);
    if (int(threadIdx.x) < count && at >= 0 && at < pattern.nnz) entry = panels.entries[at];
    const int list = entry.at & (kPanelFeatures / R - 1), column = entry.at >> 8 & (kSampledWindow / C - 1);
    entries[threadIdx.x] = {entry.place < pattern.nnz ? entry.place : -1, list | column << 8};
    if (int(threadIdx.x) < count) atomicOr(&columns_of, 1u << column);
  }
  __syncthreads();
  const unsigned columns = columns_of;
  const int64_t row = panel_of * kPanelFeatures, column = int64_t(step_of.window) * kSampledWindow;
  const Element* a = static_cast<const Element*>(call.a);
  const Element* b = static_cast<const Element*>(call.b);
  const int steps = int((call.inner + kSampledStep - 1) / kSampledStep);
  auto load = [&](int step) {
    const uint32_t stage = base + uint32_t(step % kSampledStages * kSampledStageBytes);
    const int64_t inner = int64_t(step) * kSampledStep;
#pragma unroll
    for (int i = 0; i < kSampledStep * kPanelFeatures / 8 / kSampledThreads; ++i) {
      const int at = int(threadIdx.x) + i * kSampledThreads, k = at / (kPanelFeatures / 8),
                chunk = at % (kPanelFeatures / 8);
      const int64_t left = inner + k < call.inner ? min(pattern.rows - row - chunk * 8, int64_t(8)) : 0;
      copy_async_part(stage + swizzled<kPanelFeatures * 2>(k, chunk),
                      left > 0 ? a + (inner + k) * call.a_inner + row + chunk * 8 : a, left > 0 ? int(left) * 2 : 0);
    }
#pragma unroll
    for (int i = 0; i < kSampledStep * kSampledWindow / 8 / kSampledThreads; ++i) {
      const int at = int(threadIdx.x) + i * kSampledThreads, k = at / (kSampledWindow / 8),
                chunk = at % (kSampledWindow / 8);
      if (!(columns >> (chunk * 8 / C) & 1)) continue;
      const int64_t left = inner + k < call.inner ? min(pattern.cols - column - chunk * 8, int64_t(8)) : 0;
      copy_async_part(stage + kSampledBytesA + swizzled<kSampledWindow * 2>(k, chunk),
                      left > 0 ? b + (inner + k) * call.b_inner + column + chunk * 8 : b, left > 0 ? int(left) * 2 : 0);
    }
  };

  float sums[kSampledOfWarp][2][4];
#pragma unroll
  for (int s = 0; s < kSampledOfWarp; ++s)
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[s][j][e] = 0.f;

#pragma unroll 1
  for (int step = 0; step < kSampledStages - 1; ++step) {
    if (step < steps) load(step);
    copy_async_commit();
  }
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<kSampledStages - 2>();
    __syncthreads();
    if (step + kSampledStages - 1 < steps) load(step + kSampledStages - 1);
    copy_async_commit();
    const uint32_t tile_a = base + uint32_t(step % kSampledStages * kSampledStageBytes),
                   tile_b = tile_a + kSampledBytesA;
#pragma unroll
    for (int s = 0; s < kSampledOfWarp; ++s) {
      if (8 * s + warp >= count) break;
      const int32_t where = entries[8 * s + warp].at;
      const int first_a = (where & 255) * (R / 8), first_b = (where >> 8) * (C / 8);
#pragma unroll
      for (int k = 0; k < kSampledStep / 16; ++k) {
        uint32_t of_a[4], of_b[4];
        load_matrices_transposed(of_a, address_columns16<kPanelFeatures * 2>(tile_a, 16 * k, first_a, lane));
        load_matrices_transposed(of_b, address_rows16<kSampledWindow * 2>(tile_b, 16 * k, first_b, lane));
        mma_m16n8k16<Element>(sums[s][0], of_a, of_b[0], of_b[1]);
        mma_m16n8k16<Element>(sums[s][1], of_a, of_b[2], of_b[3]);
      }
    }
  }
  copy_async_wait<0>();

  Element* values = static_cast<Element*>(call.values);
#pragma unroll
  for (int s = 0; s < kSampledOfWarp; ++s) {
    if (8 * s + warp >= count) break;
    const PanelEntry entry = entries[8 * s + warp];
    if (entry.place < 0) continue;
    const int r = lane / 4, c = lane % 4 * 2;
    const int64_t rows = pattern.rows - row - (entry.at & 255) * R, cols = pattern.cols - column - (entry.at >> 8) * C;
    Element* to = values + int64_t(entry.place) * (R * C) + r * C + c;
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // padding is 0 even where a has a NaN
        const bool inside = r + 8 * half < rows;
        const float low = inside && c + 8 * j < cols ? sums[s][j][2 * half] : 0.f;
        const float high = inside && c + 8 * j + 1 < cols ? sums[s][j][2 * half + 1] : 0.f;
        *reinterpret_cast<uint32_t*>(to + 8 * half * C + 8 * j) = pack<Element>(low, high);
      }
  }
}

using SampledKernel = void (*)(BlockSddmm, Panels);

/// In cuda_sddmm_panels_sm80.cu.
SampledKernel sampled_kernel_of(DType dtype);

}  // namespace sparsekit::cuda

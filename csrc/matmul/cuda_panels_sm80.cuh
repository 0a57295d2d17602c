// y = factor * act(x W^T + bias), or x W, of blocks of 16 and 32, with mma.sync (sm_80 and later): many block rows
// share x.
//
// A block row of 16 by itself does 16 flop for each byte of x. Here a CTA computes 128 tokens x 256 features, 16 block
// rows of 16 or 8 of 32, whose lists are merged (cuda_panels.h). A step is a window of 64 of the contraction: the
// columns of x that any of the rows lists there, and the blocks, each in its slot. Warps stand 4 (32 tokens) x 2 (half
// of the rows); a warp walks the blocks of its half, and a switch over the row picks the registers that sum: a block is
// multiplied with nothing that its row does not list. The next block's operands are loaded while this one is
// multiplied.
//
// Bound: 128 d / u x 2 flop for a byte of L2 at density d, where u = 1 - (1 - d)^rows of the columns are loaded (16
// rows: 23 at 5 %, 53 at 20 %, 128 at 50 %); then shared memory, 6 KB for a block of 16 x 16 (315 TFLOP/s on Hopper),
// then mma.sync.
#pragma once

#include "matmul/cuda_panels.h"
#include "matmul/cuda_product.cuh"

namespace sparsekit::cuda {

constexpr int kPanelWindow = 64;
constexpr int kPanelTokens = 128, kPanelThreads = 256, kPanelStages = 3, kPanelRing = 4;
constexpr int kPanelBytesX = kPanelTokens * 128, kPanelBytesW = kPanelFeatures * 128;
constexpr int kPanelStageBytes = kPanelBytesX + kPanelBytesW;
constexpr int kPanelSharedBytes = kPanelStages * kPanelStageBytes;
static_assert(Staging<kPanelTokens, kPanelFeatures>::kFloats * 4 <= kPanelSharedBytes);

/// Where a block with rows of ROW_BYTES (32, 64) keeps a chunk: 8 rows of ldmatrix lie in different banks.
template <int ROW_BYTES>
__device__ __forceinline__ uint32_t block_swizzled(int row, int chunk) {
  static_assert(ROW_BYTES == 32 || ROW_BYTES == 64);
  const int moved = ROW_BYTES == 32 ? chunk ^ (row >> 2 & 1) : chunk ^ (row >> 1 & 3);
  return uint32_t(row * ROW_BYTES + moved * 16);
}

// LS features and CK of the contraction in a block. WT: x W, blocks lie [CK][LS]; else [LS][CK].
template <class Element, int LS, int CK, bool WT>
struct PanelBlock {
  static constexpr int kBytes = LS * CK * 2, kRowBytes = (WT ? LS : CK) * 2, kChunks = kBytes / 16;
  static constexpr int kSteps = CK / 16, kTiles = LS / 16;  // of mma
  static constexpr int kLists = kPanelFeatures / LS, kSlots = kLists * (kPanelWindow / CK);

  uint32_t a[kSteps][2][4], b[kSteps][kTiles][4];

  /// The operands of one block: x at its column of the window for the warp's 32 tokens, and the block in its slot.
  __device__ __forceinline__ void load(uint32_t tile_x, uint32_t slot, int m, int column, int lane) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load_matrices(a[k][i], address_rows16<128>(tile_x, m + 16 * i, column * (CK / 8) + 2 * k, lane));
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if constexpr (WT) {
          load_matrices_transposed(b[k][n],
                                   slot + block_swizzled<kRowBytes>(16 * k + (lane & 15), 2 * n + (lane >> 4)));
        } else {
          const int row = 16 * n + (lane & 7) + ((lane >> 4) << 3);
          load_matrices(b[k][n], slot + block_swizzled<kRowBytes>(row, 2 * k + ((lane >> 3) & 1)));
        }
      }
    }
  }

  template <int LIST>
  __device__ __forceinline__ void multiply_as(float (&sums)[2][16][4]) const {
    if constexpr (LIST < kLists / 2) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k)
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < 2; ++i)
              mma_m16n8k16<Element>(sums[i][2 * (LIST * kTiles + n) + half], a[k][i], b[k][n][2 * half],
                                    b[k][n][2 * half + 1]);
    }
  }
  __device__ __forceinline__ void multiply(float (&sums)[2][16][4], int list) const {
    switch (list) {
      case 0: multiply_as<0>(sums); break;
      case 1: multiply_as<1>(sums); break;
      case 2: multiply_as<2>(sums); break;
      case 3: multiply_as<3>(sums); break;
      case 4: multiply_as<4>(sums); break;
      case 5: multiply_as<5>(sums); break;
      case 6: multiply_as<6>(sums); break;
      case 7: multiply_as<7>(sums); break;
    }
  }
};

template <class Element, int LS, int CK, bool WT>
__global__ void __launch_bounds__(kPanelThreads, 1)
    panel_kernel(const __grid_constant__ ProductCall call, const __grid_constant__ Panels panels) {
  using Block = PanelBlock<Element, LS, CK, WT>;
  extern __shared__ __align__(1024) char shared[];
  __shared__ PanelEntry entries[kPanelRing][Block::kSlots];
  __shared__ PanelStep step_of[kPanelRing];
  __shared__ unsigned columns_of[kPanelRing][2];  // bit: a block of this column of the window is there
  const uint32_t base = shared_address(shared);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, half = warp / 4, m = warp % 4 * 32;

  const TileAt tile = tile_at<16>(call, blockIdx.x);
  const int64_t panel = tile.list, token = tile.token_tile * kPanelTokens;
  const int tokens = int(min(int64_t(kPanelTokens), call.out.tokens - token));
  const int64_t first_entry = list_extent(call.offsets, panel * panels.lists, call.pattern.nnz).begin;
  const int64_t first = first_step(panels, panel, first_entry);
  const int steps = panels.counts[panel];
  const Element* x = static_cast<const Element*>(call.input.data);
  const Element* values = static_cast<const Element*>(call.values);

  // What a step consists of is read three iterations before its data: the step, then its entries, then the table.
  static_assert(Block::kSlots <= 64);
  PanelStep next_step = {0, 0, 0, 0}, entry_step = {0, 0, 0, 0};
  PanelEntry entry = {-1, 0};
  auto read_step = [&](int step) {
    next_step = {0, 0, 0, 0};
    if (warp < 2 && step < steps) next_step = panels.steps[first + step];
  };
  auto read_entry = [&] {
    entry_step = next_step;
    entry = {-1, 0};
    const int64_t at = int64_t(entry_step.begin) + int(threadIdx.x);
    if (warp < 2 && int(threadIdx.x) < entry_step.count && at >= 0 && at < call.pattern.nnz) entry = panels.entries[at];
  };
  auto fill_table = [&](int step) {
    if (warp >= 2) return;
    const int slot = step % kPanelRing;
    const bool mine = int(threadIdx.x) < entry_step.count;
    const unsigned column = entry.at >> 8 & (kPanelWindow / CK - 1);
    if (threadIdx.x < Block::kSlots) {
      entries[slot][threadIdx.x] = {entry.place, int32_t((entry.at & (Block::kLists - 1)) | column << 8)};
    }
    const unsigned columns = __reduce_or_sync(0xffffffffu, mine ? 1u << column : 0u);
    if (lane == 0) columns_of[slot][warp] = columns;
    if (threadIdx.x == 0) step_of[slot] = entry_step;
  };
  auto load = [&](int step) {
    const uint32_t stage = base + uint32_t(step % kPanelStages * kPanelStageBytes);
    const int slot = step % kPanelRing;
    const PanelStep here = step_of[slot];
    const unsigned columns = columns_of[slot][0] | columns_of[slot][1];
    const int64_t inner = int64_t(here.window) * kPanelWindow;
    const int chunk = int(threadIdx.x) % 8;
    if (columns >> (chunk * 8 / CK) & 1) {
      const int left = int(min(max(call.inner - inner - chunk * 8, int64_t(0)), int64_t(8)));
      const Element* from = x + token * call.input.token + inner + chunk * 8;
#pragma unroll
      for (int i = 0; i < kPanelTokens / 32; ++i) {
        const int row = int(threadIdx.x) / 8 + 32 * i, count = row < tokens ? left : 0;
        copy_async_part(stage + swizzled<128>(row, chunk), count ? from + row * call.input.token : x, 2 * count);
      }
    }
    for (int i = int(threadIdx.x); i < here.count * Block::kChunks; i += kPanelThreads) {
      constexpr int kPerRow = Block::kRowBytes / 16;
      const PanelEntry& of = entries[slot][i / Block::kChunks];
      const int within = i % Block::kChunks, row = within / kPerRow, part = within % kPerRow;
      const int64_t k = inner + (of.at >> 8) * CK + (WT ? row : part * 8);
      int count = int(min(max(call.inner - k, int64_t(0)), int64_t(8)));
      if (WT && count > 0) count = 8;
      if (of.place < 0 || of.place >= call.pattern.nnz) count = 0;
      const Element* from = values + int64_t(of.place) * (LS * CK) + within * 8;
      copy_async_part(
          stage + kPanelBytesX + i / Block::kChunks * Block::kBytes + block_swizzled<Block::kRowBytes>(row, part),
          count ? from : values, 2 * count);
    }
  };

  Sums<Element, 2, 8> sums;
  sums.clear();
  read_step(0);
  read_entry();
  read_step(1);
#pragma unroll 1
  for (int step = 0; step < kPanelStages; ++step) {  // tables of the first STAGES steps, loads of all but the last
    fill_table(step);
    read_entry();
    read_step(step + 2);
    __syncthreads();
    if (step == kPanelStages - 1) break;
    if (step < steps) load(step);
    copy_async_commit();
  }
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<kPanelStages - 2>();
    __syncthreads();
    if (step + kPanelStages - 1 < steps) load(step + kPanelStages - 1);
    copy_async_commit();
    fill_table(step + kPanelStages);
    read_entry();
    read_step(step + kPanelStages + 2);

    const uint32_t tile_x = base + uint32_t(step % kPanelStages * kPanelStageBytes), tile_w = tile_x + kPanelBytesX;
    const int slot = step % kPanelRing, split = step_of[slot].split;
    const int begin = half ? split : 0, end = half ? step_of[slot].count : split;
    const PanelEntry* table = entries[slot];
    if (begin >= end) continue;
    auto load_block = [&](Block& block, int at) {
      const int32_t where = table[at].at;
      block.load(tile_x, tile_w + uint32_t(at * Block::kBytes), m, where >> 8, lane);
      return (where & 255) - half * (Block::kLists / 2);
    };
    Block even, odd;
    int list_even = load_block(even, begin), list_odd = 0;
#pragma unroll 1
    for (int at = begin; at < end; at += 2) {
      if (at + 1 < end) list_odd = load_block(odd, at + 1);
      even.multiply(sums.total, list_even);
      if (at + 1 >= end) break;
      if (at + 2 < end) list_even = load_block(even, at + 2);
      odd.multiply(sums.total, list_odd);
    }
  }
  copy_async_wait<0>();
  __syncthreads();
  const Staging<kPanelTokens, kPanelFeatures> staging(call.out);
  stage_sums(sums, reinterpret_cast<float*>(shared), staging.step_m, staging.step_n, m, half * (kPanelFeatures / 2),
             lane);
  __syncthreads();
  const int64_t feature = panel * kPanelFeatures, left = call.out.features - feature;
  store_tile<Element, kPanelTokens, kPanelFeatures, kPanelThreads>(call.out, reinterpret_cast<const float*>(shared),
                                                                   token, feature, tokens,
                                                                   int(min(int64_t(kPanelFeatures), left)));
}

/// All blocks of a window that there can be, unless some are listed twice.
inline Panels panels_of_product(const ProductCall& call) {
  return panels_of(call, kPanelWindow, kPanelFeatures / call.list_size * (kPanelWindow / call.inner_size));
}

using PanelKernel = void (*)(ProductCall, Panels);

/// In cuda_panels_sm80_<dtype>.cu: of blocks of `list_size` features x `inner_size`, 16 or 32 each.
PanelKernel panel_kernel_bf16(int list_size, int inner_size, bool wt);
PanelKernel panel_kernel_f16(int list_size, int inner_size, bool wt);

template <class Element>
PanelKernel panel_kernel_of(int list_size, int inner_size, bool wt) {
  if (list_size == 16) {
    if (inner_size == 16) return wt ? panel_kernel<Element, 16, 16, true> : panel_kernel<Element, 16, 16, false>;
    return wt ? panel_kernel<Element, 16, 32, true> : panel_kernel<Element, 16, 32, false>;
  }
  if (inner_size == 16) return wt ? panel_kernel<Element, 32, 16, true> : panel_kernel<Element, 32, 16, false>;
  return wt ? panel_kernel<Element, 32, 32, true> : panel_kernel<Element, 32, 32, false>;
}

}  // namespace sparsekit::cuda

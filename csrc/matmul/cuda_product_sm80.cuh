// y = factor * act(x W^T + bias), or x W, of a block-sparse W, with mma.sync (sm_80 and later).
//
// A CTA computes BM tokens x BN features of one block row (x W: block column). The blocks of that row stand one after
// the other as one long contraction, count * C numbers, which is walked in steps of 128 bytes whatever C is: 64 numbers
// of 16 bits may come from half a block or from eight. A table in shared memory, one step ahead, says where the 8
// chunks of a step are, in x and in the values; threads copy them with cp.async into a ring of STAGES. Warps stand
// WARPS_M x WARPS_N over the tile. Sums go through shared memory so that the output is written in whole 16 bytes.
//
// Bound: the step loads BM + BN rows for 2 BM BN flop: with BN = R = 128 64 flop a byte of L2, with 32 26; and mma.sync
// itself, 0.6 of what wgmma reaches on Hopper.
#pragma once

#include "matmul/cuda_product.cuh"

namespace sparsekit::cuda {

/// Where one chunk (ALIGNED) or one number of the contraction is.
struct StepEntry {
  int64_t weight;  // offset in values of feature 0 of the list
  int32_t inner;   // place in the contraction
  int32_t count;   // numbers that exist
};

/// Walks the contraction of a list for one column of the table: `at` it has reached block `block`, number `within`.
template <class Element, bool WT, bool ALIGNED>
struct StepCursor {
  static constexpr int kWidth = ALIGNED ? kChunk<Element> : 1;

  int64_t block;
  int within;

  __device__ __forceinline__ StepCursor(const ProductCall& call, int column)
      : block(column * kWidth / call.inner_size), within(column * kWidth % call.inner_size) {}

  __device__ __forceinline__ StepEntry next(const ProductCall& call, const Extent& list) {
    StepEntry entry = {0, 0, 0};
    if (block < list.end - list.begin) {
      const int64_t at = list.begin + block;
      const int64_t neighbour = index_at(call.neighbour, at), place = WT ? index_at(call.place, at) : at;
      if (neighbour >= 0 && neighbour < call.neighbours && place >= 0 && place < call.pattern.nnz) {
        const int64_t inner = neighbour * call.inner_size + within;
        const int64_t stored = place * call.pattern.block_rows * call.pattern.block_cols;
        entry.weight = stored + int64_t(within) * (WT ? call.pattern.block_cols : 1);
        entry.inner = int32_t(inner);
        entry.count = int32_t(min(max(call.inner - inner, int64_t(0)), int64_t(kWidth)));
      }
    }
    block += kStep<Element> / call.inner_size;
    within += kStep<Element> % call.inner_size;
    if (within >= call.inner_size) within -= call.inner_size, ++block;
    return entry;
  }
};

template <class ElementType, int BM_, int BN_, int WARPS_M_, int WARPS_N_, int STAGES_, bool ALIGNED_>
struct ProductTile {
  using Element = ElementType;
  static constexpr int BM = BM_, BN = BN_, WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, STAGES = STAGES_;
  static constexpr bool ALIGNED = ALIGNED_;
  static constexpr int kThreads = 32 * WARPS_M * WARPS_N;
  static constexpr int kStageBytes = (BM + BN) * 128;
  static constexpr int kStagedBytes = Staging<BM, BN>::kFloats * 4;
  static constexpr int kSharedBytes =
      STAGES * kStageBytes > kStagedBytes ? STAGES * kStageBytes : (kStagedBytes + 127) / 128 * 128;
};

// XT: x has tokens contiguous. WT: x W, so W has features contiguous.
template <class Tile, bool XT, bool WT>
__global__ void __launch_bounds__(Tile::kThreads, 2) product_kernel(const __grid_constant__ ProductCall call) {
  using Element = typename Tile::Element;
  constexpr bool ALIGNED = Tile::ALIGNED;
  constexpr int BM = Tile::BM, BN = Tile::BN, STAGES = Tile::STAGES, kThreads = Tile::kThreads;
  constexpr int MT = BM / Tile::WARPS_M / 16, NT = BN / Tile::WARPS_N / 16;
  using Cursor = StepCursor<Element, WT, ALIGNED>;
  constexpr int kColumns = kStep<Element> / Cursor::kWidth;
  static_assert(kColumns <= kThreads && MT > 0 && NT > 0);

  extern __shared__ __align__(1024) char shared[];
  __shared__ StepEntry table[2][kColumns];
  const uint32_t base = shared_address(shared);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int m = warp % Tile::WARPS_M * (16 * MT), n = warp / Tile::WARPS_M * (16 * NT);

  const TileAt tile = tile_at<16>(call, blockIdx.x);
  const int64_t token = tile.token_tile * BM, feature = tile.list * call.list_size + tile.part * BN;
  const int tokens = int(min(int64_t(BM), call.out.tokens - token));
  const int features = min(BN, call.list_size - tile.part * BN);  // of the block; the matrix may end before
  const Extent list = list_extent(call.offsets, tile.list, call.pattern.nnz);
  // A list of 2^31 steps would be more memory than there is, save where offsets or counts are wrong; then it is cut.
  const int steps = int(min(((list.end - list.begin) * call.inner_size + kStep<Element> - 1) / kStep<Element>,
                            int64_t(INT32_MAX - STAGES)));

  Cursor cursor(call, int(threadIdx.x) % kColumns);
  auto fill_table = [&](int step) {
    if (threadIdx.x < kColumns) table[step & 1][threadIdx.x] = cursor.next(call, list);
  };
  const Element* x = static_cast<const Element*>(call.input.data);
  const Element* values = static_cast<const Element*>(call.values);
  const int first = tile.part * BN;  // feature inside the block
  auto load = [&](int step) {
    const uint32_t stage = base + uint32_t(step % STAGES * Tile::kStageBytes);
    const StepEntry* entries = table[step & 1];
    load_tile<Element, XT, BM, kThreads, ALIGNED>(stage, [&](int row, int k) -> Span<Element> {
      const StepEntry& entry = entries[k / Cursor::kWidth];
      const int inside = k % Cursor::kWidth;
      const int count = XT ? (inside < entry.count ? tokens - row : 0) : (row < tokens ? entry.count - inside : 0);
      if (count <= 0) return {x, 0};
      return {x + (token + row) * call.input.token + (entry.inner + inside) * call.input.feature,
              min(count, kChunk<Element>)};
    });
    load_tile<Element, WT, BN, kThreads, ALIGNED>(stage + BM * 128, [&](int row, int k) -> Span<Element> {
      const StepEntry& entry = entries[k / Cursor::kWidth];
      const int inside = k % Cursor::kWidth, columns = call.pattern.block_cols;
      const int count = WT ? (inside < entry.count ? features - row : 0) : (row < features ? entry.count - inside : 0);
      if (count <= 0) return {values, 0};
      const int64_t at = WT ? int64_t(inside) * columns + first + row : int64_t(first + row) * columns + inside;
      return {values + entry.weight + at, min(count, kChunk<Element>)};
    });
  };

  Sums<Element, MT, NT> sums;
  sums.clear();
  // Loads of a step need its table, written an iteration before.
  fill_table(0);
  __syncthreads();
#pragma unroll 1
  for (int step = 0; step < STAGES - 1; ++step) {
    if (step < steps) load(step);
    copy_async_commit();
    fill_table(step + 1);
    __syncthreads();
  }
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<STAGES - 2>();
    __syncthreads();  // the step has arrived, and the stage of the step before is free
    if (step + STAGES - 1 < steps) load(step + STAGES - 1);
    copy_async_commit();
    fill_table(step + STAGES);
    const uint32_t stage = base + uint32_t(step % STAGES * Tile::kStageBytes);
    multiply_step<Element, XT, BM, WT, BN, MT, NT>(sums, stage, stage + BM * 128, m, n, lane, call.tf32);
    if (step % 8 == 7) sums.fold();
  }
  sums.fold();
  copy_async_wait<0>();
  __syncthreads();
  const Staging<BM, BN> staging(call.out);
  stage_sums(sums, reinterpret_cast<float*>(shared), staging.step_m, staging.step_n, m, n, lane);
  __syncthreads();
  const int64_t left = call.out.features - feature;
  if (left > 0) {
    store_tile<Element, BM, BN, kThreads>(call.out, reinterpret_cast<const float*>(shared), token, feature, tokens,
                                          int(min(int64_t(features), left)));
  }
}

struct ProductKernel {
  void (*kernel)(ProductCall);
  int bm, bn, threads, shared_bytes;
};

template <class Tile, bool XT, bool WT>
ProductKernel product_kernel_of() {
  return {product_kernel<Tile, XT, WT>, Tile::BM, Tile::BN, Tile::kThreads, Tile::kSharedBytes};
}
template <class Tile>
ProductKernel product_kernel_of(bool xt, bool wt) {
  if (xt) return wt ? product_kernel_of<Tile, true, true>() : product_kernel_of<Tile, true, false>();
  return wt ? product_kernel_of<Tile, false, true>() : product_kernel_of<Tile, false, false>();
}

/// The kernels of a dtype, in cuda_product_sm80_<dtype>.cu: of a tile of at least `features` features (or the largest
/// there is), of few tokens or many.
struct ProductChoice {
  bool xt, wt, aligned, few;
  int features;
};
ProductKernel product_kernel_bf16(const ProductChoice& choice);
ProductKernel product_kernel_f16(const ProductChoice& choice);
ProductKernel product_kernel_f32(const ProductChoice& choice);

template <class Element>
ProductKernel product_kernel_16bit(const ProductChoice& c) {
  if (!c.aligned) return product_kernel_of<ProductTile<Element, 64, 32, 4, 1, 2, false>>(c.xt, c.wt);
  if (c.few) return product_kernel_of<ProductTile<Element, 32, 64, 2, 2, 4, true>>(c.xt, c.wt);
  if (c.features <= 32) return product_kernel_of<ProductTile<Element, 128, 32, 4, 2, 4, true>>(c.xt, c.wt);
  if (c.features <= 64) return product_kernel_of<ProductTile<Element, 128, 64, 4, 2, 4, true>>(c.xt, c.wt);
  return product_kernel_of<ProductTile<Element, 128, 128, 4, 2, 3, true>>(c.xt, c.wt);
}

}  // namespace sparsekit::cuda

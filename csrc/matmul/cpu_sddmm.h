// values[p] = the listed blocks of a b: columns of b in the lanes, elements of a broadcast.
//
// Both are packed once, a panel per block row (of a) and per block column (of b), several where blocks are narrower
// than a vector; a stays in place where it is fp32 and its rows are contiguous. Each block is one tile after another
// over the whole inner dimension (the tokens of a gradient), in chains whose sums are added.
//
// Bound: multiply-adds; blocks of 16 read 8 bytes of panels a cycle from L2.
#pragma once

#include "matmul/cpu_epilogue.h"

namespace sparsekit {
namespace {

template <class Product>
struct SddmmCall {
  using Element = typename Product::Element;
  const BlockSddmm* s = nullptr;
  const Element* a = nullptr;         // [row panels][steps][a_width]
  const Element* b = nullptr;         // [column panels][steps][b_width]
  int64_t a_width = 0, a_blocks = 0;  // lanes of a panel, block rows in it
  int64_t b_width = 0, b_blocks = 0, steps = 0;
  bool whole_lines = false;  // values are bf16, so many that they are written past the caches
  int64_t next = 0;
  char* own = nullptr;  // memory of the first thread; of the others `own_size` bytes on
  int64_t own_size = 0;
};

template <class Product>
static void sddmm_row(const SddmmCall<Product>& call, int64_t i, float* sums) {
  const BlockSddmm& s = *call.s;
  const BlockSparsePattern& w = s.pattern;
  const int64_t R = w.block_rows, C = w.block_cols;
  const int64_t stride = round_up(C, Simd::lanes), rows = smaller(R, w.rows - i * R);
  int32_t panels[2] = {0, 0};  // of b, from that of a block on: its own and the next block's, brought into L2 meanwhile
  Blocks<Product> blocks;
  blocks.weight_stride = call.a_width;
  blocks.slab = panels;
  blocks.slab_size = call.b_width;
  blocks.ahead = 1;
  blocks.prefetch_slabs = true;
  blocks.slab_stride = call.b_width;
  blocks.count = 1;
  for (int64_t block = w.crow[i]; block < w.crow[i + 1]; ++block) {
    const int64_t column = w.col[block];
    const auto* a = call.a + (i / call.a_blocks * call.steps * call.a_width + i % call.a_blocks * R);
    const auto* b = call.b + (column / call.b_blocks * call.steps * call.b_width + column % call.b_blocks * C);
    const int64_t next = block + 1 < w.nnz ? w.col[block + 1] : column;
    panels[1] = int32_t((next / call.b_blocks - column / call.b_blocks) * call.steps);
    for (int64_t k = 0; k < call.steps; k += longest_chain<Product>) {
      blocks.depth = smaller(longest_chain<Product>, call.steps - k);
      blocks.weights = a + k * call.a_width;
      for (int64_t c = 0; c < stride;) {
        const int64_t left = (stride - c) / Simd::lanes;
        // The most registers a tile of many rows has; 3 of 4 would leave one for a tile of its own.
        const int registers = Simd::registers == 32 && left == 3 ? 3 : left >= 2 ? 2 : 1;
        blocks.slabs = b + k * call.b_width + c;
        blocks.exist = c == 0 && panels[1] != 0 ? 2 : 1;
        multiply_blocks<Product, true>(blocks, registers, rows, sums + c, stride, k > 0);
        c += registers * Simd::lanes;
      }
    }
    const int64_t columns = smaller(C, w.cols - column * C);
#ifdef SPARSEKIT_BF16_PRODUCT
    if (call.whole_lines && rows == R && columns == C && call.steps > 0) {
      __m512i* to = reinterpret_cast<__m512i*>(static_cast<uint16_t*>(s.values) + block * R * C);
      for (const float* from = sums; from < sums + R * C; from += 2 * Simd::lanes)
        stream_line(to++, (__m512i)_mm512_cvtne2ps_pbh(Simd::load(from + Simd::lanes), Simd::load(from)));
      continue;
    }
#endif
    for (int64_t r = 0; r < R; ++r) {
      for (int64_t c = 0; c < C; c += Simd::lanes) {
        const int valid = call.steps > 0 && r < rows ? clamp_count(columns - c, Simd::lanes) : 0;
        store_float(s.values, (block * R + r) * C + c, s.dtype, Simd::load_partial(sums + r * stride + c, valid),
                    clamp_count(C - c, Simd::lanes));
      }
    }
  }
}

template <class Product>
static void sddmm_worker(int64_t first, int64_t last, void* context) {
  SddmmCall<Product>& call = *static_cast<SddmmCall<Product>*>(context);
  const BlockSparsePattern& w = call.s->pattern;
  for (int64_t i = first; i < last; ++i) {
    for (;;) {
      int64_t row = __atomic_fetch_add(&call.next, 1, __ATOMIC_RELAXED);
      if (row >= w.row_blocks()) break;
      sddmm_row<Product>(call, row, reinterpret_cast<float*>(call.own + i * call.own_size));
    }
  }
  stream_fence();
}

template <class Product>
static Status run_sddmm(const BlockSddmm& s, const ParallelFor& parallel) {
  const BlockSparsePattern& w = s.pattern;
  SddmmCall<Product> call;
  call.s = &s;
  call.steps = (s.inner + Product::pair - 1) / Product::pair;
  call.whole_lines = Product::pair == 2 && w.block_cols % (2 * Simd::lanes) == 0 &&
                     w.nnz * w.block_rows * w.block_cols * 2 >= stream_bytes &&
                     reinterpret_cast<uintptr_t>(s.values) % 64 == 0;
  call.a_blocks = larger(1, Simd::lanes / w.block_rows);
  call.b_blocks = larger(1, Simd::lanes / w.block_cols);
  call.a_width = round_up(call.a_blocks * w.block_rows, Simd::lanes);
  call.b_width = round_up(call.b_blocks * w.block_cols, Simd::lanes);
  PackCall<Product> a, b;
  a.source.data = s.a, b.source.data = s.b;
  a.source.dtype = b.source.dtype = s.dtype;
  a.source.lanes = w.rows, b.source.lanes = w.cols;
  a.source.inner = b.source.inner = s.inner;
  a.source.lane_stride = s.a_row, b.source.lane_stride = s.b_col;
  a.source.inner_stride = s.a_inner, b.source.inner_stride = s.b_inner;
  a.panel_lanes = call.a_blocks * w.block_rows, b.panel_lanes = call.b_blocks * w.block_cols;
  a.width = call.a_width, b.width = call.b_width;
  a.steps = b.steps = call.steps;
  const int64_t threads = smaller(larger(1, parallel.threads), w.row_blocks());
  Scratch scratch, own;
  own.reserve(w.block_rows * round_up(w.block_cols, Simd::lanes) * int64_t(sizeof(float)));
  call.own_size = own.size;
  const int64_t own_at = scratch.reserve(threads * own.size);
  const int64_t a_panels = (w.rows + a.panel_lanes - 1) / a.panel_lanes;
  const int64_t b_panels = (w.cols + b.panel_lanes - 1) / b.panel_lanes;
  const int64_t a_at = scratch.reserve(a_panels * call.steps * call.a_width * 4);
  const int64_t b_at = scratch.reserve(b_panels * call.steps * call.b_width * 4);
  if (!scratch.allocate()) return error(Status::Kind::failed, "block_sddmm: out of memory");
  call.own = scratch.data + own_at;
  a.to = reinterpret_cast<typename Product::Element*>(scratch.data + a_at);
  b.to = reinterpret_cast<typename Product::Element*>(scratch.data + b_at);
  call.a = a.to, call.b = b.to;
  pack(&a, parallel);
  pack(&b, parallel);
  parallel(0, threads, 1, sddmm_worker<Product>, &call);
  scratch.release();
  return {};
}

static Status sddmm(const BlockSddmm& s, const ParallelFor& parallel) {
  if (s.pattern.nnz == 0) return {};
#ifdef SPARSEKIT_BF16_PRODUCT
  if (s.dtype == DType::bf16) return run_sddmm<Bf16Product>(s, parallel);
#endif
  return run_sddmm<FloatProduct>(s, parallel);
}

}  // namespace
}  // namespace sparsekit

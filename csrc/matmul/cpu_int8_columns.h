// int8 weights in R x 1 blocks (4 x 1, n:m:g): y = x W^T through vpdpbusd, which wants four neighbours of the inner
// dimension where these blocks have one.
//
// Four listed columns of a block row make a group. Their weights are brought together once per call, [group][R][4
// bytes]; tokens are packed as bytes, a cache line of 64 tokens per column, and the four lines of a group are
// interleaved in registers: 4 loads and 8 shuffles, which R rows share, for 4 R products of 64 bytes. Tokens stand in
// the line in the order that makes interleaving by 128-bit lanes leave them in theirs.
//
// Bound: vpdpbusd, of which R = 4 issues 16 among 36 instructions. Source: Shen et al., An Efficient Sparse Inference
// Software Accelerator for Transformer-based Language Models on CPUs (arXiv 2306.16601), section 3.
#pragma once

#include "matmul/cpu_product.h"

#ifdef SPARSEKIT_INT8_PRODUCT

namespace sparsekit {
namespace {

constexpr int64_t line_tokens = 64;

struct ColumnsCall {
  const BlockSparseProduct* p = nullptr;
  const int64_t* groups = nullptr;  // [row blocks + 1] offsets
  uint32_t* weights = nullptr;      // [groups][R]
  int32_t* columns = nullptr;       // [groups][4]
  uint8_t* lines = nullptr;         // [panels][cols][64]
  PackSource source;
  const float* token_scales = nullptr;
  const int32_t* corrections = nullptr;
  int64_t panels = 0, item_blocks = 0, items_per_panel = 0, items = 0, next = 0;
  int out_of_memory = 0;
};

/// Brings the weights of each block row's groups together; a group that is not full repeats a column with weights 0.
static void group_columns(int64_t first, int64_t last, void* context) {
  const ColumnsCall& call = *static_cast<const ColumnsCall*>(context);
  const BlockSparsePattern& w = call.p->pattern;
  const int64_t R = w.block_rows;
  const int8_t* values = static_cast<const int8_t*>(call.p->values);
  const __m128i transpose = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int64_t i = first; i < last; ++i) {
    const int64_t begin = w.crow[i], end = w.crow[i + 1];
    for (int64_t g = call.groups[i], n = begin; n < end; ++g, n += 4) {
      uint32_t* to = call.weights + g * R;
      for (int64_t c = 0; c < 4; ++c) call.columns[4 * g + c] = int32_t(w.col[n + c < end ? n + c : n]);
      if (R == 4 && n + 4 <= end) {
        __m128i block = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + n * 4));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(block, transpose));
        continue;
      }
      for (int64_t r = 0; r < R; ++r) {
        uint32_t four = 0;
        for (int64_t c = 0; c < 4 && n + c < end; ++c) four |= uint32_t(uint8_t(values[(n + c) * R + r])) << (8 * c);
        to[r] = four;
      }
    }
  }
}

/// Lines of the columns `first` to `last` of one panel.
static void pack_lines(const ColumnsCall& call, int64_t panel, int64_t first, int64_t last) {
  const PackSource& s = call.source;
  const Simd::Int order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  uint8_t* to = call.lines + panel * s.inner * line_tokens;
  for (int64_t k = first; k < last; k += Simd::lanes) {
    const int steps = clamp_count(last - k, Simd::lanes);
    alignas(64) __m128i bytes[Simd::lanes][4];  // [step][16 tokens]
    for (int j = 0; j < 4; ++j) {
      const int64_t lane = panel * line_tokens + 16 * j;
      Simd::Int r[Simd::lanes];
      for (int i = 0; i < Simd::lanes; ++i) {
        Simd::Float x = Simd::zero();
        if (s.inner_stride == 1) {
          if (lane + i < s.lanes) x = load_source<true>(s, lane + i, k, last - k);
        } else if (i < steps && lane < s.lanes) {
          x = load_source<false>(s, lane, k + i, s.lanes - lane);
        }
        r[i] = Simd::as_int(x);
      }
      if (s.inner_stride == 1) Simd::transpose(r);
      for (int i = 0; i < Simd::lanes; ++i) bytes[i][j] = token_bytes(Simd::as_float(r[i]));
    }
    for (int i = 0; i < steps; ++i)
      Simd::store_int(to + (k + i) * line_tokens, _mm512_permutexvar_epi32(order, Simd::load_int(bytes[i])));
  }
}

static void pack_line_parts(int64_t first, int64_t last, void* context) {
  const ColumnsCall& call = *static_cast<const ColumnsCall*>(context);
  constexpr int64_t part = 256;
  const int64_t columns = call.source.inner, parts = (columns + part - 1) / part;
  for (int64_t i = first; i < last; ++i)
    pack_lines(call, i / parts, i % parts * part, smaller(i % parts * part + part, columns));
}

/// `rows` rows of one block row: sums [rows][64] of its groups.
template <int rows>
static __attribute__((noinline)) void multiply_lines(const uint32_t* weights, int64_t weight_stride,
                                                     const int32_t* columns, int64_t groups, const uint8_t* lines,
                                                     float* out) {
  Simd::Int sum[rows][4];
#pragma GCC unroll 4
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[i][j] = _mm512_setzero_si512();
  for (int64_t g = 0; g < groups; ++g, weights += weight_stride, columns += 4) {
    // The lines of a group 8 ahead: the panel is 64 bytes a column, read in an order that no prefetcher knows.
    Simd::Int a = Simd::load_int(lines + int64_t(columns[0]) * line_tokens);
    Simd::Int b = Simd::load_int(lines + int64_t(columns[1]) * line_tokens);
    Simd::Int c = Simd::load_int(lines + int64_t(columns[2]) * line_tokens);
    Simd::Int d = Simd::load_int(lines + int64_t(columns[3]) * line_tokens);
    Simd::Int ab = _mm512_unpacklo_epi8(a, b), AB = _mm512_unpackhi_epi8(a, b);
    Simd::Int cd = _mm512_unpacklo_epi8(c, d), CD = _mm512_unpackhi_epi8(c, d);
    const Simd::Int x[4] = {_mm512_unpacklo_epi16(ab, cd), _mm512_unpackhi_epi16(ab, cd), _mm512_unpacklo_epi16(AB, CD),
                            _mm512_unpackhi_epi16(AB, CD)};
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) {
      Simd::Int w = _mm512_set1_epi32(int32_t(weights[i]));
      Simd::hold(w);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[i][j] = _mm512_dpbusd_epi32(sum[i][j], x[j], w);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) Simd::store_int(out + i * line_tokens + 16 * j, sum[i][j]);
}

static void columns_item(const ColumnsCall& call, int64_t item, float* sums) {
  const BlockSparseProduct& p = *call.p;
  const BlockSparsePattern& w = p.pattern;
  const int64_t R = w.block_rows, panel = item / call.items_per_panel;
  const int64_t first = item % call.items_per_panel * call.item_blocks;
  const int64_t last = smaller(first + call.item_blocks, w.row_blocks());
  const uint8_t* lines = call.lines + panel * w.cols * line_tokens;
  for (int64_t block = first; block < last; ++block) {
    const int64_t g = call.groups[block], groups = call.groups[block + 1] - g;
    const int64_t rows = smaller(R, w.rows - block * R);
    float* out = sums + (block - first) * R * line_tokens;
    const int32_t* columns = call.columns + 4 * g;
    const uint32_t* weights = call.weights + g * R;
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) multiply_lines<4>(weights + r, R, columns, groups, lines, out + r * line_tokens);
    for (; r < rows; ++r) multiply_lines<1>(weights + r, R, columns, groups, lines, out + r * line_tokens);
  }
  Epilogue e;
  e.p = &p;
  e.token_scales = call.token_scales;
  e.feature = first * R;
  e.features = smaller(last * R, w.rows) - e.feature;
  e.token = panel * line_tokens;
  e.tokens = smaller(line_tokens, p.tokens - e.token);
  e.sums = sums;
  e.width = line_tokens;
  Sums<Int8Product>::to_float(sums, call.corrections + e.feature, e.features, line_tokens);
  finish(e);
}

static void columns_worker(int64_t first, int64_t last, void* context) {
  ColumnsCall& call = *static_cast<ColumnsCall*>(context);
  Scratch scratch;
  scratch.reserve(round_up(call.item_blocks * call.p->pattern.block_rows, Simd::lanes) * line_tokens * 4);
  if (!scratch.allocate()) {
    __atomic_store_n(&call.out_of_memory, 1, __ATOMIC_RELAXED);
    return;
  }
  for (int64_t i = first; i < last; ++i) {
    for (;;) {
      int64_t item = __atomic_fetch_add(&call.next, 1, __ATOMIC_RELAXED);
      if (item >= call.items) break;
      columns_item(call, item, reinterpret_cast<float*>(scratch.data));
    }
  }
  scratch.release();
}

static Status run_columns(const BlockSparseProduct& p, const ParallelFor& parallel) {
  const BlockSparsePattern& w = p.pattern;
  const int64_t blocks = w.row_blocks(), R = w.block_rows;
  ColumnsCall call;
  call.p = &p;
  call.panels = (p.tokens + line_tokens - 1) / line_tokens;
  call.item_blocks = larger(1, item_rows / R);
  call.items_per_panel = (blocks + call.item_blocks - 1) / call.item_blocks;
  call.items = call.panels * call.items_per_panel;
  const int64_t most_groups = w.nnz / 4 + blocks, tokens = call.panels * line_tokens;
  Scratch scratch;
  const int64_t groups_at = scratch.reserve((blocks + 1) * int64_t(sizeof(int64_t)));
  const int64_t weights_at = scratch.reserve(most_groups * R * 4);
  const int64_t columns_at = scratch.reserve(most_groups * 16);
  const int64_t lines_at = scratch.reserve(tokens * w.cols);
  const int64_t scales_at = scratch.reserve(tokens * 4), rounding_at = scratch.reserve(tokens * 4);
  const int64_t corrections_at = scratch.reserve(w.rows * 4);
  if (!scratch.allocate()) return error(Status::Kind::failed, "block-sparse product: out of memory");
  int64_t* groups = reinterpret_cast<int64_t*>(scratch.data + groups_at);
  groups[0] = 0;
  for (int64_t i = 0; i < blocks; ++i) groups[i + 1] = groups[i] + (w.crow[i + 1] - w.crow[i] + 3) / 4;
  call.groups = groups;
  call.weights = reinterpret_cast<uint32_t*>(scratch.data + weights_at);
  call.columns = reinterpret_cast<int32_t*>(scratch.data + columns_at);
  call.lines = reinterpret_cast<uint8_t*>(scratch.data + lines_at);
  float* scales = reinterpret_cast<float*>(scratch.data + scales_at);
  float* rounding = reinterpret_cast<float*>(scratch.data + rounding_at);
  int32_t* corrections = reinterpret_cast<int32_t*>(scratch.data + corrections_at);
  find_token_scales(p, tokens, scales, rounding, parallel);
  find_corrections(p, corrections, parallel);
  call.token_scales = scales;
  call.corrections = corrections;
  PackSource& s = call.source;
  s.data = p.input.data;
  s.dtype = p.dtype;
  s.lanes = p.tokens;
  s.inner = w.cols;
  s.lane_stride = p.input.token;
  s.inner_stride = p.input.feature;
  s.rounding = rounding;
  parallel(0, blocks, 64, group_columns, &call);
  parallel(0, call.panels * ((w.cols + 255) / 256), 4, pack_line_parts, &call);
  parallel(0, smaller(larger(1, parallel.threads), call.items), 1, columns_worker, &call);
  scratch.release();
  return call.out_of_memory ? error(Status::Kind::failed, "block-sparse product: out of memory") : Status{};
}

}  // namespace
}  // namespace sparsekit

#endif

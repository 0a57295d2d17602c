// int8 weights in R x 1 blocks (4 x 1, n:m:g): y = x W^T through vpdpbusd, which wants four neighbours of the inner
// dimension where these blocks have one.
//
// Four listed columns of a block row make a group. Their weights are brought together once per call, [group][R][4
// bytes]; tokens are packed as bytes, a cache line of 64 tokens per column, and the four lines of a group are
// interleaved in registers: 4 loads and 8 shuffles, which R rows share, for 4 R products of 64 bytes. Tokens stand in
// the line in the order that makes interleaving by 128-bit lanes leave them in theirs. An item is 256 rows, for all
// tokens; it goes through chunks of 512 columns, whose lines come from L1 (from L2 the products ran at half the rate).
//
// Bound: vpdpbusd, of which R = 4 issues 16 among 36 instructions. Source: Shen et al., An Efficient Sparse Inference
// Software Accelerator for Transformer-based Language Models on CPUs (arXiv 2306.16601), section 3.
#pragma once

#include "matmul/cpu_product.h"

#ifdef SPARSEKIT_INT8_PRODUCT

namespace sparsekit {
namespace {

constexpr int64_t line_tokens = 64;
constexpr int64_t chunk_columns = 512;  // whose lines, 32 KB, stay in L1 while the rows of an item pass by
constexpr int64_t columns_item_rows = 256;

struct ColumnsCall {
  const BlockSparseProduct* p = nullptr;
  uint8_t* lines = nullptr;  // [panels][cols][64]
  PackSource source;
  const float* token_scales = nullptr;
  int64_t panels = 0, chunks = 0, item_blocks = 0, items = 0, most_groups = 0, next = 0;
  int out_of_memory = 0;
};

/// The block rows of one item, their blocks sorted by chunk and put together in groups of four.
struct Groups {
  int64_t* offsets = nullptr;      // [blocks * chunks + 1]
  int64_t* place = nullptr;        // [chunks]
  uint32_t* weights = nullptr;     // [groups][R]
  int32_t* columns = nullptr;      // [groups][4]
  int32_t* corrections = nullptr;  // [blocks * R rounded up]: 128 times the sum of a row's weights
};

/// Fills `to` for the block rows `first` to `last`; a group that is not full has weights 0 for column 0.
static void group_columns(const ColumnsCall& call, int64_t first, int64_t last, const Groups& to) {
  const BlockSparsePattern& w = call.p->pattern;
  const int64_t R = w.block_rows, chunks = call.chunks;
  const int8_t* values = static_cast<const int8_t*>(call.p->values);
  to.offsets[0] = 0;
  for (int64_t i = first; i < last; ++i) {
    for (int64_t c = 0; c < chunks; ++c) to.place[c] = 0;
    for (int64_t n = w.crow[i]; n < w.crow[i + 1]; ++n) ++to.place[w.col[n] / chunk_columns];
    int64_t* offsets = to.offsets + (i - first) * chunks;
    for (int64_t c = 0; c < chunks; ++c) {
      offsets[c + 1] = offsets[c] + (to.place[c] + 3) / 4;
      to.place[c] = 4 * offsets[c];
    }
    const int64_t begin = offsets[0], count = offsets[chunks] - begin;
    uint32_t* weights = to.weights + begin * R;
    memset(weights, 0, size_t(count * R) * 4);
    memset(to.columns + 4 * begin, 0, size_t(count) * 16);
    int8_t* bytes = reinterpret_cast<int8_t*>(to.weights);
    for (int64_t n = w.crow[i]; n < w.crow[i + 1]; ++n) {
      const int64_t column = w.col[n], place = to.place[column / chunk_columns]++;
      to.columns[place] = int32_t(column);
      int8_t* four = bytes + place / 4 * R * 4 + place % 4;
      for (int64_t r = 0; r < R; ++r) four[4 * r] = values[n * R + r];
    }
    int32_t* corrections = to.corrections + (i - first) * R;
    for (int64_t r = 0; r < R; r += Simd::lanes) {
      const Simd::Mask rows = Simd::first(clamp_count(R - r, Simd::lanes));
      Simd::Int sum = _mm512_setzero_si512();
      for (int64_t g = 0; g < count; ++g)
        sum =
            _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(char(128)), _mm512_maskz_loadu_epi32(rows, weights + g * R + r));
      _mm512_mask_storeu_epi32(corrections + r, rows, sum);
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
                                                     bool add, float* out) {
  Simd::Int sum[rows][4];
#pragma GCC unroll 4
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      sum[i][j] = add ? Simd::load_int(out + i * line_tokens + 16 * j) : _mm512_setzero_si512();
  for (int64_t g = 0; g < groups; ++g, weights += weight_stride, columns += 4) {
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

static void columns_item(const ColumnsCall& call, int64_t item, const Groups& groups, float* sums) {
  const BlockSparseProduct& p = *call.p;
  const BlockSparsePattern& w = p.pattern;
  const int64_t R = w.block_rows, chunks = call.chunks;
  const int64_t first = item * call.item_blocks, last = smaller(first + call.item_blocks, w.row_blocks());
  group_columns(call, first, last, groups);
  for (int64_t panel = 0; panel < call.panels; ++panel) {
    const uint8_t* lines = call.lines + panel * w.cols * line_tokens;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      for (int64_t block = first; block < last; ++block) {
        const int64_t* offsets = groups.offsets + (block - first) * chunks + chunk;
        const int64_t g = offsets[0], count = offsets[1] - g, rows = smaller(R, w.rows - block * R);
        if (count == 0 && chunk > 0) continue;
        float* out = sums + (block - first) * R * line_tokens;
        const int32_t* columns = groups.columns + 4 * g;
        const uint32_t* weights = groups.weights + g * R;
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4)
          multiply_lines<4>(weights + r, R, columns, count, lines, chunk > 0, out + r * line_tokens);
        for (; r < rows; ++r)
          multiply_lines<1>(weights + r, R, columns, count, lines, chunk > 0, out + r * line_tokens);
      }
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
    Sums<Int8Product>::to_float(sums, groups.corrections, e.features, line_tokens);
    finish(e);
  }
}

static void columns_worker(int64_t first, int64_t last, void* context) {
  ColumnsCall& call = *static_cast<ColumnsCall*>(context);
  const int64_t R = call.p->pattern.block_rows, rows = round_up(call.item_blocks * R, Simd::lanes);
  Scratch scratch;
  const int64_t sums_at = scratch.reserve(rows * line_tokens * 4);
  const int64_t offsets_at = scratch.reserve((call.item_blocks * call.chunks + 1) * 8);
  const int64_t place_at = scratch.reserve(call.chunks * 8);
  const int64_t corrections_at = scratch.reserve(rows * 4);
  const int64_t weights_at = scratch.reserve(call.most_groups * R * 4);
  const int64_t columns_at = scratch.reserve(call.most_groups * 16);
  if (!scratch.allocate()) {
    __atomic_store_n(&call.out_of_memory, 1, __ATOMIC_RELAXED);
    return;
  }
  Groups groups;
  groups.offsets = reinterpret_cast<int64_t*>(scratch.data + offsets_at);
  groups.place = reinterpret_cast<int64_t*>(scratch.data + place_at);
  groups.corrections = reinterpret_cast<int32_t*>(scratch.data + corrections_at);
  groups.weights = reinterpret_cast<uint32_t*>(scratch.data + weights_at);
  groups.columns = reinterpret_cast<int32_t*>(scratch.data + columns_at);
  for (int64_t i = first; i < last; ++i) {
    for (;;) {
      int64_t item = __atomic_fetch_add(&call.next, 1, __ATOMIC_RELAXED);
      if (item >= call.items) break;
      columns_item(call, item, groups, reinterpret_cast<float*>(scratch.data + sums_at));
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
  call.chunks = larger(1, (w.cols + chunk_columns - 1) / chunk_columns);
  // At least four items a thread, as far as there are rows.
  const int64_t wanted = larger(16, w.rows / (4 * larger(1, parallel.threads)));
  call.item_blocks = larger(1, smaller(columns_item_rows, wanted) / R);
  call.items = (blocks + call.item_blocks - 1) / call.item_blocks;
  for (int64_t first = 0; first < blocks; first += call.item_blocks) {
    const int64_t last = smaller(first + call.item_blocks, blocks);
    call.most_groups = larger(call.most_groups, (w.crow[last] - w.crow[first]) / 4 + (last - first) * call.chunks);
  }
  const int64_t tokens = call.panels * line_tokens;
  Scratch scratch;
  const int64_t lines_at = scratch.reserve(tokens * w.cols);
  const int64_t scales_at = scratch.reserve(tokens * 4), rounding_at = scratch.reserve(tokens * 4);
  if (!scratch.allocate()) return error(Status::Kind::failed, "block-sparse product: out of memory");
  call.lines = reinterpret_cast<uint8_t*>(scratch.data + lines_at);
  float* scales = reinterpret_cast<float*>(scratch.data + scales_at);
  float* rounding = reinterpret_cast<float*>(scratch.data + rounding_at);
  find_token_scales(p, tokens, scales, rounding, parallel);
  call.token_scales = scales;
  PackSource& s = call.source;
  s.data = p.input.data;
  s.dtype = p.dtype;
  s.lanes = p.tokens;
  s.inner = w.cols;
  s.lane_stride = p.input.token;
  s.inner_stride = p.input.feature;
  s.rounding = rounding;
  parallel(0, call.panels * ((w.cols + 255) / 256), 4, pack_line_parts, &call);
  parallel(0, smaller(larger(1, parallel.threads), call.items), 1, columns_worker, &call);
  scratch.release();
  return call.out_of_memory ? error(Status::Kind::failed, "block-sparse product: out of memory") : Status{};
}

}  // namespace
}  // namespace sparsekit

#endif

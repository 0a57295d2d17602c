// int8 weights in R x 1 blocks (4 x 1, n:m:g): y = x W^T through vpdpbusd, which wants four neighbours of the inner
// dimension where these blocks have one.
//
// Four listed columns of a block row, as they are stored, make a group. Their weights are brought together once per
// call, [group][R][4 bytes]; tokens are packed as bytes, a cache line of 64 tokens per column, and the four lines of a
// group are interleaved in registers: 4 loads and 8 shuffles, which R rows share, for 4 R products of 64 bytes. Tokens
// stand in the line in the order that makes interleaving by 128-bit lanes leave them in theirs. An item is 256 rows,
// for all tokens; it goes through chunks of 4096 columns, whose lines stay in L2 while its rows pass by.
//
// Bound: vpdpbusd, of which R = 4 issues 16 in a group: 8 cycles at best, 8.4 with the lines in L1, 10.2 from L2 (Zen
// 5). Source: Shen et al., An Efficient Sparse Inference Software Accelerator for Transformer-based Language Models on
// CPUs (arXiv 2306.16601), section 3.
#pragma once

#include "matmul/cpu_product.h"

#ifdef SPARSEKIT_INT8_PRODUCT

namespace sparsekit {
namespace {

constexpr int64_t line_tokens = 64;
constexpr int64_t chunk_columns = 4096;  // of 256 KB of lines; 512, in L1, cost as much in loads and stores of sums
constexpr int groups_ahead = 6;          // fetched into L1: a group takes 8.4 cycles instead of 10
constexpr int64_t columns_item_rows = 256;

struct ColumnsCall {
  const BlockSparseProduct* p = nullptr;
  uint8_t* lines = nullptr;  // [panels][cols][64]
  PackSource source;
  const float* token_scales = nullptr;
  int64_t panels = 0, chunks = 0, item_blocks = 0, items = 0, most_groups = 0, next = 0;
  char* own = nullptr;  // memory of the first thread; of the others `own_size` bytes on
  int64_t own_size = 0, sums_at = 0, offsets_at = 0, corrections_at = 0, weights_at = 0, group_lines_at = 0;
};

/// The block rows of one item, their blocks put together in groups of four.
struct Groups {
  int64_t* offsets = nullptr;      // [blocks * chunks + 1], of groups
  uint32_t* weights = nullptr;     // [groups][R]
  int32_t* lines = nullptr;        // [groups + groups_ahead][4]: bytes from the first line to that of a column
  int32_t* corrections = nullptr;  // [blocks * R rounded up]: 128 times the sum of a row's weights
};

/// Blocks `n` to `n + count` of a block row: their columns' lines.
template <class Index>
static void group_lines(const Index* columns, int64_t count, int32_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = int32_t(columns[i] * Index(line_tokens));
  for (int64_t i = count; i % 4; ++i) to[i] = 0;
}

/// And their weights, four columns of a row side by side; up to 64 bytes behind the last are written.
static void group_weights(const int8_t* values, int64_t count, int64_t R, uint32_t* to) {
  if (R == 4) {  // four groups at once
    const Simd::Int order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    for (int64_t i = 0; i < count; i += 16) {
      const Simd::Int blocks = Simd::load_int_partial(values + 4 * i, clamp_count(count - i, 16));
      Simd::store_int(to + i, _mm512_shuffle_epi8(blocks, order));
    }
    return;
  }
  for (int64_t i = 0; i < count; i += 4, values += 4 * R, to += R) {
    for (int64_t r = 0; r < R; r += 16) {
      const __mmask16 rows = __mmask16((1u << clamp_count(R - r, 16)) - 1);
      __m128i column[4];
      for (int k = 0; k < 4; ++k)
        column[k] = _mm_maskz_loadu_epi8(i + k < count ? rows : __mmask16(0), values + k * R + r);
      const __m128i low01 = _mm_unpacklo_epi8(column[0], column[1]), low23 = _mm_unpacklo_epi8(column[2], column[3]);
      const __m128i high01 = _mm_unpackhi_epi8(column[0], column[1]), high23 = _mm_unpackhi_epi8(column[2], column[3]);
      __m128i* four = reinterpret_cast<__m128i*>(to + r);
      _mm_storeu_si128(four, _mm_unpacklo_epi16(low01, low23));
      if (r + 4 >= R) continue;
      _mm_storeu_si128(four + 1, _mm_unpackhi_epi16(low01, low23));
      _mm_storeu_si128(four + 2, _mm_unpacklo_epi16(high01, high23));
      _mm_storeu_si128(four + 3, _mm_unpackhi_epi16(high01, high23));
    }
  }
}

/// 128 times the sum of each of R rows of `count` groups.
static void group_corrections(const uint32_t* weights, int64_t count, int64_t R, int32_t* to) {
  const Simd::Int all = _mm512_set1_epi8(char(128));
  const int64_t together = larger(1, Simd::lanes / R);  // groups in a vector
  for (int64_t r = 0; r < R; r += Simd::lanes) {
    const int64_t rows = smaller(R - r, Simd::lanes);
    Simd::Int sum = _mm512_setzero_si512();
    for (int64_t g = 0; g < count; g += together) {
      const Simd::Mask valid = Simd::first(int(rows * smaller(together, count - g)));
      sum = _mm512_dpbusd_epi32(sum, all, _mm512_maskz_loadu_epi32(valid, weights + g * R + r));
    }
    int32_t lanes[Simd::lanes];
    Simd::store_int(lanes, sum);
    for (int64_t i = 0; i < rows; ++i) {
      to[r + i] = 0;
      for (int64_t g = 0; g < together; ++g) to[r + i] += lanes[g * R + i];
    }
  }
}

/// Fills `to` for the block rows `first` to `last`; a group that is not full has weights 0 for column 0. A group
/// belongs to the chunk of its first column, if columns ascend; else chunks are just parts.
static void group_columns(const ColumnsCall& call, int64_t first, int64_t last, const Groups& to) {
  const BlockSparsePattern& w = call.p->pattern;
  const int64_t R = w.block_rows, chunks = call.chunks;
  int64_t begin = 0;
  for (int64_t i = first; i < last; ++i) {
    const int64_t n = w.crow[i], count = w.crow[i + 1] - n, end = begin + (count + 3) / 4;
    int32_t* lines = to.lines + 4 * begin;
    if (w.col.wide) {
      group_lines(static_cast<const int64_t*>(w.col.data) + n, count, lines);
    } else {
      group_lines(static_cast<const int32_t*>(w.col.data) + n, count, lines);
    }
    group_weights(static_cast<const int8_t*>(call.p->values) + n * R, count, R, to.weights + begin * R);
    group_corrections(to.weights + begin * R, end - begin, R, to.corrections + (i - first) * R);
    int64_t g = begin;
    for (int64_t c = 0; c < chunks; ++c) {
      to.offsets[(i - first) * chunks + c] = g;
      const int64_t limit = (c + 1) * chunk_columns * line_tokens;
      if (c + 1 < chunks)
        while (g < end && to.lines[4 * g] < limit) ++g;
    }
    begin = end;
  }
  to.offsets[(last - first) * chunks] = begin;
  memset(to.lines + 4 * begin, 0, groups_ahead * 16);
}

/// Four columns of 64 tokens, [16 tokens][token][4 bytes], to lines.
SPARSEKIT_INLINE void store_lines(const Simd::Int (&four)[4], uint8_t* to, int64_t count) {
  const Simd::Int order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  Simd::Int z[4];
  for (int j = 0; j < 4; ++j) z[j] = _mm512_shuffle_epi8(four[j], order);  // in 128 bits: four tokens of each column
  const Simd::Int low01 = _mm512_unpacklo_epi32(z[0], z[1]), high01 = _mm512_unpackhi_epi32(z[0], z[1]);
  const Simd::Int low23 = _mm512_unpacklo_epi32(z[2], z[3]), high23 = _mm512_unpackhi_epi32(z[2], z[3]);
  const Simd::Int lines[4] = {_mm512_unpacklo_epi64(low01, low23), _mm512_unpackhi_epi64(low01, low23),
                              _mm512_unpacklo_epi64(high01, high23), _mm512_unpackhi_epi64(high01, high23)};
  for (int i = 0; i < 4; ++i)
    if (i < count) Simd::store_int(to + i * line_tokens, lines[i]);
}

/// Lines of up to 64 columns of one panel, from tokens whose features are contiguous.
static void pack_lines(const ColumnsCall& call, int64_t panel, int64_t first, int64_t count) {
  const PackSource& s = call.source;
  const Simd::Int low_byte = _mm512_set1_epi32(255), offset = _mm512_set1_epi8(char(128));
  const Simd::Float magic = Simd::set(12582912.f);  // leaves an integer in the low bits, see round_scaled
  alignas(64) uint8_t tile[line_tokens][64];        // dword 4 i + v of a token: columns 16 v + 4 i to 16 v + 4 i + 3
  const int64_t element = s.dtype == DType::f32 ? 4 : 2;
  for (int64_t t = 0; t < line_tokens; ++t) {
    const int64_t lane = panel * line_tokens + t;
    if (lane >= s.lanes) {
      Simd::store_int(tile[t], offset);
      continue;
    }
    const int64_t at = lane * s.lane_stride + first;
    const Simd::Float rounding = Simd::set(s.rounding[lane]);
    Simd::Int x[4];
    for (int v = 0; v < 4; ++v) {
      Simd::Float product =
          Simd::mul(load_float(s.data, at + 16 * v, s.dtype, clamp_count(count - 16 * v, Simd::lanes)), rounding);
      Simd::hold(product);  // rounded before the addition
      x[v] = _mm512_and_si512(Simd::as_int(Simd::add(product, magic)), low_byte);
    }
    // The next columns: rows lie too far apart for the hardware to see so many streams.
    const char* next = static_cast<const char*>(s.data) + (at + 64) * element;
    for (int64_t byte = 0; byte < 64 * element; byte += 64) Simd::prefetch(next + byte);
    const Simd::Int bytes = _mm512_packus_epi16(_mm512_packus_epi32(x[0], x[1]), _mm512_packus_epi32(x[2], x[3]));
    Simd::store_int(tile[t], _mm512_xor_si512(bytes, offset));
  }
  Simd::Int columns[Simd::lanes][4];
  for (int j = 0; j < 4; ++j) {
    Simd::Int r[Simd::lanes];
    for (int i = 0; i < Simd::lanes; ++i) r[i] = Simd::load_int(tile[16 * j + i]);
    Simd::transpose(r);
    for (int i = 0; i < Simd::lanes; ++i) columns[i][j] = r[i];
  }
  uint8_t* to = call.lines + (panel * s.inner + first) * line_tokens;
  for (int i = 0; i < Simd::lanes; ++i) {
    const int64_t column = i % 4 * 16 + i / 4 * 4;
    store_lines(columns[i], to + column * line_tokens, count - column);
  }
}

/// The same where neighbours are tokens.
static void pack_lines_of_columns(const ColumnsCall& call, int64_t panel, int64_t first, int64_t count) {
  const PackSource& s = call.source;
  const Simd::Int order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  uint8_t* to = call.lines + (panel * s.inner + first) * line_tokens;
  for (int64_t i = 0; i < count; ++i) {
    Simd::Int line = _mm512_setzero_si512();
    for (int j = 0; j < 4; ++j) {
      const int64_t lane = panel * line_tokens + 16 * j;
      const int64_t tokens = smaller(16, s.lanes - lane);
      if (tokens <= 0) break;
      const Simd::Int bytes = _mm512_castsi128_si512(token_bytes(load_source<false>(s, lane, first + i, tokens)));
      const Simd::Mask part = Simd::Mask(15 << 4 * j);
      line = _mm512_mask_shuffle_i32x4(line, part, bytes, bytes, 0);
    }
    Simd::store_int(to + i * line_tokens, _mm512_permutexvar_epi32(order, line));
  }
}

static void pack_line_parts(int64_t first, int64_t last, void* context) {
  const ColumnsCall& call = *static_cast<const ColumnsCall*>(context);
  constexpr int64_t part = 64;
  const int64_t columns = call.source.inner, parts = (columns + part - 1) / part;
  for (int64_t i = first; i < last; ++i) {
    const int64_t column = i % parts * part, count = smaller(part, columns - column);
    if (call.source.inner_stride == 1) {
      pack_lines(call, i / parts, column, count);
    } else {
      pack_lines_of_columns(call, i / parts, column, count);
    }
  }
}

/// `rows` rows of one block row: sums [rows][64] of its groups.
template <int rows>
static __attribute__((noinline)) void multiply_lines(const uint32_t* weights, int64_t weight_stride,
                                                     const int32_t* offsets, int64_t groups, const uint8_t* lines,
                                                     bool add, float* out) {
  Simd::Int sum[rows][4];
#pragma GCC unroll 4
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      sum[i][j] = add ? Simd::load_int(out + i * line_tokens + 16 * j) : _mm512_setzero_si512();
  for (int64_t g = 0; g < groups; ++g, weights += weight_stride, offsets += 4) {
    for (int i = 0; i < 4; ++i) Simd::prefetch_near(lines + offsets[4 * groups_ahead + i]);
    Simd::Int a = Simd::load_int(lines + offsets[0]);
    Simd::Int b = Simd::load_int(lines + offsets[1]);
    Simd::Int c = Simd::load_int(lines + offsets[2]);
    Simd::Int d = Simd::load_int(lines + offsets[3]);
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
    const uint8_t* ahead = lines + w.cols * line_tokens;  // the next panel's, brought into L2 meanwhile
    const uint8_t* const panel_end = panel + 1 < call.panels ? ahead + w.cols * line_tokens : ahead;
    const int64_t part = (w.cols / ((last - first) * chunks) + 1) * line_tokens;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      for (int64_t block = first; block < last; ++block) {
        for (const uint8_t* to = ahead + smaller(part, panel_end - ahead); ahead < to; ahead += line_tokens)
          Simd::prefetch(ahead);
        const int64_t* offsets = groups.offsets + (block - first) * chunks + chunk;
        const int64_t g = offsets[0], count = offsets[1] - g, rows = smaller(R, w.rows - block * R);
        if (count == 0 && chunk > 0) continue;
        float* out = sums + (block - first) * R * line_tokens;
        const int32_t* offset = groups.lines + 4 * g;
        const uint32_t* weights = groups.weights + g * R;
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4)
          multiply_lines<4>(weights + r, R, offset, count, lines, chunk > 0, out + r * line_tokens);
        for (; r < rows; ++r) multiply_lines<1>(weights + r, R, offset, count, lines, chunk > 0, out + r * line_tokens);
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
  for (int64_t i = first; i < last; ++i) {
    char* memory = call.own + i * call.own_size;
    Groups groups;
    groups.offsets = reinterpret_cast<int64_t*>(memory + call.offsets_at);
    groups.corrections = reinterpret_cast<int32_t*>(memory + call.corrections_at);
    groups.weights = reinterpret_cast<uint32_t*>(memory + call.weights_at);
    groups.lines = reinterpret_cast<int32_t*>(memory + call.group_lines_at);
    for (;;) {
      int64_t item = __atomic_fetch_add(&call.next, 1, __ATOMIC_RELAXED);
      if (item >= call.items) break;
      columns_item(call, item, groups, reinterpret_cast<float*>(memory + call.sums_at));
    }
  }
  stream_fence();
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
    call.most_groups = larger(call.most_groups, (w.crow[last] - w.crow[first]) / 4 + last - first);
  }
  const int64_t tokens = call.panels * line_tokens, threads = smaller(larger(1, parallel.threads), call.items);
  const int64_t rows = round_up(call.item_blocks * R, 2 * Simd::lanes);
  Scratch scratch, own;
  call.sums_at = own.reserve(rows * line_tokens * 4);
  call.offsets_at = own.reserve((call.item_blocks * call.chunks + 1) * 8);
  call.corrections_at = own.reserve(rows * 4);
  call.weights_at = own.reserve(call.most_groups * R * 4 + 64);
  call.group_lines_at = own.reserve((call.most_groups + groups_ahead) * 16);
  call.own_size = own.size;
  const int64_t own_at = scratch.reserve(threads * own.size);
  const int64_t lines_at = scratch.reserve(tokens * w.cols);
  const int64_t scales_at = scratch.reserve(tokens * 4), rounding_at = scratch.reserve(tokens * 4);
  if (!scratch.allocate()) return error(Status::Kind::failed, "block-sparse product: out of memory");
  call.own = scratch.data + own_at;
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
  parallel(0, call.panels * ((w.cols + 63) / 64), 16, pack_line_parts, &call);
  parallel(0, threads, 1, columns_worker, &call);
  scratch.release();
  return {};
}

}  // namespace
}  // namespace sparsekit

#endif

// Combining rows, and their dot products, over any Simd.
//
//   out[r] = base[r] + sum_e c_e in[row_e]        a copy where there is one entry with c = 1, zeros where there is none
//   sums[e] += <grad[n], in[k] - minus[n]>
//
// Tiling: a row at a time, `block` vectors of it in registers while all entries of the row are added.
// Bound: memory. Two things decide how much of it is used. Results larger than the caches are written with streaming
// stores: an ordinary store reads its line first, a third more traffic for a copy. And the rows of a gather stand
// anywhere, so the hardware sees no stream: while one row is copied, the same lines of a row `ahead` are fetched, and
// the first line of one twice as far, which brings its page's address. Source: nothing but the formula; the order of
// the sum is that of the entries, so that threads do not matter.
#pragma once

#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "tokens/rows.h"

namespace sparsekit {
namespace {

constexpr int line = 64;
constexpr int64_t fetch_ahead = 8192;  // bytes between a copied line and the fetched one, at least
constexpr int64_t small_page = 4096;

// ---- writing around the caches: 64 bytes at an address that is a multiple of 64

SPARSEKIT_INLINE void stream_line(char* to, const char* from) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__AVX2__)
  __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32));
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), low);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to + 32), high);
#elif defined(__SSE2__)
  for (int i = 0; i < line; i += 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
  }
#else
  memcpy(to, from, line);
#endif
}

SPARSEKIT_INLINE void stream_end() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

SPARSEKIT_INLINE bool streams(const char* to, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(to) % line == 0 && bytes % line == 0;
}

/// `next`: a row to fetch meanwhile. `stream`: around the caches, for rows that stand where streams() says so.
template <bool stream>
SPARSEKIT_INLINE void copy_lines(char* to, const char* from, int64_t bytes, const char* next) {
  for (int64_t at = 0; at < bytes; at += line) {
    __builtin_prefetch(next + at);
    if (stream) stream_line(to + at, from + at);
  }
  if (!stream) memcpy(to, from, size_t(bytes));
}

SPARSEKIT_INLINE void copy_row(char* to, const char* from, int64_t bytes, bool stream, const char* next) {
  stream&& streams(to, bytes) ? copy_lines<true>(to, from, bytes, next) : copy_lines<false>(to, from, bytes, next);
}

SPARSEKIT_INLINE void zero_row(char* to, int64_t bytes, bool stream) {
  if (stream && streams(to, bytes)) {
    alignas(line) static const char zeros[line] = {};
    for (int64_t at = 0; at < bytes; at += line) stream_line(to + at, zeros);
    return;
  }
  memset(to, 0, size_t(bytes));
}

// ---- elements as fp32 lanes

struct F32 {
  using Element = float;
  SPARSEKIT_INLINE Simd::Float load(const Element* p) { return Simd::load(p); }
  SPARSEKIT_INLINE Simd::Float load_partial(const Element* p, int count) { return Simd::load_partial(p, count); }
  SPARSEKIT_INLINE void store(Element* p, Simd::Float a) { Simd::store(p, a); }
  SPARSEKIT_INLINE void store_partial(Element* p, Simd::Float a, int count) { Simd::store_partial(p, a, count); }
};
struct Bf16 {
  using Element = uint16_t;
  SPARSEKIT_INLINE Simd::Float load(const Element* p) { return Simd::load_bf16(p); }
  SPARSEKIT_INLINE Simd::Float load_partial(const Element* p, int count) { return Simd::load_bf16_partial(p, count); }
  SPARSEKIT_INLINE void store(Element* p, Simd::Float a) { Simd::store_bf16(p, a); }
  SPARSEKIT_INLINE void store_partial(Element* p, Simd::Float a, int count) { Simd::store_bf16_partial(p, a, count); }
};
struct F16 {
  using Element = uint16_t;
  SPARSEKIT_INLINE Simd::Float load(const Element* p) { return Simd::load_f16(p); }
  SPARSEKIT_INLINE Simd::Float load_partial(const Element* p, int count) { return Simd::load_f16_partial(p, count); }
  SPARSEKIT_INLINE void store(Element* p, Simd::Float a) { Simd::store_f16(p, a); }
  SPARSEKIT_INLINE void store_partial(Element* p, Simd::Float a, int count) { Simd::store_f16_partial(p, a, count); }
};

// ---- combine

/// The entries of one row of the result.
struct Entries {
  const int32_t* rows;
  const float* coefficients;  // null: 1
  int64_t count;
};

SPARSEKIT_INLINE Entries entries_of(const RowPlan& plan, int64_t s, int64_t r, const int32_t* offsets) {
  int64_t first = s * plan.sample_entries + (offsets ? offsets[r] : r * plan.per_row);
  int64_t count = offsets ? offsets[r + 1] - offsets[r] : plan.per_row;
  const float* coefficients = static_cast<const float*>(plan.coefficients);
  return {plan.rows + first, coefficients ? coefficients + first : nullptr, count};
}

template <class Type>
void sum_row(const RowTask& task, int64_t s, int64_t o, int64_t r, const Entries& entries, bool add_base) {
  using Element = typename Type::Element;
  constexpr int block = 4, width = block * Simd::lanes;
  const char* in = task.in_row(s, o, 0);
  const int64_t stride = task.in.row, inner = task.in.inner;
  const Element* base = add_base ? reinterpret_cast<const Element*>(task.base_row(s, o, r)) : nullptr;
  Element* out = reinterpret_cast<Element*>(task.out_row(s, o, r));
  constexpr int64_t block_bytes = int64_t(width * sizeof(Element));
  const bool stream = task.stream && block_bytes % line == 0 && reinterpret_cast<uintptr_t>(out) % line == 0;
  int64_t d = 0;
  for (; d + width <= inner; d += width) {
    Simd::Float sum[block];
    for (int i = 0; i < block; ++i) sum[i] = base ? Type::load(base + d + i * Simd::lanes) : Simd::zero();
    for (int64_t e = 0; e < entries.count; ++e) {
      if (entries.rows[e] < 0) continue;
      const Element* row = reinterpret_cast<const Element*>(in + entries.rows[e] * stride) + d;
      Simd::Float c = Simd::set(entries.coefficients ? entries.coefficients[e] : 1.f);
      for (int i = 0; i < block; ++i) sum[i] = Simd::fma(c, Type::load(row + i * Simd::lanes), sum[i]);
    }
    if (stream) {
      alignas(line) Element ready[width];
      for (int i = 0; i < block; ++i) Type::store(ready + i * Simd::lanes, sum[i]);
      for (int64_t at = 0; at < block_bytes; at += line) {
        stream_line(reinterpret_cast<char*>(out + d) + at, reinterpret_cast<const char*>(ready) + at);
      }
    } else {
      for (int i = 0; i < block; ++i) Type::store(out + d + i * Simd::lanes, sum[i]);
    }
  }
  for (; d < inner; d += Simd::lanes) {
    int count = inner - d < Simd::lanes ? int(inner - d) : Simd::lanes;
    Simd::Float sum = base ? Type::load_partial(base + d, count) : Simd::zero();
    for (int64_t e = 0; e < entries.count; ++e) {
      if (entries.rows[e] < 0) continue;
      const Element* row = reinterpret_cast<const Element*>(in + entries.rows[e] * stride) + d;
      Simd::Float c = Simd::set(entries.coefficients ? entries.coefficients[e] : 1.f);
      sum = Simd::fma(c, Type::load_partial(row, count), sum);
    }
    Type::store_partial(out + d, sum, count);
  }
}

static void sum_any(const RowTask& task, int64_t s, int64_t o, int64_t r, const Entries& entries, bool add_base) {
  switch (task.in.type) {
    case TokenType::f32: return sum_row<F32>(task, s, o, r, entries, add_base);
    case TokenType::bf16: return sum_row<Bf16>(task, s, o, r, entries, add_base);
    case TokenType::f16: return sum_row<F16>(task, s, o, r, entries, add_base);
    default: return;  // refused (refuses_rows) but for copies, which have one entry
  }
}

/// Rows between a copied one and the one that is fetched meanwhile.
SPARSEKIT_INLINE int64_t rows_ahead(int64_t bytes) {
  return bytes > 0 && bytes < fetch_ahead ? fetch_ahead / bytes : 1;
}
/// The rows of the result in sample s: those past a call's last are the next call's.
SPARSEKIT_INLINE int64_t rows_of(const RowPlan& plan, int64_t s) {
  return plan.to.cu_seqlens ? plan.to.count(s) : plan.out_rows;
}

/// Rows of a gather: one entry each and nothing to add. Little is done per row: what stands between the loads of one
/// row and those of the next keeps them from being in flight together (rows of 512 bytes: a quarter slower without
/// this).
template <bool stream>
SPARSEKIT_INLINE void gather_rows(const RowTask& task, int64_t s, int64_t o, int64_t first, int64_t last) {
  const RowPlan& plan = *task.plan;
  const int32_t* index = plan.rows + s * plan.sample_entries;
  const int64_t bytes = task.out.row_bytes(), out_stride = task.out.row, in_stride = task.in.row;
  const int64_t ahead = rows_ahead(bytes), end = rows_of(plan, s) - 1;
  char* out = task.out_row(s, o, first);
  const char* in = task.in_row(s, o, 0);
  for (int64_t r = first; r < last; ++r, out += out_stride) {
    const int64_t row = index[r], next = index[r + ahead < end ? r + ahead : end];
    const int64_t later = index[r + 2 * ahead < end ? r + 2 * ahead : end];
    if (row < 0) {
      zero_row(out, bytes, stream);
      continue;
    }
    for (int64_t at = 0; at < bytes; at += small_page) __builtin_prefetch(in + later * in_stride + at);
    copy_lines<stream>(out, in + row * in_stride, bytes, in + (next < 0 ? row : next) * in_stride);
  }
}

static void combine(const RowTask& task, int64_t s, int64_t o, int64_t first, int64_t last) {
  const RowPlan& plan = *task.plan;
  const int32_t* offsets = plan.sample_offsets(s);
  const int64_t bytes = task.out.row_bytes();
  const bool has_base = task.base.data != nullptr, add_base = has_base && plan.base_always;
  if (!offsets && plan.per_row == 1 && !plan.coefficients && !has_base && bytes > 0 && first < last) {
    if (task.stream && streams(task.out_row(s, o, first), bytes | task.out.row)) {
      gather_rows<true>(task, s, o, first, last);
      return stream_end();
    }
    return gather_rows<false>(task, s, o, first, last);
  }
  const int64_t ahead = rows_ahead(bytes), rows = rows_of(plan, s);
  for (int64_t r = first; r < last; ++r) {
    Entries entries = entries_of(plan, s, r, offsets);
    char* out = task.out_row(s, o, r);
    if (entries.count == 1 && entries.rows[0] < 0) entries.count = 0;
    if (entries.count == 0) {
      if (has_base) {
        const char* base = task.base_row(s, o, r);
        copy_row(out, base, bytes, task.stream, base);
      } else {
        zero_row(out, bytes, task.stream);
      }
    } else if (entries.count == 1 && !add_base && (!entries.coefficients || entries.coefficients[0] == 1.f)) {
      const char *row = task.in_row(s, o, entries.rows[0]), *next = row;
      if (r + ahead < rows) {
        const Entries later = entries_of(plan, s, r + ahead, offsets);
        if (later.count > 0 && later.rows[0] >= 0) next = task.in_row(s, o, later.rows[0]);
      }
      copy_row(out, row, bytes, task.stream, next);
    } else {
      sum_any(task, s, o, r, entries, add_base);
    }
  }
  if (task.stream) stream_end();
}

// ---- dots

template <class Type>
float dot_rows(const char* grad_row, const char* in_row, const char* minus_row, int64_t inner) {
  using Element = typename Type::Element;
  const Element* grad = reinterpret_cast<const Element*>(grad_row);
  const Element* in = reinterpret_cast<const Element*>(in_row);
  const Element* minus = reinterpret_cast<const Element*>(minus_row);
  constexpr int block = 4, width = block * Simd::lanes;
  Simd::Float sum[block];
  for (int i = 0; i < block; ++i) sum[i] = Simd::zero();
  int64_t d = 0;
  for (; d + width <= inner; d += width) {
    for (int i = 0; i < block; ++i) {
      Simd::Float x = Type::load(in + d + i * Simd::lanes);
      if (minus) x = Simd::sub(x, Type::load(minus + d + i * Simd::lanes));
      sum[i] = Simd::fma(Type::load(grad + d + i * Simd::lanes), x, sum[i]);
    }
  }
  for (; d < inner; d += Simd::lanes) {
    int count = inner - d < Simd::lanes ? int(inner - d) : Simd::lanes;
    Simd::Float x = Type::load_partial(in + d, count);
    if (minus) x = Simd::sub(x, Type::load_partial(minus + d, count));
    sum[0] = Simd::fma(Type::load_partial(grad + d, count), x, sum[0]);
  }
  return Simd::sum(Simd::add(Simd::add(sum[0], sum[1]), Simd::add(sum[2], sum[3])));
}

template <class Type>
void dots_of(const DotTask& t, int64_t s, int64_t o, int64_t first, int64_t last) {
  float* sums = static_cast<float*>(t.sums);
  for (int64_t k = first; k < last; ++k) {
    for (int64_t m = 0; m < t.per_row; ++m) {
      int64_t e = (s * t.index_rows + k) * t.per_row + m, n = t.rows[e];
      if (n < 0) continue;
      const char* minus = t.minus.data ? RowTask::at(t.minus, t.to, s, o, n) : nullptr;
      sums[e] +=
          dot_rows<Type>(RowTask::at(t.grad, t.to, s, o, n), RowTask::at(t.in, t.from, s, o, k), minus, t.in.inner);
    }
  }
}

static void dots(const DotTask& task, int64_t s, int64_t o, int64_t first, int64_t last) {
  switch (task.in.type) {
    case TokenType::f32: return dots_of<F32>(task, s, o, first, last);
    case TokenType::bf16: return dots_of<Bf16>(task, s, o, first, last);
    case TokenType::f16: return dots_of<F16>(task, s, o, first, last);
    default: return;
  }
}

static const char* refuses_rows(TokenType type, bool f64_coefficients) {
  if (f64_coefficients) return "float64 weights run on the reference";
  if (type == TokenType::f64) return "float64 runs on the reference";
  if (type == TokenType::i32 || type == TokenType::i64) return "integers are summed by the reference";
  return nullptr;
}

}  // namespace
}  // namespace sparsekit

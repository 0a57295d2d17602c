// The products of decode attention over rows of bf16: bound by reading them once.
//
// Scores: 16 keys at a time, 32 channels per vdpbf16ps, and one transposing reduction for 16 results, so a key of 128
// channels costs 4 loads and 5 instructions. Values: even and odd channels widened by a shift and a mask, two rows of
// weights at a time. Each step prefetches the row that is read 4 KB later, across the turns from keys to values to the
// next keys, where the hardware prefetcher loses the track: 26 to 35 GB/s (15 to 27 on one thread), where 38 (35) is
// what reading alone gives. 8 KB to 32 KB ahead gave 31 to 33.
#pragma once

#include "kv_cache/cpu_decode.h"

namespace sparsekit {
namespace {

/// Lane i: the sum of the lanes of v[i].
SPARSEKIT_INLINE __m512 sum_each(const __m512 (&v)[16]) {
  __m512 t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  }
  __m512 u[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    __m512d a = _mm512_castps_pd(t[2 * i]), b = _mm512_castps_pd(t[2 * i + 1]);
    u[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(u[0], u[1], 0x88), _mm512_shuffle_f32x4(u[0], u[1], 0xdd));
  __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(u[2], u[3], 0x88), _mm512_shuffle_f32x4(u[2], u[3], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

constexpr int group = 16;  // tokens that are read together

/// Token to prefetch while token 0 is read: 4 KB later at dim 128, 8 KB at 256.
SPARSEKIT_INLINE int32_t distance(int32_t dim) { return dim >= 128 ? group : 2 * group; }

/// The rows of `group` tokens: evenly spaced from `first` on, or rows[0 .. 15].
struct Group {
  const char* first;
  int64_t stride;
  const void* const* rows;
};

/// Walks down a group. The addresses of evenly spaced rows are kept from the compiler: it computed all 64 of a group
/// beforehand and spilled them, which took a third of the speed from caches.
template <bool even>
struct RowPointer {
  const char* at;
  const void* const* rows;
  int64_t stride;

  SPARSEKIT_INLINE RowPointer start(const Group& g) {
    return {even ? g.first : static_cast<const char*>(g.rows[0]), g.rows, g.stride};
  }
  SPARSEKIT_INLINE void advance(RowPointer& p, int u) {
    if (even) {
      p.at += p.stride;
      asm("" : "+r"(p.at));
    } else if (u + 1 < group) {
      p.at = static_cast<const char*>(p.rows[u + 1]);
    }
  }
};

/// Walks the groups of a chunk in one of its two streams. Beside each group goes the one to prefetch, of the same
/// stream: in the chunk, in the next one, or what follows in memory, where the next split begins more often than not.
struct Groups {
  const ChunkRows& now;
  const ChunkRows* next;
  int32_t count, next_count, distance;
  Group group, ahead;
  const void *rows[sparsekit::group], *rows_ahead[sparsekit::group];
  bool even;

  Groups(const ChunkRows& now, int32_t count, const ChunkRows* next, int32_t next_count, int32_t dim)
      : now(now), next(next), count(count), next_count(next_count), distance(sparsekit::distance(dim)) {}

  void seek(int32_t t) {
    bool inside = t + distance < chunk_tokens;
    const ChunkRows& later = inside || !next ? now : *next;
    int32_t at = inside || !next ? t + distance : t + distance - chunk_tokens;
    even = now.first && later.first && t + sparsekit::group <= count;
    if (even) {
      group = {now.first + t * now.stride, now.stride, nullptr};
      // An address only: it may lie behind the tensor.
      auto address = reinterpret_cast<uintptr_t>(later.first) + uintptr_t(at * later.stride);
      ahead = {reinterpret_cast<const char*>(address), later.stride, nullptr};
      return;
    }
    int32_t later_count = &later == &now ? count : next_count;
    for (int u = 0; u < sparsekit::group; ++u) {
      rows[u] = now[t + u < count ? t + u : count - 1];
      rows_ahead[u] = later[at + u < later_count ? at + u : later_count - 1];
    }
    group = {nullptr, 0, rows};
    ahead = {nullptr, 0, rows_ahead};
  }
};

SPARSEKIT_INLINE void prefetch(const char* p) { _mm_prefetch(p, _MM_HINT_T0); }

/// Products of one query row and 16 keys. vectors: head_dim / 32, or 0 for any dim.
template <int vectors, bool even, bool asks>
SPARSEKIT_INLINE __m512 score_group(const Group& keys, const Group& ahead, int32_t dim, const uint16_t* query) {
  int32_t all = vectors ? vectors : (dim + 31) / 32;
  __m512 sums[group];
  auto row = RowPointer<even>::start(keys), later = RowPointer<even>::start(ahead);
#pragma GCC unroll 16
  for (int u = 0; u < group; ++u) {
    __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
#pragma GCC unroll 4
    for (int32_t v = 0; v < all; ++v) {
      const auto* at = reinterpret_cast<const uint16_t*>(row.at) + 32 * v;
      __m512i key = vectors ? _mm512_loadu_si512(at) : load_bf16_pairs(at, dim - 32 * v);
      __m512bh q = (__m512bh)_mm512_loadu_si512(query + 32 * v);
      sum[v % 2] = _mm512_dpbf16_ps(sum[v % 2], q, (__m512bh)key);
      if (asks) prefetch(later.at + 64 * v);
    }
    RowPointer<even>::advance(row, u);
    RowPointer<even>::advance(later, u);
    sums[u] = _mm512_add_ps(sum[0], sum[1]);
  }
  return sum_each(sums);
}

/// query: bf16 [rows][ceil(head_dim / 32) * 32], zero at the end.
template <int vectors>
void bf16_scores(const DecodeSplit& split, const DecodeChunk& chunk, const DecodeChunk* next, const uint16_t* query,
                 const Workspace& w) {
  int32_t dim = vectors ? 32 * vectors : split.problem->head_dim, padded = vectors ? dim : (dim + 31) / 32 * 32;
  Groups keys(chunk.key, chunk.count, next ? &next->key : nullptr, next ? next->count : 0, dim);
  for (int32_t t = 0; t < chunk.count; t += group) {
    keys.seek(t);
    for (int32_t r = 0; r < split.rows; ++r) {
      const uint16_t* q = query + int64_t(r) * padded;
      __m512 found = !keys.even ? (r == 0 ? score_group<vectors, false, true>(keys.group, keys.ahead, dim, q)
                                          : score_group<vectors, false, false>(keys.group, keys.ahead, dim, q))
                     : r == 0   ? score_group<vectors, true, true>(keys.group, keys.ahead, dim, q)
                                : score_group<vectors, true, false>(keys.group, keys.ahead, dim, q);
      Simd::store(w.x + int64_t(r) * chunk_tokens + t, found);
    }
  }
}

/// sum[r] += weights . values for the first `count` tokens of a group, 32 * vectors channels from `offset` bytes on.
/// whole: no weight is 0. Otherwise a token of weight 0 is left out: it may be hidden, and hold NaN.
template <int vectors, int rows, bool even_rows, bool whole>
SPARSEKIT_INLINE void add_group(const Group& values, const Group& ahead, bool asks, int64_t offset, int32_t count,
                                const float* x, __m512 (&even)[rows][vectors], __m512 (&odd)[rows][vectors]) {
  const __m512i high = _mm512_set1_epi32(int32_t(0xffff0000));
  auto pointer = RowPointer<even_rows>::start(values), later = RowPointer<even_rows>::start(ahead);
#pragma GCC unroll 4
  for (int u = 0; u < (whole ? group : count); ++u) {
    const char* row = pointer.at + offset;
    if (asks) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) prefetch(later.at + offset + 64 * v);
    }
    RowPointer<even_rows>::advance(pointer, u);
    RowPointer<even_rows>::advance(later, u);
    bool seen = whole;
    for (int r = 0; r < rows; ++r) seen |= x[r * chunk_tokens + u] != 0;
    if (!seen) continue;
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      __m512i pair = _mm512_loadu_si512(row + 64 * v);
      __m512 a = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)),
             b = _mm512_castsi512_ps(_mm512_and_si512(pair, high));
#pragma GCC unroll 2
      for (int r = 0; r < rows; ++r) {
        float weight = x[r * chunk_tokens + u];
        __mmask16 mask = whole || rows == 1 || weight != 0 ? 0xffff : 0;
        even[r][v] = _mm512_mask3_fmadd_ps(_mm512_set1_ps(weight), a, even[r][v], mask);
        odd[r][v] = _mm512_mask3_fmadd_ps(_mm512_set1_ps(weight), b, odd[r][v], mask);
      }
    }
  }
}

/// acc[r][channel ..] += weights . values, for `rows` rows and 32 * vectors channels.
template <int vectors, int rows>
void bf16_value_columns(const DecodeChunk& chunk, const DecodeChunk* next, bool asks, const float* x, int32_t channel,
                        float* acc, int32_t dim) {
  const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
  __m512 even[rows][vectors], odd[rows][vectors];
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; ++v) {
      float* at = acc + int64_t(r) * dim + channel + 32 * v;
      __m512 a = _mm512_loadu_ps(at), b = _mm512_loadu_ps(at + 16);
      even[r][v] = _mm512_permutex2var_ps(a, evens, b);
      odd[r][v] = _mm512_permutex2var_ps(a, odds, b);
    }
  }
  Groups values(chunk.value, chunk.count, next ? &next->value : nullptr, next ? next->count : 0, dim);
  for (int32_t t = 0; t < chunk.count; t += group) {
    values.seek(t);
    bool whole = t + group <= chunk.count;
    for (int r = 0; r < rows; ++r) {
      whole &= _mm512_cmp_ps_mask(Simd::load(x + r * chunk_tokens + t), Simd::zero(), _CMP_NEQ_UQ) == 0xffff;
    }
    const Group &now = values.group, &ahead = values.ahead;
    int32_t left = chunk.count - t < group ? chunk.count - t : group;
    if (whole && values.even) {
      add_group<vectors, rows, true, true>(now, ahead, asks, channel * 2, group, x + t, even, odd);
    } else if (values.even) {
      add_group<vectors, rows, true, false>(now, ahead, asks, channel * 2, left, x + t, even, odd);
    } else {
      add_group<vectors, rows, false, false>(now, ahead, asks, channel * 2, left, x + t, even, odd);
    }
  }
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i upper = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; ++v) {
      float* at = acc + int64_t(r) * dim + channel + 32 * v;
      _mm512_storeu_ps(at, _mm512_permutex2var_ps(even[r][v], low, odd[r][v]));
      _mm512_storeu_ps(at + 16, _mm512_permutex2var_ps(even[r][v], upper, odd[r][v]));
    }
  }
}

/// value_dim is a multiple of 32.
void bf16_values(const DecodeSplit& split, const DecodeChunk& chunk, const DecodeChunk* next, const Workspace& w) {
  int32_t dim = split.problem->value_dim;
  for (int32_t r = 0; r < split.rows;) {
    const float* x = w.x + int64_t(r) * chunk_tokens;
    float* acc = split.acc + int64_t(r) * dim;
    bool two = r + 1 < split.rows;
    for (int32_t d = 0; d < dim;) {
      bool wide = d + 128 <= dim;
      if (wide && two) {
        bf16_value_columns<4, 2>(chunk, next, r == 0, x, d, acc, dim);
      } else if (wide) {
        bf16_value_columns<4, 1>(chunk, next, r == 0, x, d, acc, dim);
      } else if (two) {
        bf16_value_columns<1, 2>(chunk, next, r == 0, x, d, acc, dim);
      } else {
        bf16_value_columns<1, 1>(chunk, next, r == 0, x, d, acc, dim);
      }
      d += wide ? 128 : 32;
    }
    r += two ? 2 : 1;
  }
}

}  // namespace
}  // namespace sparsekit

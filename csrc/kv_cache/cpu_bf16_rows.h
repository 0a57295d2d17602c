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

SPARSEKIT_INLINE void prefetch_row(const void* row, int32_t bytes) {
  for (int32_t i = 0; i < bytes; i += 64) _mm_prefetch(static_cast<const char*>(row) + i, _MM_HINT_T0);
}

/// Rows that make 4 KB.
SPARSEKIT_INLINE int32_t rows_ahead(int32_t dim) { return dim >= 256 ? 8 : dim >= 128 ? 16 : 32; }

/// vectors: head_dim / 32, or 0 for any dim. query: bf16 [rows][ceil(head_dim / 32) * 32], zero at the end.
template <int vectors>
void bf16_scores(const DecodeSplit& split, const DecodeChunk& chunk, const uint16_t* query, const Workspace& w) {
  int32_t dim = vectors ? 32 * vectors : split.problem->head_dim, all = vectors ? vectors : (dim + 31) / 32;
  int32_t distance = rows_ahead(dim);
  for (int32_t t = 0; t < chunk.count; t += 16) {
    const uint16_t* rows[16];
    for (int u = 0; u < 16; ++u) {
      int32_t token = t + u < chunk.count ? t + u : chunk.count - 1;
      rows[u] = static_cast<const uint16_t*>(chunk.key_rows[token]);
      if (token + distance < chunk.count) {
        prefetch_row(chunk.key_rows[token + distance], dim * 2);
      } else if (token + distance < 2 * chunk.count) {
        prefetch_row(chunk.value_rows[token + distance - chunk.count], split.problem->value_dim * 2);
      }
    }
    for (int32_t r = 0; r < split.rows; ++r) {
      const uint16_t* q = query + int64_t(r) * all * 32;
      __m512 sums[16];
#pragma GCC unroll 16
      for (int u = 0; u < 16; ++u) {
        __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
#pragma GCC unroll 4
        for (int32_t v = 0; v < all; ++v) {
          __m512i key =
              vectors ? _mm512_loadu_si512(rows[u] + 32 * v) : load_bf16_pairs(rows[u] + 32 * v, dim - 32 * v);
          __m512bh a = (__m512bh)_mm512_loadu_si512(q + 32 * v);
          if (v % 2 == 0) {
            even = _mm512_dpbf16_ps(even, a, (__m512bh)key);
          } else {
            odd = _mm512_dpbf16_ps(odd, a, (__m512bh)key);
          }
        }
        sums[u] = _mm512_add_ps(even, odd);
      }
      Simd::store(w.x + int64_t(r) * chunk_tokens + t, sum_each(sums));
    }
  }
}

/// acc[r][channel ..] += weights . values, for `rows` rows and 32 * vectors channels.
template <int vectors, int rows>
void bf16_value_columns(const DecodeChunk& chunk, const float* x, int32_t channel, float* acc, int32_t dim,
                        const DecodeChunk* next, int32_t next_bytes) {
  const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
  const __m512i high = _mm512_set1_epi32(int32_t(0xffff0000));
  __m512 even[rows][vectors], odd[rows][vectors];
  int32_t distance = rows_ahead(dim);
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; ++v) {
      float* at = acc + int64_t(r) * dim + channel + 32 * v;
      __m512 a = _mm512_loadu_ps(at), b = _mm512_loadu_ps(at + 16);
      even[r][v] = _mm512_permutex2var_ps(a, evens, b);
      odd[r][v] = _mm512_permutex2var_ps(a, odds, b);
    }
  }
  for (int32_t t = 0; t < chunk.count; ++t) {
    const auto* row = static_cast<const uint16_t*>(chunk.value_rows[t]) + channel;
    int32_t ahead = t + distance;
    if (ahead < chunk.count) {
      prefetch_row(static_cast<const uint16_t*>(chunk.value_rows[ahead]) + channel, 64 * vectors);
    } else if (next && ahead - chunk.count < next->count) {
      prefetch_row(next->key_rows[ahead - chunk.count], next_bytes);
    }
    bool seen = false;
    for (int r = 0; r < rows; ++r) seen |= x[r * chunk_tokens + t] != 0;
    if (!seen) continue;
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      __m512i pair = _mm512_loadu_si512(row + 32 * v);
      __m512 a = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)),
             b = _mm512_castsi512_ps(_mm512_and_si512(pair, high));
#pragma GCC unroll 2
      for (int r = 0; r < rows; ++r) {
        float weight = x[r * chunk_tokens + t];
        // Of two rows one may not see the token: its weight 0 must not meet a NaN.
        __mmask16 mask = rows == 1 || weight != 0 ? 0xffff : 0;
        even[r][v] = _mm512_mask3_fmadd_ps(_mm512_set1_ps(weight), a, even[r][v], mask);
        odd[r][v] = _mm512_mask3_fmadd_ps(_mm512_set1_ps(weight), b, odd[r][v], mask);
      }
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
void bf16_values(const DecodeSplit& split, const DecodeChunk& chunk, const DecodeChunk& following, const Workspace& w) {
  const DecodeAttention& p = *split.problem;
  int32_t dim = p.value_dim;
  const DecodeChunk* next = &following != &chunk && !following.quantized ? &following : nullptr;
  for (int32_t r = 0; r < split.rows;) {
    const float* x = w.x + int64_t(r) * chunk_tokens;
    float* acc = split.acc + int64_t(r) * dim;
    bool two = r + 1 < split.rows;
    for (int32_t d = 0; d < dim;) {
      const DecodeChunk* ahead = r == 0 && d == 0 ? next : nullptr;
      bool wide = d + 128 <= dim;
      if (wide && two) {
        bf16_value_columns<4, 2>(chunk, x, d, acc, dim, ahead, p.head_dim * 2);
      } else if (wide) {
        bf16_value_columns<4, 1>(chunk, x, d, acc, dim, ahead, p.head_dim * 2);
      } else if (two) {
        bf16_value_columns<1, 2>(chunk, x, d, acc, dim, ahead, p.head_dim * 2);
      } else {
        bf16_value_columns<1, 1>(chunk, x, d, acc, dim, ahead, p.head_dim * 2);
      }
      d += wide ? 128 : 32;
    }
    r += two ? 2 : 1;
  }
}

}  // namespace
}  // namespace sparsekit

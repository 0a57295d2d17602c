// The products of decode attention over packed codes, in integers (vpdpbusd: 64 products of unsigned and signed bytes).
//
// Keys per channel: q . k_t = sum_d (q_d scale_d) code[t][d] + sum_d q_d minimum_d, so the scales of a group go into
// the query, once for its 32 to 128 tokens. Keys per token, and values: the scales stand outside the sum over a group's
// channels, or go into the weights. The fp32 factor is rounded to 15 bits, x = 256 hi + lo with hi, lo signed bytes
// (error 2^-16 of the largest, where bf16 would lose 2^-9 of each), so 64 codes cost two vpdpbusd, and a shift and a
// mask to unpack: 0.06 instructions per code where the way over fp32 takes 0.4. Sums fit int32: 255 * 127 * 128 * 256 <
// 2^31 for 128 tokens of a chunk, and for 256 channels (dims above go the fp32 way).
#pragma once

#include "kv_cache/cpu_decode.h"

namespace sparsekit {
namespace {

constexpr float steps = 32512.f;  // 127 * 256
constexpr int32_t row_batch = 4;  // query rows that share unpacked codes of keys

/// 15-bit factors as two planes of bytes; x ~ unit * (256 hi + lo).
struct Factors {
  int8_t* hi;
  int8_t* lo;
};

SPARSEKIT_INLINE void store_factors(Factors f, int32_t at, __m512 x, __m512 inverse, __m512i* sum) {
  __m512i integer = _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse));
  __m512i hi = _mm512_srai_epi32(_mm512_add_epi32(integer, _mm512_set1_epi32(128)), 8);
  __m512i lo = _mm512_sub_epi32(integer, _mm512_slli_epi32(hi, 8));
  _mm_storeu_si128((__m128i*)(f.hi + at), _mm512_cvtepi32_epi8(hi));
  _mm_storeu_si128((__m128i*)(f.lo + at), _mm512_cvtepi32_epi8(lo));
  *sum = _mm512_add_epi32(*sum, integer);
}

/// Field j of the words: four codes of `bits` in each lane.
template <int bits>
SPARSEKIT_INLINE __m512i field(__m512i words, int j) {
  if (bits == 8) return words;
  return _mm512_and_si512(_mm512_srli_epi32(words, bits * j), _mm512_set1_epi8((1 << bits) - 1));
}

/// Of 3-bit codes: field j of the plane of two bits, and bit `place` of the other plane as their third.
SPARSEKIT_INLINE __m512i field_3(__m512i low, int j, __m512i high, int place) {
  __m512i third = place >= 2 ? _mm512_srli_epi32(high, place - 2) : _mm512_slli_epi32(high, 2 - place);
  return _mm512_ternarylogic_epi32(field<2>(low, j), third, _mm512_set1_epi8(4), 0xf8);  // a | (b & c)
}

SPARSEKIT_INLINE __m512i broadcast4(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return _mm512_set1_epi32(four);
}

SPARSEKIT_INLINE void prefetch_bytes(const void* at, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(static_cast<const char*>(at) + i, _MM_HINT_T0);
}

/// The block that stands about 8 KB further on in the same stream, in the chunk or the next, to ask for a line of it
/// with each line that is read; null: none.
SPARSEKIT_INLINE const uint8_t* block_ahead(const uint8_t* const* now, const uint8_t* const* next, int32_t block,
                                            int32_t bits) {
  block += bits == 8 ? 2 : chunk_blocks;
  return block < chunk_blocks ? now[block] : next ? next[block - chunk_blocks] : nullptr;
}
SPARSEKIT_INLINE void ask(const uint8_t* block, int64_t offset) {
  if (block) _mm_prefetch(reinterpret_cast<const char*>(block) + offset, _MM_HINT_T0);
}

// ---- keys: lanes are tokens, a block is two vectors of 16

template <int rows>
struct KeySums {
  static constexpr int parities = rows == 1 ? 2 : 1;  // chains: 8 at least, for 4 cycles of latency on two ports
  __m512i hi[rows][2][parities], lo[rows][2][parities];

  SPARSEKIT_INLINE void clear(KeySums& s) {
    for (int r = 0; r < rows; ++r) {
      for (int v = 0; v < 2; ++v) {
        for (int k = 0; k < parities; ++k) s.hi[r][v][k] = s.lo[r][v][k] = _mm512_setzero_si512();
      }
    }
  }
  SPARSEKIT_INLINE void add(KeySums& s, __m512i codes0, __m512i codes1, const Factors* f, int32_t channel, int parity) {
    int k = parity % parities;
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      __m512i hi = broadcast4(f[r].hi + channel), lo = broadcast4(f[r].lo + channel);
      s.hi[r][0][k] = _mm512_dpbusd_epi32(s.hi[r][0][k], codes0, hi);
      s.lo[r][0][k] = _mm512_dpbusd_epi32(s.lo[r][0][k], codes0, lo);
      s.hi[r][1][k] = _mm512_dpbusd_epi32(s.hi[r][1][k], codes1, hi);
      s.lo[r][1][k] = _mm512_dpbusd_epi32(s.lo[r][1][k], codes1, lo);
    }
  }
  SPARSEKIT_INLINE __m512i total(const KeySums& s, int r, int v) {
    __m512i hi = s.hi[r][v][0], lo = s.lo[r][v][0];
    if (parities == 2) hi = _mm512_add_epi32(hi, s.hi[r][v][1]), lo = _mm512_add_epi32(lo, s.lo[r][v][1]);
    return _mm512_add_epi32(_mm512_slli_epi32(hi, 8), lo);
  }
};

/// A line of codes, loaded once: as an operand of several instructions the compiler loads it for each, and there are as
/// many loads and prefetches as two ports take.
SPARSEKIT_INLINE __m512i load_codes(const uint8_t* p) {
  __m512i codes = _mm512_loadu_si512(p);
  asm("" : "+v"(codes));
  return codes;
}

/// Adds channels first to last (multiples of 16; of 32 for 3 bits) of a block, and asks for the same place of a later
/// one, a line for each line that it reads.
template <int bits, int rows>
SPARSEKIT_INLINE void add_channels(KeySums<rows>& s, const uint8_t* block, const uint8_t* ahead, int32_t dim,
                                   int32_t first, int32_t last, const Factors* f) {
  auto load = [&](int64_t at) __attribute__((always_inline)) {
    ask(ahead, at);
    return load_codes(block + at);
  };
  if (bits == 3) {
    for (int32_t d = first; d < last; d += 32) {
      int64_t plane = 8 * dim + 4 * d;  // a row of 32 words for 32 channels
      __m512i high0 = load(plane), high1 = load(plane + 64);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        __m512i low0 = load(8 * d + 128 * half), low1 = load(8 * d + 128 * half + 64);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          KeySums<rows>::add(s, field_3(low0, j, high0, 4 * half + j), field_3(low1, j, high1, 4 * half + j), f,
                             d + 16 * half + 4 * j, j);
        }
      }
    }
    return;
  }
  // Two steps of 8 bits at once: which chain a product joins must not depend on d, or the sums live in memory (int8
  // took twice as long).
  constexpr int fields = 8 / bits, steps = fields == 1 ? 2 : 1;
  for (int32_t d = first; d < last; d += 4 * fields * steps) {
#pragma GCC unroll 2
    for (int step = 0; step < steps; ++step) {
      int64_t at = (d + 4 * step) * bits * 4;  // 32 words for 4 * fields channels
      __m512i words0 = load(at), words1 = load(at + 64);
#pragma GCC unroll 4
      for (int j = 0; j < fields; ++j) {
        KeySums<rows>::add(s, field<bits>(words0, j), field<bits>(words1, j), f, d + 4 * (step + j), step + j);
      }
    }
  }
}

/// The factors of one query row for one group of keys, or for the query alone where keys are per token.
struct KeyFactors {
  Factors f;
  float unit;         // of the integers
  float bias;         // per channel: what is added to every product
  float sums[16];     // per token: sum of the query over each group of channels,
  int32_t isums[16];  // and of its integers
};

SPARSEKIT_INLINE __m512 load_scales(const uint16_t* p) { return Simd::load_f16(p); }

/// q_d * scale_d in 15 bits, and the sum of q_d * minimum_d.
void fold_channel_scales(const KvPacking& p, const float* query, const uint16_t* scales, const uint16_t* minima,
                         KeyFactors& k) {
  __m512 largest = Simd::zero(), bias = Simd::zero(), check = Simd::zero(), x[16];  // dim is 256 at most
  for (int32_t d = 0; d < p.dim; d += 16) {
    __m512 q = Simd::load(query + d);
    x[d / 16] = Simd::mul(q, load_scales(scales + d));
    largest = Simd::max(Simd::abs(x[d / 16]), largest);
    check = Simd::add(check, x[d / 16]);  // max passes NaN over
    if (minima) bias = Simd::fma(q, load_scales(minima + d), bias);
  }
  float most = _mm512_reduce_max_ps(largest);
  __m512 inverse = Simd::set(most > 0 ? steps / most : 0.f);
  __m512i sum = _mm512_setzero_si512();
  for (int32_t d = 0; d < p.dim; d += 16) store_factors(k.f, d, x[d / 16], inverse, &sum);
  k.unit = Simd::sum(check) * 0.f + most * (1.f / steps);  // NaN where a scale or the query is
  k.bias = minima ? Simd::sum(bias) : -k.unit * float(1 << (p.bits - 1)) * float(_mm512_reduce_add_epi32(sum));
}

/// q_d in 15 bits, and its sums over groups of channels.
void split_query(const KvPacking& p, const float* query, KeyFactors& k) {
  __m512 largest = Simd::zero(), check = Simd::zero();
  for (int32_t d = 0; d < p.dim; d += 16) {
    largest = Simd::max(Simd::abs(Simd::load(query + d)), largest);
    check = Simd::add(check, Simd::load(query + d));
  }
  float most = _mm512_reduce_max_ps(largest);
  __m512 inverse = Simd::set(most > 0 ? steps / most : 0.f);
  for (int32_t g = 0; g < p.groups_per_token(); ++g) {
    __m512i sum = _mm512_setzero_si512();
    __m512 q = Simd::zero();
    for (int32_t d = g * p.group_size; d < p.dim && d < (g + 1) * p.group_size; d += 16) {
      store_factors(k.f, d, Simd::load(query + d), inverse, &sum);
      q = Simd::add(q, Simd::load(query + d));
    }
    k.sums[g] = Simd::sum(q);
    k.isums[g] = _mm512_reduce_add_epi32(sum);
  }
  k.unit = Simd::sum(check) * 0.f + most * (1.f / steps);
}

/// x[r][block * 32 ..] of up to `rows` query rows and one block.
template <int bits, int rows>
void key_block(const KvPacking& p, const DecodeChunk& chunk, int32_t block, const uint8_t* ahead, const KeyFactors* k,
               float* x) {
  Factors f[rows];
  for (int r = 0; r < rows; ++r) f[r] = k[r].f;
  KeySums<rows> s;
  x += block * kv_block;
  if (p.per_channel) {
    KeySums<rows>::clear(s);
    add_channels<bits, rows>(s, chunk.key_codes[block], ahead, p.dim, 0, p.dim, f);
    for (int r = 0; r < rows; ++r) {
      for (int v = 0; v < 2; ++v) {
        __m512 product = _mm512_cvtepi32_ps(KeySums<rows>::total(s, r, v));
        Simd::store(x + r * chunk_tokens + 16 * v, Simd::fma(product, Simd::set(k[r].unit), Simd::set(k[r].bias)));
      }
    }
    return;
  }
  __m512 sum[rows][2];
  for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = Simd::zero();
  for (int32_t g = 0; g < p.groups_per_token(); ++g) {
    int32_t first = g * p.group_size, last = first + p.group_size < p.dim ? first + p.group_size : p.dim;
    KeySums<rows>::clear(s);
    add_channels<bits, rows>(s, chunk.key_codes[block], ahead, p.dim, first, last, f);
    for (int v = 0; v < 2; ++v) {
      __m512 scale = load_scales(chunk.key_scales[block] + g * kv_block + 16 * v);
      __m512 minimum = p.symmetric ? Simd::zero() : load_scales(chunk.key_minima[block] + g * kv_block + 16 * v);
      for (int r = 0; r < rows; ++r) {
        __m512i total = KeySums<rows>::total(s, r, v);
        if (p.symmetric) total = _mm512_sub_epi32(total, _mm512_set1_epi32(k[r].isums[g] * (1 << (bits - 1))));
        __m512 product = Simd::mul(_mm512_cvtepi32_ps(total), Simd::set(k[r].unit));
        sum[r][v] = Simd::fma(product, scale, Simd::fma(Simd::set(k[r].sums[g]), minimum, sum[r][v]));
      }
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < 2; ++v) Simd::store(x + r * chunk_tokens + 16 * v, sum[r][v]);
  }
}

/// What the products keep beside Workspace: factors of keys, factors of weights, and rows of the query in bf16.
struct VnniScratch {
  static int64_t key_floats(const DecodeAttention& p) { return 2 * row_batch * (p.head_dim / 4 + 16); }
  static int64_t floats(const DecodeAttention& p) {
    return key_floats(p) + 2 * 16 * chunk_tokens / 4 + Workspace::rows(p) * (p.head_dim / 2 + 16);
  }
};

/// Factors of one row and each group of a chunk (keys per channel), or of row_batch rows. `split`: they are the query's
/// own (keys per token) and stay from chunk to chunk.
struct KeyState {
  static_assert(row_batch >= chunk_blocks, "a group is a block at least");
  KeyFactors factors[row_batch];
  bool split = false;

  KeyState(const KvPacking& p, int8_t* bytes) {
    for (KeyFactors& k : factors) {
      k.f = {bytes, bytes + p.dim};
      bytes += 2 * p.dim;
    }
  }
};

/// Scales and minima of a block of the next chunk: a share of those of its group.
void prefetch_key_scales(const KvPacking& p, const DecodeChunk* next, int32_t block) {
  if (!next || !next->key_codes[block]) return;
  int64_t bytes = p.per_channel ? p.dim * 2 * kv_block / p.group_size : p.groups_per_token() * 64;
  int64_t at = p.per_channel ? block * kv_block % p.group_size / kv_block * bytes / 2 : 0;
  prefetch_bytes(next->key_scales[block] + at, bytes);
  if (next->key_minima[block]) prefetch_bytes(next->key_minima[block] + at, bytes);
}

/// next: the chunk behind this one where it is quantized, too.
template <int bits>
void vnni_scores(const DecodeSplit& split, const DecodeChunk& chunk, const DecodeChunk* next, KeyState& state,
                 const Workspace& w) {
  const KvPacking& packing = split.problem->cache->key;
  int32_t group_blocks = packing.per_channel ? packing.group_size / kv_block : chunk_blocks;
  bool one = packing.per_channel && split.rows == 1;
  KeyFactors* factors = state.factors;
  for (int32_t first = 0; first < split.rows; first += row_batch) {
    int32_t rows = split.rows - first < row_batch ? split.rows - first : row_batch;
    const float* query = split.query + int64_t(first) * packing.dim;
    auto fold = [&](int32_t block, int32_t r, KeyFactors& k) {
      fold_channel_scales(packing, query + int64_t(r) * packing.dim, chunk.key_scales[block], chunk.key_minima[block],
                          k);
    };
    if (!packing.per_channel && !state.split) {
      for (int32_t r = 0; r < rows; ++r) split_query(packing, query + int64_t(r) * packing.dim, factors[r]);
      state.split = split.rows <= row_batch;
    }
    // One row: the groups of the chunk one after the other, as a processor folds two at the same time.
    for (int32_t block = 0; one && block * kv_block < chunk.count; block += group_blocks) {
      fold(block, 0, factors[block / group_blocks]);
    }
    for (int32_t block = 0; block * kv_block < chunk.count; ++block) {
      if (packing.per_channel && !one && block % group_blocks == 0) {
        for (int32_t r = 0; r < rows; ++r) fold(block, r, factors[r]);
      }
      const uint8_t* ahead = nullptr;
      if (first == 0) {
        ahead = block_ahead(chunk.key_codes, next ? next->key_codes : nullptr, block, bits);
        prefetch_key_scales(packing, next, block);
      }
      const KeyFactors* k = one ? factors + block / group_blocks : factors;
      float* x = w.x + int64_t(first) * chunk_tokens;
      switch (rows) {
        case 1: key_block<bits, 1>(packing, chunk, block, ahead, k, x); break;
        case 2: key_block<bits, 2>(packing, chunk, block, ahead, k, x); break;
        case 3: key_block<bits, 3>(packing, chunk, block, ahead, k, x); break;
        default: key_block<bits, 4>(packing, chunk, block, ahead, k, x); break;
      }
    }
  }
}

// ---- values: lanes are channels, a word's fields are its tokens

/// The weights of one row times the scales of one group of channels, in 15 bits.
struct ValueFactors {
  Factors f;  // [128]
  float unit;
  float bias;  // what the group's minima add to each of its channels
};

void fold_value_scales(const KvPacking& p, const DecodeChunk& chunk, const float* x, int32_t group, ValueFactors& k) {
  __m512 largest = Simd::zero(), bias = Simd::zero(), check = Simd::zero();
  __m512 product[chunk_tokens / 16];
  for (int32_t t = 0; t < chunk.count; t += 16) {
    int32_t block = t / kv_block, at = group * kv_block + t % kv_block;
    __m512 weight = Simd::load(x + t);
    __mmask16 seen = _mm512_cmp_ps_mask(weight, Simd::zero(), _CMP_NEQ_UQ);  // 0 * NaN: a hidden token reaches nothing
    product[t / 16] = _mm512_maskz_mul_ps(seen, weight, load_scales(chunk.value_scales[block] + at));
    largest = Simd::max(product[t / 16], largest);
    check = Simd::add(check, product[t / 16]);
    if (!p.symmetric) bias = _mm512_mask3_fmadd_ps(weight, load_scales(chunk.value_minima[block] + at), bias, seen);
  }
  float most = _mm512_reduce_max_ps(largest);
  __m512 inverse = Simd::set(most > 0 ? steps / most : 0.f);
  __m512i sum = _mm512_setzero_si512();
  for (int32_t t = 0; t < chunk.count; t += 16) store_factors(k.f, t, product[t / 16], inverse, &sum);
  k.unit = Simd::sum(check) * 0.f + most * (1.f / steps);
  k.bias = p.symmetric ? -k.unit * float(1 << (p.bits - 1)) * float(_mm512_reduce_add_epi32(sum)) : Simd::sum(bias);
}

/// acc[channel ..] += over all tokens of a chunk, for 16 * vectors channels that begin at `channel`, of which each
/// `of_group` vectors share a group and so the broadcasts of its factors.
template <int bits, int vectors, int of_group>
void value_columns(const KvPacking& p, const DecodeChunk& chunk, const uint8_t* const* next, bool asks, int32_t channel,
                   const ValueFactors* k, float* acc) {
  constexpr int low_bits = bits == 3 ? 2 : bits, fields = 8 / low_bits, groups = vectors / of_group;
  __m512i sum_hi[vectors], sum_lo[vectors];
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) sum_hi[v] = sum_lo[v] = _mm512_setzero_si512();
  k += channel / p.group_size;
  for (int32_t block = 0; block * kv_block < chunk.count; ++block) {
    const auto* words = reinterpret_cast<const uint32_t*>(chunk.value_codes[block]) + channel;
    const uint8_t* ahead = asks ? block_ahead(chunk.value_codes, next, block, bits) : nullptr;
#pragma GCC unroll 2
    for (int row = 0; row < low_bits; ++row) {
      int32_t token = block * kv_block + row * fields * 4;
#pragma GCC unroll 4
      for (int g = 0; g < groups; ++g) {
        __m512i hi[fields], lo[fields];
#pragma GCC unroll 4
        for (int j = 0; j < fields; ++j) {
          hi[j] = broadcast4(k[g].f.hi + token + 4 * j);
          lo[j] = broadcast4(k[g].f.lo + token + 4 * j);
        }
#pragma GCC unroll 8
        for (int v = g * of_group; v < (g + 1) * of_group; ++v) {
          __m512i low = load_codes(reinterpret_cast<const uint8_t*>(words + row * p.dim + 16 * v)), high = low;
          if (bits == 3) high = load_codes(reinterpret_cast<const uint8_t*>(words + 2 * p.dim + 16 * v));
          ask(ahead, (row * p.dim + channel + 16 * v) * 4);
          if (bits == 3 && row == 0) ask(ahead, (2 * p.dim + channel + 16 * v) * 4);
#pragma GCC unroll 4
          for (int j = 0; j < fields; ++j) {
            __m512i codes = bits == 3 ? field_3(low, j, high, 4 * (row % 2) + j) : field<low_bits>(low, j);
            sum_hi[v] = _mm512_dpbusd_epi32(sum_hi[v], codes, hi[j]);
            sum_lo[v] = _mm512_dpbusd_epi32(sum_lo[v], codes, lo[j]);
          }
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) {
    __m512 product = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(sum_hi[v], 8), sum_lo[v]));
    float* at = acc + channel + 16 * v;
    const ValueFactors& of = k[v / of_group];
    Simd::store(at, Simd::fma(product, Simd::set(of.unit), Simd::add(Simd::load(at), Simd::set(of.bias))));
  }
}

template <int bits>
void vnni_values(const DecodeSplit& split, const DecodeChunk& chunk, const DecodeChunk* next, const Workspace& w) {
  const KvPacking& packing = split.problem->cache->value;
  auto* bytes = reinterpret_cast<int8_t*>(w.more + VnniScratch::key_floats(*split.problem));
  ValueFactors k[16];  // 512 channels in groups of 32
  int32_t groups = packing.groups_per_token();
  for (int32_t g = 0; g < groups; ++g) {
    k[g].f = {bytes, bytes + chunk_tokens};
    bytes += 2 * chunk_tokens;
  }
  for (int32_t block = 0; next && block * kv_block < next->count; ++block) {
    prefetch_bytes(next->value_scales[block], groups * 64);
    if (!packing.symmetric) prefetch_bytes(next->value_minima[block], groups * 64);
  }
  for (int32_t r = 0; r < split.rows; ++r) {
    const float* x = w.x + int64_t(r) * chunk_tokens;
    float* acc = split.acc + int64_t(r) * packing.dim;
    for (int32_t g = 0; g < groups; ++g) fold_value_scales(packing, chunk, x, g, k[g]);
    const uint8_t* const* after = next ? next->value_codes : nullptr;
    int32_t d = 0, group = packing.group_size;
    for (; d + 128 <= packing.dim; d += 128) {
      group == 32   ? value_columns<bits, 8, 2>(packing, chunk, after, r == 0, d, k, acc)
      : group == 64 ? value_columns<bits, 8, 4>(packing, chunk, after, r == 0, d, k, acc)
                    : value_columns<bits, 8, 8>(packing, chunk, after, r == 0, d, k, acc);
    }
    if (d + 64 <= packing.dim) {
      group == 32 ? value_columns<bits, 4, 2>(packing, chunk, after, r == 0, d, k, acc)
                  : value_columns<bits, 4, 4>(packing, chunk, after, r == 0, d, k, acc);
      d += 64;
    }
    if (d + 32 <= packing.dim) value_columns<bits, 2, 2>(packing, chunk, after, r == 0, d, k, acc), d += 32;
    if (d < packing.dim) value_columns<bits, 1, 1>(packing, chunk, after, r == 0, d, k, acc);
  }
}

}  // namespace
}  // namespace sparsekit

// Scores as integers in the order of their choice, and the passes over them that choosing is made of. Include after
// simd_<isa>.h.
//
// The key of a score x: its bits, with all but the sign turned over where that is set, so that keys compare as signed
// integers as scores do; -0 is made 0 first. `never` is the key of what may not be chosen: -inf and NaN. Passes are
// written in GCC's vector extensions at this set's width; only compaction has instructions of its own (vpcompressd,
// into a register: the form that writes memory is microcode on Zen 4).
#pragma once

#include <cstdint>
#include <cstring>

#include "common/cpu/simd_math.h"
#include "sparsekit/selection.h"

namespace sparsekit {
namespace {

constexpr int32_t never = INT32_MIN;
constexpr int key_slack = 16;  // elements that a pass may write past the end of a buffer

typedef int32_t Keys __attribute__((vector_size(Simd::lanes * 4)));
typedef int32_t HalfKeys __attribute__((vector_size(Simd::lanes * 2)));
typedef int64_t HalfMask __attribute__((vector_size(Simd::lanes * 4)));
typedef float HalfFloats __attribute__((vector_size(Simd::lanes * 2)));
typedef double Doubles __attribute__((vector_size(Simd::lanes * 4)));  // lanes / 2 of them
constexpr int half = Simd::lanes / 2;

template <class Vector, class T>
SPARSEKIT_INLINE Vector load_vector(const T* p) {
  Vector a;
  __builtin_memcpy(&a, p, sizeof a);
  return a;
}
template <class Vector, class T>
SPARSEKIT_INLINE void store_vector(T* p, Vector a) {
  __builtin_memcpy(p, &a, sizeof a);
}

SPARSEKIT_INLINE Keys key_of(Simd::Float score) {
  Keys bits = (Keys)Simd::as_int(Simd::add(score, Simd::zero()));
  Keys key = bits ^ ((bits >> 31) & INT32_MAX);
  // NaN of either sign and -inf: their magnitude is at least that of inf, and their key is not that of +inf.
  Keys beyond = (bits & INT32_MAX) >= 0x7f800000;
  return (beyond & (key != 0x7f800000)) ? Keys{} + never : key;
}

SPARSEKIT_INLINE int32_t key_of(float score) {
  if (!(score > -__builtin_inff())) return never;
  score += 0.f;
  int32_t bits;
  __builtin_memcpy(&bits, &score, sizeof bits);
  return bits ^ ((bits >> 31) & INT32_MAX);
}

SPARSEKIT_INLINE float score_of(int32_t key) {
  int32_t bits = key ^ ((key >> 31) & INT32_MAX);
  float score;
  __builtin_memcpy(&score, &bits, sizeof score);
  return score;
}

/// A row of scores, widened and weighted.
struct ScoreRow {
  const char* scores;
  const float* weights;  // or null
  DType dtype;

  /// Up to Simd::lanes scores from `at` on; past `count` they are 0.
  SPARSEKIT_INLINE Simd::Float load(const ScoreRow& row, int64_t at, int count) {
    Simd::Float a;
    bool whole = count >= Simd::lanes;
    if (row.dtype == DType::f32) {
      const float* p = reinterpret_cast<const float*>(row.scores) + at;
      a = whole ? Simd::load(p) : Simd::load_partial(p, count);
    } else {
      const uint16_t* p = reinterpret_cast<const uint16_t*>(row.scores) + at;
      if (row.dtype == DType::bf16) {
        a = whole ? Simd::load_bf16(p) : Simd::load_bf16_partial(p, count);
      } else {
        a = whole ? Simd::load_f16(p) : Simd::load_f16_partial(p, count);
      }
    }
    if (!row.weights) return a;
    const float* w = row.weights + at;
    return Simd::mul(a, whole ? Simd::load(w) : Simd::load_partial(w, count));
  }
  float at(int64_t j) const {
    float one[Simd::lanes];
    Simd::store(one, load(*this, j, 1));
    return one[0];
  }
};

/// Keys of scores first .. last; returns the largest. Writes up to key_slack past the end.
static int32_t make_keys(const ScoreRow& row, int64_t first, int64_t last, int32_t* keys) {
  Keys highest = Keys{} + never;
  int64_t at = first;
  for (; at + Simd::lanes <= last; at += Simd::lanes, keys += Simd::lanes) {
    Keys key = key_of(ScoreRow::load(row, at, Simd::lanes));
    highest = key > highest ? key : highest;
    store_vector(keys, key);
  }
  int32_t result = never;
  for (int i = 0; i < Simd::lanes; ++i) result = highest[i] > result ? highest[i] : result;
  if (at < last) {
    Keys key = key_of(ScoreRow::load(row, at, int(last - at)));
    for (int i = 0; i < last - at; ++i) {
      keys[i] = key[i];
      result = key[i] > result ? key[i] : result;
    }
  }
  return result;
}

/// How many keys are greater.
static int64_t count_greater(const int32_t* keys, int64_t count, int32_t than) {
  Keys counts[4] = {};
  int64_t at = 0;
  for (; at + 4 * Simd::lanes <= count; at += 4 * Simd::lanes) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) counts[i] -= load_vector<Keys>(keys + at + i * Simd::lanes) > than;
  }
  Keys sum = (counts[0] + counts[1]) + (counts[2] + counts[3]);
  int64_t result = 0;
  for (int i = 0; i < Simd::lanes; ++i) result += sum[i];
  for (int i = 0, left = int(count - at); i < left; ++i) result += keys[at + i] > than;
  return result;
}

/// Masses in whole units of 2^-shift: their sums are below 2^53, exact in any order (see Choice).
struct Units {
  double scale = 1;

  Units(int32_t highest, int64_t entries) {
    float largest = score_of(highest > 0 ? highest : 0);
    if (largest > 3.40282347e38f) largest = 3.40282347e38f;
    int exponent = 0, bits = 0;
    (void)__builtin_frexp(double(largest), &exponent);
    while (bits < 62 && int64_t(1) << bits < entries) ++bits;
    scale = __builtin_ldexp(1., 52 - bits - exponent);
  }
  /// Rounded to nearest by adding 2^52, below which lie all masses.
  double of(int32_t key) const {
    float score = key > 0 ? score_of(key < 0x7f7fffff ? key : 0x7f7fffff) : 0.f;
    return (double(score) * scale + 0x1p52) - 0x1p52;
  }
};

/// Mass of every key; returns the sum.
static double make_masses(const int32_t* keys, int64_t count, const Units& units, double* masses) {
  Doubles sum = {};
  int64_t at = 0;
  for (; at + half <= count; at += half) {
    HalfKeys key = load_vector<HalfKeys>(keys + at);
    key = key > 0 ? key : HalfKeys{};  // a score above 0 is its key
    key = key < 0x7f7fffff ? key : HalfKeys{} + 0x7f7fffff;
    HalfFloats score;
    __builtin_memcpy(&score, &key, sizeof score);
    Doubles mass = (__builtin_convertvector(score, Doubles) * units.scale + 0x1p52) - 0x1p52;
    store_vector(masses + at, mass);
    sum += mass;
  }
  double result = 0;
  for (int i = 0; i < half; ++i) result += sum[i];
  for (; at < count; ++at) result += masses[at] = units.of(keys[at]);
  return result;
}

/// Mass and number of the keys that are greater.
static double mass_greater(const int32_t* keys, const double* masses, int64_t count, int32_t than, int64_t* greater) {
  Doubles sum[2] = {};
  HalfMask number[2] = {};
  int64_t at = 0;
  for (; at + 2 * half <= count; at += 2 * half) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      HalfMask mask = __builtin_convertvector(load_vector<HalfKeys>(keys + at + i * half) > than, HalfMask);
      sum[i] += (Doubles)((HalfMask)load_vector<Doubles>(masses + at + i * half) & mask);
      number[i] -= mask;
    }
  }
  double result = 0;
  *greater = 0;
  for (int i = 0; i < half; ++i) {
    result += sum[0][i] + sum[1][i];
    *greater += number[0][i] + number[1][i];
  }
  for (; at < count; ++at) {
    if (keys[at] <= than) continue;
    result += masses[at];
    ++*greater;
  }
  return result;
}

/// Keys in (low, high] to the front of `to`, their masses (or indices) with them; returns how many. In place is
/// allowed.
template <class Value>
static int64_t compact(const int32_t* keys, const Value* values, int64_t count, int32_t low, int32_t high, int32_t* to,
                       Value* to_values) {
  int64_t kept = 0, at = 0;
#ifdef __AVX512F__
  const __m512i below = _mm512_set1_epi32(low), above = _mm512_set1_epi32(high);
  for (; at + 16 <= count; at += 16) {
    __m512i key = _mm512_loadu_si512(keys + at);
    __mmask16 in = _mm512_mask_cmple_epi32_mask(_mm512_cmpgt_epi32_mask(key, below), key, above);
    if (values && sizeof(Value) == 8) {
      __m512i first = _mm512_loadu_si512(values + at), second = _mm512_loadu_si512(values + at + 8);
      int64_t more = __builtin_popcount(in & 0xff);
      _mm512_storeu_si512(to_values + kept, _mm512_maskz_compress_epi64(__mmask8(in), first));
      _mm512_storeu_si512(to_values + kept + more, _mm512_maskz_compress_epi64(__mmask8(in >> 8), second));
    }
    _mm512_storeu_si512(to + kept, _mm512_maskz_compress_epi32(in, key));
    kept += __builtin_popcount(in);
  }
#endif
  for (; at < count; ++at) {
    int32_t key = keys[at];
    if (values) {
      Value value = values[at];
      to_values[kept] = value;
    }
    to[kept] = key;
    kept += (key > low) & (key <= high);
  }
  return kept;
}

/// Keys >= least of scores first .. last, and where they stand; returns how many. Buffers hold last - first +
/// key_slack.
static int64_t collect(const ScoreRow& row, int64_t first, int64_t last, int32_t least, int32_t* keys,
                       int32_t* indices) {
  int64_t kept = 0, at = first;
#ifdef __AVX512F__
  const __m512i bound = _mm512_set1_epi32(least), step = _mm512_set1_epi32(16);
  __m512i index = _mm512_add_epi32(_mm512_set1_epi32(int32_t(first)),
                                   _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  for (; at + 16 <= last; at += 16, index = _mm512_add_epi32(index, step)) {
    __m512i key = (__m512i)key_of(ScoreRow::load(row, at, 16));
    __mmask16 in = _mm512_cmpge_epi32_mask(key, bound);
    _mm512_storeu_si512(keys + kept, _mm512_maskz_compress_epi32(in, key));
    _mm512_storeu_si512(indices + kept, _mm512_maskz_compress_epi32(in, index));
    kept += __builtin_popcount(in);
  }
#endif
  for (; at < last; at += Simd::lanes) {
    int count = int(last - at < Simd::lanes ? last - at : Simd::lanes);
    Keys key = key_of(ScoreRow::load(row, at, count));
    for (int i = 0; i < count; ++i) {
      keys[kept] = key[i];
      indices[kept] = int32_t(at + i);
      kept += key[i] >= least;
    }
  }
  return kept;
}

}  // namespace
}  // namespace sparsekit

// The loops that take the time in the CPU forward: S^T = K Q^T, softmax down the columns, O^T += V^T P^T.
//
// Lanes are queries. A register tile of `keys` x `registers` scores multiplies vectors of packed queries with elements
// of key rows, which are broadcast from memory as they stand: K needs no packing, whatever its strides. O^T works the
// same way on V, whose rows were interleaved in panels of 16 columns, so that one panel is read from front to back.
//
// Per 16 scores at D = Dv = 128: 256 multiply-adds of fp32 (or 128 of bf16 pairs) against about 15 instructions of
// softmax.
#pragma once

#include "attention/cpu_pack.h"
#include "common/cpu/simd_math.h"

namespace sparsekit {
namespace {

constexpr float log2_e = 1.44269504088896341f, ln_2 = 0.693147180559945309f;

/// Rows (keys, or columns of V) of a register tile of `n` vectors of queries. Accumulators: 16 of 32 or 8 of 16
/// registers, enough to hide 4 to 6 cycles of latency twice per cycle; a power of two, so that it divides 16.
constexpr int tile_rows(int n) { return Simd::registers == 32 ? (n == 1 ? 16 : n == 2 ? 8 : 4) : (n == 1 ? 8 : 4); }

/// Keys and values of the next group, brought into L2 row by row while the present group is used.
struct Prefetch {
  struct Block {
    const char* key;
    const char* value;
    int rows;
  };
  Block blocks[64];
  int count = 0, next = 0;
  int rows = 0;  // left of the present block
  const char* key = nullptr;
  const char* value = nullptr;
  int64_t key_stride = 0, value_stride = 0, key_bytes = 0, value_bytes = 0;

  SPARSEKIT_INLINE void step(Prefetch* f, int rows) {
    for (; rows > 0; --rows) {
      if (f->rows == 0) {
        if (f->next == f->count) return;
        const Block& block = f->blocks[f->next++];
        f->key = block.key;
        f->value = block.value;
        f->rows = block.rows;
      }
      for (int64_t at = 0; at < f->key_bytes; at += 64) Simd::prefetch(f->key + at);
      for (int64_t at = 0; at < f->value_bytes; at += 64) Simd::prefetch(f->value + at);
      f->key += f->key_stride;
      f->value += f->value_stride;
      --f->rows;
    }
  }
};

/// Keys and values of a segment as the kernels read them.
struct LoadedSegment {
  KeySegment keys;
  const char* key = nullptr;  // first row of Product::Element, `key_stride` bytes apart
  int64_t key_stride = 0;
  const void* values = nullptr;  // [value_dim / 16][padded / pair][16] Product::Element
  const float* bias = nullptr;   // [padded] times log2 e, or null
};

/// Rows of keys in a tile of scores. One vector of queries takes two sets of accumulators over 8 rows, for even and odd
/// pairs of bf16: 16 row pointers do not fit the registers. fp32 keeps one set: backward repeats its order of
/// summation, so that what rounding did to a score of 50 it did to lse, too.
constexpr int tile_keys(int n) { return tile_rows(n) < 8 ? tile_rows(n) : 8; }

/// scores[n][lane] = k_n . q_lane for the keys of a segment; rows past its end repeat the last key. `most` collects the
/// maximum.
template <class Product, int registers>
static void multiply_keys(const LoadedSegment& segment, const typename Product::Element* queries, int steps,
                          float* scores, Simd::Float* most, Prefetch* prefetch) {
  using Element = typename Product::Element;
  constexpr int keys = tile_keys(registers), width = registers * Simd::lanes;
  constexpr int sets = registers == 1 && Simd::registers == 32 && Product::pair == 2 ? 2 : 1;
  Simd::Float highest[registers];
  for (int j = 0; j < registers; ++j) highest[j] = most[j];
  for (int n = 0; n < segment.keys.padded; n += keys) {
    const Element* row[keys];
    for (int i = 0; i < keys; ++i) {
      int at = n + i < segment.keys.count ? n + i : segment.keys.count - 1;
      row[i] = reinterpret_cast<const Element*>(segment.key + at * segment.key_stride);
    }
    const Element* query = queries;
    for (int first = 0; first < steps; first += score_chain) {
      const int last = int(smaller(first + score_chain, steps));
      Simd::Float sum[sets][keys][registers];
#pragma GCC unroll 2
      for (int set = 0; set < sets; ++set)
#pragma GCC unroll 16
        for (int i = 0; i < keys; ++i)
#pragma GCC unroll 4
          for (int j = 0; j < registers; ++j) sum[set][i][j] = Simd::zero();
      int d = first;
      for (; d + sets <= last; d += sets, query += sets * width) {
#pragma GCC unroll 2
        for (int set = 0; set < sets; ++set) {
          typename Product::Operand q[registers];
#pragma GCC unroll 4
          for (int j = 0; j < registers; ++j) q[j] = Product::load(query + set * width + j * Simd::lanes);
#pragma GCC unroll 16
          for (int i = 0; i < keys; ++i) {
            typename Product::Operand k = Product::broadcast(row[i] + d + set);
#pragma GCC unroll 4
            for (int j = 0; j < registers; ++j) sum[set][i][j] = Product::madd(k, q[j], sum[set][i][j]);
          }
        }
      }
      if (sets == 2 && d < last) {
#pragma GCC unroll 16
        for (int i = 0; i < keys; ++i)
          sum[0][i][0] = Product::madd(Product::broadcast(row[i] + d), Product::load(query), sum[0][i][0]);
      }
#pragma GCC unroll 16
      for (int i = 0; i < keys; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < registers; ++j) {
          float* score = scores + (n + i) * width + j * Simd::lanes;
          if (sets == 2) sum[0][i][j] = Simd::add(sum[0][i][j], sum[sets - 1][i][j]);
          if (first > 0) sum[0][i][j] = Simd::add(Simd::load(score), sum[0][i][j]);
          Simd::store(score, sum[0][i][j]);
          if (last == steps) highest[j] = Simd::max(highest[j], sum[0][i][j]);
        }
    }
    Prefetch::step(prefetch, keys);
  }
  for (int j = 0; j < registers; ++j) most[j] = highest[j];
}

/// How raw products become scores in units of log2: only where softcap, bias or a scale <= 0 ask for a pass of its own.
struct ScoreTransform {
  bool needed = false;
  float scale = 1.f, softcap = 0.f;
};

/// Transforms and masks the scores of one segment in place; `most` collects the maximum of what is seen.
template <int registers>
static void mask_scores(const ScoreTransform& transform, const LoadedSegment& segment, const PairMask& mask,
                        bool masked, float* scores, Simd::Float* most) {
  constexpr int width = registers * Simd::lanes;
  const Simd::Float unseen = Simd::set(-__builtin_inff());
  const Simd::Float scale =
      Simd::set(transform.softcap > 0 ? transform.scale / transform.softcap : transform.scale * log2_e);
  const Simd::Float cap = Simd::set(transform.softcap * log2_e);
  for (int j = 0; j < registers; ++j) {
    Simd::Float highest = most[j];
    for (int n = 0; n < segment.keys.padded; ++n) {
      float* at = scores + n * width + j * Simd::lanes;
      if (n >= segment.keys.count) {
        Simd::store(at, unseen);
        continue;
      }
      Simd::Float score = Simd::load(at);
      if (transform.needed) {
        score = Simd::mul(score, scale);
        if (transform.softcap > 0) score = Simd::mul(tanh(score), cap);
        if (segment.bias) score = Simd::add(score, Simd::set(segment.bias[n]));
      }
      if (masked) score = Simd::select(PairMask::lanes(mask, j, n), score, unseen);
      Simd::store(at, score);
      highest = Simd::max(highest, score);
    }
    most[j] = highest;
  }
}

/// Scores to weights in place (bf16 pairs: in half of it): p = 2^(unit * s - m) with the new maximum m of each column.
/// Updates m and the sums l; `rescale` receives what the old sums and outputs are to be multiplied with.
template <class Product, int registers>
static void softmax(float* scores, int keys, float unit, const Simd::Float* most, float* maximum, float* sum,
                    Simd::Float* rescale) {
  constexpr int width = registers * Simd::lanes, degree = Product::exp2_degree;
  const Simd::Float units = Simd::set(unit), nothing = Simd::set(-__builtin_inff());
#pragma GCC unroll 1
  for (int j = 0; j < registers; ++j) {
    Simd::Float old = Simd::load(maximum + j * Simd::lanes);
    Simd::Float now = Simd::max(old, Simd::mul(most[j], units));
    // A column that has seen no key keeps m = -inf; subtracting 0 instead makes its weights 2^-inf = 0 and not NaN.
    Simd::Float base = Simd::select(Simd::equal(now, nothing), Simd::zero(), now);
    Simd::Float scale = exp2<5>(Simd::sub(old, base));
    Simd::Float even = Simd::zero(), odd = Simd::zero();
    float* column = scores + j * Simd::lanes;
    for (int n = 0; n < keys; n += 2) {
      Simd::Float a = exp2<degree>(Simd::fms(Simd::load(column + n * width), units, base));
      Simd::Float b = exp2<degree>(Simd::fms(Simd::load(column + (n + 1) * width), units, base));
      even = Simd::add(even, a);
      odd = Simd::add(odd, b);
      if constexpr (Product::pair == 2) {
        Product::store(reinterpret_cast<typename Product::Element*>(column + n / 2 * width), Product::join(a, b));
      } else {
        Simd::store(column + n * width, a);
        Simd::store(column + (n + 1) * width, b);
      }
    }
    Simd::store(maximum + j * Simd::lanes, now);
    Simd::store(sum + j * Simd::lanes, Simd::fma(Simd::load(sum + j * Simd::lanes), scale, Simd::add(even, odd)));
    rescale[j] = scale;
  }
}

/// outputs[d][lane] = outputs * rescale + sum over keys of values[d][key] * weights[key][lane], segment after segment.
/// Sums begin at zero (as the softmax's do): carried on through 1,024 keys they had three times dense attention's
/// error.
template <class Product, int registers>
static void multiply_values(const LoadedSegment* const* segments, int count, const float* weights, int value_dim,
                            const Simd::Float* rescale, float* outputs) {
  using Element = typename Product::Element;
  constexpr int columns = tile_rows(registers), width = registers * Simd::lanes;
  for (int d = 0; d < value_dim; d += columns) {
    float* output = outputs + d * width;
    Simd::Float sum[columns][registers];
#pragma GCC unroll 16
    for (int i = 0; i < columns; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < registers; ++j) sum[i][j] = Simd::zero();
    const Element* weight = reinterpret_cast<const Element*>(weights);
    for (int s = 0; s < count; ++s) {
      int steps = segments[s]->keys.padded / Product::pair;
      const Element* value = static_cast<const Element*>(segments[s]->values) + d / panel * panel * steps + d % panel;
      for (int n = 0; n < steps; ++n, value += panel, weight += width) {
        typename Product::Operand p[registers];
#pragma GCC unroll 4
        for (int j = 0; j < registers; ++j) p[j] = Product::load(weight + j * Simd::lanes);
#pragma GCC unroll 16
        for (int i = 0; i < columns; ++i) {
          typename Product::Operand v = Product::broadcast(value + i);
#pragma GCC unroll 4
          for (int j = 0; j < registers; ++j) sum[i][j] = Product::madd(v, p[j], sum[i][j]);
        }
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < columns; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < registers; ++j) {
        float* at = output + i * width + j * Simd::lanes;
        Simd::store(at, Simd::fma(rescale[j], Simd::load(at), sum[i][j]));
      }
  }
}

}  // namespace
}  // namespace sparsekit

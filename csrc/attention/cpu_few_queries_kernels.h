// The loops of attention with few queries (see cpu_few_queries.h): scores of up to 16 rows, softmax along each row, and
// the weighted sum of values.
//
// Lanes run along the head dimension, so that a row of K or V is read from front to back wherever it stands, once for
// all rows: nothing is packed. Scores of one vector are lanes / rows keys by `rows` queries, summed across the lanes
// together (Simd::sum_each, 3 instructions a score). V of bf16 is interleaved by pairs of keys in registers.
//
// Per key and row at D = Dv = 128: 16 multiply-adds of fp32 or 8 of bf16 pairs, 3 instructions of the sum across lanes,
// about one of softmax: 44 cycles a key for 8 rows of bf16 in L1 (Zen 5), where memory takes 47 to 55.
#pragma once

#include "attention/cpu_forward_kernels.h"

namespace sparsekit {
namespace {
namespace few {

constexpr int lanes = Simd::lanes;
constexpr int most_rows = tile_lanes < 16 ? tile_lanes : 16;  // of a tile
constexpr int chunk_keys = segment_keys;                      // keys to a softmax
constexpr int step_keys = 32;                                 // keys to a sum of values
constexpr int share_keys = 2048;                              // keys to a share, at most
constexpr int score_stride = chunk_keys + 16;                 // floats; rows a power of two apart share cache sets
constexpr int together = 16;         // keys that stand evenly spaced: blocks are multiples of it
constexpr int ahead = 2 * together;  // keys to ask memory for beforehand, see ask_for()

/// 16 keys or values, evenly spaced from `first` on. Behind row `last`, where a sequence ends, stands nothing; it is
/// repeated instead.
struct Group {
  const char* first;
  int last;

  SPARSEKIT_INLINE void fill(const Group& group, int64_t stride, const char** row) {
    const uintptr_t first = reinterpret_cast<uintptr_t>(group.first);  // may lie behind a tensor: see Worker::gather
    if (group.last == together - 1) {
      for (int i = 0; i < together; ++i) row[i] = reinterpret_cast<const char*>(first + uintptr_t(i * stride));
    } else {
      for (int i = 0; i < together; ++i) {
        row[i] = reinterpret_cast<const char*>(first + uintptr_t(smaller(i, group.last) * stride));
      }
    }
  }
};

/// The keys of a share, of any number of blocks: where they stand.
struct Keys {
  struct Run {
    KeySegment keys;
    int first;     // its place in the share, a multiple of 16
    int32_t bits;  // bits_index, -1 for none
    bool masked;   // of the partial list

    int end() const { return first + keys.count; }
  };
  int count = 0, run_count = 0;  // places, a multiple of 16
  Run runs[share_keys / together];
  Group key[(share_keys + ahead) / together], value[(share_keys + ahead) / together];
};

/// Asks for rows 32 keys further on, line by line in the order in which they stand. In the order of the products (a
/// line of each of four rows, then the next of each) the processor's own prefetchers see no stream: 0.82 to 0.95 of the
/// rate.
struct Asker {
  const char* const* row;
  const char* const* end;
  int64_t bytes, at;  // of a row

  SPARSEKIT_INLINE void step(Asker& asker, int lines) {
    for (int n = 0; n < lines && asker.row != asker.end; ++n) {
      Simd::prefetch_near(asker.row[ahead] + asker.at);
      asker.at += 64;
      if (asker.at >= asker.bytes) {
        asker.at = 0;
        ++asker.row;
      }
    }
  }
};

template <class Product>
SPARSEKIT_INLINE typename Product::Operand operand(Simd::Int a) {
  if constexpr (Product::pair == 2) {
    return a;
  } else {
    return Simd::as_float(a);
  }
}

/// scores[row][n] = k_n . q_row of lanes / rows keys. `share`: of the lines that are read here, how many are asked for.
template <class Product, DType dtype, int rows>
SPARSEKIT_INLINE void multiply_keys(const char* const* key, Asker& asker, int share,
                                    const typename Product::Element* queries, int64_t query_stride, int64_t head_dim,
                                    float* scores) {
  constexpr int keys = lanes / rows, group = keys < 4 ? keys : 4;
  constexpr int lines = group * lanes * Product::pair * (dtype == DType::f32 ? 4 : 2) / 64;  // of a step
  const int asks = (lines + share - 1) / share;
  Simd::Float sums[lanes];  // [row][key]
#pragma GCC unroll 4
  for (int first = 0; first < keys; first += group) {
    Simd::Float sum[rows][group];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < group; ++i) sum[r][i] = Simd::zero();
    auto add = [&](int64_t at, int64_t size) __attribute__((always_inline)) {
      typename Product::Operand k[group];
#pragma GCC unroll 4
      for (int i = 0; i < group; ++i) {
        k[i] = operand<Product>(Rows<Product, dtype>::along(key[first + i], at, size));
      }
      Asker::step(asker, asks);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        typename Product::Operand q = Product::load(queries + r * query_stride + at);
#pragma GCC unroll 4
        for (int i = 0; i < group; ++i) sum[r][i] = Product::madd(k[i], q, sum[r][i]);
      }
    };
    int64_t at = 0;
    for (; (at + lanes) * Product::pair <= head_dim; at += lanes) add(at, (at + lanes) * Product::pair);
    if (at * Product::pair < head_dim) add(at, head_dim);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < group; ++i) sums[r * keys + first + i] = sum[r][i];
  }
  alignas(64) float found[lanes];
  Simd::store(found, Simd::sum_each(sums));
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) __builtin_memcpy(scores + r * score_stride, found + r * keys, keys * sizeof(float));
}

template <class Product, DType dtype, int rows>
static void multiply_group(const char* const* key, Asker& asker, int share, const typename Product::Element* queries,
                           int64_t query_stride, int64_t head_dim, float* scores) {
  for (int n = 0; n < together; n += lanes / rows) {
    multiply_keys<Product, dtype, rows>(key + n, asker, share, queries, query_stride, head_dim, scores + n);
  }
}

/// Scores of any number of rows and `count` keys, a multiple of 16.
template <class Product, DType dtype>
static void multiply_keys(const Group* groups, int64_t stride, int count, const typename Product::Element* queries,
                          int64_t query_stride, int rows, int64_t head_dim, float* scores) {
  const char* key[together + ahead];
  for (int n = 0; n < ahead; n += together) Group::fill(groups[n / together], stride, key + together + n);
  const int shares = int(ceil_div(rows, 4));  // each group of rows asks for its part
  for (int n = 0; n < count; n += together) {
    memmove(key, key + together, ahead * sizeof *key);
    Group::fill(groups[(n + ahead) / together], stride, key + ahead);
    Asker asker = {key, key + together, head_dim * size_of(dtype), 0};
    for (int r = 0, taken; r < rows; r += taken) {
      const typename Product::Element* q = queries + r * query_stride;
      float* to = scores + r * score_stride + n;
      const int left = rows - r;
      taken = left > 2 ? 4 : left;  // rows that do not exist are computed and dropped
      switch (taken) {
        case 4: multiply_group<Product, dtype, 4>(key, asker, shares, q, query_stride, head_dim, to); break;
        case 2: multiply_group<Product, dtype, 2>(key, asker, shares, q, query_stride, head_dim, to); break;
        default: multiply_group<Product, dtype, 1>(key, asker, shares, q, query_stride, head_dim, to);
      }
    }
  }
}

/// Scores of one row in units of log2: softcap and bias, where they ask for a pass of their own.
static void transform_scores(const ScoreTransform& transform, const float* bias, int padded, float* scores) {
  const Simd::Float scale =
      Simd::set(transform.softcap > 0 ? transform.scale / transform.softcap : transform.scale * log2_e);
  const Simd::Float cap = Simd::set(transform.softcap * log2_e);
  for (int n = 0; n < padded; n += lanes) {
    Simd::Float score = Simd::mul(Simd::load(scores + n), scale);
    if (transform.softcap > 0) score = Simd::mul(tanh(score), cap);
    if (bias) score = Simd::add(score, Simd::load(bias + n));
    Simd::store(scores + n, score);
  }
}

/// Hides keys `first` to `last` of a run from row `row` of the tile where it does not see them.
static void mask_scores(const PairMask& mask, int row, const KeySegment& keys, int first, int last, float* scores) {
  const int32_t low = mask.tile->low[row], high = mask.tile->high[row];
  for (int n = first; n < last; ++n, ++scores) {
    bool seen = !mask.by_bits || (mask.words[n / 32][row] >> n % 32 & 1);
    if (mask.by_position) seen = seen && keys.position_of(n) >= low && keys.position_of(n) <= high;
    if (!seen) *scores = -__builtin_inff();
  }
}

/// Scores of one row to weights in place (bf16 pairs: in half of it), as softmax of cpu_forward_kernels.h does for
/// columns. Returns what the row's old sum and outputs are to be multiplied with.
template <class Product>
static float softmax_row(float* scores, int padded, float unit, float* maximum, float* sum) {
  Simd::Float most = Simd::load(scores);
  for (int n = lanes; n < padded; n += lanes) most = Simd::max(most, Simd::load(scores + n));
  const float found = Simd::largest(most) * unit, old = *maximum, now = found > old ? found : old;
  // A row that has seen no key keeps -inf; subtracting 0 instead makes its weights 2^-inf = 0 and not NaN.
  const float base = now == -__builtin_inff() ? 0 : now;
  const Simd::Float units = Simd::set(unit), bases = Simd::set(base);
  Simd::Float total = Simd::zero();
  auto* weights = reinterpret_cast<typename Product::Element*>(scores);
  for (int n = 0; n < padded; n += lanes) {
    Simd::Float p = exp2<Product::exp2_degree>(Simd::fms(Simd::load(scores + n), units, bases));
    total = Simd::add(total, p);
    Product::store_neighbours(weights + n / Product::pair, p);
  }
  const float rescale = __builtin_exp2f(old - base);
  *maximum = now;
  *sum = *sum * rescale + Simd::sum(total);
  return rescale;
}

/// `columns` vectors of columns from `at` on of one row of V, or of a pair of rows; past `size` they are zero.
template <class Product, DType dtype, int columns, bool whole>
SPARSEKIT_INLINE void load_values(const char* const* value, int64_t at, int64_t size,
                                  typename Product::Operand (&v)[columns]) {
#pragma GCC unroll 8
  for (int c = 0; c < columns; c += Product::pair) {
    const int64_t element = at / Product::pair + c / Product::pair * lanes;
    const int64_t end = whole ? (element + lanes) * Product::pair : size;
    Simd::Int even = Rows<Product, dtype>::along(value[0], element, end);
    if constexpr (Product::pair == 2) {
      interleave_bf16(even, Rows<Product, dtype>::along(value[1], element, end), &v[c], &v[c + 1]);
    } else {
      v[c] = operand<Product>(even);
    }
  }
}

/// outputs[row][d] = outputs * rescale + sum over keys of weights[row][key] * values[key][d], for `columns` vectors of
/// d from `at` on, all of them inside the row if it is `whole`.
template <class Product, DType dtype, int rows, int columns, bool whole>
SPARSEKIT_INLINE void multiply_columns(const char* const* value, int count, Asker& asker, int asks,
                                       const float* weights, const float* rescale, int64_t at, int64_t size,
                                       float* outputs, int64_t output_stride) {
  Simd::Float sum[rows][columns];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c) sum[r][c] = Simd::zero();
  for (int n = 0; n < count; n += Product::pair) {
    typename Product::Operand v[columns];
    load_values<Product, dtype, columns, whole>(value + n, at, size, v);
    const auto* weight = reinterpret_cast<const typename Product::Element*>(weights) + n / Product::pair;
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      typename Product::Operand p = Product::broadcast(weight + r * score_stride);
#pragma GCC unroll 8
      for (int c = 0; c < columns; ++c) sum[r][c] = Product::madd(p, v[c], sum[r][c]);
    }
    Asker::step(asker, asks);
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    const Simd::Float scale = Simd::set(rescale[r]);
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c) {
      float* to = outputs + r * output_stride + at + c * lanes;
      Simd::store(to, Simd::fma(scale, Simd::load(to), sum[r][c]));
    }
  }
}

template <class Product, DType dtype, int rows>
static void multiply_values(const char* const* value, int count, Asker& asker, int share, const float* weights,
                            const float* rescale, int64_t value_dim, float* outputs, int64_t output_stride) {
  constexpr int sums = Simd::registers / 2 / rows, columns = sums > 8 ? 8 : sums, step = Product::pair * lanes;
  constexpr int bytes = lanes * Product::pair * (dtype == DType::f32 ? 4 : 2);  // of a column of vectors, a step
  const int wide = int(larger(1, columns * bytes / 64 / share)), narrow = int(larger(1, step * bytes / lanes / 64));
  int64_t at = 0;
  for (; at + columns * lanes <= value_dim; at += columns * lanes) {
    multiply_columns<Product, dtype, rows, columns, true>(value, count, asker, wide, weights, rescale, at, value_dim,
                                                          outputs, output_stride);
  }
  for (; at + step <= value_dim; at += step) {
    multiply_columns<Product, dtype, rows, Product::pair, true>(value, count, asker, narrow, weights, rescale, at,
                                                                value_dim, outputs, output_stride);
  }
  if (at < value_dim) {
    multiply_columns<Product, dtype, rows, Product::pair, false>(value, count, asker, narrow, weights, rescale, at,
                                                                 value_dim, outputs, output_stride);
  }
}

/// The same for any number of rows and `count` keys, a multiple of 16 up to a chunk.
template <class Product, DType dtype>
static void multiply_values(const Group* groups, int64_t stride, int count, const float* weights, const float* rescale,
                            int rows, int64_t value_dim, float* outputs, int64_t output_stride) {
  const char* value[chunk_keys + ahead];
  for (int n = 0; n < count + ahead; n += together) Group::fill(groups[n / together], stride, value + n);
  Asker asker = {value, value + count, value_dim * size_of(dtype), 0};
  const int share = rows > 8 ? 2 : 1;
  for (int r = 0, taken; r < rows; r += taken) {
    const int left = rows - r;
    const float* from = weights + r * score_stride;
    float* to = outputs + r * output_stride;
    taken = left > 5 ? 8 : left > 2 ? 4 : left;
    switch (taken) {  // rows that do not exist are computed and dropped
      case 8:
        multiply_values<Product, dtype, 8>(value, count, asker, share, from, rescale + r, value_dim, to, output_stride);
        break;
      case 4:
        multiply_values<Product, dtype, 4>(value, count, asker, share, from, rescale + r, value_dim, to, output_stride);
        break;
      case 2:
        multiply_values<Product, dtype, 2>(value, count, asker, share, from, rescale + r, value_dim, to, output_stride);
        break;
      default:
        multiply_values<Product, dtype, 1>(value, count, asker, share, from, rescale + r, value_dim, to, output_stride);
    }
  }
}

}  // namespace few
}  // namespace
}  // namespace sparsekit

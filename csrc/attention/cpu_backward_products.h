// The two kinds of work that backward's time goes into: matrix products of packed operands, and the elementwise step
// between them.
//
//   C[row][lane] (+)= sum_step A[row][step] * B[step][lane]
//
// A is read one broadcast element at a time (any strides), B in panels of up to 4 vectors of lanes, C stays in
// registers: 6 rows x 4 vectors (6 x 2 where there are 16 registers), 24 independent sums for an FMA of latency 4,
// issued twice per cycle. All five products of backward have this form; only who the lanes are differs: queries for S^T
// and dP^T, the head dimension for dV, dK and dQ. Nothing is ever transposed between two products.
#pragma once

#include "attention/cpu_tiles.h"
#include "common/cpu/simd_math.h"

namespace sparsekit {
namespace {
namespace gradients {

constexpr int lanes = Simd::lanes;
constexpr int panel_vectors = tile_registers;
constexpr int micro_rows = 6;
constexpr int chunk_keys = 32;  // scores and dP of a chunk and one panel of fp32 queries, D = 128: 48 KB

/// Vectors of the panel that starts at `first` of `vectors`: as even as possible, so that no panel is left with one.
SPARSEKIT_INLINE int panel_width(int first, int vectors) {
  int left = vectors - first, panels = (left + panel_vectors - 1) / panel_vectors;
  return (left + panels - 1) / panels;
}

/// Memory to bring into L2 while products run, a few lines per register tile: from `at` to `end`, then rows of a
/// tensor.
struct Ahead {
  const char *at = nullptr, *end = nullptr;
  int lines = 0;
  const char* first_row = nullptr;
  int64_t row_stride = 0, row_bytes = 0;
  const int32_t* rows = nullptr;  // `left` of them
  int left = 0;

  SPARSEKIT_INLINE void step(Ahead* a) {
    for (int i = 0; i < a->lines; ++i, a->at += 64) {
      if (a->at >= a->end && !next_row(a)) return;
      Simd::prefetch(a->at);
    }
  }
  static bool next_row(Ahead* a) {
    if (a->left == 0) return false;
    --a->left;
    a->at = a->first_row + *a->rows++ * a->row_stride;
    a->end = a->at + a->row_bytes;
    return true;
  }
};

/// Left operand of a product: element (row, step) is data[row * row_stride + step * step_stride].
template <class Product>
struct Operand {
  const typename Product::Element* data;
  int64_t row_stride, step_stride;
  Operand rows_from(int64_t row) const { return {data + row * row_stride, row_stride, step_stride}; }
};

template <class Product, int rows, int width>
SPARSEKIT_INLINE void multiply(const Operand<Product>& a, const typename Product::Element* b, int steps,
                               Simd::Float (&c)[rows][width]) {
  const typename Product::Element* step = a.data;
  for (int k = 0; k < steps; ++k, step += a.step_stride, b += width * lanes) {
    typename Product::Operand right[width];
#pragma GCC unroll 4
    for (int v = 0; v < width; ++v) right[v] = Product::load(b + v * lanes);
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      typename Product::Operand left = Product::broadcast(step + r * a.row_stride);
#pragma GCC unroll 4
      for (int v = 0; v < width; ++v) c[r][v] = Product::madd(left, right[v], c[r][v]);
    }
  }
}

/// Steps that one sum runs over before it is added to C. The product dO V^T ends its sums early in fp32: at head
/// dimension 256 the rounding of one long sum showed where dP - delta cancels (7 times dense attention's largest
/// error). Scores (score_chain) do not: they repeat forward's order, so that what rounding did to a large score it did
/// to lse, too.
template <class Product>
constexpr int gradient_chain = Product::pair == 1 ? 64 : 1 << 30;

/// `rows` x (width vectors) of C, overwritten or added to.
template <class Product, int rows, int width>
SPARSEKIT_INLINE void product_micro(Operand<Product> a, const typename Product::Element* b, int steps, int chain,
                                    float* c, int64_t c_stride, bool add) {
  for (int left = steps; left > 0; left -= chain, add = true) {
    Simd::Float sum[rows][width];
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < width; ++v) sum[r][v] = Simd::zero();
      // C lies in L2: asked for now, it has arrived when the sums are done.
      if (add) {
#pragma GCC unroll 4
        for (int v = 0; v < width; ++v) __builtin_prefetch(c + r * c_stride + v * lanes, 1);
      }
    }
    int part = left < chain ? left : chain;
    multiply<Product, rows, width>(a, b, part, sum);
    a.data += part * a.step_stride;
    b += part * width * lanes;
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < width; ++v) {
        float* at = c + r * c_stride + v * lanes;
        Simd::store(at, add ? Simd::add(Simd::load(at), sum[r][v]) : sum[r][v]);
      }
    }
  }
}

template <class Product, int width>
void product_panel(Operand<Product> a, int rows, const typename Product::Element* b, int steps, int chain, float* c,
                   int64_t c_stride, bool add, Ahead* ahead) {
  while (rows > 0) {
    Ahead::step(ahead);
    // rows is a multiple of 16: 6, 6, ... and 4 or 4, 4 at the end
    if (rows >= micro_rows && rows != 8) {
      product_micro<Product, micro_rows, width>(a, b, steps, chain, c, c_stride, add);
      a = a.rows_from(micro_rows);
      c += micro_rows * c_stride;
      rows -= micro_rows;
    } else {
      product_micro<Product, 4, width>(a, b, steps, chain, c, c_stride, add);
      a = a.rows_from(4);
      c += 4 * c_stride;
      rows -= 4;
    }
  }
}

/// C (+)= A B with B packed in panels [panel][step][lane].
template <class Product>
void product(const Operand<Product>& a, int rows, const typename Product::Element* b, int steps, int vectors, float* c,
             int64_t c_stride, bool add, Ahead* ahead) {
  for (int first = 0, width; first < vectors; first += width) {
    width = panel_width(first, vectors);
    const typename Product::Element* panel = b + int64_t(first) * lanes * steps;
    float* out = c + first * lanes;
    constexpr int chain = gradient_chain<Product>;
    switch (width) {
      case 1: product_panel<Product, 1>(a, rows, panel, steps, chain, out, c_stride, add, ahead); break;
      case 2: product_panel<Product, 2>(a, rows, panel, steps, chain, out, c_stride, add, ahead); break;
      case 3:
        product_panel<Product, panel_vectors >= 3 ? 3 : 1>(a, rows, panel, steps, chain, out, c_stride, add, ahead);
        break;
      case 4:
        product_panel<Product, panel_vectors >= 4 ? 4 : 1>(a, rows, panel, steps, chain, out, c_stride, add, ahead);
        break;
    }
  }
}

/// The scores of one query tile against one key tile, and what turns them into gradients.
///   P = exp(score - lse),  dS = P * (weight * dP - delta),  weight = exp(lse - log(exp(lse) + exp(sink)))
/// All per-query arrays have one entry per lane; scores are in units of log 2 so that exp is exp2.
template <class Product>
struct ScoreTile {
  using Element = typename Product::Element;
  // inputs
  Operand<Product> key, value;                          // rows: keys
  const Element *query = nullptr, *grad_out = nullptr;  // panels [panel][step][query]
  int query_steps = 0, value_steps = 0;
  int count = 0;                                    // keys that exist
  int keys = 0, query_vectors = 0;                  // keys: a multiple of 16
  const float *lse = nullptr, *lse_rest = nullptr;  // [queries]; rest: what rounding to fp32 took from lse
  const float *weight = nullptr, *delta = nullptr;  // [queries]
  const float* bias = nullptr;                      // [keys]; -inf past the last key
  float scale = 0;                                  // score = scale * q.k + bias, or
  float softcap_in = 0, softcap_out = 0;  // score = softcap_out * tanh(softcap_in * q.k) + bias, where softcap_out != 0
  // outputs
  Element* probability = nullptr;       // [key][query] as left operand of dV: weight * P
  Element* grad_score = nullptr;        // [key][query] as left operand of dK
  Element* grad_score_pairs = nullptr;  // [key / pair][query] as left operand of dQ; fp32: is grad_score
  int64_t row_stride = 0, pair_stride = 0;
  Ahead* ahead = nullptr;
  float* grad_bias = nullptr;  // [key][lanes] partial sums, or null
};

/// P and dS of `rows` keys from `key` on and panel `first`, a panel of `width` vectors, from the products q.k and dO.v.
template <class Product, bool masked, int width>
SPARSEKIT_INLINE void score_elements(const ScoreTile<Product>& t, int key, int rows, int first, const PairMask& mask,
                                     const float* scores, const float* grads) {
  for (int v = 0; v < width; ++v) {
    int query = (first + v) * lanes;
    const Simd::Float lse = Simd::load(t.lse + query), lse_rest = Simd::load(t.lse_rest + query);
    const Simd::Float weight = Simd::load(t.weight + query), delta = Simd::load(t.delta + query);
    for (int r = 0; r < rows; r += 2) {
      Simd::Float p[2], ds[2];
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        int n = key + r + i, at = ((r + i) * width + v) * lanes;
        Simd::Float x = Simd::load(scores + at), shift = Simd::sub(Simd::set(t.bias[n]), lse), capped = Simd::zero();
        if (t.softcap_out != 0) {
          capped = tanh(Simd::mul(x, Simd::set(t.softcap_in)));
          x = Simd::fma(capped, Simd::set(t.softcap_out), shift);
        } else {
          x = Simd::fma(x, Simd::set(t.scale), shift);
        }
        p[i] = exp2<Product::exp2_degree>(Simd::sub(x, lse_rest));
        ds[i] = Simd::mul(p[i], Simd::fms(weight, Simd::load(grads + at), delta));
        if (masked) {
          Simd::Mask seen = PairMask::lanes(mask, v, n < t.count ? n : t.count - 1);  // the padding has no position
          p[i] = Simd::select(seen, p[i], Simd::zero());
          ds[i] = Simd::select(seen, ds[i], Simd::zero());
        }
        if (t.grad_bias) Simd::store(t.grad_bias + n * lanes, Simd::add(Simd::load(t.grad_bias + n * lanes), ds[i]));
        if (t.softcap_out != 0) ds[i] = Simd::fnma(Simd::mul(ds[i], capped), capped, ds[i]);
        Product::store_neighbours(t.probability + n * t.row_stride + query / Product::pair, Simd::mul(p[i], weight));
        Product::store_neighbours(t.grad_score + n * t.row_stride + query / Product::pair, ds[i]);
      }
      if constexpr (Product::pair == 2) {
        Product::store(t.grad_score_pairs + (key + r) / 2 * t.pair_stride + query, Product::join(ds[0], ds[1]));
      }
    }
  }
}

/// All keys against one panel of queries. Keys go in chunks: the panels of Q and dO take turns in L1 only once per
/// chunk.
template <class Product, bool masked, int width>
void score_panel(const ScoreTile<Product>& t, int first, const PairMask& mask) {
  alignas(64) float scores[chunk_keys * width * lanes], grads[chunk_keys * width * lanes];
  int64_t panel = int64_t(first) * lanes;
  for (int key = 0; key < t.keys; key += chunk_keys) {
    int rows = t.keys - key < chunk_keys ? t.keys - key : chunk_keys;
    product_panel<Product, width>(t.key.rows_from(key), rows, t.query + panel * t.query_steps, t.query_steps,
                                  score_chain, scores, width * lanes, false, t.ahead);
    product_panel<Product, width>(t.value.rows_from(key), rows, t.grad_out + panel * t.value_steps, t.value_steps,
                                  gradient_chain<Product>, grads, width * lanes, false, t.ahead);
    score_elements<Product, masked, width>(t, key, rows, first, mask, scores, grads);
  }
}

template <class Product, bool masked>
void score(const ScoreTile<Product>& t, int first, int width, const PairMask& mask) {
  switch (width) {
    case 1: score_panel<Product, masked, 1>(t, first, mask); break;
    case 2: score_panel<Product, masked, 2>(t, first, mask); break;
    case 3: score_panel<Product, masked, panel_vectors >= 3 ? 3 : 1>(t, first, mask); break;
    case 4: score_panel<Product, masked, panel_vectors >= 4 ? 4 : 1>(t, first, mask); break;
  }
}

/// Zeros for vectors `first` to `last` of the queries: what score() would leave where none sees a key.
template <class Product>
void clear_scores(const ScoreTile<Product>& t, int first, int last) {
  for (int n = 0; n < t.keys && first < last; ++n) {
    for (int v = first; v < last; ++v) {
      int64_t at = n * t.row_stride + v * lanes / Product::pair;
      Product::store_neighbours(t.probability + at, Simd::zero());
      Product::store_neighbours(t.grad_score + at, Simd::zero());
      if constexpr (Product::pair == 2) {
        Product::store(t.grad_score_pairs + n / 2 * t.pair_stride + v * lanes,
                       Product::join(Simd::zero(), Simd::zero()));
      }
    }
  }
}

}  // namespace gradients
}  // namespace
}  // namespace sparsekit

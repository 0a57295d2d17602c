// The most similar odd-positioned token of each even-positioned one, over any Simd and Product.
//
//   best[i] = max_j <m_2i, m_2j+1> / (|m_2i| |m_2j+1|),   target[i] = the first j that reaches it
//
// Tiling: destinations stand in the lanes. A panel of `panel` of them is packed once, [dim][panel], and every source of
// the item walks it, `tile_rows` at a time, with all sums of the tile in registers; the tile's cosines are compared
// with the best so far and dropped, so no matrix of similarities exists. Bound: multiply-adds (N^2 dim / 4 of them for
// N tokens); packing costs about 1 / 100 of that at 288 sources. Source: bipartite soft matching, Token Merging (arXiv
// 2210.09461), section 3.
#pragma once

#include <cstdlib>
#include <cstring>

#include "common/cpu/simd_math.h"
#include "tokens/rows.h"

namespace sparsekit {
namespace {

constexpr bool wide_file = Simd::registers == 32;
constexpr int tile_rows = wide_file ? 8 : 4;
constexpr int tile_vectors = 3;  // 8 x 3 sums + 3 operands + 1 broadcast of 32 registers; 4 x 3 + 3 + 1 of 16
constexpr int panel = tile_vectors * Simd::lanes;
constexpr int64_t block_steps =
    256;  // of a panel at a time: 48 KB with 48 lanes; 64 to 512 are alike, a whole row of 1,024 is 15 % slower

SPARSEKIT_INLINE int64_t round_up(int64_t a, int64_t to) { return (a + to - 1) / to * to; }

/// How a metric's element becomes the product's: as it stands, or widened to fp32.
struct MetricF32 {
  using Element = float;
  using Product = FloatProduct;
  SPARSEKIT_INLINE Simd::Float load(const Element* p, int count) { return Simd::load_partial(p, count); }
  SPARSEKIT_INLINE Simd::Int operand(const Element* p, int count) {
    return count >= Simd::lanes ? Simd::load_int(p) : Simd::load_int_partial(p, count);
  }
};
struct MetricF16 {
  using Element = uint16_t;
  using Product = FloatProduct;
  SPARSEKIT_INLINE Simd::Float load(const Element* p, int count) {
    return count >= Simd::lanes ? Simd::load_f16(p) : Simd::load_f16_partial(p, count);
  }
  SPARSEKIT_INLINE Simd::Int operand(const Element* p, int count) { return Simd::as_int(load(p, count)); }
};
struct MetricBf16 {
  using Element = uint16_t;
#ifdef SPARSEKIT_BF16_PRODUCT
  using Product = Bf16Product;
  SPARSEKIT_INLINE Simd::Int operand(const Element* p, int count) { return load_bf16_pairs(p, count); }
#else
  using Product = FloatProduct;
  SPARSEKIT_INLINE Simd::Int operand(const Element* p, int count) { return Simd::as_int(load(p, count)); }
#endif
  SPARSEKIT_INLINE Simd::Float load(const Element* p, int count) {
    return count >= Simd::lanes ? Simd::load_bf16(p) : Simd::load_bf16_partial(p, count);
  }
};

/// Length of a row and a power of two that brings it near 1. `inverse`: what a product of scaled rows is multiplied
/// with; 0 for a row of zeros (similarity 0), NaN for one with a NaN or an infinity (similar to none).
struct RowNorm {
  float inverse;
  int exponent;  // 0 but for rows whose squares leave fp32
};

template <class Metric>
RowNorm norm_of(const typename Metric::Element* row, int64_t dim) {
  Simd::Float sum[4] = {Simd::zero(), Simd::zero(), Simd::zero(), Simd::zero()};
  int64_t d = 0;
  for (; d + 4 * Simd::lanes <= dim; d += 4 * Simd::lanes) {
    for (int i = 0; i < 4; ++i) {
      Simd::Float x = Metric::load(row + d + i * Simd::lanes, Simd::lanes);
      sum[i] = Simd::fma(x, x, sum[i]);
    }
  }
  for (; d < dim; d += Simd::lanes) {
    Simd::Float x = Metric::load(row + d, dim - d < Simd::lanes ? int(dim - d) : Simd::lanes);
    sum[0] = Simd::fma(x, x, sum[0]);
  }
  float square = Simd::sum(Simd::add(Simd::add(sum[0], sum[1]), Simd::add(sum[2], sum[3])));
  // Within these bounds no product of two rows leaves fp32, nor do its squares lose digits to denormals.
  if (square > 0x1p-60f && square < 0x1p+60f) return {1.f / __builtin_sqrtf(square), 0};
  double exact = 0;
  for (d = 0; d < dim; d += Simd::lanes) {
    int count = dim - d < Simd::lanes ? int(dim - d) : Simd::lanes;
    alignas(64) float x[Simd::lanes];
    Simd::store(x, Metric::load(row + d, count));
    for (int i = 0; i < count; ++i) exact += double(x[i]) * x[i];
  }
  if (!(exact < __builtin_inf())) return {__builtin_nanf(""), 0};
  if (exact == 0) return {0.f, 0};
  double length = __builtin_sqrt(exact);
  int exponent = -__builtin_ilogb(length);
  return {float(1. / __builtin_ldexp(length, exponent)), exponent};
}

/// 2^exponent times a row of fp32 or bf16, written to `to`. (The squares of fp16 never leave fp32.)
template <class Metric>
const typename Metric::Element* scaled_row(const typename Metric::Element* row, int64_t dim, int exponent,
                                           typename Metric::Element* to) {
  constexpr int half = 4 - int(sizeof(*row));  // bytes that a bf16 lacks of the fp32 it is
  for (int64_t d = 0; d < dim; ++d) {
    float x = 0.f;
    memcpy(reinterpret_cast<char*>(&x) + half, row + d, sizeof *row);
    x = float(__builtin_ldexp(double(x), exponent));
    memcpy(to + d, reinterpret_cast<char*>(&x) + half, sizeof *row);
  }
  return to;
}

/// sums[i][v] += the products of steps [begin, end): tile_rows sources, broadcast from `source` ([step][lanes]), with a
/// panel ([step][panel]). A function of its own: inlined, GCC keeps what its caller needs in registers and spills sums.
template <class Product>
__attribute__((noinline)) void multiply_tile(const typename Product::Element* source,
                                             const typename Product::Element* column, int64_t steps, float* sums) {
  Simd::Float sum[tile_rows][tile_vectors];
#pragma GCC unroll 8
  for (int i = 0; i < tile_rows; ++i) {
#pragma GCC unroll 3
    for (int v = 0; v < tile_vectors; ++v) sum[i][v] = Simd::load(sums + i * panel + v * Simd::lanes);
  }
  for (int64_t step = 0; step < steps; ++step, column += panel, source += Simd::lanes) {
    typename Product::Operand b[tile_vectors];
#pragma GCC unroll 3
    for (int v = 0; v < tile_vectors; ++v) b[v] = Product::load(column + v * Simd::lanes);
#pragma GCC unroll 8
    for (int i = 0; i < tile_rows; ++i) {
      typename Product::Operand a = Product::broadcast(source + i);
      Simd::hold(a);
#pragma GCC unroll 3
      for (int v = 0; v < tile_vectors; ++v) sum[i][v] = Product::madd(a, b[v], sum[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < tile_rows; ++i) {
#pragma GCC unroll 3
    for (int v = 0; v < tile_vectors; ++v) Simd::store(sums + i * panel + v * Simd::lanes, sum[i][v]);
  }
}

template <class Metric>
struct Nearest {
  using Product = typename Metric::Product;
  using Element = typename Product::Element;
  using Source = typename Metric::Element;
  static constexpr int pair = Product::pair;

  const NearestTask& task;
  const int64_t sample, first, last;  // sources
  const int64_t dim, steps;           // steps: Product elements of a row
  Element* packed = nullptr;          // destinations [steps][panel]
  Element* sources = nullptr;         // [(last - first) / lanes, rounded up][steps][lanes]
  Source* scaled = nullptr;           // [lanes][dim]
  RowNorm* norms = nullptr;           // [last - first]
  float* best = nullptr;              // [last - first, rounded up to lanes][lanes]
  float* place = nullptr;             // the same: positions of the best, as bits
  float* sums = nullptr;              // [last - first, rounded up to lanes][panel]
  alignas(64) float inverse[panel] = {};
  alignas(64) float bias[panel] = {};  // -inf where a lane holds no candidate
  alignas(64) int32_t position[panel] = {};

  const Source* row(int64_t token) const {
    const InputView& view = task.match->metric;
    return static_cast<const Source*>(view.data) + view.offset(sample, 0, token);
  }

  /// The row as it is multiplied: where its length asks for it, a scaled copy in place `i`.
  const Source* operand_row(const Source* from, const RowNorm& norm, int i) {
    return norm.exponent ? scaled_row<Metric>(from, dim, norm.exponent, scaled + i * dim) : from;
  }

  /// As many rows as lanes to columns `to[step * stride + lane]`; null: zeros.
  void pack_rows(const Source* const (&rows)[Simd::lanes], Element* to, int64_t stride) {
    constexpr int taken = Simd::lanes * pair;
    for (int64_t d = 0; d < dim; d += taken) {
      const int wanted = dim - d < taken ? int(dim - d) : taken, elements = (wanted + pair - 1) / pair;
      Simd::Int block[Simd::lanes];
      for (int i = 0; i < Simd::lanes; ++i) {
        block[i] = rows[i] ? Metric::operand(rows[i] + d, wanted) : Simd::set_int(0);
      }
      Simd::transpose(block);
      for (int i = 0; i < elements; ++i) Simd::store_int(to + (d / pair + i) * stride, block[i]);
    }
  }

  /// Destinations 2(j0 + i) + 1 of i < count to the columns of the panel.
  void pack_panel(int64_t j0, int count) {
    for (int v = 0; v < tile_vectors; ++v) {
      const Source* rows[Simd::lanes] = {};
      for (int i = 0; i < Simd::lanes; ++i) {
        const int at = v * Simd::lanes + i;
        const int64_t token = 2 * (j0 + at) + 1;
        position[at] = int32_t(token);
        inverse[at] = 0.f;
        bias[at] = at < count && token >= task.match->protect ? 0.f : -__builtin_inff();
        if (at >= count) continue;
        RowNorm norm = norm_of<Metric>(row(token), dim);
        inverse[at] = norm.inverse;
        rows[i] = operand_row(row(token), norm, i);
      }
      pack_rows(rows, packed + v * Simd::lanes, panel);
    }
  }

  void pack_sources(int64_t count) {
    for (int64_t i0 = 0; i0 < count; i0 += Simd::lanes) {
      const Source* rows[Simd::lanes] = {};
      for (int i = 0; i < Simd::lanes && i0 + i < count; ++i) {
        const Source* from = row(2 * (first + i0 + i));
        norms[i0 + i] = norm_of<Metric>(from, dim);
        rows[i] = operand_row(from, norms[i0 + i], i);
      }
      pack_rows(rows, sources + i0 * steps, Simd::lanes);
    }
  }

  /// The cosines of source `i` (but for its own length) with the panel, against the best so far.
  void compare(int64_t i) {
    Simd::Float top = Simd::load(best + i * Simd::lanes), where = Simd::load(place + i * Simd::lanes);
#pragma GCC unroll 3
    for (int v = 0; v < tile_vectors; ++v) {
      const int lane = v * Simd::lanes;
      Simd::Float sum = Simd::load(sums + i * panel + lane);
      Simd::Float cosine = Simd::fma(sum, Simd::load(inverse + lane), Simd::load(bias + lane));
      Simd::Mask better = Simd::less(top, cosine);  // not where either is NaN; of equal ones the first stays
      top = Simd::select(better, cosine, top);
      where = Simd::select(better, Simd::as_float(Simd::load_int(position + lane)), where);
    }
    Simd::store(best + i * Simd::lanes, top);
    Simd::store(place + i * Simd::lanes, where);
  }

  bool run() {
    const int64_t candidates = task.count(sample) / 2, count = last - first, held = round_up(count, Simd::lanes);
    const int64_t element = sizeof(Element);
    const int64_t bytes[] = {steps * panel * element,
                             held * steps * element,
                             Simd::lanes * dim * element,
                             count * int64_t(sizeof(RowNorm)),
                             held * Simd::lanes * 4,
                             held * Simd::lanes * 4,
                             held * panel * 4};
    int64_t at[8] = {};
    for (int i = 0; i < 7; ++i) at[i + 1] = at[i] + round_up(bytes[i], 64);
    char* scratch = nullptr;
    if (posix_memalign(reinterpret_cast<void**>(&scratch), 64, size_t(at[7]) + 64)) return false;
    packed = reinterpret_cast<Element*>(scratch + at[0]);
    sources = reinterpret_cast<Element*>(scratch + at[1]);
    scaled = reinterpret_cast<Source*>(scratch + at[2]);
    norms = reinterpret_cast<RowNorm*>(scratch + at[3]);
    best = reinterpret_cast<float*>(scratch + at[4]);
    place = reinterpret_cast<float*>(scratch + at[5]);
    sums = reinterpret_cast<float*>(scratch + at[6]);
    for (int64_t i = 0; i < held * Simd::lanes; ++i) best[i] = -__builtin_inff();
    pack_sources(count);
    for (int64_t j0 = 0; j0 < candidates; j0 += panel) {
      pack_panel(j0, candidates - j0 < panel ? int(candidates - j0) : panel);
      memset(sums, 0, size_t(held * panel) * 4);
      for (int64_t begin = 0; begin < steps; begin += block_steps) {
        const int64_t length = steps - begin < block_steps ? steps - begin : block_steps;
        for (int64_t i = 0; i < held; i += tile_rows) {
          const Element* source =
              sources + i / Simd::lanes * Simd::lanes * steps + begin * Simd::lanes + i % Simd::lanes;
          multiply_tile<Product>(source, packed + begin * panel, length, sums + i * panel);
        }
      }
      for (int64_t i = 0; i < count; ++i) compare(i);
    }
    for (int64_t i = 0; i < count; ++i) finish(i);
    free(scratch);
    return true;
  }

  /// The best lane of source `i`; of equal ones the first position.
  void finish(int64_t i) {
    const int64_t to = sample * task.sources + first + i;
    float top = -__builtin_inff();
    int32_t chosen = int32_t(task.match->protect | 1);  // the first candidate, where none is similar
    for (int lane = 0; lane < Simd::lanes && norms[i].inverse == norms[i].inverse; ++lane) {
      float value = best[i * Simd::lanes + lane];
      if (value == -__builtin_inff()) continue;
      int32_t at;
      memcpy(&at, place + i * Simd::lanes + lane, 4);
      if (value > top || (value == top && at < chosen)) {
        top = value;
        chosen = at;
      }
    }
    task.best[to] = top * norms[i].inverse;
    if (top == -__builtin_inff()) task.best[to] = top;
    task.target[to] = chosen;
  }
};

template <class Metric>
bool search(const NearestTask& task, int64_t s, int64_t first, int64_t last) {
  Nearest<Metric> nearest = {
      task, s, first, last, task.match->dim, (task.match->dim + Metric::Product::pair - 1) / Metric::Product::pair};
  return nearest.run();
}

static bool nearest(const NearestTask& task, int64_t s, int64_t first, int64_t last) {
  switch (task.match->dtype) {
    case DType::f32: return search<MetricF32>(task, s, first, last);
    case DType::f16: return search<MetricF16>(task, s, first, last);
    case DType::bf16: return search<MetricBf16>(task, s, first, last);
    default: return true;  // refused
  }
}

static const char* refuses_match(DType dtype) {
  return dtype == DType::f64 ? "float64 runs on the reference" : nullptr;
}

}  // namespace
}  // namespace sparsekit

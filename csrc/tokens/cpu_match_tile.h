// What both searches of the matcher are made of, over any Simd: metrics as operands of a product, lengths of rows, and
// the tile of a product, 8 sources times 48 destinations (8 x 24 or 4 x 12 with narrower registers).
#pragma once

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

}  // namespace
}  // namespace sparsekit

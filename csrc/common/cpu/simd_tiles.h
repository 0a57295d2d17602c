// Register tiles of matrix products: sum[row][lane] = sum over steps of a[row][step] * b[step][lane].
//
// Elements of `a` are broadcast, `b` holds `width` vectors of lanes per step, the sums stay in registers. The loops are
// assembly on x86-64: there is nothing in them for a compiler to decide, and GCC 12 decides differently from one change
// of the code around them to the next. The same source had sums in memory (0.47 of the multiply-add peak), operands on
// the stack (0.51), or neither (0.98). Include after simd_math.h.
#pragma once

namespace sparsekit {
namespace {

/// Steps of one segment of a panel: 16 rows stand together, [step][16].
struct PanelRun {
  const void* a;
  int64_t steps;  // > 0
};
constexpr int panel_rows = 16;

/// Any shape, without assembly. `at(row, step)` says where an element of `a` stands.
template <class Product, int rows, int width, class At>
SPARSEKIT_INLINE void add_products(At at, const typename Product::Element* b, int64_t steps,
                                   Simd::Float (&sum)[rows][width]) {
  for (int64_t k = 0; k < steps; ++k, b += width * Simd::lanes) {
    typename Product::Operand right[width];
    for (int j = 0; j < width; ++j) right[j] = Product::load(b + j * Simd::lanes);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      typename Product::Operand left = Product::broadcast(at(i, k));
#pragma GCC unroll 4
      for (int j = 0; j < width; ++j) sum[i][j] = Product::madd(left, right[j], sum[i][j]);
    }
  }
}

template <int rows, int width>
SPARSEKIT_INLINE void clear_sums(Simd::Float (&sum)[rows][width]) {
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < width; ++j) sum[i][j] = Simd::zero();
}

/// Tiles of a product. multiply_rows: rows of `a` stand anywhere, their steps one after the other; steps > 0.
/// multiply_panel: rows of a panel, segment after segment, from the row at `runs[i].a` on.
template <class Product>
struct Tile {
  using Element = typename Product::Element;

  template <int rows, int width>
  SPARSEKIT_INLINE void multiply_rows(const Element* const (&a)[rows], const Element* b, int64_t steps,
                                      Simd::Float (&sum)[rows][width]) {
    clear_sums(sum);
    add_products<Product, rows, width>([&](int row, int64_t step) { return a[row] + step; }, b, steps, sum);
  }
  template <int rows, int width>
  SPARSEKIT_INLINE void multiply_panel(const PanelRun* runs, int count, const Element* b,
                                       Simd::Float (&sum)[rows][width]) {
    clear_sums(sum);
    for (; count > 0; --count, b += runs->steps * width * Simd::lanes, ++runs) {
      auto at = [&](int row, int64_t step) { return static_cast<const Element*>(runs->a) + step * panel_rows + row; };
      add_products<Product, rows, width>(at, b, runs->steps, sum);
    }
  }
};

#ifdef SPARSEKIT_TILES
#define SPARSEKIT_TILE_PRODUCT FloatProduct
#define SPARSEKIT_MADD "vfmadd231ps "
#define SPARSEKIT_BROADCAST "vbroadcastss "
#include "common/cpu/simd_tiles_asm.h"
#undef SPARSEKIT_TILE_PRODUCT
#undef SPARSEKIT_MADD
#undef SPARSEKIT_BROADCAST
#ifdef SPARSEKIT_BF16_PRODUCT
#define SPARSEKIT_TILE_PRODUCT Bf16Product
#define SPARSEKIT_TILE_TWO_SETS
#define SPARSEKIT_MADD "vdpbf16ps "
#define SPARSEKIT_BROADCAST "vpbroadcastd "
#include "common/cpu/simd_tiles_asm.h"
#endif
#endif

}  // namespace
}  // namespace sparsekit

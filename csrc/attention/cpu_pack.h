// Rows of tensors to what the kernels read: elements of any 16- or 32-bit dtype to fp32, bf16 to pairs, queries to
// lanes, values to panels. No row is read past its end; what is padded is zero.
#pragma once

#include "attention/cpu_tiles.h"
#include "common/cpu/simd_math.h"
#include "common/cpu/simd_tiles.h"

namespace sparsekit {
namespace {

constexpr int panel = panel_rows;  // columns of V that stand together

template <DType dtype>
SPARSEKIT_INLINE const char* row_of(const InputView& view, int64_t b, int64_t h, int64_t row) {
  return static_cast<const char*>(view.data) +
         (b * view.batch + h * view.head + row * view.row) * (dtype == DType::f32 ? 4 : 2);
}

/// Up to Simd::lanes elements of a row as fp32.
template <DType dtype>
SPARSEKIT_INLINE Simd::Float load_row(const char* row, int64_t at, int count) {
  const char* p = row + at * (dtype == DType::f32 ? 4 : 2);
  if (dtype == DType::f32) {
    const float* f = reinterpret_cast<const float*>(p);
    return count >= Simd::lanes ? Simd::load(f) : Simd::load_partial(f, count > 0 ? count : 0);
  }
  const uint16_t* h = reinterpret_cast<const uint16_t*>(p);
  if (dtype == DType::bf16) {
    return count >= Simd::lanes ? Simd::load_bf16(h) : Simd::load_bf16_partial(h, count > 0 ? count : 0);
  }
  return count >= Simd::lanes ? Simd::load_f16(h) : Simd::load_f16_partial(h, count > 0 ? count : 0);
}

/// The first `count` of a vector, rounded to the row's dtype.
template <DType dtype>
SPARSEKIT_INLINE void store_row(char* row, int64_t at, int count, Simd::Float a) {
  char* p = row + at * (dtype == DType::f32 ? 4 : 2);
  if (dtype == DType::f32) {
    float* f = reinterpret_cast<float*>(p);
    count >= Simd::lanes ? Simd::store(f, a) : Simd::store_partial(f, a, count);
  } else if (dtype == DType::bf16) {
    uint16_t* h = reinterpret_cast<uint16_t*>(p);
    count >= Simd::lanes ? Simd::store_bf16(h, a) : Simd::store_bf16_partial(h, a, count);
  } else {
    uint16_t* h = reinterpret_cast<uint16_t*>(p);
    count >= Simd::lanes ? Simd::store_f16(h, a) : Simd::store_f16_partial(h, a, count);
  }
}

/// What a Product's kernels need of tensors of one dtype. Vectors of elements: one fp32 each, or one bf16 pair.
template <class Product, DType dtype>
struct Rows {
  /// Keys are used where they stand if they are the product's elements already.
  static constexpr bool keys_in_place = dtype == DType::f32;

  /// Elements at ... at + lanes along a row of `size` tensor elements.
  SPARSEKIT_INLINE Simd::Int along(const char* row, int64_t at, int64_t size) {
    return Simd::as_int(load_row<dtype>(row, at, int(smaller(size - at, Simd::lanes))));
  }
  /// Columns at ... at + lanes of row n: what V's panels hold.
  SPARSEKIT_INLINE Simd::Int across(const char* row, int64_t, bool, int64_t at, int64_t size) {
    return along(row, at, size);
  }
};

#ifdef SPARSEKIT_BF16_PRODUCT
template <>
struct Rows<Bf16Product, DType::bf16> {
  static constexpr bool keys_in_place = true;

  SPARSEKIT_INLINE Simd::Int along(const char* row, int64_t at, int64_t size) {
    return load_bf16_pairs(reinterpret_cast<const uint16_t*>(row) + 2 * at, int(smaller(size - 2 * at, 32)));
  }
  /// Rows n and n + 1 interleaved; `second`: n + 1 exists.
  SPARSEKIT_INLINE Simd::Int across(const char* row, int64_t stride, bool second, int64_t at, int64_t size) {
    int count = int(clamp(size - at, 0, 16));
    const uint16_t* even = reinterpret_cast<const uint16_t*>(row) + at;
    return interleave_bf16(even, reinterpret_cast<const uint16_t*>(row + stride) + at, count, second);
  }
};
#endif

/// Queries to lanes: packed[step][lane] = element `step` of the row at row_at(lane); lanes from `rows` to `width` are
/// zero.
template <class Product, DType dtype, class RowAt>
static void pack_lanes(RowAt row_at, int rows, int width, int64_t size, typename Product::Element* packed) {
  constexpr int lanes = Simd::lanes;
  int64_t steps = ceil_div(size, Product::pair);
  for (int j = 0; j < width; j += lanes) {
    for (int64_t at = 0; at < steps; at += lanes) {
      Simd::Int block[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        block[i] = j + i < rows ? Rows<Product, dtype>::along(row_at(j + i), at, size) : Simd::set_int(0);
      }
      Simd::transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        if (at + i < steps) Simd::store_int(packed + (at + i) * width + j, block[i]);
      }
    }
  }
}

/// The same for rows that stand `stride` bytes apart.
template <class Product, DType dtype>
static void pack_lanes(const char* first, int64_t stride, int rows, int width, int64_t size,
                       typename Product::Element* packed) {
  pack_lanes<Product, dtype>([=](int lane) { return first + lane * stride; }, rows, width, size, packed);
}

/// Rows as they stand, widened to elements: packed[row][step].
template <class Product, DType dtype>
static void pack_rows(const char* first, int64_t stride, int rows, int64_t size, typename Product::Element* packed) {
  int64_t steps = ceil_div(size, Product::pair);
  for (int n = 0; n < rows; ++n, packed += steps) {
    for (int64_t at = 0; at < steps; at += Simd::lanes) {
      Simd::Int elements = Rows<Product, dtype>::along(first + n * stride, at, size);
      if (at + Simd::lanes <= steps) {
        Simd::store_int(packed + at, elements);
      } else {
        Simd::store_partial(reinterpret_cast<float*>(packed + at), Simd::as_float(elements), int(steps - at));
      }
    }
  }
}

/// Rows of V to panels: packed[column / 16][row / pair][column % 16]; rows from `rows` to `padded` are zero.
template <class Product, DType dtype>
static void pack_panels(const char* first, int64_t stride, int rows, int padded, int64_t size,
                        typename Product::Element* packed) {
  for (int64_t column = 0; column < size; column += panel) {
    for (int n = 0; n < padded; n += Product::pair, packed += panel) {
      for (int at = 0; at < panel; at += Simd::lanes) {
        Simd::Int elements = Simd::set_int(0);
        if (n < rows) {
          elements = Rows<Product, dtype>::across(first + n * stride, stride, n + 1 < rows, column + at, size);
        }
        Simd::store_int(packed + at, elements);
      }
    }
  }
}

}  // namespace
}  // namespace sparsekit

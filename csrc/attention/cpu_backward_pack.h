// How backward's operands are laid out. Whatever a tile or a head dimension lacks is zero, and so are the rows of
// queries that see no key: a NaN in them reaches nothing.
#pragma once

#include "attention/cpu_backward_products.h"
#include "attention/cpu_pack.h"

namespace sparsekit {
namespace {
namespace gradients {

/// Consecutive rows of one head.
struct Source {
  const char* data;
  int64_t stride;  // bytes
  int count;
  int dim;  // elements of a row
};

/// Writes scale * source to a row.
template <DType dtype>
void store_scaled(char* row, const float* source, float scale, int dim) {
  for (int d = 0; d < dim; d += lanes) {
    Simd::Float a = Simd::mul(Simd::set(scale), Simd::load(source + d));
    store_row<dtype>(row, d, int(smaller(dim - d, lanes)), a);
  }
}

template <DType dtype>
float dot(const char* a, const char* b, int dim) {
  Simd::Float sum = Simd::zero();
  for (int d = 0; d < dim; d += lanes) {
    sum = Simd::fma(load_row<dtype>(a, d, dim - d), load_row<dtype>(b, d, dim - d), sum);
  }
  return Simd::sum(sum);
}

/// Left operand with one row per tensor row: [padded][row_stride].
template <class Product, DType dtype>
void pack_left(const Source& rows, int padded, int64_t row_stride, typename Product::Element* out) {
  for (int row = 0; row < padded; ++row, out += row_stride) {
    for (int step = 0; step < row_stride; step += lanes) {
      Simd::store_int(out + step, row < rows.count
                                      ? Rows<Product, dtype>::along(rows.data + row * rows.stride, step, rows.dim)
                                      : Simd::set_int(0));
    }
  }
}

/// Right operand whose lanes are rows (queries) and whose steps run along the row: panels [panel][step][row].
template <class Product, DType dtype>
void pack_lanes_are_rows(const Source& rows, int padded, int steps, typename Product::Element* out) {
  for (int first = 0, width; first < padded / lanes; first += width, out += int64_t(width) * lanes * steps) {
    width = panel_width(first, padded / lanes);
    pack_lanes<Product, dtype>(rows.data + first * lanes * rows.stride, rows.stride, rows.count - first * lanes,
                               width * lanes, rows.dim, out);
  }
}

/// Right operand whose lanes run along the row and whose steps are rows (pairs of rows): panels [panel][step][d].
template <class Product, DType dtype>
void pack_steps_are_rows(const Source& rows, int padded, int vectors, typename Product::Element* out) {
  for (int first = 0, width; first < vectors; first += width) {
    width = panel_width(first, vectors);
    for (int row = 0; row < padded; row += Product::pair) {
      for (int v = 0; v < width; ++v, out += lanes) {
        Simd::Int elements = Simd::set_int(0);
        if (row < rows.count) {
          elements = Rows<Product, dtype>::across(rows.data + row * rows.stride, rows.stride, row + 1 < rows.count,
                                                  (first + v) * lanes, rows.dim);
        }
        Simd::store_int(out, elements);
      }
    }
  }
}

/// Makes row `row` of what the two functions above packed zero.
template <class Product>
void clear_lane(int row, int padded, int steps, typename Product::Element* packed) {
  for (int first = 0, width; first < padded / lanes; first += width, packed += int64_t(width) * lanes * steps) {
    width = panel_width(first, padded / lanes);
    int lane = row - first * lanes;
    if (lane < 0 || lane >= width * lanes) continue;
    for (int step = 0; step < steps; ++step) packed[step * width * lanes + lane] = 0;
  }
}
template <class Product>
void clear_step(int row, int padded, int vectors, typename Product::Element* packed) {
  constexpr int size = int(sizeof(typename Product::Element)) / Product::pair;
  for (int first = 0, width; first < vectors;
       first += width, packed += int64_t(width) * lanes * (padded / Product::pair)) {
    width = panel_width(first, vectors);
    char* at = reinterpret_cast<char*>(packed + row / Product::pair * width * lanes) + row % Product::pair * size;
    for (int i = 0; i < width * lanes; ++i, at += sizeof(typename Product::Element)) memset(at, 0, size);
  }
}

}  // namespace gradients
}  // namespace
}  // namespace sparsekit

// Keys and values of a segment, wherever their rows stand, to what the forward kernels read: rows and panels.
#pragma once

#include "attention/cpu_pack.h"
#include "attention/cpu_stripes_plan.h"

namespace sparsekit {
namespace {
namespace stripes {

template <class Product, DType dtype>
struct GatherLayout {
  using Element = typename Product::Element;

  /// Whether consecutive keys can be read where they stand.
  static bool keys_in_place(const AttentionProblem& p) {
    return Rows<Product, dtype>::keys_in_place && p.head_dim % Product::pair == 0;
  }

  /// packed[key][step]. May write up to a vector past the last row.
  static void keys(const AttentionProblem& p, int64_t b, int64_t kv_head, const StripeSegment& s, Element* packed) {
    const int64_t steps = ceil_div(p.head_dim, Product::pair);
    for (int n = 0; n < s.keys.count; ++n, packed += steps) {
      const char* row = row_of<dtype>(p.key, b, kv_head, s.row(n));
      for (int64_t at = 0; at < steps; at += Simd::lanes) {
        Simd::store_int(packed + at, Rows<Product, dtype>::along(row, at, p.head_dim));
      }
    }
  }

  /// packed[column / panel][key / pair][column % panel]; keys that are missing to the padding are zero.
  static void values(const AttentionProblem& p, int64_t b, int64_t kv_head, const StripeSegment& s, Element* packed) {
    const int steps = s.keys.padded / Product::pair;
    for (int step = 0; step < steps; ++step) {
      const int n = step * Product::pair;
      const bool first = n < s.keys.count, second = n + 1 < s.keys.count;
      const char* row = first ? row_of<dtype>(p.value, b, kv_head, s.row(n)) : nullptr;
      const int64_t stride = second ? row_of<dtype>(p.value, b, kv_head, s.row(n + 1)) - row : 0;
      for (int64_t column = 0; column < p.value_dim; column += panel) {
        Element* to = packed + (column / panel * steps + step) * panel;
        for (int at = 0; at < panel; at += Simd::lanes) {
          Simd::Int elements = Simd::set_int(0);
          if (first) elements = Rows<Product, dtype>::across(row, stride, second, column + at, p.value_dim);
          Simd::store_int(to + at, elements);
        }
      }
    }
  }
};

}  // namespace stripes
}  // namespace
}  // namespace sparsekit

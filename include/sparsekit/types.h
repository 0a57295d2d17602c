// Types that every op family shares.
#pragma once

#include <cstdint>

namespace sparsekit {

enum class DType : int32_t { f32, f16, bf16, f64 };

static inline const char* name(DType dtype) {
  switch (dtype) {
    case DType::f32: return "float32";
    case DType::f16: return "float16";
    case DType::bf16: return "bfloat16";
    case DType::f64: return "float64";
  }
  return "unknown";
}

static inline int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

/// A view of a `[batch, heads, rows, dim]` tensor with `dim` contiguous. Strides are in elements.
/// A packed (varlen) tensor `[rows, heads, dim]` is the same view with one batch.
template <class Pointer>
struct HeadsView {
  Pointer data = nullptr;
  int64_t batch = 0, head = 0, row = 0;

  int64_t offset(int64_t b, int64_t h, int64_t r) const { return b * batch + h * head + r * row; }
};
using InputView = HeadsView<const void*>;
using OutputView = HeadsView<void*>;

}  // namespace sparsekit

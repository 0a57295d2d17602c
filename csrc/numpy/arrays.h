// Arrays on their way in and out: what an error must name, and which layouts kernels take in place.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "sparsekit/types.h"

namespace sparsekit::numpy {

/// An argument: a CPU array of any producer, or nothing where None was given. Its data is never converted.
class Array {
 public:
  Array(const char* name, nanobind::handle source, size_t dimensions);

  const char* const name;
  bool given() const { return array_.is_valid(); }
  int64_t size(int dimension) const { return int64_t(array_.shape(dimension)); }
  int64_t stride(int dimension) const { return array_.stride(dimension); }
  const void* data() const { return array_.data(); }

  DType dtype() const;
  void expect_dtype(const Array& other) const;
  /// Throws unless the shape is `sizes`; -1 is any.
  void expect_shape(const std::vector<int64_t>& sizes) const;
  /// Their data where they are contiguous and of that type.
  const int32_t* int32s() const;
  const float* floats() const;

 private:
  nanobind::ndarray<nanobind::ro> array_;
};

using Buffer = std::unique_ptr<void, decltype(&std::free)>;

/// A `[batch, heads, rows, dim]` argument as kernels take it: in place where the last stride is 1 and the base and the
/// other strides are multiples of 16 bytes, else a copy.
struct HeadsArray {
  explicit HeadsArray(const Array& array);

  InputView view;
  Buffer copy{nullptr, std::free};
};

/// A result: 64-byte aligned memory that the NumPy array takes over. bfloat16 travels as uint16.
class OwnedArray {
 public:
  OwnedArray(DType dtype, const std::vector<int64_t>& shape);
  void* data() const { return buffer_.get(); }
  nanobind::object to_numpy();

 private:
  DType dtype_;
  std::vector<size_t> shape_;
  Buffer buffer_;
};

}  // namespace sparsekit::numpy

#include "numpy/arrays.h"

#include <cstring>

namespace nb = nanobind;

namespace sparsekit::numpy {
namespace {

constexpr auto Float = uint8_t(nb::dlpack::dtype_code::Float);
constexpr auto Bfloat = uint8_t(nb::dlpack::dtype_code::Bfloat);
constexpr auto Int = uint8_t(nb::dlpack::dtype_code::Int);
constexpr auto UInt = uint8_t(nb::dlpack::dtype_code::UInt);
constexpr int64_t alignment = 16;  // bytes: the loads of every backend

std::string text(nb::dlpack::dtype dtype) {
  std::string bits = std::to_string(dtype.bits);
  switch (dtype.code) {
    case Float: return "float" + bits;
    case Bfloat: return "bfloat" + bits;
    case Int: return "int" + bits;
    case UInt: return "uint" + bits;
    default: return "type code " + std::to_string(dtype.code) + " with " + bits + " bits";
  }
}

std::string shape_text(const std::vector<int64_t>& sizes) {
  std::string all;
  for (int64_t size : sizes) all += (all.empty() ? "" : ", ") + (size < 0 ? "any" : std::to_string(size));
  return "(" + all + ")";
}

Buffer allocate(size_t bytes) {
  Buffer buffer(std::aligned_alloc(64, (bytes / 64 + 1) * 64), std::free);
  if (!buffer) throw std::bad_alloc();
  return buffer;
}

}  // namespace

Array::Array(const char* argument, nb::handle source, size_t dimensions) : name(argument) {
  if (source.is_none()) return;
  if (!nb::try_cast(source, array_, /*convert=*/false)) {
    std::string type = nb::str(source.type().attr("__name__")).c_str();
    throw nb::type_error((std::string(name) + ": " + type +
                          " found; a NumPy array or a DLPack producer on the CPU "
                          "supported")
                             .c_str());
  }
  if (array_.device_type() != nb::device::cpu::value) {
    throw nb::value_error((std::string(name) + " is not in CPU memory; use sparsekit's torch ops on a GPU").c_str());
  }
  if (array_.ndim() != dimensions) {
    throw nb::value_error((std::string(name) + ": " + std::to_string(array_.ndim()) + " dimensions found; " +
                           std::to_string(dimensions) + " supported")
                              .c_str());
  }
}

DType Array::dtype() const {
  nb::dlpack::dtype found = array_.dtype();
  if (found.lanes == 1) {
    if (found.code == Float && found.bits == 16) return DType::f16;
    if (found.code == Float && found.bits == 32) return DType::f32;
    if (found.code == Float && found.bits == 64) return DType::f64;
    if ((found.code == Bfloat || found.code == UInt) && found.bits == 16) return DType::bf16;
  }
  throw nb::type_error((std::string(name) + ": dtype " + text(found) +
                        " found; float32, float16, bfloat16 (also as its bits, uint16) and float64 supported")
                           .c_str());
}

void Array::expect_dtype(const Array& other) const {
  if (dtype() == other.dtype()) return;
  throw nb::type_error((std::string(name) + ": dtype " + sparsekit::name(dtype()) + " found; " + other.name + "'s " +
                        sparsekit::name(other.dtype()) + " supported")
                           .c_str());
}

void Array::expect_shape(const std::vector<int64_t>& sizes) const {
  std::vector<int64_t> found;
  bool same = array_.ndim() == sizes.size();
  for (size_t i = 0; i < array_.ndim(); ++i) {
    found.push_back(size(int(i)));
    same = same && (sizes[i] < 0 || sizes[i] == found[i]);
  }
  if (same) return;
  throw nb::value_error(
      (std::string(name) + ": shape " + shape_text(found) + " found; " + shape_text(sizes) + " supported").c_str());
}

namespace {

template <class T>
const T* plain(const nb::ndarray<nb::ro>& array, const char* name) {
  if (array.dtype() != nb::dtype<T>()) {
    throw nb::type_error(
        (std::string(name) + ": dtype " + text(array.dtype()) + " found; " + text(nb::dtype<T>()) + " supported")
            .c_str());
  }
  int64_t expected = 1;
  for (size_t i = array.ndim(); i-- > 0;) {
    if (array.size() > 0 && array.shape(i) > 1 && array.stride(i) != expected) {
      throw nb::value_error((std::string(name) + " is not contiguous; pass numpy.ascontiguousarray of it").c_str());
    }
    expected *= int64_t(array.shape(i));
  }
  static const T nothing{};  // an empty array may have no address, but a null pointer means that it was not given
  return array.size() > 0 ? static_cast<const T*>(array.data()) : &nothing;
}

}  // namespace

const int32_t* Array::int32s() const { return plain<int32_t>(array_, name); }
const float* Array::floats() const { return plain<float>(array_, name); }

HeadsArray::HeadsArray(const Array& array) {
  const int64_t bytes = size_of(array.dtype());
  const int64_t sizes[4] = {array.size(0), array.size(1), array.size(2), array.size(3)};
  bool in_place = reinterpret_cast<uintptr_t>(array.data()) % alignment == 0;
  in_place = in_place && (sizes[3] <= 1 || array.stride(3) == 1);
  for (int d = 0; d < 3; ++d) in_place = in_place && (sizes[d] <= 1 || array.stride(d) * bytes % alignment == 0);
  if (in_place) {
    view = {array.data(), array.stride(0), array.stride(1), array.stride(2)};
    return;
  }
  const int64_t row = (sizes[3] * bytes + alignment - 1) / alignment * alignment / bytes;
  copy = allocate(size_t(sizes[0] * sizes[1] * sizes[2] * row * bytes));
  view = {copy.get(), sizes[1] * sizes[2] * row, sizes[2] * row, row};
  char* target = static_cast<char*>(copy.get());
  const char* source = static_cast<const char*>(array.data());
  for (int64_t b = 0; b < sizes[0]; ++b) {
    for (int64_t h = 0; h < sizes[1]; ++h) {
      for (int64_t r = 0; r < sizes[2]; ++r, target += row * bytes) {
        const char* from = source + (b * array.stride(0) + h * array.stride(1) + r * array.stride(2)) * bytes;
        for (int64_t d = 0; d < sizes[3]; ++d) {
          std::memcpy(target + d * bytes, from + d * array.stride(3) * bytes, size_t(bytes));
        }
      }
    }
  }
}

OwnedArray::OwnedArray(DType dtype, const std::vector<int64_t>& shape)
    : dtype_(dtype), shape_(shape.begin(), shape.end()), buffer_(nullptr, std::free) {
  size_t bytes = size_t(size_of(dtype_));
  for (size_t size : shape_) bytes *= size;
  buffer_ = allocate(bytes);
}

nb::object OwnedArray::to_numpy() {
  const bool is_float = dtype_ != DType::bf16;
  nb::dlpack::dtype dtype{is_float ? Float : UInt, uint8_t(size_of(dtype_) * 8), 1};
  void* data = buffer_.release();
  nb::capsule owner(data, [](void* memory) noexcept { std::free(memory); });
  nb::ndarray<nb::numpy> array(data, shape_.size(), shape_.data(), owner, nullptr, dtype);
  return nb::cast(array);
}

}  // namespace sparsekit::numpy

// Between torch::stable::Tensor and the plain structs of include/sparsekit.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdarg>
#include <cstdio>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "sparsekit/parallel.h"
#include "sparsekit/status.h"
#include "sparsekit/types.h"

namespace sparsekit {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

/// Raises a RuntimeError (printf format). The message names the argument, what was found and what is supported.
[[noreturn]] __attribute__((format(printf, 1, 2))) static inline void fail(const char* format, ...) {
  char message[384];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  throw std::runtime_error(message);
}

static inline void require(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message);
}

static inline DType to_dtype(ScalarType type, const char* name) {
  switch (type) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Double: return DType::f64;
    default: fail("%s has an unsupported dtype; supported: float32, float16, bfloat16 (float64 on the CPU)", name);
  }
}

/// The tensor as every kernel takes it: last stride 1, base and other strides multiples of 16 bytes, else one copy.
static inline Tensor aligned(const Tensor& tensor) {
  int64_t last = tensor.dim() - 1, element = tensor.element_size();
  bool usable = tensor.size(last) <= 1 || tensor.stride(last) == 1;
  usable &= reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
  for (int64_t d = 0; d < last; ++d) usable &= tensor.size(d) <= 1 || tensor.stride(d) * element % 16 == 0;
  if (usable) return tensor;
  // A contiguous tensor at an odd address is not copied by contiguous().
  return tensor.is_contiguous() ? torch::stable::clone(tensor) : torch::stable::contiguous(tensor);
}

/// Uninitialised `[batch, heads, rows, dim]` (packed: `[rows, heads, dim]`) with the dimension order of `like` in
/// memory and no gaps. `fake kernels` in python/sparsekit/_registrations/ compute the same strides.
static inline Tensor empty_in_order_of(const Tensor& like, const std::vector<int64_t>& sizes) {
  int64_t dims = like.dim();
  std::vector<int64_t> order, strides(sizes.size());
  for (int64_t d = 0; d < dims - 1; ++d) {
    // Insertion by descending stride, stable: dimensions of equal stride keep their order.
    auto at = order.begin();
    while (at != order.end() && like.stride(*at) >= like.stride(d)) ++at;
    order.insert(at, d);
  }
  int64_t stride = sizes[dims - 1] > 0 ? sizes[dims - 1] : 1;
  strides[dims - 1] = 1;
  for (auto d = order.rbegin(); d != order.rend(); ++d) {
    strides[*d] = stride;
    stride *= sizes[*d] > 0 ? sizes[*d] : 1;
  }
  AtenTensorHandle handle;
  int32_t dtype, type, index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes.data(), strides.data(), dtype, type, index, &handle));
  return Tensor(handle);
}

static inline Tensor empty_on(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

/// A view of `[batch, heads, rows, dim]`, or of a packed `[rows, heads, dim]` as one batch.
template <class View>
View heads_view(const Tensor& tensor) {
  View view;
  view.data = tensor.data_ptr();
  bool packed = tensor.dim() == 3;
  view.batch = packed || tensor.size(0) == 1 ? 0 : tensor.stride(0);
  view.head = tensor.stride(1);
  view.row = packed ? tensor.stride(0) : tensor.stride(2);
  return view;
}

static inline void require_same_device(const Tensor& tensor, const Tensor& query, const char* name) {
  if (tensor.device() != query.device()) {
    fail("%s is on another device than query; supported: all tensors on one device", name);
  }
}

static inline void require_dims(const Tensor& tensor, int64_t dims, const char* name) {
  if (tensor.dim() != dims) {
    fail("%s has %lld dimensions; supported: %lld", name, (long long)tensor.dim(), (long long)dims);
  }
}

static inline void require_size(const Tensor& tensor, int64_t dim, int64_t size, const char* name) {
  if (tensor.size(dim) != size) {
    fail("%s has size %lld in dimension %lld; supported: %lld", name, (long long)tensor.size(dim), (long long)dim,
         (long long)size);
  }
}

static inline Tensor contiguous_of(const Tensor& tensor, ScalarType type, const char* name) {
  if (tensor.scalar_type() != type) {
    fail("%s has the wrong dtype; supported: %s", name,
         type == ScalarType::Int    ? "int32"
         : type == ScalarType::Bool ? "bool"
                                    : "float32");
  }
  return torch::stable::contiguous(tensor);
}

/// torch's thread pool as the kernels see it.
static inline ParallelFor torch_parallel() {
  ParallelFor parallel;
  parallel.run = [](int64_t begin, int64_t end, int64_t grain, ParallelFor::Body body, void* context) {
    TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
  };
  uint32_t threads = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
  parallel.threads = int32_t(threads);
  return parallel;
}

/// A plan of any family as text, a line per implementation, best first: "name: runs" or "name: why it refuses".
template <class Plan>
std::string plan_text(const Plan& plan) {
  std::string text;
  for (int i = 0; i < plan.count; ++i) {
    text += std::string(i ? "\n" : "") + plan.entries[i].name + ": " +
            (plan.entries[i].reason ? plan.entries[i].reason : "runs");
  }
  return text;
}

}  // namespace sparsekit

// Host side of TMA: a tensor map says how a box of a tensor is addressed. Through the runtime, so that nothing links
// against libcuda (the library must load on machines without a driver).
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "common/cuda/launch.h"
#include "sparsekit/types.h"

namespace sparsekit::cuda {

/// A `[batch, heads, rows, dim]` view as TMA sees it: why it cannot be one, or null. Extents of 1 may have any stride.
template <class Pointer>
inline const char* tensor_map_refuses(const HeadsView<Pointer>& view, DType dtype, int64_t batch, int64_t heads,
                                      int64_t rows) {
  const int64_t extents[3] = {rows, heads, batch}, strides[3] = {view.row, view.head, view.batch};
  if (reinterpret_cast<uintptr_t>(view.data) % 16) return "query, key, value: supported are addresses of 16 bytes";
  for (int i = 0; i < 3; ++i) {
    if (extents[i] <= 1) continue;
    const int64_t bytes = strides[i] * size_of(dtype);
    if (bytes <= 0 || bytes % 16 || bytes >= int64_t(1) << 40) {
      return "query, key, value: supported are strides above 0 and below 2^40 bytes that are multiples of 16 bytes";
    }
  }
  return nullptr;
}

/// The map of such a view for boxes of 64 columns x `box_rows` rows, with the 128-byte swizzle; 16-bit dtypes.
/// Coordinates are (column, row, head, batch). `stand_in` is any device address: an empty tensor's may be null.
template <class Pointer>
inline Status make_tensor_map(CUtensorMap* map, const HeadsView<Pointer>& view, DType dtype, int64_t batch,
                              int64_t heads, int64_t rows, int64_t dim, int box_rows, const void* stand_in) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t code =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return code == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  if (!encode) {
    return error(Status::Kind::failed, "the NVIDIA driver has no cuTensorMapEncodeTiled; needed: driver 525 or newer");
  }
  const uint64_t element = uint64_t(size_of(dtype));
  auto extent = [](int64_t n) { return cuuint64_t(n > 0 ? n : 1); };
  auto stride = [&](int64_t n, int64_t elements) {
    return n > 1 ? uint64_t(elements) * element : uint64_t(dim) * element;
  };
  const cuuint64_t extents[4] = {extent(dim), extent(rows), extent(heads), extent(batch)};
  const cuuint64_t strides[3] = {stride(rows, view.row), stride(heads, view.head), stride(batch, view.batch)};
  const cuuint32_t box[4] = {64, cuuint32_t(box_rows), 1, 1}, steps[4] = {1, 1, 1, 1};
  void* address = const_cast<void*>(rows > 0 && view.data ? static_cast<const void*>(view.data) : stand_in);
  const CUresult code =
      encode(map, dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, address,
             extents, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (code == CUDA_SUCCESS) return {};
  return error(
      Status::Kind::failed,
      "cuTensorMapEncodeTiled failed with error %d for [%lld, %lld, %lld, %lld], strides %lld, %lld, %lld bytes",
      int(code), (long long)batch, (long long)heads, (long long)rows, (long long)dim, (long long)strides[2],
      (long long)strides[1], (long long)strides[0]);
}

}  // namespace sparsekit::cuda

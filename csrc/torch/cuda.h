// How a CUDA call runs: on the tensor's device and torch's current stream, scratch from torch's caching allocator.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "sparsekit/attention.h"
#include "sparsekit/selection.h"
#include "torch/tensors.h"

// Declared here because torch's header hides it behind USE_CUDA. getCurrentStream().id() is not a cudaStream_t.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace sparsekit {

/// Compute capability (10 * major + minor) and multiprocessors of a device; read once per device.
void cuda_device_properties(int device, int* compute_capability, int* multiprocessors);

/// The context of the current device while it lives; `workspace()` allocates scratch that lives as long.
class CudaCall {
 public:
  explicit CudaCall(const Tensor& tensor) : guard_(tensor.get_device_index()), like_(tensor) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &context.stream));
    cuda_device_properties(tensor.get_device_index(), &context.compute_capability, &context.multiprocessors);
  }
  const CudaContext& with_workspace(size_t bytes) {
    if (bytes > 0) {
      scratch_ = empty_on(like_, {int64_t(bytes)}, ScalarType::Byte);
      context.workspace = scratch_.data_ptr();
      context.workspace_bytes = bytes;
    }
    return context;
  }

  CudaContext context;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Tensor like_, scratch_;
};

struct Cuda {
  static void run(const AttentionForward& p, const Tensor& query) {
    CudaCall call(query);
    require(attention_forward(p, call.with_workspace(attention_workspace(p, Direction::forward, call.context))));
  }
  static void run(const AttentionBackward& p, const Tensor& query) {
    CudaCall call(query);
    require(attention_backward(p, call.with_workspace(attention_workspace(p, Direction::backward, call.context))));
  }
  static void run(const AttentionMerge& m, const Tensor& out) {
    CudaCall call(out);
    require(attention_merge(m, call.context));
  }
  static void run(const TransposeBlockLists& t, const Tensor& lists) {
    CudaCall call(lists);
    require(transpose_block_lists(t, call.with_workspace(transpose_block_lists_workspace(t, call.context))));
  }
  static void run(const BlockListsFromBool& b, const Tensor& map) {
    CudaCall call(map);
    require(block_lists_from_bool(b, call.context));
  }
};

}  // namespace sparsekit

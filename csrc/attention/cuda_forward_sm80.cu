// The host side of the sm_80 forward, and its entry in the table of implementations: which problems it takes, which
// kernel and how many rows per CTA, and the launch.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "attention/cuda_forward_sm80.h"
#include "attention/cuda_implementations.h"
#include "attention/cuda_schedule.h"
#include "attention/cuda_tiles.cuh"
#include "common/cuda/launch.h"

namespace sparsekit {
namespace sm80 {
namespace {

constexpr int kMaxDim = 256;

int64_t list_rows(const AttentionProblem& p) { return p.batch * p.heads_q * p.lists.q_blocks; }

/// The cheapest kernel that holds the problem's dimensions and whose tiles divide its key blocks.
const ForwardKernel* kernel_for(const AttentionProblem& p) {
  const ForwardKernels kernels = p.dtype == DType::bf16  ? forward_kernels_bf16()
                                 : p.dtype == DType::f16 ? forward_kernels_f16()
                                                         : forward_kernels_f32();
  for (const ForwardKernel* kernel = kernels.first; kernel < kernels.first + kernels.count; ++kernel) {
    if (p.head_dim <= kernel->head_dim && p.value_dim <= kernel->value_dim && p.lists.block_k % kernel->keys == 0) {
      return kernel;
    }
  }
  return nullptr;
}

/// How a kernel is launched on one card.
struct Launch {
  int rows = 0;  // of a CTA
  int shared_bytes = 0;
  int resident = 0;  // CTAs on a multiprocessor; 0: does not fit
};

/// CTAs of 128 rows read K and V half as often as CTAs of 64, but need query blocks of 128 and enough of them for every
/// multiprocessor; and two CTAs should share a multiprocessor, so that one multiplies while the other takes
/// exponentials (head dimension 256 on an H200: two CTAs of 64 rows 331 TFLOP/s, one of 128 rows 305).
Launch plan_launch(const AttentionProblem& p, const ForwardKernel& kernel, const cuda::SharedMemory& card,
                   int multiprocessors) {
  auto plan = [&](int rows) {
    const int elements = rows * kernel.head_dim + kernel.keys * (kernel.head_dim + kernel.value_dim);
    const int bytes = elements * int(size_of(p.dtype));
    const int fit = bytes > card.per_block ? 0 : card.per_multiprocessor / (bytes + 1024);
    return Launch{rows, bytes, std::min(fit, kernel.ctas * 128 / rows)};
  };
  const Launch small = plan(64);
  if (p.lists.block_q != 128 || list_rows(p) < multiprocessors) return small;
  const Launch large = plan(128);
  return large.resident >= 2 || large.resident * 2 > small.resident ? large : small;
}

/// The order of the list rows. Problems that run all at once do without, but that depends on the launch.
size_t forward_workspace(const AttentionProblem& p) { return size_t(list_rows(p)) * sizeof(int32_t); }

Status forward(const AttentionForward& p, const CudaContext& context) {
  if (list_rows(p) == 0) return {};
  const size_t workspace = forward_workspace(p);
  if (context.workspace_bytes < workspace) {
    return error(Status::Kind::invalid_argument, "workspace is %zu bytes; needed: %zu", context.workspace_bytes,
                 workspace);
  }
  cuda::SharedMemory card;
  Status status = cuda::shared_memory_of_device(&card);
  if (!status.ok()) return status;
  const ForwardKernel* kernel = kernel_for(p);
  const Launch launch = plan_launch(p, *kernel, card, context.multiprocessors);
  if (!launch.resident) {
    return error(Status::Kind::unsupported,
                 "block-sparse attention on sm80: head_dim %d needs more shared memory than %d", p.head_dim,
                 card.per_block);
  }
  const int64_t ctas = list_rows(p) * (p.lists.block_q / launch.rows);
  int32_t* order = nullptr;
  if (ctas > int64_t(launch.resident) * context.multiprocessors) {
    order = static_cast<int32_t*>(context.workspace);
    status = cuda::schedule_longest_first(p, order, context.stream);
    if (!status.ok()) return status;
  }
  cudaError_t code = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel->kernel),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared_bytes);
  if (code != cudaSuccess) return cuda::status_of(code, "setting the forward kernel's shared memory");
  const unsigned threads = unsigned(launch.rows / kernel->rows_per_warp * 32);
  kernel->kernel<<<unsigned(ctas), threads, launch.shared_bytes, static_cast<cudaStream_t>(context.stream)>>>(p, order);
  return cuda::status_of(cudaGetLastError(), "launching block-sparse attention forward");
}

template <class Pointer>
bool aligned(const HeadsView<Pointer>& view, DType dtype) {
  const int64_t elements = view.batch | view.head | view.row;
  return (reinterpret_cast<uintptr_t>(view.data) | uintptr_t(elements * size_of(dtype))) % 16 == 0;
}

const char* refuses(const AttentionProblem& p, Direction, const CudaContext&) {
  const int in_16_bytes = p.dtype == DType::f32 ? 4 : 8;
  if (p.dtype == DType::f64) return "float64 runs on the CPU only; supported: float32, float16, bfloat16";
  if (p.packed()) return "packed batches (cu_seqlens) are not taken on CUDA yet; supported: [batch, heads, rows, dim]";
  if ((p.lists.block_q != 64 && p.lists.block_q != 128) || (p.lists.block_k != 64 && p.lists.block_k != 128)) {
    return "block_size: supported on CUDA are 64 and 128 in any pairing";
  }
  if (p.head_dim > kMaxDim || p.value_dim > kMaxDim) return "head_dim, value_dim: supported are up to 256";
  if (p.head_dim % in_16_bytes || p.value_dim % in_16_bytes) {
    return "head_dim, value_dim: supported are multiples of 16 bytes";
  }
  if (!aligned(p.query, p.dtype) || !aligned(p.key, p.dtype) || !aligned(p.value, p.dtype)) {
    return "query, key, value: supported are addresses and strides that are multiples of 16 bytes";
  }
  const int64_t longest_row = std::max({p.query.row, p.key.row, p.value.row}) * size_of(p.dtype);
  if (longest_row > INT32_MAX) return "query, key, value: supported are row strides below 2^31 bytes";
  if (p.len_q > cuda::kMaxLength || p.len_k > cuda::kMaxLength)
    return "query, key: supported are up to 2^31 - 4097 rows";
  if (list_rows(p) > INT32_MAX / 2) return "query: supported are up to 2^30 query blocks over batch and heads";
  return nullptr;
}

size_t workspace(const AttentionProblem& p, Direction direction, const CudaContext& context) {
  return direction == Direction::forward ? forward_workspace(p) : attention_backward_workspace_sm80(p, context);
}

}  // namespace
}  // namespace sm80

const CudaAttention attention_cuda_sm80 = {"sm80", sm80::refuses, sm80::workspace, sm80::forward,
                                           attention_backward_sm80};

}  // namespace sparsekit

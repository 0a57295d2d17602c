// The host side of stripe-sparse attention on CUDA, and its entry in the table of implementations: which problems it
// takes, which kernel and how many rows a unit has, and the rounds of plan and attention.
//
// A plan may be larger than what it is made from (a group's columns once for each of its units, where a band makes them
// differ), so it has a budget of memory: the cells are worked off in rounds, each planned and then walked.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "attention/cuda_implementations.h"
#include "attention/cuda_stripes_kernels.h"
#include "attention/cuda_stripes_tiles.cuh"
#include "common/cuda/launch.h"

namespace sparsekit {
namespace sm80 {
namespace {

constexpr int kMaxDim = 256;

const StripesForwardKernel* kernel_for(const AttentionProblem& p) {
  const StripesForwardKernels kernels = p.dtype == DType::bf16  ? stripes_forward_kernels_bf16()
                                        : p.dtype == DType::f16 ? stripes_forward_kernels_f16()
                                                                : stripes_forward_kernels_f32();
  for (const StripesForwardKernel* kernel = kernels.first; kernel < kernels.first + kernels.count; ++kernel) {
    const bool divides = p.lists.slots_per_row() == 0 || p.lists.block_k % kernel->keys == 0;
    if (p.head_dim <= kernel->head_dim && p.value_dim <= kernel->value_dim && divides) return kernel;
  }
  return nullptr;
}

/// How a kernel is launched on one card.
struct Launch {
  int rows = 0;  // of a unit
  int shared_bytes = 0;
  int resident = 0;  // CTAs on a multiprocessor; 0: does not fit
};

/// As for blocks: units of 128 rows gather half as often as units of 64, but need groups and query blocks of 128 and
/// enough of them; and two CTAs should share a multiprocessor.
Launch plan_launch(const AttentionProblem& p, const StripesForwardKernel& kernel, const cuda::SharedMemory& card,
                   int multiprocessors) {
  auto plan = [&](int rows) {
    const int elements = rows * kernel.head_dim + kernel.keys * (kernel.head_dim + kernel.value_dim);
    const int bytes = elements * int(size_of(p.dtype)) + 4 * kernel.keys * int(sizeof(int32_t));  // TileRing
    const int fit = bytes > card.per_block ? 0 : card.per_multiprocessor / (bytes + 1024);
    return Launch{rows, bytes, std::min(fit, kernel.ctas * 128 / rows)};
  };
  const Launch small = plan(64);
  const cuda::StripeCut cut = cuda::stripe_cut(p, 128);
  const int most_rows = cut.block ? std::min(cut.block, cut.group) : cut.group;
  if (most_rows <= 64 || p.batch * p.heads_q * cut.units() < multiprocessors) return small;
  const Launch large = plan(128);
  return large.resident >= 2 || large.resident * 2 > small.resident ? large : small;
}

/// The launch on the current device; `multiprocessors` as the context says.
Status launch_of(const AttentionProblem& p, const CudaContext& context, const StripesForwardKernel** kernel,
                 Launch* launch) {
  cuda::SharedMemory card;
  const Status status = cuda::shared_memory_of_device(&card);
  if (!status.ok()) return status;
  *kernel = kernel_for(p);
  *launch = plan_launch(p, **kernel, card, context.multiprocessors);
  if (launch->resident) return {};
  return error(Status::Kind::unsupported, "stripe-sparse attention: head_dim %d needs more shared memory than %d",
               p.head_dim, card.per_block);
}

Status forward(const AttentionForward& p, const CudaContext& context) {
  if (p.batch * p.heads_q * p.len_q == 0) return {};
  const StripesForwardKernel* kernel;
  Launch launch;
  Status status = launch_of(p, context, &kernel, &launch);
  if (!status.ok()) return status;
  cuda::StripePlan plan = cuda::stripe_plan(p, launch.rows, kernel->keys);
  if (context.workspace_bytes < cuda::stripe_plan_bytes(plan)) {
    return error(Status::Kind::invalid_argument, "workspace is %zu bytes; needed: %zu", context.workspace_bytes,
                 cuda::stripe_plan_bytes(plan));
  }
  cudaError_t code = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel->kernel),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared_bytes);
  if (code != cudaSuccess) return cuda::status_of(code, "setting the stripe kernel's shared memory");
  const unsigned threads = unsigned(launch.rows / kernel->rows_per_warp * 32);
  for (int first = 0; first < plan.all_cells(); first += plan.cells) {
    cuda::place_stripe_plan(&plan, context.workspace, first);
    status = cuda::make_stripe_plan(p, plan, context.stream);
    if (!status.ok()) return status;
    const int64_t units = int64_t(plan.cells) * plan.cut.parts_of_cell() * cuda::heads_of_cell(p, plan);
    kernel->kernel<<<unsigned(units), threads, launch.shared_bytes, static_cast<cudaStream_t>(context.stream)>>>(p,
                                                                                                                 plan);
    status = cuda::status_of(cudaGetLastError(), "launching stripe-sparse attention forward");
    if (!status.ok()) return status;
  }
  return {};
}

template <class Pointer>
bool aligned(const HeadsView<Pointer>& view, DType dtype) {
  const int64_t elements = view.batch | view.head | view.row;
  return (reinterpret_cast<uintptr_t>(view.data) | uintptr_t(elements * size_of(dtype))) % 16 == 0;
}

const char* refuses(const AttentionProblem& p, Direction, const CudaContext&) {
  const int in_16_bytes = p.dtype == DType::f32 ? 4 : 8;
  if (p.dtype == DType::f64) return "float64 runs on the CPU only; supported: float32, float16, bfloat16";
  if (p.packed()) return "packed batches (cu_seqlens) have no stripes; supported: [batch, heads, rows, dim]";
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
  if (p.len_q > cuda::kMaxLength || p.len_k > cuda::kMaxLength) {
    return "query, key: supported are up to 2^31 - 4097 rows";
  }
  // Regions of a query block and a group: at most two of each for 16 rows and more, block_q + 1 for the smallest.
  const int64_t units = p.len_q / 32 + (p.lists.slots_per_row() > 0 ? 2 : 1) * (p.len_q / p.stripes.group_size + 1) +
                        2 * (p.len_q / 64 + 1);
  if (p.batch * p.heads_q * units > INT32_MAX / 2) return "query: too many groups of rows over batch and heads";
  return nullptr;
}

size_t workspace(const AttentionProblem& p, Direction direction, const CudaContext& context) {
  if (direction == Direction::backward) return stripes_backward_workspace(p, context);
  const StripesForwardKernel* kernel;
  Launch launch;
  if (p.batch * p.heads_q * p.len_q == 0 || !launch_of(p, context, &kernel, &launch).ok()) return 0;
  return cuda::stripe_plan_bytes(cuda::stripe_plan(p, launch.rows, kernel->keys));
}

}  // namespace
}  // namespace sm80

const CudaAttention attention_cuda_stripes_sm80 = {"stripes_sm80", sm80::refuses, sm80::workspace, sm80::forward,
                                                   stripes_backward};

}  // namespace sparsekit

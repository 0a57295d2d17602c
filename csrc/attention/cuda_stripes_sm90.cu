// The host side of stripe-sparse attention on Hopper, and its entry in the table of implementations: which problems it
// takes, which kernel, and the rounds of plan and attention (as cuda_stripes.cu).
#include <cuda_runtime.h>

#include <algorithm>

#include "attention/cuda_implementations.h"
#include "attention/cuda_stripes_forward_sm90.h"
#include "attention/cuda_stripes_tiles.cuh"
#include "common/cuda/launch.h"
#include "common/cuda/math.cuh"
#include "common/cuda/tensor_map.h"

namespace sparsekit {
namespace sm90 {
namespace {

constexpr int kRows = 128;  // of a unit
constexpr int kKeys = 128;  // of a step

const StripesForwardKernel* kernel_for(const AttentionProblem& p) {
  const StripesForwardKernels kernels =
      p.dtype == DType::bf16 ? stripes_forward_kernels_bf16() : stripes_forward_kernels_f16();
  for (const StripesForwardKernel* kernel = kernels.first; kernel < kernels.first + kernels.count; ++kernel) {
    if (p.head_dim <= kernel->head_dim && p.value_dim <= kernel->value_dim) return kernel;
  }
  return nullptr;
}

const char* refuses(const AttentionProblem& p, Direction direction, const CudaContext& context) {
  if (context.compute_capability != 90) return "needs a GPU of compute capability 9.0 (Hopper)";
  if (direction == Direction::backward && (p.softcap > 0.f || p.key_bias)) {
    return "softcap, key_bias: not in the backward of this implementation";
  }
  if (p.dtype != DType::bf16 && p.dtype != DType::f16) return "dtype: supported are float16, bfloat16";
  if (p.packed()) return "packed batches (cu_seqlens) are not in this implementation";
  if (p.stripes.group_size % kRows) return "group_size: supported are multiples of 128";
  if (p.lists.block_q != kRows || p.lists.block_k != kKeys) return "block_size: supported is (128, 128)";
  if (p.head_dim < 64 || p.value_dim < 64) return "head_dim, value_dim: supported are 64 and larger";
  if (p.head_dim % 8 || p.value_dim % 8) return "head_dim, value_dim: supported are multiples of 16 bytes";
  if (!kernel_for(p)) return "head_dim, value_dim: supported are up to 128";
  if (const char* reason = cuda::tensor_map_refuses(p.query, p.dtype, p.batch, p.heads_q, p.len_q)) return reason;
  for (const InputView* view : {&p.key, &p.value}) {
    const uintptr_t strides = uintptr_t((view->batch | view->head | view->row) * size_of(p.dtype));
    if ((reinterpret_cast<uintptr_t>(view->data) | strides) % 16 || view->row * size_of(p.dtype) > INT32_MAX) {
      return "key, value: supported are addresses and strides that are multiples of 16 bytes, rows below 2^31 bytes";
    }
  }
  if (p.len_q > cuda::kMaxLength || p.len_k > cuda::kMaxLength) {
    return "query, key: supported are up to 2^31 - 4097 rows";
  }
  if (p.batch * p.heads_q * (p.len_q / kRows + 1) > INT32_MAX / 2) {
    return "query: too many groups of rows over batch and heads";
  }
  return nullptr;
}

size_t workspace(const AttentionProblem& p, Direction direction, const CudaContext& context) {
  if (direction == Direction::backward) return stripes_backward_workspace_sm90(p, context);
  if (p.batch * p.heads_q * p.len_q == 0) return 0;
  return cuda::stripe_plan_bytes(cuda::stripe_plan(p, kRows, kKeys));
}

Status forward(const AttentionForward& p, const CudaContext& context) {
  if (p.batch * p.heads_q * p.len_q == 0) return {};
  const int64_t out_strides = p.out.batch | p.out.head | p.out.row;
  if ((reinterpret_cast<uintptr_t>(p.out.data) | uintptr_t(out_strides * size_of(p.dtype))) % 16) {
    return error(Status::Kind::unsupported, "out: supported are addresses and strides that are multiples of 16 bytes");
  }
  const StripesForwardKernel& kernel = *kernel_for(p);
  StripesForward a{};
  a.problem = p;
  a.plan = cuda::stripe_plan(p, kRows, kKeys);
  if (context.workspace_bytes < cuda::stripe_plan_bytes(a.plan)) {
    return error(Status::Kind::invalid_argument, "workspace is %zu bytes; needed: %zu", context.workspace_bytes,
                 cuda::stripe_plan_bytes(a.plan));
  }
  ForwardArguments& blocks = a.blocks;
  blocks.call = p;
  blocks.call.lists.block_k = kKeys;
  blocks.call.len_k = INT32_MAX / 2;
  blocks.plain = p.softcap <= 0.f && !p.key_bias && p.scale > 0.f;
  blocks.factor = p.scale * cuda::kLog2e;
  if (p.softcap > 0.f) blocks.cap_in = p.scale / p.softcap, blocks.cap_out = p.softcap * cuda::kLog2e;
  Status status = cuda::make_tensor_map(&blocks.query, p.query, p.dtype, p.batch, p.heads_q, p.len_q, p.head_dim, kRows,
                                        p.query.data);
  if (!status.ok()) return status;
  cudaError_t code = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel.kernel),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes);
  if (code != cudaSuccess) return cuda::status_of(code, "setting the stripe kernel's shared memory");
  for (int first = 0; first < a.plan.all_cells(); first += a.plan.cells) {
    cuda::place_stripe_plan(&a.plan, context.workspace, first);
    status = cuda::make_stripe_plan(p, a.plan, context.stream);
    if (!status.ok()) return status;
    a.units = a.plan.cells * a.plan.cut.parts_of_cell() * cuda::heads_of_cell(p, a.plan);
    const unsigned ctas = unsigned(std::min(a.units, context.multiprocessors));
    kernel.kernel<<<ctas, unsigned(kernel.threads), size_t(kernel.shared_bytes),
                    static_cast<cudaStream_t>(context.stream)>>>(a);
    status = cuda::status_of(cudaGetLastError(), "launching stripe-sparse attention forward");
    if (!status.ok()) return status;
  }
  return {};
}

}  // namespace
}  // namespace sm90

const CudaAttention attention_cuda_stripes_sm90 = {"stripes_sm90", sm90::refuses, sm90::workspace, sm90::forward,
                                                   stripes_backward_sm90};

}  // namespace sparsekit

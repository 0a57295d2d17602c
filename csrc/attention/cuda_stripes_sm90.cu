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

constexpr int kRows = 128;                           // of a unit
constexpr int kKeys = 128;                           // of a step
constexpr int kUnitsToPack = 8;                      // of a cell
constexpr int64_t kMostPacked = int64_t(256) << 20;  // bytes; longer lists are gathered by each unit

/// The cheapest kernel that holds the problem's dimensions, and packs rows or does not; null: none.
const StripesForwardKernel* kernel_for(const AttentionProblem& p, bool packed = false) {
  const StripesForwardKernels kernels =
      p.dtype == DType::bf16 ? stripes_forward_kernels_bf16() : stripes_forward_kernels_f16();
  for (const StripesForwardKernel* kernel = kernels.first; kernel < kernels.first + kernels.count; ++kernel) {
    if (p.head_dim <= kernel->head_dim && p.value_dim <= kernel->value_dim && packed == kernel->packed) return kernel;
  }
  return nullptr;
}

/// What a problem is worked off with: the plan (without memory), the kernel, and where this packs rows, how.
struct Work {
  cuda::StripePlan plan;
  const StripesForwardKernel* kernel = nullptr;
  int32_t slots = 0;
  int64_t key_bytes = 0, value_bytes = 0, counter_bytes = 0;

  Work(const AttentionProblem& p, const CudaContext& context)
      : plan(cuda::stripe_plan(p, kRows, kKeys)), kernel(kernel_for(p, false)) {
    const StripesForwardKernel* packing = kernel_for(p, true);
    const int cells = cuda::stripe_plan_cells_at_once(plan);
    const int units = plan.cut.parts_of_cell() * cuda::heads_of_cell(p, plan);
    const bool one_head = plan.list_heads % p.heads_kv == 0 && (p.batch == 1 || plan.list_batch > 1);  // of keys
    if (packing->head_dim > kernel->head_dim || !one_head || plan.cut.block || units < kUnitsToPack) return;
    const int32_t wanted = std::min(cells, context.multiprocessors / units + 5);  // at work, and some ahead
    const int64_t row_bytes = wanted * plan.column_capacity * size_of(p.dtype);
    if (row_bytes * (packing->head_dim + packing->value_dim) > kMostPacked) return;
    kernel = packing;
    slots = wanted;
    key_bytes = row_bytes * packing->head_dim;
    value_bytes = row_bytes * packing->value_dim;
    counter_bytes = ((2 * int64_t(cells) + 1) * int64_t(sizeof(int32_t)) + 15) / 16 * 16;
  }

  size_t bytes() const { return size_t(key_bytes + value_bytes + counter_bytes) + cuda::stripe_plan_bytes(plan); }
};

/// Points the arguments of a kernel that packs into `memory`.
Status place_packed(StripesForward* a, const Work& work, char* memory) {
  const AttentionForward& p = a->problem;
  const StripesForwardKernel& kernel = *work.kernel;
  const int64_t rows = a->plan.column_capacity;
  PackedStripes& packed = a->packed;
  packed.slots = work.slots;
  packed.key = reinterpret_cast<uint16_t*>(memory);
  packed.value = reinterpret_cast<uint16_t*>(memory + work.key_bytes);
  packed.tiles = reinterpret_cast<int32_t*>(memory + work.key_bytes + work.value_bytes);
  packed.units = packed.tiles + cuda::stripe_plan_cells_at_once(a->plan);
  packed.counter = packed.units + cuda::stripe_plan_cells_at_once(a->plan);
  const InputView key{packed.key, 0, rows * kernel.head_dim, kernel.head_dim};
  const InputView value{packed.value, 0, rows * kernel.value_dim, kernel.value_dim};
  const Status status =
      cuda::make_tensor_map(&a->blocks.key, key, p.dtype, 1, work.slots, rows, p.head_dim, kKeys, p.query.data);
  if (!status.ok()) return status;
  return cuda::make_tensor_map(&a->blocks.value, value, p.dtype, 1, work.slots, rows, p.value_dim, kKeys, p.query.data);
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
  return Work(p, context).bytes();
}

Status forward(const AttentionForward& p, const CudaContext& context) {
  if (p.batch * p.heads_q * p.len_q == 0) return {};
  const int64_t out_strides = p.out.batch | p.out.head | p.out.row;
  if ((reinterpret_cast<uintptr_t>(p.out.data) | uintptr_t(out_strides * size_of(p.dtype))) % 16) {
    return error(Status::Kind::unsupported, "out: supported are addresses and strides that are multiples of 16 bytes");
  }
  const Work work(p, context);
  const StripesForwardKernel& kernel = *work.kernel;
  if (context.workspace_bytes < work.bytes()) {
    return error(Status::Kind::invalid_argument, "workspace is %zu bytes; needed: %zu", context.workspace_bytes,
                 work.bytes());
  }
  char* const memory = static_cast<char*>(context.workspace);
  char* const plan_memory = memory + work.key_bytes + work.value_bytes + work.counter_bytes;
  auto stream = static_cast<cudaStream_t>(context.stream);
  StripesForward a{};
  a.problem = p;
  a.plan = work.plan;
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
  if (work.slots) status = place_packed(&a, work, memory);
  if (!status.ok()) return status;
  cudaError_t code = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel.kernel),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes);
  if (code != cudaSuccess) return cuda::status_of(code, "setting the stripe kernel's shared memory");
  for (int first = 0; first < a.plan.all_cells(); first += a.plan.cells) {
    cuda::place_stripe_plan(&a.plan, plan_memory, first);
    status = cuda::make_stripe_plan(p, a.plan, stream);
    if (status.ok() && work.slots) {
      code = cudaMemsetAsync(a.packed.tiles, 0, size_t(work.counter_bytes), stream);
      status = cuda::status_of(code, "clearing the counters of packed stripes");
    }
    if (!status.ok()) return status;
    a.units = a.plan.cells * a.plan.cut.parts_of_cell() * cuda::heads_of_cell(p, a.plan);
    const unsigned ctas = unsigned(std::min(a.units, context.multiprocessors));
    kernel.kernel<<<ctas, unsigned(kernel.threads), size_t(kernel.shared_bytes), stream>>>(a);
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

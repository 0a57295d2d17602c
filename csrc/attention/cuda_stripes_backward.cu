// The host side of the stripe-sparse attention backward: which kernel, the scratch, and the order of the launches.
//
//   prepare_backward_rows   lse', delta and what dsink needs, per query row
//   in rounds of cells, as forward: the plan; units: dQ, and dK and dV into fp32 sums by atomics
//                                   deterministic: units: dQ; sections of keys: dK and dV in the order of the rows
//   finish                  the sums in the element type
//   sum_backward_sinks      dsink
// Scratch: 2 DIM floats for every key of every key head, and the plan.
#include <algorithm>

#include "attention/cuda_backward_rows.h"
#include "attention/cuda_implementations.h"
#include "attention/cuda_stripes_backward.h"
#include "attention/cuda_stripes_tiles.cuh"
#include "common/cuda/launch.h"

namespace sparsekit {
namespace cuda {
namespace {

constexpr int64_t kAlignment = 256;
constexpr int64_t kLeastSection = 512;  // keys: smaller ones would mostly hold a part of a tile of each unit's columns

StripesBackwardKernels kernels_of(DType dtype) {
  return dtype == DType::bf16  ? stripes_backward_kernels_bf16()
         : dtype == DType::f16 ? stripes_backward_kernels_f16()
                               : stripes_backward_kernels_f32();
}

int ctas_that_fit(const StripesBackwardKernel& kernel, int bytes, const SharedMemory& card) {
  return bytes > card.per_block ? 0 : std::min(card.per_multiprocessor / (bytes + 1024), kernel.ctas);
}

/// The kernel of the smallest dimension that holds the problem's, with as many rows as units may have and the card's
/// shared memory allows; null where none fits.
const StripesBackwardKernel* kernel_for(const AttentionProblem& p, bool bias_gradient, const SharedMemory& card) {
  const StripesBackwardKernels kernels = kernels_of(p.dtype);
  const int dim = std::max(p.head_dim, p.value_dim);
  const int64_t most_rows =
      p.lists.slots_per_row() > 0 ? std::min(p.lists.block_q, p.stripes.group_size) : p.stripes.group_size;
  const StripesBackwardKernel* found = nullptr;
  for (const StripesBackwardKernel* kernel = kernels.first; kernel < kernels.first + kernels.count; ++kernel) {
    if (kernel->dim < dim || (found && kernel->dim > found->dim)) continue;
    if (ctas_that_fit(*kernel, kernel->shared_bytes(1, bias_gradient), card) == 0) continue;
    if (!found || found->rows >= 2 * most_rows) found = kernel;
  }
  return found;
}

/// The kernel of Hopper that holds the problem's dimensions; null: none.
const StripesBackwardKernel* kernel_of_hopper(const AttentionProblem& p) {
  const StripesBackwardKernels kernels =
      p.dtype == DType::bf16 ? sm90::stripes_backward_kernels_bf16() : sm90::stripes_backward_kernels_f16();
  for (const StripesBackwardKernel* kernel = kernels.first; kernel < kernels.first + kernels.count; ++kernel) {
    if (std::max(p.head_dim, p.value_dim) <= kernel->dim) return kernel;
  }
  return nullptr;
}

/// The scratch in bytes, each part from an aligned place on.
struct Scratch {
  int64_t plan = 0, rows = 0, sums = 0, kept_out = 0, bytes = 0;

  Scratch(const AttentionProblem& p, const StripePlan& of, int dim) {
    auto up = [](int64_t n) { return (n + kAlignment - 1) / kAlignment * kAlignment; };
    rows = up(int64_t(stripe_plan_bytes(of)));
    sums = rows + up(3 * p.batch * p.heads_q * padded_rows(p) * int64_t(sizeof(float)));
    kept_out = sums + up(2 * p.batch * p.heads_kv * p.len_k * dim * int64_t(sizeof(float)));
    bytes = kept_out + kept_out_bytes(p);
  }
};

template <class Kernel>
Status launch(Kernel kernel, int64_t ctas, const StripesBackwardKernel& about, int bytes, const StripesBackward& work,
              cudaStream_t stream) {
  if (ctas == 0) return {};
  cudaError_t code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (code != cudaSuccess) return status_of(code, "stripe-sparse attention backward: reserving shared memory");
  kernel<<<unsigned(ctas), about.threads, bytes, stream>>>(work);
  return status_of(cudaGetLastError(), "launching stripe-sparse attention backward");
}

/// The sums are zero; adds all units' shares, and writes dQ.
Status walk_units(StripesBackward work, const StripesBackwardKernel& kernel, const SharedMemory& card,
                  void* plan_memory, const CudaContext& context) {
  const AttentionBackward& a = work.rows.a;
  auto stream = static_cast<cudaStream_t>(context.stream);
  StripePlan& plan = work.plan;
  auto bytes = [&](int stages) { return kernel.shared_bytes(stages, a.grad_key_bias != nullptr); };
  work.stages = ctas_that_fit(kernel, bytes(2), card) >= ctas_that_fit(kernel, bytes(1), card) ? 2 : 1;
  work.keys = !a.deterministic;
  for (int first = 0; first < plan.all_cells(); first += plan.cells) {
    place_stripe_plan(&plan, plan_memory, first);
    Status status = make_stripe_plan(a, plan, context.stream);
    if (!status.ok()) return status;
    const int64_t units = int64_t(plan.cells) * plan.cut.parts_of_cell() * heads_of_cell(a, plan);
    status = launch(kernel.units, units, kernel, bytes(work.stages), work, stream);
    if (!status.ok()) return status;
    if (!a.deterministic) continue;
    status = launch(kernel.sections, a.batch * a.heads_kv * work.sections, kernel, bytes(work.stages), work, stream);
    if (!status.ok()) return status;
  }
  return {};
}

Status backward(const AttentionBackward& a, const CudaContext& context, bool hopper) {
  auto stream = static_cast<cudaStream_t>(context.stream);
  if (a.batch == 0 || a.heads_q == 0) return {};
  if (a.batch > 65535 || a.heads_q > 65535) {
    return error(Status::Kind::unsupported, "attention backward: batch %lld, heads_q %lld; CUDA takes 65535 of each",
                 (long long)a.batch, (long long)a.heads_q);
  }
  SharedMemory card;
  Status status = shared_memory_of_device(&card);
  if (!status.ok()) return status;
  const bool bias_gradient = a.grad_key_bias != nullptr;
  const StripesBackwardKernel* kernel = hopper ? kernel_of_hopper(a) : kernel_for(a, bias_gradient, card);
  if (!kernel) {
    return error(Status::Kind::unsupported,
                 "stripe-sparse attention backward: head dims %d / %d need more shared memory than this GPU's %d bytes",
                 a.head_dim, a.value_dim, card.per_block);
  }

  StripesBackward work;
  work.plan = stripe_plan(a, kernel->rows, kernel->keys);
  const Scratch scratch(a, work.plan, kernel->dim);
  if (context.workspace_bytes < size_t(scratch.bytes)) {
    return error(Status::Kind::failed, "attention backward: workspace has %zu bytes, needs %lld",
                 context.workspace_bytes, (long long)scratch.bytes);
  }
  auto* memory = static_cast<char*>(context.workspace);
  BackwardPlan& rows = work.rows;
  rows.a = a;
  rows.padded_rows = padded_rows(a);
  const int64_t row_count = a.batch * a.heads_q * rows.padded_rows;
  rows.row_lse = reinterpret_cast<float*>(memory + scratch.rows);
  rows.row_delta = rows.row_lse + row_count;
  if (a.grad_sinks) rows.row_sink = rows.row_lse + 2 * row_count;
  rows.inverse_softcap = a.softcap > 0.f ? 1.f / a.softcap : 0.f;
  rows.general = a.softcap > 0.f || a.key_bias;
  const int64_t sums = a.batch * a.heads_kv * a.len_k * kernel->dim;
  work.key_sum = reinterpret_cast<float*>(memory + scratch.sums);
  work.value_sum = work.key_sum + sums;
  if (a.deterministic && a.len_k > 0) {  // as many sections as keep the card busy
    const int64_t wanted = std::max<int64_t>(1, 4 * int64_t(context.multiprocessors) / (a.batch * a.heads_kv));
    const int64_t keys = std::max(kLeastSection, (a.len_k + wanted - 1) / wanted);
    work.section_keys = int((keys + 127) / 128 * 128);
    work.sections = int((a.len_k + work.section_keys - 1) / work.section_keys);
  }
  cudaError_t code = cudaSuccess;
  if (sums > 0) code = cudaMemsetAsync(work.key_sum, 0, size_t(2 * sums) * sizeof(float), stream);
  if (code == cudaSuccess && bias_gradient && a.len_k > 0) {
    code = cudaMemsetAsync(a.grad_key_bias, 0, size_t(a.batch * a.heads_q * a.len_k) * sizeof(float), stream);
  }
  if (code != cudaSuccess) return status_of(code, "stripe-sparse attention backward: clearing the sums");
  status = prepare_backward_rows(&rows, memory + scratch.kept_out, stream);
  if (status.ok()) status = walk_units(work, *kernel, card, memory, context);
  if (status.ok()) status = kernels_of(a.dtype).finish(work, kernel->dim, stream);
  return status.ok() ? sum_backward_sinks(rows, stream) : status;
}

}  // namespace
}  // namespace cuda

size_t stripes_backward_workspace(const AttentionProblem& p, const CudaContext&) {
  cuda::SharedMemory card;
  if (p.batch * p.heads_q == 0 || !cuda::shared_memory_of_device(&card).ok()) return 0;
  // Whether a bias gradient is wanted the problem does not say: room for either kernel.
  size_t most = 0;
  for (const bool bias_gradient : {false, true}) {
    const cuda::StripesBackwardKernel* kernel = cuda::kernel_for(p, bias_gradient, card);
    if (!kernel) continue;
    const cuda::Scratch scratch(p, cuda::stripe_plan(p, kernel->rows, kernel->keys), kernel->dim);
    most = std::max(most, size_t(scratch.bytes));
  }
  return most;
}

Status stripes_backward(const AttentionBackward& a, const CudaContext& context) {
  return cuda::backward(a, context, false);
}

size_t stripes_backward_workspace_sm90(const AttentionProblem& p, const CudaContext& context) {
  if (p.batch * p.heads_q == 0) return 0;
  const cuda::StripesBackwardKernel& kernel = *cuda::kernel_of_hopper(p);
  const cuda::Scratch scratch(p, cuda::stripe_plan(p, kernel.rows, kernel.keys), kernel.dim);
  return std::max(size_t(scratch.bytes), stripes_backward_workspace(p, context));
}

Status stripes_backward_sm90(const AttentionBackward& a, const CudaContext& context) {
  return cuda::backward(a, context, !a.deterministic);
}

}  // namespace sparsekit

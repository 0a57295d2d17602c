// Attention backward on sm_80 and later: the scratch, the preparation of the rows, and the order of the kernels.
//
//   prepare_rows      lse', delta and what dsink needs, per query row (formulas: cuda_backward.cuh)
//   backward_keys     dK, dV, dbias, and dQ by atomics (cuda_backward_keys.cuh)
//   finish_queries    dQ in the element type, or backward_queries: dQ without atomics (cuda_backward_queries.cuh)
//   sum_sinks         dsink, one CTA per (batch, head) so that the order of the sum is fixed
// The first and the last are also those of stripes (cuda_backward_rows.h).
// prepare_rows is bound by memory: it reads O and dO once.
#include <algorithm>

#include "attention/cuda_backward_launch.cuh"
#include "attention/cuda_backward_rows.h"
#include "attention/cuda_implementations.h"
#include "attention/cuda_schedule.h"

namespace sparsekit::cuda {

extern template Status launch_backward<__nv_bfloat16>(BackwardPlan plan, cudaStream_t stream);
extern template Status launch_backward<__half>(BackwardPlan plan, cudaStream_t stream);
extern template Status launch_backward<float>(BackwardPlan plan, cudaStream_t stream);

namespace {

constexpr int kPrepareThreads = 128, kLanesPerRow = 8;

/// A sink e^40 times the rest of its row leaves 4e-18 of the weight to the keys: out passes nothing on to them, lse,
/// which knows no sink, everything. Such a row goes on without sink and with dO = 0: further up e^(lse' - lse) would
/// overflow.
constexpr float kSinkTakesAll = 40.f;

/// 8 lanes per query row, 16 bytes per lane and step.
template <class Element>
__global__ void __launch_bounds__(kPrepareThreads) prepare_rows(const __grid_constant__ BackwardPlan plan) {
  constexpr int PER_CHUNK = 16 / int(sizeof(Element));
  const AttentionBackward& a = plan.a;
  const int batch = blockIdx.z, head = blockIdx.y, lane = threadIdx.x % kLanesPerRow;
  const int64_t row = int64_t(blockIdx.x) * (kPrepareThreads / kLanesPerRow) + threadIdx.x / kLanesPerRow;
  const bool exists = row < a.len_q;
  const auto* dout = static_cast<const Element*>(a.grad_out.data) +
                     (batch * a.grad_out.batch + head * a.grad_out.head + row * a.grad_out.row);
  float product = 0.f;  // dO . O
  if (exists) {
    const auto* out =
        static_cast<const Element*>(a.out.data) + (batch * a.out.batch + head * a.out.head + row * a.out.row);
    for (int i = lane * PER_CHUNK; i < a.value_dim; i += kLanesPerRow * PER_CHUNK) {
      Element x[PER_CHUNK], y[PER_CHUNK];
      *reinterpret_cast<uint4*>(x) = *reinterpret_cast<const uint4*>(out + i);
      *reinterpret_cast<uint4*>(y) = *reinterpret_cast<const uint4*>(dout + i);
#pragma unroll
      for (int c = 0; c < PER_CHUNK; ++c) product = fmaf(to_float(x[c]), to_float(y[c]), product);
    }
  }
  for (int step = 1; step < kLanesPerRow; step *= 2) product += __shfl_xor_sync(kAllLanes, product, step);

  const int64_t head_row = int64_t(batch) * a.heads_q + head;
  float lse = kInfinity, delta = 0.f, sink_part = 0.f;  // a row that sees no key, or does not exist
  bool kept = true;
  const float own = exists ? a.lse[head_row * a.len_q + row] : -kInfinity;
  if (own != -kInfinity) {
    const float sink = a.sinks ? a.sinks[head] : -kInfinity;
    const float gap = sink - own;  // lse' = log(e^own + e^sink), without overflow whichever is larger
    const float above = gap > 0.f ? gap + log1pf(expf(-gap)) : log1pf(expf(gap));  // lse' - lse
    kept = !plan.kept_out || above < kSinkTakesAll;
    lse = kept ? own + above : own;
    if (sizeof(Element) == 2) lse *= kLog2e;
    delta = kept ? product : 0.f;
    if (a.grad_lse) delta -= a.grad_lse[head_row * a.len_q + row] * (kept ? expf(above) : 1.f);
    sink_part = -expf(gap - above) * product;
  }
  if (exists && plan.kept_out) {
    auto* to = static_cast<Element*>(plan.kept_out) + (head_row * a.len_q + row) * a.value_dim;
    for (int i = lane * PER_CHUNK; i < a.value_dim; i += kLanesPerRow * PER_CHUNK)
      *reinterpret_cast<uint4*>(to + i) = kept ? *reinterpret_cast<const uint4*>(dout + i) : uint4{};
  }
  if (lane != 0 || row >= plan.padded_rows) return;
  plan.row_lse[head_row * plan.padded_rows + row] = lse;
  plan.row_delta[head_row * plan.padded_rows + row] = delta;
  if (plan.row_sink) plan.row_sink[head_row * plan.padded_rows + row] = sink_part;
}

constexpr int kSumThreads = 256;

__global__ void __launch_bounds__(kSumThreads) sum_sinks(const __grid_constant__ BackwardPlan plan) {
  __shared__ float by_warp[kSumThreads / kWarpSize];
  const float* parts = plan.row_sink + blockIdx.x * plan.padded_rows;
  float sum = 0.f;
  for (int64_t row = threadIdx.x; row < plan.padded_rows; row += kSumThreads) sum += parts[row];
  for (int step = 1; step < kWarpSize; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  if (threadIdx.x % kWarpSize == 0) by_warp[threadIdx.x / kWarpSize] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = 0.f;
  for (float part : by_warp) sum += part;
  plan.a.grad_sinks[blockIdx.x] = sum;
}

/// Entries of the order of key blocks; none where all CTAs run at once anyway.
int64_t ordered_blocks(const AttentionProblem& problem, const CudaContext& context) {
  const int64_t blocks = problem.batch * problem.heads_kv * problem.k_blocks();
  return blocks * (problem.lists.block_k / 64) > 2 * int64_t(context.multiprocessors) ? blocks : 0;
}

template <class Element>
void prepare(const BackwardPlan& plan, cudaStream_t stream) {
  constexpr int rows = kPrepareThreads / kLanesPerRow;
  prepare_rows<Element><<<dim3(unsigned(plan.padded_rows / rows), unsigned(plan.a.heads_q), unsigned(plan.a.batch)),
                          kPrepareThreads, 0, stream>>>(plan);
}

}  // namespace

int64_t padded_rows(const AttentionProblem& problem) { return (problem.len_q + kPadRows - 1) / kPadRows * kPadRows; }

int64_t kept_out_bytes(const AttentionProblem& p) {
  return p.sinks ? p.batch * p.heads_q * p.len_q * p.value_dim * size_of(p.dtype) : 0;
}

Status prepare_backward_rows(BackwardPlan* plan, void* kept_out, cudaStream_t stream) {
  if (plan->padded_rows == 0) return {};
  AttentionBackward& a = plan->a;
  if (a.grad_lse && a.sinks) plan->kept_out = kept_out;
  switch (a.dtype) {
    case DType::bf16: prepare<__nv_bfloat16>(*plan, stream); break;
    case DType::f16: prepare<__half>(*plan, stream); break;
    default: prepare<float>(*plan, stream); break;
  }
  if (plan->kept_out) {
    a.grad_out.data = plan->kept_out;
    a.grad_out.row = a.value_dim;
    a.grad_out.head = a.len_q * a.grad_out.row;
    a.grad_out.batch = a.heads_q * a.grad_out.head;
  }
  return status_of(cudaGetLastError(), "attention backward: prepare_rows");
}

Status sum_backward_sinks(const BackwardPlan& plan, cudaStream_t stream) {
  const AttentionBackward& a = plan.a;
  if (!a.grad_sinks) return {};
  if (plan.padded_rows == 0) {
    return status_of(cudaMemsetAsync(a.grad_sinks, 0, size_t(a.batch * a.heads_q) * sizeof(float), stream),
                     "attention backward: clearing grad_sinks");
  }
  sum_sinks<<<unsigned(a.batch * a.heads_q), kSumThreads, 0, stream>>>(plan);
  return status_of(cudaGetLastError(), "attention backward: sum_sinks");
}

}  // namespace sparsekit::cuda

namespace sparsekit {

size_t attention_backward_workspace_sm80(const AttentionProblem& problem, const CudaContext& context) {
  const int64_t rows = problem.batch * problem.heads_q * cuda::padded_rows(problem);
  const int64_t dim = cuda::backward_dim(problem.dtype, problem.head_dim, problem.value_dim);
  return size_t(rows * (3 + dim) + cuda::ordered_blocks(problem, context)) * sizeof(float) +
         size_t(cuda::kept_out_bytes(problem));
}

Status attention_backward_sm80(const AttentionBackward& arguments, const CudaContext& context) {
  using namespace cuda;
  const AttentionBackward& a = arguments;
  auto stream = static_cast<cudaStream_t>(context.stream);
  if (a.batch == 0 || a.heads_q == 0) return {};
  if (!a.transpose.offsets || (!a.transpose.slots && a.lists.q_blocks * a.lists.slots_per_row() > 0))
    return error(Status::Kind::invalid_argument, "attention backward: the transposed lists are missing");
  if (a.batch > 65535 || a.heads_q > 65535)
    return error(Status::Kind::unsupported, "attention backward: batch %lld, heads_q %lld; CUDA takes 65535 of each",
                 (long long)a.batch, (long long)a.heads_q);
  if (a.batch * a.heads_kv * a.k_blocks() * (a.lists.block_k / 32) > INT32_MAX)
    return error(Status::Kind::unsupported, "attention backward: %lld key blocks over batch and heads are too many",
                 (long long)(a.batch * a.heads_kv * a.k_blocks()));
  const size_t needed = attention_backward_workspace_sm80(a, context);
  if (context.workspace_bytes < needed)
    return error(Status::Kind::failed, "attention backward: workspace has %zu bytes, needs %zu",
                 context.workspace_bytes, needed);

  BackwardPlan plan;
  plan.a = a;
  plan.padded_rows = padded_rows(a);
  const int64_t rows = a.batch * a.heads_q * plan.padded_rows;
  auto* floats = static_cast<float*>(context.workspace);
  if (!a.deterministic) plan.query_sum = floats;  // first: its atomics and 16-byte loads want the workspace's alignment
  floats += rows * backward_dim(a.dtype, a.head_dim, a.value_dim);
  plan.row_lse = floats;
  plan.row_delta = floats + rows;
  if (a.grad_sinks) plan.row_sink = floats + 2 * rows;
  auto* kept_out = reinterpret_cast<char*>(floats + 3 * rows);  // a multiple of 16 bytes, as rows is of kPadRows
  if (ordered_blocks(a, context) > 0) {
    auto* order = reinterpret_cast<int32_t*>(kept_out + kept_out_bytes(a));
    Status status = schedule_keys_longest_first(a, a.transpose.offsets, order, context.stream);
    if (!status.ok()) return status;
    plan.order = order;
  }
  plan.slots_per_row = a.lists.slots_per_row();
  plan.slots_per_head = a.lists.q_blocks * plan.slots_per_row;
  plan.inverse_softcap = a.softcap > 0.f ? 1.f / a.softcap : 0.f;
  plan.general = a.softcap > 0.f || a.key_bias;
  if (plan.query_sum && rows > 0) {
    cudaError_t code = cudaMemsetAsync(
        plan.query_sum, 0, size_t(rows) * backward_dim(a.dtype, a.head_dim, a.value_dim) * sizeof(float), stream);
    if (code != cudaSuccess) return status_of(code, "attention backward: clearing dQ's scratch");
  }

  Status status = prepare_backward_rows(&plan, kept_out, stream);
  if (!status.ok()) return status;
  status = a.dtype == DType::bf16  ? launch_backward<__nv_bfloat16>(plan, stream)
           : a.dtype == DType::f16 ? launch_backward<__half>(plan, stream)
           : a.dtype == DType::f32
               ? launch_backward<float>(plan, stream)
               : error(Status::Kind::unsupported,
                       "attention backward: query is %s; CUDA takes bfloat16, float16, float32", name(a.dtype));
  return status.ok() ? sum_backward_sinks(plan, stream) : status;
}

}  // namespace sparsekit

// Before and after the decode kernels: scores filled with -inf; the states of a row's splits merged,
//   lse = log sum_s total_s 2^largest_s,   out = sum_s 2^(largest_s - largest) acc_s / (sum of weights, and of the
//   sink).
//
// A CTA of 128 threads per query row, a thread per channel; the states are few and come from L2. One launch of about
// 2 us beside the 100 and more of the decode kernel.
#include <cuda_runtime.h>

#include "common/cuda/launch.h"
#include "common/cuda/math.cuh"
#include "common/cuda/mma.cuh"
#include "kv_cache/cuda_decode.cuh"
#include "kv_cache/cuda_decode.h"

namespace sparsekit {
namespace {

using namespace sparsekit::cuda;

constexpr int kThreads = 128, kFillThreads = 256;

__global__ void __launch_bounds__(kFillThreads) fill(float* to, int64_t count) {
  for (int64_t at = int64_t(blockIdx.x) * kFillThreads + threadIdx.x; at < count;
       at += int64_t(gridDim.x) * kFillThreads)
    to[at] = -kInfinity;
}

/// Maximum or sum over the CTA's threads, in an order of its own.
template <bool MAXIMUM>
__device__ float over_threads(float x, float* warps) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, x, step);
    x = MAXIMUM ? fmaxf(x, other) : x + other;
  }
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = warps[0];
  for (int w = 1; w < kThreads / 32; ++w) x = MAXIMUM ? fmaxf(x, warps[w]) : x + warps[w];
  return x;
}

template <class Element>
__global__ void __launch_bounds__(kThreads) merge_splits(const __grid_constant__ Decode p) {
  __shared__ float weights[kMostSlots], warps[2][kThreads / 32];  // a weight below 0: saw nothing, acc is not written
  const int64_t head = blockIdx.x / p.rows, b = head / p.heads_kv, h = head % p.heads_kv;
  const int row = int(blockIdx.x % p.rows);
  const int64_t query_head = p.query_head(h, row), i = row % p.len_q;
  // A thread has one state of 128: the loads wait for nothing.
  constexpr int kEach = (kMostSlots + kThreads - 1) / kThreads;
  float2 own[kEach];
  float largest = -kInfinity;
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int s = k * kThreads + int(threadIdx.x);
    own[k] = s < p.slots ? p.states[p.state(b, h, s, row)] : make_float2(-kInfinity, 0.f);
    largest = fmaxf(largest, own[k].x);
  }
  largest = over_threads<true>(largest, warps[0]);
  const float reference = largest == -kInfinity ? 0.f : largest;
  float total = 0.f;
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int s = k * kThreads + int(threadIdx.x);
    const float weight = exp2f(own[k].x - reference);
    if (s < p.slots) weights[s] = own[k].y == 0.f ? -1.f : weight;
    total += weight * own[k].y;  // 0 where a split saw no key; NaN stays
  }
  total = over_threads<false>(total, warps[1]);
  const bool empty = total == 0.f;
  const float sink = p.sinks ? p.sinks[query_head] * kLog2e : -kInfinity;
  // The sink joins the denominator only; far above every score it leaves weights that underflow to 0, as it should.
  const float highest = fmaxf(sink, reference), shrink = exp2f(reference - highest);
  const float factor = empty ? 0.f : shrink / (total * shrink + exp2f(sink - highest));
  Element* out = static_cast<Element*>(p.out.data) + b * p.out.batch + query_head * p.out.head + i * p.out.row;
  for (int d = threadIdx.x; d < p.value_dim; d += kThreads) {
    float sum = 0.f;
#pragma unroll 8
    for (int s = 0; s < p.slots; ++s) {
      const float weight = weights[s];
      if (!(weight < 0.f)) sum += weight * p.acc[p.state(b, h, s, row) * p.value_dim + d];
    }
    out[d] = from_float<Element>(empty ? 0.f : sum * factor);
  }
  if (threadIdx.x == 0)
    p.lse[(b * p.heads_q + query_head) * p.len_q + i] = empty ? -kInfinity : (largest + log2f(total)) * kLn2;
}

Status fill_scores(const Decode& decode, const CudaContext& context) {
  const int64_t count = decode.scores ? decode.batch * decode.heads_q * decode.len_q * decode.scores_length : 0;
  if (count == 0) return {};
  const int64_t blocks = (count + kFillThreads - 1) / kFillThreads, most = int64_t(context.multiprocessors) * 8;
  fill<<<unsigned(blocks < most ? blocks : most), kFillThreads, 0, static_cast<cudaStream_t>(context.stream)>>>(
      decode.scores, count);
  return status_of(cudaGetLastError(), "decode_attention");
}

Status merge_states(const Decode& decode, const CudaContext& context) {
  const void* kernel = decode.dtype == DType::f32   ? reinterpret_cast<const void*>(&merge_splits<float>)
                       : decode.dtype == DType::f16 ? reinterpret_cast<const void*>(&merge_splits<__half>)
                                                    : reinterpret_cast<const void*>(&merge_splits<__nv_bfloat16>);
  void* arguments[] = {const_cast<Decode*>(&decode)};
  return status_of(cudaLaunchKernel(kernel, dim3(unsigned(decode.batch * decode.heads_kv * decode.rows)),
                                    dim3(kThreads), arguments, 0, static_cast<cudaStream_t>(context.stream)),
                   "decode_attention");
}

int64_t aligned_bytes(int64_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

Status decode_cuda_launch(const CudaDecodeKernel& kernel, const DecodeAttention& p, int splits, int slots,
                          const CudaContext& context) {
  Decode d{};
  if (p.cache) {
    d.cache = cache_on_device(*p.cache);
    d.kept = p.cache->dtype;
  } else {
    const PlainCache& c = *p.plain;
    d.plain = {c.key,       c.value,      c.pages,      c.pages_per_head, c.page_size, c.key_page,   c.key_head,
               c.key_token, c.value_page, c.value_head, c.value_token,    c.lengths,   c.block_table};
    static const char nothing = 0;  // the address of an empty tensor is null; null means a packed cache here
    if (!d.plain.key) d.plain.key = &nothing;
    d.kept = c.dtype;
  }
  d.dtype = p.dtype;
  d.batch = p.batch;
  d.heads_q = p.heads_q;
  d.heads_kv = p.heads_kv;
  d.len_q = p.len_q;
  d.head_dim = p.head_dim;
  d.value_dim = p.value_dim;
  d.rows = int32_t(p.heads_q / p.heads_kv * p.len_q);
  d.group = int32_t(p.heads_q / p.heads_kv);
  d.query = p.query;
  d.scale = p.scale;
  d.softcap = p.softcap;
  d.sinks = p.sinks;
  d.key_bias = p.key_bias;
  d.bias_batch = p.bias_batch;
  d.bias_head = p.bias_head;
  d.bias_row = p.bias_row;
  d.bias_length = p.bias_length;
  d.out = p.out;
  d.lse = p.lse;
  d.scores = p.scores;
  d.scores_length = p.scores_length;
  d.splits = splits;
  d.slots = slots;
  const int64_t states = p.batch * p.heads_kv * d.slots * d.rows;
  d.acc = static_cast<float*>(context.workspace);
  d.states = reinterpret_cast<float2*>(static_cast<char*>(context.workspace) + aligned_bytes(states * p.value_dim * 4));
  Status status = fill_scores(d, context);
  if (status.ok()) status = kernel.run(d, context);
  return status.ok() ? merge_states(d, context) : status;
}

}  // namespace sparsekit

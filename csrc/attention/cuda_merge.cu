// Merges attention states over disjoint keys: lse = log sum exp(lse_s), out = sum exp(lse_s - lse) out_s.
//
// A thread owns 16 bytes of one row of out (one element where the tensors are not aligned to 16 bytes) and reads the
// same place of every state. Bound: memory, each state is read once and the result written once. fp32 arithmetic.
#include <cuda_runtime.h>

#include "attention/cuda_tiles.cuh"
#include "common/cuda/launch.h"
#include "common/cuda/math.cuh"
#include "common/cuda/mma.cuh"

namespace sparsekit {
namespace {

using namespace sparsekit::cuda;

constexpr int kMaxStates = 16;
constexpr int kThreads = 256;

/// The arguments with the host arrays copied in.
struct States {
  InputView outs[kMaxStates];
  const float* lses[kMaxStates];
};

template <class Element, int WIDTH>
struct alignas(sizeof(Element) * WIDTH) Pack {
  Element at[WIDTH];
};

template <class Element, int WIDTH>
__global__ void __launch_bounds__(kThreads)
    merge(const __grid_constant__ AttentionMerge m, const __grid_constant__ States states) {
  using Values = Pack<Element, WIDTH>;
  const int per_row = m.value_dim / WIDTH;
  const int64_t rows = m.batch * m.heads * m.rows;
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, row = thread / per_row;
  if (row >= rows) return;
  const int column = int(thread % per_row) * WIDTH;
  const int64_t i = row % m.rows, h = row / m.rows % m.heads, b = row / m.rows / m.heads;

  float largest = -kInfinity;
  for (int s = 0; s < m.count; ++s) largest = fmaxf(largest, states.lses[s][row]);
  float total = 0.f, sum[WIDTH] = {};
  for (int s = 0; s < m.count && largest != -kInfinity; ++s) {
    const float weight = exp2f((states.lses[s][row] - largest) * kLog2e);
    if (weight == 0.f) continue;  // what a state without keys holds reaches nothing
    total += weight;
    const InputView& view = states.outs[s];
    const int64_t from = b * view.batch + h * view.head + i * view.row + column;
    const Values values = *reinterpret_cast<const Values*>(static_cast<const Element*>(view.data) + from);
#pragma unroll
    for (int d = 0; d < WIDTH; ++d) sum[d] += weight * to_float(values.at[d]);
  }
  const float inverse = total == 0.f ? 0.f : 1.f / total;  // NaN stays NaN
  Values result;
#pragma unroll
  for (int d = 0; d < WIDTH; ++d) result.at[d] = from_float<Element>(sum[d] * inverse);
  const int64_t to = b * m.out.batch + h * m.out.head + i * m.out.row + column;
  *reinterpret_cast<Values*>(static_cast<Element*>(m.out.data) + to) = result;
  if (column == 0) m.lse[row] = total == 0.f ? -kInfinity : largest + log2f(total) * kLn2;
}

template <class Pointer>
bool aligned(const HeadsView<Pointer>& view, int64_t element) {
  const int64_t bytes =
      int64_t(reinterpret_cast<uintptr_t>(view.data)) | view.batch * element | view.head * element | view.row * element;
  return bytes % 16 == 0;
}

template <class Element, int WIDTH>
void launch(const AttentionMerge& m, const States& states, cudaStream_t stream) {
  const int64_t threads = m.batch * m.heads * m.rows * (m.value_dim / WIDTH);
  merge<Element, WIDTH><<<unsigned((threads + kThreads - 1) / kThreads), kThreads, 0, stream>>>(m, states);
}

template <class Element>
void launch(const AttentionMerge& m, const States& states, cudaStream_t stream) {
  constexpr int kWidth = 16 / sizeof(Element);
  bool wide = m.value_dim % kWidth == 0 && aligned(m.out, sizeof(Element));
  for (int s = 0; s < m.count; ++s) wide = wide && aligned(states.outs[s], sizeof(Element));
  wide ? launch<Element, kWidth>(m, states, stream) : launch<Element, 1>(m, states, stream);
}

}  // namespace

Status attention_merge(const AttentionMerge& m, const CudaContext& context) {
  if (m.count < 1 || m.count > kMaxStates) {
    return error(Status::Kind::unsupported, "outs: %lld states; supported on CUDA are 1 to %d (merge in several steps)",
                 (long long)m.count, kMaxStates);
  }
  if (m.batch * m.heads * m.rows == 0 || m.value_dim == 0) return {};
  States states;
  for (int s = 0; s < m.count; ++s) {
    states.outs[s] = m.outs[s];
    states.lses[s] = m.lses[s];
  }
  const cudaStream_t stream = static_cast<cudaStream_t>(context.stream);
  switch (m.dtype) {
    case DType::bf16: launch<__nv_bfloat16>(m, states, stream); break;
    case DType::f16: launch<__half>(m, states, stream); break;
    case DType::f32: launch<float>(m, states, stream); break;
    case DType::f64:
      return error(Status::Kind::unsupported,
                   "outs: float64 is merged on the CPU only; supported: float32, float16, bfloat16");
  }
  return status_of(cudaGetLastError(), "launching the merge of attention states");
}

}  // namespace sparsekit

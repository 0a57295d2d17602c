// The gradient of a scatter's weights: a dot product of two rows per entry.
//
//   sum[e] = sum over tensors and outers of <grad_out[s, o, n], in[s, o, k] - minus[s, o, n]>,   n = index[s, k, m]
//   add: sum      mean (minus = out): sum / total[n], 0 where total is 0     both: + grad_totals[n]
//
// Tiling: a warp per entry; each lane adds its vectors of all tensors in their order, then the lanes are added as a
// tree: the same bits in every run. Bound: memory, two or three rows per entry. fp32 sums (float64 where a tensor or
// the weights are).
#include <initializer_list>

#include "tokens/cuda_implementations.h"
#include "tokens/cuda_launch.h"
#include "tokens/cuda_numbers.cuh"
#include "tokens/cuda_plan.cuh"

namespace sparsekit::cuda {
namespace {

struct Part {
  Rows grad, in, minus;
  int64_t outers, inner;
  TokenType type;
  bool vectors;
};

struct Dots {
  Scatter t;
  const void* grad_totals;
  void* sums;
  bool copy, more;  // more: earlier tensors have left their sums
  bool last;
  int tensors;
  Part part[kMostTensors];
};

template <class Element, class Sum, int Width>
__device__ Sum dot_of_lane(const Part& part, const char* grad, const char* in, const char* minus, int lane) {
  using Values = Pack<Element, Width>;
  Sum sum = Sum(0);
  for (int64_t v = lane; v < part.inner / Width; v += 32) {
    const Values g = load_once(reinterpret_cast<const Values*>(grad) + v);
    const Values x = load_once(reinterpret_cast<const Values*>(in) + v);
    Values y = Values();
    if (minus) y = load_once(reinterpret_cast<const Values*>(minus) + v);
#pragma unroll
    for (int d = 0; d < Width; ++d) {
      Sum other = widen<Sum>(x.at[d]);
      if (minus) other -= widen<Sum>(y.at[d]);
      sum = multiply_add(widen<Sum>(g.at[d]), other, sum);
    }
  }
  return sum;
}

template <class Element, class Sum>
__device__ __forceinline__ Sum dot_of_lane(const Part& part, const char* grad, const char* in, const char* minus,
                                           int lane) {
  return part.vectors ? dot_of_lane<Element, Sum, 16 / sizeof(Element)>(part, grad, in, minus, lane)
                      : dot_of_lane<Element, Sum, 1>(part, grad, in, minus, lane);
}

template <class Sum>
__global__ void __launch_bounds__(kRowThreads) dots(const __grid_constant__ Dots a) {
  const int64_t e = (int64_t(blockIdx.x) * kRowThreads + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (e >= a.t.entries()) return;  // whole warps
  Sum* sums = static_cast<Sum*>(a.sums);
  const Entry entry = entry_of(a.t, e);
  if (entry.row < 0 || a.copy) {
    if (lane == 0) sums[e] = Sum(0);
    return;
  }
  const int64_t s = e / a.t.per_sample(), k = entry.inside / a.t.places;
  Sum sum = Sum(0);
  for (int i = 0; i < a.tensors; ++i) {
    const Part& part = a.part[i];
    Sum mine = Sum(0);
    double mine_f64 = 0.;
    for (int64_t o = 0; o < part.outers; ++o) {
      const char* grad = part.grad.at(a.t.to, s, o, entry.target);
      const char* in = part.in.at(a.t.from, s, o, k);
      const char* minus = part.minus.data ? part.minus.at(a.t.to, s, o, entry.target) : nullptr;
      switch (part.type) {
        case TokenType::f32: mine += dot_of_lane<float, Sum>(part, grad, in, minus, lane); break;
        case TokenType::f16: mine += dot_of_lane<__half, Sum>(part, grad, in, minus, lane); break;
        case TokenType::bf16: mine += dot_of_lane<__nv_bfloat16, Sum>(part, grad, in, minus, lane); break;
        default: mine_f64 += dot_of_lane<double, double>(part, grad, in, minus, lane); break;
      }
    }
    sum += mine + Sum(mine_f64);
  }
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (lane != 0) return;
  if (a.more) sum += sums[e];
  if (a.last) {
    if (a.t.mean) {
      const Sum total = static_cast<const Sum*>(a.t.totals)[entry.row];
      sum = total == Sum(0) ? Sum(0) : sum / total;
    }
    if (a.grad_totals) sum += static_cast<const Sum*>(a.grad_totals)[entry.row];
  }
  sums[e] = sum;
}

}  // namespace

Status weight_gradients(const ScatterTokensBackward& b, const CudaContext& context) {
  const ScatterTokens& t = b.forward;
  const bool mean = t.reduce == TokenReduce::mean;
  Dots a{Scatter(t), b.grad_totals, b.grad_weights, t.reduce == TokenReduce::copy, false, false, 0, {}};
  const int64_t blocks = (a.t.entries() * 32 + kRowThreads - 1) / kRowThreads;
  if (a.t.entries() > INT32_MAX) {
    return error(Status::Kind::unsupported, "index: %lld entries; CUDA takes 2^31 - 1", (long long)a.t.entries());
  }
  for (int64_t i = 0; i < t.tensors && blocks > 0; ++i) {
    const TokenTensor* minus = mean ? &t.out[i] : nullptr;
    if (t.in[i].type == TokenType::bytes || t.in[i].type == TokenType::i32 || t.in[i].type == TokenType::i64) {
      return error(Status::Kind::unsupported, "tensors[%lld]: not floating point, so weights have no gradient",
                   (long long)i);
    }
    Part part{Rows(b.grad_out[i]), Rows(t.in[i]), mean ? Rows(t.out[i]) : Rows(), t.in[i].outers, t.in[i].inner,
              t.in[i].type,        false};
    part.vectors = vector_bytes({&b.grad_out[i], &t.in[i], minus}) == 16;
    a.part[a.tensors++] = part;
    a.last = i + 1 == t.tensors;
    if (a.tensors < kMostTensors && !a.last) continue;
    start(t.weights_f64 ? dots<double> : dots<float>, unsigned(blocks), kRowThreads, 0, context.stream, a);
    a.more = true;
    a.tensors = 0;
  }
  return started("gradients of weights");
}

}  // namespace sparsekit::cuda

// From sums to the output of a block-sparse product: bias, activation, the factor of a gated MLP, rounding.
#pragma once

#include "matmul/cuda_tiles.cuh"

namespace sparsekit::cuda {

/// Relative errors of a few units in the last place in the tails, too: torch's forms cancel there.
__device__ __forceinline__ float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::relu: return x < 0.f ? 0.f : x;  // NaN stays
    case Activation::gelu: return 0.5f * x * erfcf(x * -0.707106781186547524f);
    case Activation::gelu_tanh: {
      // x / (1 + 2^p): the error of p, up to 128, counts in full, so its product is taken in two parts.
      constexpr float kFactor = -2.30220819813f, kRest = -2.30220819813 - double(kFactor);
      const float square = x * x, cubic = fmaf(0.044715f * square, x, x), p = cubic * kFactor;
      const float rest = fmaf(cubic, kFactor, -p) + cubic * kRest;
      return x / (1.f + exp2f(p) * (1.f + 0.693147181f * (fabsf(p) < 200.f ? rest : 0.f)));
    }
    case Activation::silu: return x / (1.f + expf(-x));
    case Activation::none: break;
  }
  return x;
}

/// The same for results that are rounded to 16 bits: relative errors of about 1e-6, a few instructions.
template <Activation ACTIVATION>
__device__ __forceinline__ float activate_fast(float x) {
  constexpr float kLog2e = 1.44269504088896341f;
  auto exp2_approximate = [](float y) {
    float z;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(z) : "f"(y));
    return z;
  };
  if constexpr (ACTIVATION == Activation::relu) return x < 0.f ? 0.f : x;
  if constexpr (ACTIVATION == Activation::silu) return __fdividef(x, 1.f + exp2_approximate(x * -kLog2e));
  if constexpr (ACTIVATION == Activation::gelu_tanh) {
    const float cubic = fmaf(0.044715f * x * x, x, x);
    return __fdividef(x, 1.f + exp2_approximate(cubic * (-2.f * 0.797884560802865356f * kLog2e)));
  }
  if constexpr (ACTIVATION == Activation::gelu) {
    // 0.5 x erfc(-x / sqrt 2), erfc z = t e^(-z^2 + P(t)), t = 1 / (1 + z / 2): Press et al., Numerical Recipes, 6.2.
    const float z = fabsf(x) * 0.707106781186547524f, t = __fdividef(1.f, fmaf(z, 0.5f, 1.f));
    float p = fmaf(0.17087277f, t, -0.82215223f);
    p = fmaf(p, t, 1.48851587f), p = fmaf(p, t, -1.13520398f), p = fmaf(p, t, 0.27886807f);
    p = fmaf(p, t, -0.18628806f), p = fmaf(p, t, 0.09678418f), p = fmaf(p, t, 0.37409196f);
    p = fmaf(p, t, 1.00002368f), p = fmaf(p, t, -1.26551223f);
    const float tail = t * exp2_approximate(fmaf(-z, z, p) * kLog2e);
    return 0.5f * x * (x < 0.f ? tail : 2.f - tail);
  }
  return x;
}

/// What an epilogue needs of a product.
struct Output {
  TokensView<void*> output;
  const void* bias = nullptr;
  TokensView<const void*> factor;
  Activation activation = Activation::none;
  int64_t tokens = 0, features = 0;
  bool vectors = false;  // addresses and strides of output and factor are multiples of 16 bytes
};

inline Output output_of(const BlockSparseProduct& p) {
  Output out;
  out.output = p.output;
  out.bias = p.bias;
  out.factor = p.factor;
  out.activation = p.activation;
  out.tokens = p.tokens;
  out.features = p.transposed ? p.pattern.cols : p.pattern.rows;
  auto aligned = [&](const void* data, int64_t token, int64_t feature) {
    const int64_t stride = feature == 1 ? token : feature;
    return (reinterpret_cast<uintptr_t>(data) | uintptr_t(stride * size_of(p.dtype))) % 16 == 0;
  };
  out.vectors = aligned(p.output.data, p.output.token, p.output.feature);
  if (p.factor.data) {
    out.vectors &= aligned(p.factor.data, p.factor.token, p.factor.feature);
    out.vectors &= (p.factor.feature == 1) == (p.output.feature == 1);
  }
  return out;
}

template <class Element>
__device__ __forceinline__ float finish(const Output& out, float x, int64_t token, int64_t feature) {
  if (out.bias) x += to_float(static_cast<const Element*>(out.bias)[feature]);
  x = activate(out.activation, x);
  if (out.factor.data) {
    x *=
        to_float(static_cast<const Element*>(out.factor.data)[token * out.factor.token + feature * out.factor.feature]);
  }
  return x;
}

/// Strides of a staged tile of MSIZE tokens x NSIZE features, so that 16 bytes of output are neighbours in it.
template <int MSIZE, int NSIZE>
struct Staging {
  bool features_first;
  int step_m, step_n;

  static constexpr int kFloats = (MSIZE + 4) * (NSIZE + 4);
  __device__ __forceinline__ explicit Staging(const Output& out)
      : features_first(out.output.feature == 1),
        step_m(features_first ? NSIZE + 4 : 1),
        step_n(features_first ? 1 : MSIZE + 4) {}
};

/// Writes a staged tile: `tokens` x `features` of it (at most MSIZE x NSIZE) from (token, feature) of the output on.
template <class Element, int MSIZE, int NSIZE, int THREADS>
__device__ __forceinline__ void store_tile(const Output& out, const float* staged, int64_t token, int64_t feature,
                                           int tokens, int features) {
  constexpr int kWidth = kChunk<Element>;
  const Staging<MSIZE, NSIZE> staging(out);
  const bool first = staging.features_first;
  const int per_row = (first ? NSIZE : MSIZE) / kWidth, pitch = first ? staging.step_m : staging.step_n;
  for (int at = int(threadIdx.x); at < MSIZE * NSIZE / kWidth; at += THREADS) {
    const int major = at / per_row, minor = at % per_row * kWidth;
    const int m = first ? major : minor, n = first ? minor : major;
    if (m >= tokens || n >= features) continue;
    const float* from = staged + major * pitch + minor;
    const int count = min(kWidth, (first ? features : tokens) - minor);
    const int64_t t = token + m, f = feature + n;
    Element* to = static_cast<Element*>(out.output.data) + t * out.output.token + f * out.output.feature;
    if (out.vectors && count == kWidth && (first ? f : t) % kWidth == 0) {
      alignas(16) Element results[kWidth];
      if (out.factor.data) {
        const Element* factor =
            static_cast<const Element*>(out.factor.data) + t * out.factor.token + f * out.factor.feature;
        *reinterpret_cast<uint4*>(results) = *reinterpret_cast<const uint4*>(factor);
      }
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        float x = from[e];
        if (out.bias) x += to_float(static_cast<const Element*>(out.bias)[first ? f + e : f]);
        x = activate(out.activation, x);
        results[e] = from_float<Element>(out.factor.data ? x * to_float(results[e]) : x);
      }
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(results);
    } else {
      for (int e = 0; e < count; ++e) {
        const float x = finish<Element>(out, from[e], first ? t : t + e, first ? f + e : f);
        to[e] = from_float<Element>(x);
      }
    }
  }
}

}  // namespace sparsekit::cuda

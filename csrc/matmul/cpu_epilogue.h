// From sums to output: scales, bias, activation while tokens stand in the lanes; then rows of the output, transposed
// where features are contiguous; there the factor (the other half of a gated MLP) is multiplied in.
#pragma once

#include "matmul/cpu_pack.h"

namespace sparsekit {
namespace {

// An output beyond the L2 of two cores is written past the caches, in whole lines: reading each line first to write it
// took 0.2 of the 2.6 ms of a bf16 product of 512 tokens, and pushed weights and panels out of L2.
constexpr int64_t stream_bytes = 2 << 20;

#ifdef __AVX512F__
SPARSEKIT_INLINE void stream_line(void* to, Simd::Int line) { _mm512_stream_si512(static_cast<__m512i*>(to), line); }
/// Before others may read what was streamed.
SPARSEKIT_INLINE void stream_fence() { _mm_sfence(); }
#else
SPARSEKIT_INLINE void stream_line(void* to, Simd::Int line) { Simd::store_int(to, line); }
SPARSEKIT_INLINE void stream_fence() {}
#endif

/// e^-z^2 t P(t) with t = 1 / (1 + z / 2), z >= 0: the complementary error function with a relative error of 1.2e-7 and
/// what rounding z^2 adds (Press et al., Numerical Recipes, section 6.2).
SPARSEKIT_INLINE Simd::Float erfc_positive(Simd::Float z) {
  Simd::Float t = Simd::div(Simd::set(1.f), Simd::fma(z, Simd::set(0.5f), Simd::set(1.f)));
  Simd::Float p = Simd::fma(Simd::set(0.17087277f), t, Simd::set(-0.82215223f));
  p = Simd::fma(p, t, Simd::set(1.48851587f));
  p = Simd::fma(p, t, Simd::set(-1.13520398f));
  p = Simd::fma(p, t, Simd::set(0.27886807f));
  p = Simd::fma(p, t, Simd::set(-0.18628806f));
  p = Simd::fma(p, t, Simd::set(0.09678418f));
  p = Simd::fma(p, t, Simd::set(0.37409196f));
  p = Simd::fma(p, t, Simd::set(1.00002368f));
  p = Simd::fma(p, t, Simd::set(-1.26551223f));
  return Simd::mul(t, exp2<5>(Simd::mul(Simd::fnma(z, z, p), Simd::set(1.44269504088896341f))));
}

SPARSEKIT_INLINE Simd::Float gelu(Simd::Float x) {
  Simd::Float tail = erfc_positive(Simd::mul(Simd::abs(x), Simd::set(0.707106781186547524f)));  // of erfc, at |x|
  Simd::Float doubled = Simd::select(Simd::less(x, Simd::zero()), tail, Simd::sub(Simd::set(2.f), tail));
  return Simd::mul(Simd::mul(Simd::set(0.5f), x), doubled);
}

SPARSEKIT_INLINE Simd::Float gelu_tanh(Simd::Float x) {
  // 0.5 x (1 + tanh(u)) = x / (1 + e^-2u): no cancellation where tanh is near -1.
  Simd::Float cubic = Simd::fma(Simd::mul(Simd::mul(x, x), x), Simd::set(0.044715f), x);
  Simd::Float power = Simd::mul(cubic, Simd::set(-2.f * 0.797884560802865356f * 1.44269504088896341f));
  return Simd::div(x, Simd::add(Simd::set(1.f), exp2<5>(Simd::min(Simd::set(126.f), power))));
}

SPARSEKIT_INLINE Simd::Float silu(Simd::Float x) {
  Simd::Float power = Simd::mul(x, Simd::set(-1.44269504088896341f));
  return Simd::div(x, Simd::add(Simd::set(1.f), exp2<5>(Simd::min(Simd::set(126.f), power))));
}

template <Activation activation>
SPARSEKIT_INLINE Simd::Float activate(Simd::Float x) {
  switch (activation) {
    case Activation::relu: return Simd::max(Simd::zero(), x);
    case Activation::gelu: return gelu(x);
    case Activation::gelu_tanh: return gelu_tanh(x);
    case Activation::silu: return silu(x);
    case Activation::none: break;
  }
  return x;
}

/// Sums [features][width] of one panel of tokens, and where they belong.
struct Epilogue {
  const BlockSparseProduct* p = nullptr;
  const float* token_scales = nullptr;  // [tokens rounded up to panels], where tokens were rounded to 8 bits
  int64_t feature = 0, features = 0;    // of the output, from `feature` on; sums hold whole pairs of vectors of rows
  int64_t token = 0, tokens = 0;
  float* sums = nullptr;
  int64_t width = 0;

  /// Whether whole lines of the output are written past the caches.
  bool streams() const {
    const int64_t element = p->dtype == DType::f32 ? 4 : 2, all = p->transposed ? p->pattern.cols : p->pattern.rows;
    return Simd::lanes == 16 && p->dtype != DType::f16 && p->output.feature == 1 && !p->factor.data &&
           p->tokens * all * element >= stream_bytes && p->output.token * element % 64 == 0 &&
           (reinterpret_cast<uintptr_t>(p->output.data) + uintptr_t(feature * element)) % 64 == 0;
  }
};

template <Activation activation>
static void finish_sums(const Epilogue& e) {
  const BlockSparseProduct& p = *e.p;
  for (int64_t i = 0; i < e.features; ++i) {
    Simd::Float bias = Simd::zero(), scale = Simd::set(e.token_scales ? p.scales[e.feature + i] : 1.f);
    if (p.bias) {
      float first[Simd::lanes];
      Simd::store(first, load_float(p.bias, e.feature + i, p.dtype, 1));
      bias = Simd::set(first[0]);
    }
    float* row = e.sums + i * e.width;
    for (int64_t j = 0; j < e.width; j += Simd::lanes) {
      Simd::Float x = Simd::load(row + j);
      if (e.token_scales) x = Simd::mul(x, Simd::mul(scale, Simd::load(e.token_scales + e.token + j)));
      Simd::store(row + j, activate<activation>(Simd::add(x, bias)));
    }
  }
}

SPARSEKIT_INLINE void store_row(const BlockSparseProduct& p, int64_t token, int64_t feature, Simd::Float x, int count) {
  if (p.factor.data) {
    const int64_t at = token * p.factor.token + feature * p.factor.feature;
    x = Simd::mul(x, load_float(p.factor.data, at, p.dtype, count));
  }
  store_float(p.output.data, token * p.output.token + feature * p.output.feature, p.dtype, x, count);
}

#ifdef SPARSEKIT_BF16_PRODUCT
/// Rows of bf16: rounded to pairs of features first, so that half as much is transposed, and whole lines are stored.
static void store_bf16_rows(const Epilogue& e) {
  const BlockSparseProduct& p = *e.p;
  const bool streams = e.streams();
  for (int64_t j = 0; j < e.tokens; j += Simd::lanes) {
    const int tokens = clamp_count(e.tokens - j, Simd::lanes);
    uint16_t* to = static_cast<uint16_t*>(p.output.data) + (e.token + j) * p.output.token + e.feature;
    for (int64_t i = 0; i < e.features; i += 2 * Simd::lanes) {
      Simd::Int r[Simd::lanes];
      for (int n = 0; n < Simd::lanes; ++n) {
        const float* two = e.sums + (i + 2 * n) * e.width + j;
        r[n] = round_bf16_pairs(Simd::load(two), Simd::load(two + e.width));
      }
      Simd::transpose(r);
      const int features = clamp_count(e.features - i, 2 * Simd::lanes);
      if (streams && features == 2 * Simd::lanes) {
        for (int n = 0; n < tokens; ++n) stream_line(to + n * p.output.token + i, r[n]);
      } else {
        for (int n = 0; n < tokens; ++n) store_bf16_pairs(to + n * p.output.token + i, r[n], features);
      }
    }
  }
}
#endif

/// Brings the lines of the output that finish() will write into L2, while the sums are still being made.
static void prefetch_output(const Epilogue& e) {
  const BlockSparseProduct& p = *e.p;
  if (p.output.feature != 1 || e.streams()) return;
  const int64_t element = p.dtype == DType::f32 ? 4 : 2;
  for (int64_t t = e.token; t < e.token + e.tokens; ++t) {
    const char* row = static_cast<const char*>(p.output.data) + (t * p.output.token + e.feature) * element;
    for (int64_t at = 0; at < e.features * element; at += 64) Simd::prefetch(row + at);
  }
}

static void finish(const Epilogue& e) {
  const BlockSparseProduct& p = *e.p;
  if (e.token_scales || p.bias || p.activation != Activation::none) {
    switch (p.activation) {
      case Activation::none: finish_sums<Activation::none>(e); break;
      case Activation::relu: finish_sums<Activation::relu>(e); break;
      case Activation::gelu: finish_sums<Activation::gelu>(e); break;
      case Activation::gelu_tanh: finish_sums<Activation::gelu_tanh>(e); break;
      case Activation::silu: finish_sums<Activation::silu>(e); break;
    }
  }
  if (p.output.feature != 1) {  // tokens are contiguous: rows as they are
    for (int64_t i = 0; i < e.features; ++i)
      for (int64_t j = 0; j < e.tokens; j += Simd::lanes)
        store_row(p, e.token + j, e.feature + i, Simd::load(e.sums + i * e.width + j),
                  clamp_count(e.tokens - j, Simd::lanes));
    return;
  }
#ifdef SPARSEKIT_BF16_PRODUCT
  if (p.dtype == DType::bf16 && !p.factor.data) return store_bf16_rows(e);
#endif
  const bool streams = p.dtype == DType::f32 && e.streams();
  for (int64_t j = 0; j < e.tokens; j += Simd::lanes) {
    for (int64_t i = 0; i < e.features; i += Simd::lanes) {
      Simd::Int r[Simd::lanes];
      for (int n = 0; n < Simd::lanes; ++n) r[n] = Simd::load_int(e.sums + (i + n) * e.width + j);
      Simd::transpose(r);
      const int tokens = clamp_count(e.tokens - j, Simd::lanes), features = clamp_count(e.features - i, Simd::lanes);
      if (streams && features == Simd::lanes) {
        float* to = static_cast<float*>(p.output.data) + (e.token + j) * p.output.token + e.feature + i;
        for (int n = 0; n < tokens; ++n) stream_line(to + n * p.output.token, r[n]);
      } else {
        for (int n = 0; n < tokens; ++n) store_row(p, e.token + j + n, e.feature + i, Simd::as_float(r[n]), features);
      }
    }
  }
}

}  // namespace
}  // namespace sparsekit

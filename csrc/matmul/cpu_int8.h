// int8 weights: tokens rounded to 8 bits, and the product of quadruples of bytes (vpdpbusd) where the set has it.
//
// vpdpbusd multiplies unsigned with signed bytes, so tokens are stored as q + 128: the sums are too large by 128 times
// the sum of a row's weights, which is computed once per call. Integer sums: exact in any order.
#pragma once

#include "matmul/cpu_pack.h"

namespace sparsekit {
namespace {

/// What sums are before the epilogue; see Sums in cpu_tiles.h.
struct TokenScales {
  const BlockSparseProduct* p;
  float* scales;
  float* rounding;
};

static void token_scales(int64_t first, int64_t last, void* context) {
  const TokenScales& call = *static_cast<const TokenScales*>(context);
  const BlockSparseProduct& p = *call.p;
  const int64_t features = p.pattern.cols;
  for (int64_t t = first; t < last; t += Simd::lanes) {
    const int count = clamp_count(last - t, Simd::lanes);
    float most[Simd::lanes] = {}, bad[Simd::lanes] = {};
    if (p.input.feature == 1) {
      for (int i = 0; i < count; ++i) {
        Simd::Float a = Simd::zero(), b = Simd::zero();
        for (int64_t k = 0; k < features; k += Simd::lanes) {
          const int n = clamp_count(features - k, Simd::lanes);
          Simd::Float x = load_float(p.input.data, (t + i) * p.input.token + k, p.dtype, n);
          a = Simd::max(a, Simd::abs(x));
          b = Simd::fma(x, Simd::zero(), b);  // NaN where x is NaN or infinite
        }
        float lanes[Simd::lanes];
        Simd::store(lanes, a);
        for (int n = 0; n < Simd::lanes; ++n) most[i] = lanes[n] > most[i] ? lanes[n] : most[i];
        bad[i] = Simd::sum(b);
      }
    } else {
      Simd::Float a = Simd::zero(), b = Simd::zero();
      for (int64_t k = 0; k < features; ++k) {
        Simd::Float x = load_float(p.input.data, t * p.input.token + k * p.input.feature, p.dtype, count);
        a = Simd::max(a, Simd::abs(x));
        b = Simd::fma(x, Simd::zero(), b);
      }
      Simd::store(most, a);
      Simd::store(bad, b);
    }
    for (int i = 0; i < count; ++i) {
      call.scales[t + i] = most[i] / 127.f + bad[i];
      call.rounding[t + i] = most[i] > 1e-30f ? 127.f / most[i] : 0.f;
    }
  }
}

/// Per token max|x| / 127 (NaN where x has a NaN or an Inf) and 127 / max|x|; zeros up to `padded` tokens.
static void find_token_scales(const BlockSparseProduct& p, int64_t padded, float* scales, float* rounding,
                              const ParallelFor& parallel) {
  TokenScales call = {&p, scales, rounding};
  for (int64_t t = p.tokens; t < padded; ++t) scales[t] = rounding[t] = 0;
  parallel(0, p.tokens, 64, token_scales, &call);
}

#ifndef SPARSEKIT_INT8_PRODUCT
static void find_corrections(const BlockSparseProduct&, int32_t*, const ParallelFor&) {}
#endif

}  // namespace
}  // namespace sparsekit

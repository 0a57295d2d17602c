// int8 weights: tokens rounded to 8 bits, and the product of quadruples of bytes (vpdpbusd) where the set has it.
//
// vpdpbusd multiplies unsigned with signed bytes, so tokens are stored as q + 128: the sums are too large by 128 times
// the sum of a row's weights, which is computed once per call. Integer sums: exact in any order.
#pragma once

#include "matmul/cpu_pack.h"

#ifdef __AVX512VNNI__
#define SPARSEKIT_INT8_PRODUCT 1
#endif

namespace sparsekit {
namespace {

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

#ifdef SPARSEKIT_INT8_PRODUCT

constexpr int64_t int8_longest = 1 << 17;  // features: |sums| of q w stay below 2^31

/// Products of quadruples of bytes, added to int32 sums (which travel as the bits of fp32 lanes).
struct Int8Product {
  using Element __attribute__((aligned(1), may_alias)) = uint32_t;  // four neighbours of the inner dimension
  using Operand = Simd::Int;
  static constexpr int pair = 4;

  SPARSEKIT_INLINE Operand load(const Element* p) { return _mm512_loadu_si512(p); }
  SPARSEKIT_INLINE Operand broadcast(const Element* p) { return _mm512_set1_epi32(int32_t(*p)); }
  SPARSEKIT_INLINE Simd::Float madd(Operand weight, Operand token, Simd::Float sum) {
    return Simd::as_float(_mm512_dpbusd_epi32(Simd::as_int(sum), token, weight));
  }
};

template <>
struct Sums<Int8Product> {
  SPARSEKIT_INLINE Simd::Float add(Simd::Float a, Simd::Float b) {
    return Simd::as_float(_mm512_add_epi32(Simd::as_int(a), Simd::as_int(b)));
  }
  static void to_float(float* sums, const int32_t* corrections, int64_t features, int64_t width) {
    for (int64_t i = 0; i < features; ++i) {
      const Simd::Int correction = Simd::set_int(corrections[i]);
      for (int64_t j = 0; j < width; j += Simd::lanes) {
        float* at = sums + i * width + j;
        Simd::store(at, _mm512_cvtepi32_ps(_mm512_sub_epi32(Simd::load_int(at), correction)));
      }
    }
  }
};

/// q + 128 of 16 rounded numbers.
SPARSEKIT_INLINE __m128i token_bytes(Simd::Float rounded) {
  return _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(rounded), _mm512_set1_epi32(128)));
}

template <>
struct Packer<Int8Product> {
  SPARSEKIT_INLINE int64_t whole_lanes(const PackSource&, int64_t, int64_t, int64_t, Int8Product::Element*) {
    return 0;
  }
  SPARSEKIT_INLINE Simd::Int steps(const PackSource& s, int64_t lane, int64_t k) {
    __m128i part[4];
    for (int n = 0; n < 4; ++n) part[n] = token_bytes(load_source<true>(s, lane, k + 16 * n, s.inner - k - 16 * n));
    Simd::Int all = _mm512_inserti32x4(_mm512_castsi128_si512(part[0]), part[1], 1);
    return _mm512_inserti32x4(_mm512_inserti32x4(all, part[2], 2), part[3], 3);
  }
  SPARSEKIT_INLINE Simd::Int lanes(const PackSource& s, int64_t lane, int64_t k) {
    Simd::Int all = _mm512_setzero_si512();
    for (int n = 0; n < 4 && k + n < s.inner; ++n) {
      Simd::Int bytes = _mm512_cvtepu8_epi32(token_bytes(load_source<false>(s, lane, k + n, s.lanes - lane)));
      all = _mm512_or_si512(all, _mm512_slli_epi32(bytes, unsigned(8 * n)));
    }
    return all;
  }
};

/// 128 times the sum of each row's weights, without what lies beyond the matrix.
struct Corrections {
  const BlockSparseProduct* p;
  int32_t* to;
};

static void correct_rows(int64_t first, int64_t last, void* context) {
  const Corrections& call = *static_cast<const Corrections*>(context);
  const BlockSparsePattern& w = call.p->pattern;
  const int64_t R = w.block_rows, C = w.block_cols;
  const int8_t* values = static_cast<const int8_t*>(call.p->values);
  for (int64_t i = first; i < last; ++i) {
    const int64_t rows = smaller(R, w.rows - i * R);
    for (int64_t r = 0; r < rows; ++r) call.to[i * R + r] = 0;
    for (int64_t block = w.crow[i]; block < w.crow[i + 1]; ++block) {
      const int64_t columns = smaller(C, w.cols - w.col[block] * C);
      for (int64_t r = 0; r < rows; ++r) {
        const int8_t* row = values + (block * R + r) * C;
        int32_t sum = 0;
        for (int64_t c = 0; c < columns; ++c) sum += row[c];
        call.to[i * R + r] += 128 * sum;
      }
    }
  }
}

static void find_corrections(const BlockSparseProduct& p, int32_t* corrections, const ParallelFor& parallel) {
  Corrections call = {&p, corrections};
  parallel(0, p.pattern.row_blocks(), 64, correct_rows, &call);
}

#else

static void find_corrections(const BlockSparseProduct&, int32_t*, const ParallelFor&) {}

#endif

}  // namespace
}  // namespace sparsekit

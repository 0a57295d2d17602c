// Functions and the fp32 product over any Simd. Include after simd_<isa>.h.
#pragma once

namespace sparsekit {
namespace {

/// Products of fp32, one step of the inner dimension at a time.
struct FloatProduct {
  using Element = float;
  using Operand = Simd::Float;
  static constexpr int pair = 1;
  static constexpr int exp2_degree = 5;

  SPARSEKIT_INLINE Operand load(const Element* p) { return Simd::load(p); }
  SPARSEKIT_INLINE Operand broadcast(const Element* p) { return Simd::set(*p); }
  SPARSEKIT_INLINE Simd::Float madd(Operand a, Operand b, Simd::Float c) { return Simd::fma_registers(a, b, c); }
  SPARSEKIT_INLINE void store(Element* p, Operand a) { Simd::store(p, a); }
  /// Neighbouring lanes to neighbouring elements of an inner dimension: lanes / pair elements.
  SPARSEKIT_INLINE void store_neighbours(Element* p, Simd::Float a) { Simd::store(p, a); }
};

/// 2^x for x < 128; 0 for x = -inf. Relative minimax polynomials on [0, 1): degree 3 7.5e-5, 4 2.6e-6, 5 1.5e-7 (of
/// which 7.5e-8 is rounding). Underflows towards 0 below 2^-126.
template <int degree>
SPARSEKIT_INLINE Simd::Float exp2(Simd::Float x) {
  static_assert(degree >= 3 && degree <= 5, "degrees 3 to 5");
  Simd::Float f = Simd::fraction(x), p;
  if (degree == 3) {
    p = Simd::fma(Simd::set(0.07802452264f), f, Simd::set(0.2260671554f));
    p = Simd::fma(p, f, Simd::set(0.6958335405f));
    p = Simd::fma(p, f, Simd::set(0.9999252186f));
  } else if (degree == 4) {
    p = Simd::fma(Simd::set(0.01353416792f), f, Simd::set(0.05201146061f));
    p = Simd::fma(p, f, Simd::set(0.2414427569f));
    p = Simd::fma(p, f, Simd::set(0.6930038345f));
    p = Simd::fma(p, f, Simd::set(1.000002593f));
  } else {
    p = Simd::fma(Simd::set(0.001877576675f), f, Simd::set(0.008989340091f));
    p = Simd::fma(p, f, Simd::set(0.05582631805f));
    p = Simd::fma(p, f, Simd::set(0.240153617f));
    p = Simd::fma(p, f, Simd::set(0.6931530732f));
    p = Simd::fma(p, f, Simd::set(0.9999999251f));
  }
  return Simd::scale_by_exp2(p, x);
}

/// tanh(x), relative error 4e-7: x + x^3 P(x^2) below 0.625 (as in Cephes), 1 - 2 / (e^2x + 1) above.
SPARSEKIT_INLINE Simd::Float tanh(Simd::Float x) {
  Simd::Float size = Simd::abs(x), square = Simd::mul(x, x);
  Simd::Float p = Simd::fma(Simd::set(-5.70498872745e-3f), square, Simd::set(2.06390887954e-2f));
  p = Simd::fma(p, square, Simd::set(-5.37397155531e-2f));
  p = Simd::fma(p, square, Simd::set(1.33314422036e-1f));
  p = Simd::fma(p, square, Simd::set(-3.33332819422e-1f));
  Simd::Float small = Simd::fma(Simd::mul(p, square), x, x);
  // e^2x by exp2, clamped where tanh is 1 in fp32. min(a, NaN) is NaN, so that a NaN stays one.
  Simd::Float e = exp2<5>(Simd::mul(Simd::min(Simd::set(10.f), size), Simd::set(2.885390082f)));
  Simd::Float large = Simd::sub(Simd::set(1.f), Simd::div(Simd::set(2.f), Simd::add(e, Simd::set(1.f))));
  return Simd::select(Simd::less(size, Simd::set(0.625f)), small, Simd::copy_sign(large, x));
}

/// ln(x) of normal x > 0, relative error of the result 2e-7; anything for others.
SPARSEKIT_INLINE Simd::Float log(Simd::Float x) {
#ifdef __AVX512F__
  // x = 2^e m, 0.75 <= m < 1.5; ln(m) = 2 atanh(s), s = (m - 1) / (m + 1), |s| <= 0.2.
  const Simd::Float m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src), one = Simd::set(1.f);
  Simd::Float e = _mm512_getexp_ps(x);
  e = Simd::select(Simd::less(m, one), Simd::add(e, one), e);
  const Simd::Float s = Simd::div(Simd::sub(m, one), Simd::add(m, one)), square = Simd::mul(s, s);
  Simd::Float p = Simd::fma(Simd::set(2.f / 9), square, Simd::set(2.f / 7));
  p = Simd::fma(p, square, Simd::set(2.f / 5));
  p = Simd::fma(p, square, Simd::set(2.f / 3));
  p = Simd::fma(Simd::mul(p, square), s, Simd::add(s, s));
  return Simd::fma(e, Simd::set(0.693147180559945f), p);
#else
  alignas(64) float lane[Simd::lanes];
  Simd::store(lane, x);
  for (int i = 0; i < Simd::lanes; ++i) lane[i] = __builtin_logf(lane[i]);
  return Simd::load(lane);
#endif
}

}  // namespace
}  // namespace sparsekit

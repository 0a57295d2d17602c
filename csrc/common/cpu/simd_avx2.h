// Simd for AVX2, FMA and F16C: 8 lanes of fp32, 16 registers. See README.md for the rules of these files.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define SPARSEKIT_INLINE static inline __attribute__((always_inline))
#define SPARSEKIT_TILES 256  // width of the tiles in simd_tiles_asm.h

namespace sparsekit {
namespace {

struct Simd {
  static constexpr int lanes = 8;
  static constexpr int registers = 16;
  using Float = __m256;
  using Int = __m256i;
  using Mask = __m256;  // all ones or all zeros per lane

  // ---- memory. `_partial` touches the first `count` (0 to lanes) elements only; the others read as 0.
  SPARSEKIT_INLINE Int first(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  SPARSEKIT_INLINE Float load(const float* p) { return _mm256_loadu_ps(p); }
  SPARSEKIT_INLINE Float load_partial(const float* p, int count) { return _mm256_maskload_ps(p, first(count)); }
  SPARSEKIT_INLINE void store(float* p, Float a) { _mm256_storeu_ps(p, a); }
  SPARSEKIT_INLINE void store_partial(float* p, Float a, int count) { _mm256_maskstore_ps(p, first(count), a); }
  SPARSEKIT_INLINE Int load_int(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
  SPARSEKIT_INLINE Int load_int_partial(const void* p, int count) {
    return _mm256_maskload_epi32((const int*)p, first(count));
  }
  SPARSEKIT_INLINE void store_int(void* p, Int a) { _mm256_storeu_si256((__m256i*)p, a); }

  // 16-bit elements, widened to fp32 and rounded back (to nearest even). Partial ones go through a small array.
  SPARSEKIT_INLINE __m128i load_16(const uint16_t* p, int count) {
    alignas(16) uint16_t part[lanes] = {};
    for (int i = 0; i < count; ++i) part[i] = p[i];
    return _mm_load_si128((const __m128i*)part);
  }
  SPARSEKIT_INLINE void store_16(uint16_t* p, __m128i a, int count) {
    alignas(16) uint16_t part[lanes];
    _mm_store_si128((__m128i*)part, a);
    for (int i = 0; i < count; ++i) p[i] = part[i];
  }
  SPARSEKIT_INLINE Float widen_bf16(__m128i a) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16));
  }
  SPARSEKIT_INLINE __m128i round_bf16(Float a) {
    Int bits = _mm256_castps_si256(a);
    Int odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    Int rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000),
                                 _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
    rounded = _mm256_srli_epi32(rounded, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  }
  SPARSEKIT_INLINE __m128i round_f16(Float a) {
    return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  SPARSEKIT_INLINE Float load_bf16(const uint16_t* p) { return widen_bf16(_mm_loadu_si128((const __m128i*)p)); }
  SPARSEKIT_INLINE Float load_bf16_partial(const uint16_t* p, int count) { return widen_bf16(load_16(p, count)); }
  SPARSEKIT_INLINE void store_bf16(uint16_t* p, Float a) { _mm_storeu_si128((__m128i*)p, round_bf16(a)); }
  SPARSEKIT_INLINE void store_bf16_partial(uint16_t* p, Float a, int count) { store_16(p, round_bf16(a), count); }
  SPARSEKIT_INLINE Float load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  SPARSEKIT_INLINE Float load_f16_partial(const uint16_t* p, int count) { return _mm256_cvtph_ps(load_16(p, count)); }
  SPARSEKIT_INLINE void store_f16(uint16_t* p, Float a) { _mm_storeu_si128((__m128i*)p, round_f16(a)); }
  SPARSEKIT_INLINE void store_f16_partial(uint16_t* p, Float a, int count) { store_16(p, round_f16(a), count); }
  template <class T>
  SPARSEKIT_INLINE void hold(T&) {}  // see simd_avx512.h; there are no broadcast operands here
  SPARSEKIT_INLINE Float fma_registers(Float a, Float b, Float c) {  // see simd_avx512.h
    asm("vfmadd231ps %2, %1, %0" : "+x"(c) : "x"(a), "x"(b));
    return c;
  }
  SPARSEKIT_INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }
  SPARSEKIT_INLINE void prefetch_near(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }  // into L1

  // ---- arithmetic
  SPARSEKIT_INLINE Float zero() { return _mm256_setzero_ps(); }
  SPARSEKIT_INLINE Float set(float a) { return _mm256_set1_ps(a); }
  SPARSEKIT_INLINE Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  SPARSEKIT_INLINE Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
  SPARSEKIT_INLINE Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  SPARSEKIT_INLINE Float div(Float a, Float b) { return _mm256_div_ps(a, b); }
  SPARSEKIT_INLINE Float max(Float a, Float b) { return _mm256_max_ps(a, b); }  // b where either is NaN
  SPARSEKIT_INLINE Float min(Float a, Float b) { return _mm256_min_ps(a, b); }
  SPARSEKIT_INLINE Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }    // a * b + c
  SPARSEKIT_INLINE Float fms(Float a, Float b, Float c) { return _mm256_fmsub_ps(a, b, c); }    // a * b - c
  SPARSEKIT_INLINE Float fnma(Float a, Float b, Float c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a * b
  SPARSEKIT_INLINE float sum(Float a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  /// Lane i: the sum of all lanes of a[i].
  SPARSEKIT_INLINE Float sum_each(const Float (&a)[lanes]) {
    Float low = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    Float high = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
    return add(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
  }
  SPARSEKIT_INLINE float largest(Float a) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
  }
  SPARSEKIT_INLINE Float abs(Float a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), a); }
  SPARSEKIT_INLINE Float copy_sign(Float magnitude, Float sign) {
    return _mm256_blendv_ps(magnitude, _mm256_or_ps(magnitude, _mm256_set1_ps(-0.f)), sign);  // magnitude >= 0
  }

  // ---- masks
  SPARSEKIT_INLINE Int set_int(int32_t a) { return _mm256_set1_epi32(a); }
  SPARSEKIT_INLINE Mask less(Float a, Float b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  SPARSEKIT_INLINE Mask equal(Float a, Float b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
  SPARSEKIT_INLINE Mask at_most(Int a, Int b) {
    return _mm256_castsi256_ps(_mm256_xor_si256(_mm256_cmpgt_epi32(a, b), _mm256_set1_epi32(-1)));
  }
  SPARSEKIT_INLINE Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
  /// Lanes whose integer has bit `bit` set.
  SPARSEKIT_INLINE Mask bit_set(Int a, int bit) {
    Int one = _mm256_set1_epi32(int32_t(1u << bit));
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(a, one), one));
  }
  SPARSEKIT_INLINE Float select(Mask mask, Float yes, Float no) { return _mm256_blendv_ps(no, yes, mask); }

  // ---- exponentials: x = floor(x) + fraction. `scale_by_exp2(p, x)` is 0 below -126, also at -inf.
  SPARSEKIT_INLINE Float fraction(Float x) {
    x = _mm256_max_ps(_mm256_set1_ps(-127.f), x);  // NaN stays NaN: max returns its second operand
    return _mm256_sub_ps(x, _mm256_floor_ps(x));
  }
  SPARSEKIT_INLINE Float scale_by_exp2(Float p, Float x) {  // p * 2^floor(x)
    Float clamped = _mm256_max_ps(_mm256_set1_ps(-127.f), x);
    Int exponent = _mm256_slli_epi32(_mm256_cvttps_epi32(_mm256_floor_ps(clamped)), 23);
    Float scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
    Float tiny = _mm256_cmp_ps(x, _mm256_set1_ps(-126.f), _CMP_LT_OQ);
    scaled = _mm256_blendv_ps(scaled, p, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_andnot_ps(tiny, scaled);
  }

  /// Rows to columns of an 8 x 8 matrix of 32-bit elements.
  SPARSEKIT_INLINE void transpose(Int (&r)[lanes]) {
    Int t[lanes];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 4) {  // 4 x 4 inside each half
      Int a = _mm256_unpacklo_epi32(r[i], r[i + 1]), b = _mm256_unpackhi_epi32(r[i], r[i + 1]);
      Int c = _mm256_unpacklo_epi32(r[i + 2], r[i + 3]), d = _mm256_unpackhi_epi32(r[i + 2], r[i + 3]);
      t[i] = _mm256_unpacklo_epi64(a, c);
      t[i + 1] = _mm256_unpackhi_epi64(a, c);
      t[i + 2] = _mm256_unpacklo_epi64(b, d);
      t[i + 3] = _mm256_unpackhi_epi64(b, d);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm256_permute2x128_si256(t[i], t[i + 4], 0x20);
      r[i + 4] = _mm256_permute2x128_si256(t[i], t[i + 4], 0x31);
    }
  }
  SPARSEKIT_INLINE Int as_int(Float a) { return _mm256_castps_si256(a); }
  SPARSEKIT_INLINE Float as_float(Int a) { return _mm256_castsi256_ps(a); }
};

}  // namespace
}  // namespace sparsekit

// Simd for AVX-512 F, BW, DQ, VL: 16 lanes of fp32, 32 registers. See README.md for the rules of these files.
#pragma once

// GCC 12 takes the deliberately undefined operand inside its own intrinsics for a mistake (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <cstdint>

#define SPARSEKIT_INLINE static inline __attribute__((always_inline))
#define SPARSEKIT_TILES 512  // width of the tiles in simd_tiles_asm.h

namespace sparsekit {
namespace {

struct Simd {
  static constexpr int lanes = 16;
  static constexpr int registers = 32;
  using Float = __m512;
  using Int = __m512i;
  using Mask = __mmask16;

  // ---- memory. `_partial` touches the first `count` (0 to lanes) elements only; the others read as 0.
  SPARSEKIT_INLINE Mask first(int count) { return Mask((1u << count) - 1); }
  SPARSEKIT_INLINE Float load(const float* p) { return _mm512_loadu_ps(p); }
  SPARSEKIT_INLINE Float load_partial(const float* p, int count) { return _mm512_maskz_loadu_ps(first(count), p); }
  SPARSEKIT_INLINE void store(float* p, Float a) { _mm512_storeu_ps(p, a); }
  SPARSEKIT_INLINE void store_partial(float* p, Float a, int count) { _mm512_mask_storeu_ps(p, first(count), a); }
  SPARSEKIT_INLINE Int load_int(const void* p) { return _mm512_loadu_si512(p); }
  SPARSEKIT_INLINE Int load_int_partial(const void* p, int count) { return _mm512_maskz_loadu_epi32(first(count), p); }
  SPARSEKIT_INLINE void store_int(void* p, Int a) { _mm512_storeu_si512(p, a); }

  // 16-bit elements, widened to fp32 and rounded back (to nearest even).
  SPARSEKIT_INLINE Float widen_bf16(__m256i a) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16));
  }
  SPARSEKIT_INLINE Float load_bf16(const uint16_t* p) { return widen_bf16(_mm256_loadu_si256((const __m256i*)p)); }
  SPARSEKIT_INLINE Float load_bf16_partial(const uint16_t* p, int count) {
    return widen_bf16(_mm256_maskz_loadu_epi16(first(count), p));
  }
  SPARSEKIT_INLINE __m256i round_bf16(Float a) {
    Int bits = _mm512_castps_si512(a);
    Int odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    Int rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }
  SPARSEKIT_INLINE void store_bf16(uint16_t* p, Float a) { _mm256_storeu_si256((__m256i*)p, round_bf16(a)); }
  SPARSEKIT_INLINE void store_bf16_partial(uint16_t* p, Float a, int count) {
    _mm256_mask_storeu_epi16(p, first(count), round_bf16(a));
  }
  SPARSEKIT_INLINE Float load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  SPARSEKIT_INLINE Float load_f16_partial(const uint16_t* p, int count) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), p));
  }
  SPARSEKIT_INLINE void store_f16(uint16_t* p, Float a) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  SPARSEKIT_INLINE void store_f16_partial(uint16_t* p, Float a, int count) {
    _mm256_mask_storeu_epi16(p, first(count), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  /// Keeps a value in a register, for products that are no fma_registers (int8, minima and maxima).
  template <class T>
  SPARSEKIT_INLINE void hold(T& a) {
    asm("" : "+v"(a));
  }
  /// a * b + c with all three in registers, for the tiles of matrix products. Left to itself GCC 12 folds a broadcast
  /// into every instruction that uses it, four loads in place of one, and from one change of the source to the next
  /// keeps what a step shares on the stack: fp32 tiles at 1.3 and 0.9 multiply-adds per cycle in place of 1.97 (Zen 5).
  SPARSEKIT_INLINE Float fma_registers(Float a, Float b, Float c) {
    asm("vfmadd231ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
  }
  SPARSEKIT_INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }
  SPARSEKIT_INLINE void prefetch_near(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }  // into L1

  // ---- arithmetic
  SPARSEKIT_INLINE Float zero() { return _mm512_setzero_ps(); }
  SPARSEKIT_INLINE Float set(float a) { return _mm512_set1_ps(a); }
  SPARSEKIT_INLINE Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  SPARSEKIT_INLINE Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
  SPARSEKIT_INLINE Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  SPARSEKIT_INLINE Float div(Float a, Float b) { return _mm512_div_ps(a, b); }
  SPARSEKIT_INLINE Float max(Float a, Float b) { return _mm512_max_ps(a, b); }  // b where either is NaN
  SPARSEKIT_INLINE Float min(Float a, Float b) { return _mm512_min_ps(a, b); }
  SPARSEKIT_INLINE Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }    // a * b + c
  SPARSEKIT_INLINE Float fms(Float a, Float b, Float c) { return _mm512_fmsub_ps(a, b, c); }    // a * b - c
  SPARSEKIT_INLINE Float fnma(Float a, Float b, Float c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b
  SPARSEKIT_INLINE float sum(Float a) { return _mm512_reduce_add_ps(a); }
  /// Lane i: the sum of all lanes of a[i]. 15 additions and 30 shuffles, where 16 sums one by one take 64 of each.
  SPARSEKIT_INLINE Float sum_each(const Float (&a)[lanes]) {
    Float pairs[8], quarters[4];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      pairs[i] = add(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      __m512d x = _mm512_castps_pd(pairs[2 * i]), y = _mm512_castps_pd(pairs[2 * i + 1]);
      quarters[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    Float low = add_quarters(quarters[0], quarters[1]), high = add_quarters(quarters[2], quarters[3]);
    return add_quarters(low, high);
  }
  /// Quarters 0 + 1 and 2 + 3 of a, then those of b.
  SPARSEKIT_INLINE Float add_quarters(Float a, Float b) {
    return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  SPARSEKIT_INLINE float largest(Float a) { return _mm512_reduce_max_ps(a); }
  SPARSEKIT_INLINE Float abs(Float a) { return _mm512_abs_ps(a); }
  SPARSEKIT_INLINE Float copy_sign(Float magnitude, Float sign) {
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(magnitude), _mm512_castps_si512(sign),
                                                         _mm512_set1_epi32(INT32_MIN), 0xd8));
  }

  // ---- masks: one bit of truth per lane
  SPARSEKIT_INLINE Int set_int(int32_t a) { return _mm512_set1_epi32(a); }
  SPARSEKIT_INLINE Mask less(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  SPARSEKIT_INLINE Mask equal(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  SPARSEKIT_INLINE Mask at_most(Int a, Int b) { return _mm512_cmple_epi32_mask(a, b); }
  SPARSEKIT_INLINE Mask both(Mask a, Mask b) { return a & b; }
  /// Lanes whose integer has bit `bit` set.
  SPARSEKIT_INLINE Mask bit_set(Int a, int bit) { return _mm512_test_epi32_mask(a, _mm512_set1_epi32(1u << bit)); }
  SPARSEKIT_INLINE Float select(Mask mask, Float yes, Float no) { return _mm512_mask_blend_ps(mask, no, yes); }

  // ---- exponentials: x = floor(x) + fraction. `fraction(-inf)` is 0 and `scale_by_exp2(p, -inf)` is 0.
  SPARSEKIT_INLINE Float fraction(Float x) { return _mm512_reduce_ps(x, 0x09); }
  SPARSEKIT_INLINE Float scale_by_exp2(Float p, Float x) { return _mm512_scalef_ps(p, x); }  // p * 2^floor(x)

  /// Rows to columns of a 16 x 16 matrix of 32-bit elements.
  SPARSEKIT_INLINE void transpose(Int (&r)[lanes]) {
    Int t[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4) {  // 4 x 4 inside each 128-bit quarter
      Int a = _mm512_unpacklo_epi32(r[i], r[i + 1]), b = _mm512_unpackhi_epi32(r[i], r[i + 1]);
      Int c = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]), d = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
      t[i] = _mm512_unpacklo_epi64(a, c);
      t[i + 1] = _mm512_unpackhi_epi64(a, c);
      t[i + 2] = _mm512_unpacklo_epi64(b, d);
      t[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; ++i) {  // then the 4 x 4 matrix of quarters
      Int a = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88), b = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd);
      Int c = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88), d = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd);
      r[i] = _mm512_shuffle_i32x4(a, c, 0x88);
      r[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
      r[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
      r[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
  }
  SPARSEKIT_INLINE Int as_int(Float a) { return _mm512_castps_si512(a); }
  SPARSEKIT_INLINE Float as_float(Int a) { return _mm512_castsi512_ps(a); }
};

}  // namespace
}  // namespace sparsekit

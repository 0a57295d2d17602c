// AVX-512 with BF16: Simd of AVX-512 and a Product over pairs of bf16 (`vdpbf16ps`, 32 multiply-adds each).
#pragma once

#include "common/cpu/simd_avx512.h"
#include "common/cpu/simd_math.h"

#define SPARSEKIT_BF16_PRODUCT 1  // kernels test this to know that the product exists

namespace sparsekit {
namespace {

/// Products of bf16 pairs, added to fp32 lanes. An Element holds two neighbours of the inner dimension, the first in
/// its low half. vdpbf16ps flushes denormals and rounds to nearest even whatever MXCSR says.
struct Bf16Product {
  using Element __attribute__((aligned(2), may_alias)) = uint32_t;  // a key row stands where its tensor has it
  using Operand = Simd::Int;
  static constexpr int pair = 2;
  static constexpr int exp2_degree = 4;  // 2.6e-6, where rounding the weights to bf16 costs 2e-3

  SPARSEKIT_INLINE Operand load(const Element* p) { return _mm512_loadu_si512(p); }
  SPARSEKIT_INLINE Operand broadcast(const Element* p) { return _mm512_set1_epi32(int32_t(*p)); }
  SPARSEKIT_INLINE Simd::Float madd(Operand a, Operand b, Simd::Float c) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));  // in registers: see Simd::fma_registers
    return c;
  }
  /// Two rows of fp32 to one row of pairs: `even` in the low halves. Rounds half away from zero: 4 instructions, where
  /// vcvtne2ps2bf16 needs a shuffle besides (its halves are not interleaved).
  SPARSEKIT_INLINE Operand join(Simd::Float even, Simd::Float odd) {
    const __m512i half = _mm512_set1_epi32(0x8000), high = _mm512_set1_epi32(int32_t(0xffff0000));
    __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(even), half), 16);
    return _mm512_ternarylogic_epi32(low, _mm512_add_epi32(_mm512_castps_si512(odd), half), high, 0xf8);
  }
  SPARSEKIT_INLINE void store(Element* p, Operand a) { _mm512_storeu_si512(p, a); }
  /// Neighbouring lanes to neighbouring elements of an inner dimension: lanes / pair elements.
  SPARSEKIT_INLINE void store_neighbours(Element* p, Simd::Float a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a));
  }
};

/// 16 pairs of neighbours along d of one row: what a query or key row is read as. Reads `count` bf16 (0 to 32).
SPARSEKIT_INLINE Simd::Int load_bf16_pairs(const uint16_t* p, int count) {
  return count >= 32 ? _mm512_loadu_si512(p)
                     : _mm512_maskz_loadu_epi16(__mmask32((1ull << (count < 0 ? 0 : count)) - 1), p);
}

SPARSEKIT_INLINE void store_bf16_pairs(void* p, Simd::Int pairs, int count) {
  if (count >= 32) return _mm512_storeu_si512(p, pairs);
  _mm512_mask_storeu_epi16(p, __mmask32((1ull << count) - 1), pairs);
}

/// Two rows of fp32 to one of pairs, rounded to nearest even: results, where Bf16Product::join does for weights.
SPARSEKIT_INLINE Simd::Int round_bf16_pairs(Simd::Float even, Simd::Float odd) {
  const Simd::Int order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

/// Interleaves two rows of `count` (0 to 16) bf16 along d: element d is (even[d], odd[d]); without `second` (even[d],
/// 0).
SPARSEKIT_INLINE Simd::Int interleave_bf16(const uint16_t* even, const uint16_t* odd, int count, bool second) {
  __mmask16 first = Simd::first(count);
  __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first, even));
  if (!second) return low;
  __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first, odd));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

/// The same of whole vectors: columns 0 to 15 of two rows of 32 bf16 as pairs, then columns 16 to 31.
SPARSEKIT_INLINE void interleave_bf16(Simd::Int even, Simd::Int odd, Simd::Int* low, Simd::Int* high) {
  const Simd::Int first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  *low = _mm512_permutex2var_epi16(even, first, odd);
  *high = _mm512_permutex2var_epi16(even, _mm512_add_epi16(first, _mm512_set1_epi16(16)), odd);
}

}  // namespace
}  // namespace sparsekit

// Codes as tensor-core operands: see CODES in cuda_decode_sm80_packed.cuh.
#pragma once

#include <cstdint>

#include "sparsekit/kv_cache.h"

namespace sparsekit::cuda {

template <int BITS>
struct Codes {
  static constexpr bool kFp8 = BITS == kv_fp8;
  static constexpr int kPlane = BITS == kv_fp8 ? 8 : BITS == 3 ? 2 : BITS;  // bits of the (first) plane
  static constexpr int kSteps = 8 / kPlane;                                 // products (k = 16) per word
  static constexpr int kTokens = kPlane == 8 ? 32 : 64;                     // of a tile
  static constexpr bool kMixed = kPlane == 2;                               // chunk(g, s) takes both blocks
  static constexpr bool kHigh = BITS == 3;                                  // a second plane of one bit
  static constexpr float kUnit = kFp8 ? 256.f : 16777216.f;                 // value = kUnit * operand
  /// The operand of step j is 2^shift(j) too large.
  static __host__ __device__ constexpr int shift(int j) { return kHigh ? j / 2 * 4 : kPlane * j; }

  /// out[2 j] is elements (4 j, 4 j + 2) of a word, out[2 j + 1] is (4 j + 1, 4 j + 3). high: the word of the second
  /// plane, shifted so that its bit 8 i + j belongs to element 4 j + i.
  static __device__ __forceinline__ void unpack(uint32_t word, uint32_t high, uint32_t (&out)[2 * kSteps]) {
    if (kFp8) {
      const uint32_t low = word << 8;  // sign to bit 15, exponent and mantissa to bits 7 .. 13
      out[0] = (low & 0x80008000u) | (low >> 1 & 0x3f803f80u);
      out[1] = (word & 0x80008000u) | (word >> 1 & 0x3f803f80u);
      return;
    }
    if (kHigh) {
      // Both planes in nibbles: elements with even j in one word, those with odd j in another. The product moves the
      // two high bits of a byte by different distances; where the wrong ones meet, they carry into a bit that is
      // masked.
      const uint32_t even = (word & 0x33333333u) | ((high & 0x05050505u) * 20 & 0x44444444u);
      const uint32_t odd = (word >> 2 & 0x33333333u) | ((high & 0x0a0a0a0au) * 10 & 0x44444444u);
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {
        const uint32_t mask = 0x00070007u << (j / 2 * 4), nibbles = j % 2 ? odd : even;
        out[2 * j] = nibbles & mask;
        out[2 * j + 1] = nibbles >> 8 & mask;
      }
      return;
    }
    const uint32_t later = word >> 8;
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const uint32_t mask = ((1u << kPlane) - 1) * 0x00010001u << (kPlane * j);
      out[2 * j] = word & mask;
      out[2 * j + 1] = later & mask;
    }
  }
};

/// Halves (0, 2) and (1, 3) of four neighbours.
__device__ __forceinline__ uint32_t even_of(uint32_t low, uint32_t high) { return __byte_perm(low, high, 0x5410); }
__device__ __forceinline__ uint32_t odd_of(uint32_t low, uint32_t high) { return __byte_perm(low, high, 0x7632); }

}  // namespace sparsekit::cuda

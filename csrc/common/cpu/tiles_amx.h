// AMX: eight tile registers of 16 rows of 64 bytes, and products of two of them. Include after simd_avx512_bf16.h.
//
// Tiles hold 16 x 16 fp32, or 16 x 32 bf16. A left operand A[m][k] stands as it is read in memory, a right one B[k][n]
// as pairs of k: row k / 2, column n, elements k and k + 1.
//
// With SPARSEKIT_AMX_EMULATION the same operations run on AVX-512 and give the same bits, so that code over tiles is
// tested on processors without them. Assembly in place of intrinsics: those want literals for tile numbers, which a
// template does not have.
#pragma once

#include "common/cpu/simd_avx512_bf16.h"

namespace sparsekit {
namespace {

/// What ldtilecfg reads: palette 1, every tile whole.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

#ifndef SPARSEKIT_AMX_EMULATION

struct Tiles {
  /// Tiles are usable from its making until it is released. What the thread had configured before comes back, without
  /// its contents. (No destructor: code for exceptions would bring a weak symbol.)
  struct Session {
    TileShapes before;

    Session() {
      const TileShapes mine;
      asm volatile("sttilecfg %0\nldtilecfg %1" : "=m"(before) : "m"(mine));
    }
    void release() {
      if (before.palette) {
        asm volatile("ldtilecfg %0" ::"m"(before));
      } else {
        asm volatile("tilerelease");
      }
    }
  };

  template <int t>
  SPARSEKIT_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(t));
  }
  /// 16 rows of 64 bytes that stand `stride` bytes apart.
  template <int t>
  SPARSEKIT_INLINE void load(const void* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(t) : "memory");
  }
  template <int t>
  SPARSEKIT_INLINE void store(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(t) : "memory");
  }
  /// c += a b, of bf16. Like vdpbf16ps: denormals are zero, sums round to nearest even whatever MXCSR says.
  template <int c, int a, int b>
  SPARSEKIT_INLINE void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  }
};

#else

struct Tiles {
  struct alignas(64) Register {
    uint32_t rows[16][16];
  };
  static thread_local Register registers[8];
  struct Session {
    Session() { memset(registers, 0, sizeof registers); }
    void release() {}
  };

  template <int t>
  SPARSEKIT_INLINE void zero() {
    for (int i = 0; i < 16; ++i) Simd::store_int(registers[t].rows[i], Simd::set_int(0));
  }
  template <int t>
  SPARSEKIT_INLINE void load(const void* p, int64_t stride) {
    for (int i = 0; i < 16; ++i)
      Simd::store_int(registers[t].rows[i], Simd::load_int(static_cast<const char*>(p) + i * stride));
  }
  template <int t>
  SPARSEKIT_INLINE void store(void* p, int64_t stride) {
    for (int i = 0; i < 16; ++i)
      Simd::store_int(static_cast<char*>(p) + i * stride, Simd::load_int(registers[t].rows[i]));
  }
  template <int c, int a, int b>
  SPARSEKIT_INLINE void multiply() {
    product(&registers[c], registers[a], registers[b]);
  }

  /// As the manual's pseudocode has it: sums of even and of odd k from zero, added to each other, then to c.
  static void product(Register* c, const Register& a, const Register& b) {
    for (int m = 0; m < 16; ++m) {
      Simd::Float even = Simd::zero(), odd = Simd::zero();
      for (int k = 0; k < 16; ++k) {
        const Simd::Int right = Simd::load_int(b.rows[k]), left = Simd::set_int(int32_t(a.rows[m][k]));
        even = flushed(Simd::fma(low(left), low(right), even));
        odd = flushed(Simd::fma(high(left), high(right), odd));
      }
      float* to = reinterpret_cast<float*>(c->rows[m]);
      Simd::store(to, flushed(Simd::add(flushed(Simd::load(to)), flushed(Simd::add(even, odd)))));
    }
  }
  SPARSEKIT_INLINE Simd::Float low(Simd::Int pairs) { return flushed(Simd::as_float(_mm512_slli_epi32(pairs, 16))); }
  SPARSEKIT_INLINE Simd::Float high(Simd::Int pairs) {
    return flushed(Simd::as_float(_mm512_and_si512(pairs, Simd::set_int(int32_t(0xffff0000)))));
  }
  SPARSEKIT_INLINE Simd::Float flushed(Simd::Float x) {
    return Simd::select(_mm512_fpclass_ps_mask(x, 0x20), Simd::zero(), x);  // 0x20: denormal
  }
};
thread_local Tiles::Register Tiles::registers[8];

#endif

}  // namespace
}  // namespace sparsekit

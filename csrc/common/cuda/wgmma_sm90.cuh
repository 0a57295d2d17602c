// Matrix products of a warpgroup (128 threads) on Hopper: wgmma, asynchronous, operands in shared memory.
// PTX ISA 8.0, sm_90a.
//
//   D[64 x N] (+)= A[64 x 16] B[16 x N]     16-bit operands, fp32 D in registers
//
// D: thread t of the warpgroup, warp w = t / 32, lane l = t % 32: d[4 j + 2 r + c] is row 16 w + l / 4 + 8 r, column
// 8 j + 2 (l % 4) + c. So D of one product, rounded to 16 bits in pairs, is the A operand of the next: register i of a
// k-step of 16 columns is the pair (d[2 i], d[2 i + 1]).
//
// Operands in shared memory are panels of 128-byte rows with the 128-byte swizzle, as TMA writes them (tma_sm90.cuh),
// and are named by descriptors, 64 bits:
//   0-13 address / 16 | 16-29 leading offset / 16 | 32-45 stride offset / 16 | 62-63 swizzle, 1 = 128 bytes
// Stride offset: 8 rows = 1024 bytes. The hardware permutes by address bits 7 to 9, so inside a row plain steps are
// right.
//   contraction along the row (A; B as in q k^T):  leading offset unused; 16 columns on = + 32 bytes, 64 = the next
//   panel contraction along the panel's rows (B as in p v): leading offset = distance of the panels; 16 rows on = +
//   2048 bytes
//
// Between products and ordinary code:
//   wgmma_fence    before the first product after registers were written by ordinary code
//   wgmma_commit, wgmma_wait<PENDING>: groups of products; registers of a group in flight must not be touched
//   pin            after a wait: else the compiler may read accumulators before it
// ptxas warns (C7510 to C7520) where it has to serialise products; the build must be free of these warnings.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace sparsekit::cuda {

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(PENDING) : "memory");
}

/// "Writes" the registers with an empty instruction.
template <int COUNT>
__device__ __forceinline__ void pin(float (&registers)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int COUNT>
__device__ __forceinline__ void pin(uint32_t (&registers)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

/// The lower half of a descriptor, which changes from product to product (steps in bytes are added as bytes / 16), and
/// the whole. 32-bit arithmetic on the lower half keeps addresses in few registers.
__device__ __forceinline__ uint32_t descriptor_low(uint32_t address, int leading_bytes) {
  return (address >> 4) | uint32_t(leading_bytes >> 4) << 16;
}
__device__ __forceinline__ uint64_t descriptor(uint32_t low) { return uint64_t(0x40000000u | (1024 >> 4)) << 32 | low; }

// Operand lists of the accumulators: the names in the instruction and the C++ operands behind them.
#define SPARSEKIT_NAMES_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define SPARSEKIT_NAMES_1 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SPARSEKIT_NAMES_2 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define SPARSEKIT_NAMES_3 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SPARSEKIT_NAMES_4 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define SPARSEKIT_NAMES_5 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define SPARSEKIT_NAMES_6 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define SPARSEKIT_NAMES_7 \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define SPARSEKIT_D4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SPARSEKIT_D16(d, i) SPARSEKIT_D4(d, i), SPARSEKIT_D4(d, i + 4), SPARSEKIT_D4(d, i + 8), SPARSEKIT_D4(d, i + 12)
#define SPARSEKIT_NAMES_OF_32 SPARSEKIT_NAMES_0 ", " SPARSEKIT_NAMES_1
#define SPARSEKIT_OPERANDS_OF_32 SPARSEKIT_D16(d, 0), SPARSEKIT_D16(d, 16)
#define SPARSEKIT_NAMES_OF_48 SPARSEKIT_NAMES_0 ", " SPARSEKIT_NAMES_1 ", " SPARSEKIT_NAMES_2
#define SPARSEKIT_OPERANDS_OF_48 SPARSEKIT_D16(d, 0), SPARSEKIT_D16(d, 16), SPARSEKIT_D16(d, 32)
#define SPARSEKIT_NAMES_OF_64 SPARSEKIT_NAMES_0 ", " SPARSEKIT_NAMES_1 ", " SPARSEKIT_NAMES_2 ", " SPARSEKIT_NAMES_3
#define SPARSEKIT_OPERANDS_OF_64 SPARSEKIT_D16(d, 0), SPARSEKIT_D16(d, 16), SPARSEKIT_D16(d, 32), SPARSEKIT_D16(d, 48)
#define SPARSEKIT_NAMES_OF_128                                                                                  \
  SPARSEKIT_NAMES_0 ", " SPARSEKIT_NAMES_1 ", " SPARSEKIT_NAMES_2 ", " SPARSEKIT_NAMES_3 ", " SPARSEKIT_NAMES_4 \
                    ", " SPARSEKIT_NAMES_5 ", " SPARSEKIT_NAMES_6 ", " SPARSEKIT_NAMES_7
#define SPARSEKIT_OPERANDS_OF_128                                                                              \
  SPARSEKIT_D16(d, 0), SPARSEKIT_D16(d, 16), SPARSEKIT_D16(d, 32), SPARSEKIT_D16(d, 48), SPARSEKIT_D16(d, 64), \
      SPARSEKIT_D16(d, 80), SPARSEKIT_D16(d, 96), SPARSEKIT_D16(d, 112)

// wgmma_shared: d = a b (accumulate false) or d += a b; both operands in shared memory, contraction along their rows.
#define SPARSEKIT_WGMMA_SHARED(N, COUNT, A, B, PREDICATE, TYPE)                                                \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " PREDICATE ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N      \
               "k16.f32." TYPE "." TYPE " {" SPARSEKIT_NAMES_OF_##COUNT "}, " A ", " B ", p, 1, 1, 0, 0;\n}\n" \
               : SPARSEKIT_OPERANDS_OF_##COUNT                                                                 \
               : "l"(a), "l"(b), "r"(int(accumulate)))
#define SPARSEKIT_DEFINE_WGMMA_SHARED(N, COUNT, A, B, PREDICATE)                                             \
  template <class Element>                                                                                   \
  __device__ __forceinline__ void wgmma_shared(float (&d)[COUNT], uint64_t a, uint64_t b, bool accumulate) { \
    if constexpr (std::is_same_v<Element, __nv_bfloat16>) {                                                  \
      SPARSEKIT_WGMMA_SHARED(N, COUNT, A, B, PREDICATE, "bf16");                                             \
    } else {                                                                                                 \
      SPARSEKIT_WGMMA_SHARED(N, COUNT, A, B, PREDICATE, "f16");                                              \
    }                                                                                                        \
  }

SPARSEKIT_DEFINE_WGMMA_SHARED(64, 32, "%32", "%33", "%34")
SPARSEKIT_DEFINE_WGMMA_SHARED(128, 64, "%64", "%65", "%66")

// wgmma_registers: d += a b; a in registers, b in shared memory with the contraction along the panel's rows.
#define SPARSEKIT_WGMMA_REGISTERS(N, COUNT, A, B, TYPE)                                                        \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" SPARSEKIT_NAMES_OF_##COUNT \
               "}, {" A "}, " B ", 1, 1, 1, 1;\n"                                                              \
               : SPARSEKIT_OPERANDS_OF_##COUNT                                                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define SPARSEKIT_DEFINE_WGMMA_REGISTERS(N, COUNT, A, B)                                              \
  template <class Element>                                                                            \
  __device__ __forceinline__ void wgmma_registers(float (&d)[COUNT], const uint32_t* a, uint64_t b) { \
    if constexpr (std::is_same_v<Element, __nv_bfloat16>) {                                           \
      SPARSEKIT_WGMMA_REGISTERS(N, COUNT, A, B, "bf16");                                              \
    } else {                                                                                          \
      SPARSEKIT_WGMMA_REGISTERS(N, COUNT, A, B, "f16");                                               \
    }                                                                                                 \
  }

SPARSEKIT_DEFINE_WGMMA_REGISTERS(64, 32, "%32, %33, %34, %35", "%36")
SPARSEKIT_DEFINE_WGMMA_REGISTERS(96, 48, "%48, %49, %50, %51", "%52")
SPARSEKIT_DEFINE_WGMMA_REGISTERS(128, 64, "%64, %65, %66, %67", "%68")
SPARSEKIT_DEFINE_WGMMA_REGISTERS(256, 128, "%128, %129, %130, %131", "%132")

}  // namespace sparsekit::cuda

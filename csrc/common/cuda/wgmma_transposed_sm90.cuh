// wgmma with both operands in shared memory and the contraction along the rows of both, as in p^T dO: beside
// wgmma_sm90.cuh. PTX ISA 8.0, sm_90a.
//
// A is a panel of 64 columns (its 64 rows of D), B has N columns in panels `leading` bytes apart; 16 rows of either on
// =
// + 2048 bytes.
#pragma once

#include "common/cuda/wgmma_sm90.cuh"

namespace sparsekit::cuda {

#define SPARSEKIT_WGMMA_TRANSPOSED(N, COUNT, A, B, PREDICATE, TYPE)                                            \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " PREDICATE ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N      \
               "k16.f32." TYPE "." TYPE " {" SPARSEKIT_NAMES_OF_##COUNT "}, " A ", " B ", p, 1, 1, 1, 1;\n}\n" \
               : SPARSEKIT_OPERANDS_OF_##COUNT                                                                 \
               : "l"(a), "l"(b), "r"(int(accumulate)))
#define SPARSEKIT_DEFINE_WGMMA_TRANSPOSED(N, COUNT, A, B, PREDICATE)                                             \
  template <class Element>                                                                                       \
  __device__ __forceinline__ void wgmma_transposed(float (&d)[COUNT], uint64_t a, uint64_t b, bool accumulate) { \
    if constexpr (std::is_same_v<Element, __nv_bfloat16>) {                                                      \
      SPARSEKIT_WGMMA_TRANSPOSED(N, COUNT, A, B, PREDICATE, "bf16");                                             \
    } else {                                                                                                     \
      SPARSEKIT_WGMMA_TRANSPOSED(N, COUNT, A, B, PREDICATE, "f16");                                              \
    }                                                                                                            \
  }

/// d = a^T b (accumulate false) or d += a^T b.
SPARSEKIT_DEFINE_WGMMA_TRANSPOSED(64, 32, "%32", "%33", "%34")
SPARSEKIT_DEFINE_WGMMA_TRANSPOSED(128, 64, "%64", "%65", "%66")

}  // namespace sparsekit::cuda

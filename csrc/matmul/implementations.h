// The CPU implementations of the block-sparse products, one per file; dispatch.cpp chooses.
#pragma once

#include "sparsekit/matmul.h"

namespace sparsekit {

struct CpuMatmul {
  const char* name;  // also the value of SPARSEKIT_ISA that forces it
  /// Why it does not take this dtype and pattern (a static string), or null if it does.
  const char* (*refuses)(DType dtype, const BlockSparsePattern& pattern);
  Status (*product)(const BlockSparseProduct& arguments, const ParallelFor& parallel);
  Status (*sddmm)(const BlockSddmm& arguments, const ParallelFor& parallel);
};

extern const CpuMatmul matmul_cpu_reference;  // reference.cpp: float64 accumulation, takes every valid problem
extern const CpuMatmul matmul_cpu_portable;   // cpu_portable.cpp
#ifdef SPARSEKIT_X86
extern const CpuMatmul matmul_cpu_avx2;         // cpu_avx2.cpp
extern const CpuMatmul matmul_cpu_avx512;       // cpu_avx512.cpp
extern const CpuMatmul matmul_cpu_avx512_bf16;  // cpu_avx512_bf16.cpp
#endif

}  // namespace sparsekit

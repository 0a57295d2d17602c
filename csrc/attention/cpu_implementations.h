// The CPU implementations, one per file. Which of them are built depends on the processor family (cmake/kernels.cmake);
// which of them may run on this machine is decided in dispatch.cpp.
#pragma once

#include "sparsekit/attention.h"

namespace sparsekit {

using CpuAttention = AttentionImplementation<ParallelFor>;

extern const CpuAttention attention_cpu_reference;  // reference.cpp: float64 accumulation, takes every valid problem
extern const CpuAttention attention_cpu_portable;   // cpu_portable.cpp
#ifdef SPARSEKIT_X86
extern const CpuAttention attention_cpu_avx2;         // cpu_avx2.cpp
extern const CpuAttention attention_cpu_avx512;       // cpu_avx512.cpp
extern const CpuAttention attention_cpu_avx512_bf16;  // cpu_avx512_bf16.cpp
extern const CpuAttention attention_cpu_amx;          // cpu_amx.cpp
#endif

}  // namespace sparsekit

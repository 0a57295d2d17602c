// Block-sparse attention for AVX-512 F, BW, DQ, VL (Skylake-SP, Zen 4 and later).
// The algorithm is in cpu_forward.h and cpu_backward.h; this file compiles it with this set's flags.
#include "common/cpu/simd_avx512.h"

#include "attention/cpu_kernels.h"

namespace sparsekit {

const CpuAttention attention_cpu_avx512 = {"avx512", refuses, workspace, forward, backward};

}  // namespace sparsekit

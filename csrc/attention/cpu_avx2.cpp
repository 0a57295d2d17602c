// Block-sparse attention for AVX2, FMA and F16C (Haswell, Zen 1 and later).
// The algorithm is in cpu_forward.h and cpu_backward.h; this file compiles it with this set's flags.
#include "common/cpu/simd_avx2.h"

#include "attention/cpu_kernels.h"

namespace sparsekit {

const CpuAttention attention_cpu_avx2 = {"avx2", refuses, workspace, forward, backward};

}  // namespace sparsekit

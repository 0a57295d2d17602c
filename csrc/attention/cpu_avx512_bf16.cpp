// Block-sparse attention for AVX-512 with BF16: bf16 through vdpbf16ps (Zen 4 and later), the rest as in
// cpu_avx512.cpp. The algorithm is in cpu_forward.h and cpu_backward.h; this file compiles it with this set's flags.
#include "common/cpu/simd_avx512_bf16.h"

#include "attention/cpu_kernels.h"

namespace sparsekit {

const CpuAttention attention_cpu_avx512_bf16 = {"avx512_bf16", refuses, workspace, forward, backward};

}  // namespace sparsekit

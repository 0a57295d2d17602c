// Block-sparse products for AVX-512 with BF16 (Zen 4 and later): bf16 through vdpbf16ps, the rest as in
// cpu_avx512.cpp.
// The algorithms are in cpu_product.h and cpu_sddmm.h; this file compiles them with this set's flags.
#include "common/cpu/simd_avx512_bf16.h"

#include "matmul/cpu_kernels.h"

namespace sparsekit {

const CpuMatmul matmul_cpu_avx512_bf16 = {"avx512_bf16", refuses, product, sddmm};

}  // namespace sparsekit

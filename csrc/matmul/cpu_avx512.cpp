// Block-sparse products for AVX-512 F, BW, DQ, VL (Skylake-SP and later).
// The algorithms are in cpu_product.h and cpu_sddmm.h; this file compiles them with this set's flags.
#include "common/cpu/simd_avx512.h"

#include "matmul/cpu_kernels.h"

namespace sparsekit {

const CpuMatmul matmul_cpu_avx512 = {"avx512", refuses, product, sddmm};

}  // namespace sparsekit

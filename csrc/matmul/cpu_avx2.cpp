// Block-sparse products for AVX2, FMA and F16C (Haswell, Zen 1 and later).
// The algorithms are in cpu_product.h and cpu_sddmm.h; this file compiles them with this set's flags.
#include "common/cpu/simd_avx2.h"

#include "matmul/cpu_kernels.h"

namespace sparsekit {

const CpuMatmul matmul_cpu_avx2 = {"avx2", refuses, product, sddmm};

}  // namespace sparsekit

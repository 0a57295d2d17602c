// Block-sparse products without any instruction set of their own: SSE2 on x86-64, NEON on ARM.
// The algorithms are in cpu_product.h and cpu_sddmm.h; this file compiles them with this set's flags.
#include "common/cpu/simd_portable.h"

#include "matmul/cpu_kernels.h"

namespace sparsekit {

const CpuMatmul matmul_cpu_portable = {"portable", refuses, product, sddmm};

}  // namespace sparsekit

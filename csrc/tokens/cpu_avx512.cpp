// Token kernels for AVX-512 F, BW, DQ, VL.
// The algorithms are in cpu_rows.h and cpu_match.h; this file compiles them with this set's flags.
#include "common/cpu/simd_avx512.h"

#include "tokens/cpu_match.h"
#include "tokens/cpu_rows.h"

namespace sparsekit {

const TokenKernels tokens_cpu_avx512 = {"avx512", combine, dots, nearest, refuses_rows, refuses_match};

}  // namespace sparsekit

// Token kernels for AVX2, FMA and F16C.
// The algorithms are in cpu_rows.h and cpu_match.h; this file compiles them with this set's flags.
#include "common/cpu/simd_avx2.h"

#include "tokens/cpu_match.h"
#include "tokens/cpu_rows.h"

namespace sparsekit {

const TokenKernels tokens_cpu_avx2 = {"avx2", combine, dots, nearest, refuses_rows, refuses_match};

}  // namespace sparsekit

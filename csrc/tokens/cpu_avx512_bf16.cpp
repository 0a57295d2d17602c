// Token kernels for AVX-512 with BF16: bf16 metrics through vdpbf16ps, the rest as in cpu_avx512.cpp.
// The algorithms are in cpu_rows.h and cpu_match.h; this file compiles them with this set's flags.
#include "common/cpu/simd_avx512_bf16.h"

#include "tokens/cpu_match.h"
#include "tokens/cpu_rows.h"

namespace sparsekit {

const TokenKernels tokens_cpu_avx512_bf16 = {"avx512_bf16", combine, dots, nearest, refuses_rows, refuses_match};

}  // namespace sparsekit

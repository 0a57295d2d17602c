// Token kernels in plain C++ with GCC's vector extensions: every processor.
// The algorithms are in cpu_rows.h and cpu_match.h; this file compiles them with this set's flags.
#include "common/cpu/simd_portable.h"

#include "tokens/cpu_match.h"
#include "tokens/cpu_rows.h"

namespace sparsekit {

const TokenKernels tokens_cpu_portable = {"portable", combine, dots, nearest, refuses_rows, refuses_match};

}  // namespace sparsekit

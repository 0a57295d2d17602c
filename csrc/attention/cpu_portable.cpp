// Block-sparse attention in plain C++ with GCC's vector extensions: every processor.
// The algorithm is in cpu_forward.h and cpu_backward.h; this file compiles it with this set's flags.
#include "common/cpu/simd_portable.h"

#include "attention/cpu_kernels.h"

namespace sparsekit {

const CpuAttention attention_cpu_portable = {"portable", refuses, workspace, forward, backward};

}  // namespace sparsekit

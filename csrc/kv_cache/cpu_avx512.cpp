// Decode attention for avx512. The algorithm is in cpu_decode.h; this file compiles it with this set's flags.
#include "common/cpu/simd_avx512.h"

#include "kv_cache/cpu_decode.h"

namespace sparsekit {

const DecodeKernel decode_avx512 = {"avx512", refuses_dims, Workspace::floats, run_split<FloatKernels>};

}  // namespace sparsekit

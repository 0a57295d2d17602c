// Decode attention for portable. The algorithm is in cpu_decode.h; this file compiles it with this set's flags.
#include "common/cpu/simd_portable.h"

#include "kv_cache/cpu_decode.h"

namespace sparsekit {

const DecodeKernel decode_portable = {"portable", refuses_dims, Workspace::floats, run_split<FloatKernels>};

}  // namespace sparsekit

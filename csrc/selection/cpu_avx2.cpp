// Scores and choices for AVX2, FMA, F16C.
// The algorithms are in cpu_scores.h and cpu_choices.h; this file compiles them with this set's flags.
#include "common/cpu/simd_avx2.h"

#include "selection/cpu_kernels.h"

namespace sparsekit {

const CpuSelection selection_cpu_avx2 = {"avx2", run_block_scores, nullptr, nullptr, nullptr, nullptr, run_choice};

}  // namespace sparsekit

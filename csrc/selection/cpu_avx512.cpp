// Scores and choices for AVX-512 F, BW, DQ, VL (Skylake-SP, Zen 4 and later).
// The algorithms are in cpu_scores.h and cpu_choices.h; this file compiles them with this set's flags.
#include "common/cpu/simd_avx512.h"

#include "selection/cpu_kernels.h"

namespace sparsekit {

const CpuSelection selection_cpu_avx512 = {"avx512", run_block_scores, nullptr, nullptr, nullptr, nullptr, run_choice};

}  // namespace sparsekit

// Scores and choices for AVX-512 F, BW, DQ, VL (Skylake-SP, Zen 4 and later).
// The algorithms are in the cpu_*.h beside it; this file compiles them with this set's flags.
#include "common/cpu/simd_avx512.h"

#include "selection/cpu_kernels.h"

namespace sparsekit {

const CpuSelection selection_cpu_avx512 = {"avx512",          run_block_scores, run_block_scores_backward,
                                           run_column_scores, run_row_scores,   run_block_map,
                                           run_choice};

}  // namespace sparsekit

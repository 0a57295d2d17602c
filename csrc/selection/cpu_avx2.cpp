// Scores and choices for AVX2, FMA, F16C.
// The algorithms are in the cpu_*.h beside it; this file compiles them with this set's flags.
#include "common/cpu/simd_avx2.h"

#include "selection/cpu_kernels.h"

namespace sparsekit {

const CpuSelection selection_cpu_avx2 = {
    "avx2", run_block_scores, run_block_scores_backward, run_column_scores, run_row_scores, run_block_map, run_choice};

}  // namespace sparsekit

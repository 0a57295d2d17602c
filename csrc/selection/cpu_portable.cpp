// Scores and choices in plain C++ with GCC's vector extensions: every processor.
// The algorithms are in the cpu_*.h beside it; this file compiles them with this set's flags.
#include "common/cpu/simd_portable.h"

#include "selection/cpu_kernels.h"

namespace sparsekit {

const CpuSelection selection_cpu_portable = {"portable",        run_block_scores, run_block_scores_backward,
                                             run_column_scores, run_row_scores,   run_block_map,
                                             run_choice};

}  // namespace sparsekit

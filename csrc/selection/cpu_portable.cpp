// Scores and choices in plain C++ with GCC's vector extensions: every processor.
// The algorithms are in cpu_scores.h and cpu_choices.h; this file compiles them with this set's flags.
#include "common/cpu/simd_portable.h"

#include "selection/cpu_kernels.h"

namespace sparsekit {

const CpuSelection selection_cpu_portable = {"portable", run_block_scores, nullptr,   nullptr,
                                             nullptr,    nullptr,          run_choice};

}  // namespace sparsekit

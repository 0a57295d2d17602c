// Scores for AVX-512 with BF16: bf16 through vdpbf16ps (Zen 4 and later), the rest as in cpu_avx512.cpp.
// The algorithms are in cpu_block_folds.h and cpu_key_folds.h; this file compiles them with this set's flags.
#include "common/cpu/simd_avx512_bf16.h"

#include "selection/cpu_kernels.h"

namespace sparsekit {

const CpuSelection selection_cpu_avx512_bf16 = {"avx512_bf16",     run_block_scores, run_block_scores_backward,
                                                run_column_scores, run_row_scores,   run_block_map,
                                                run_choice};

}  // namespace sparsekit

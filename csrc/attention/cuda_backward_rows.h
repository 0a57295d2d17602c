// What every attention backward on CUDA does with the query rows, before and after its kernels (cuda_backward_sm80.cu).
#pragma once

#include "attention/cuda_backward.cuh"

namespace sparsekit::cuda {

/// Rows of the scratch for one (batch, query head): BackwardPlan::padded_rows.
int64_t padded_rows(const AttentionProblem& problem);

/// Bytes of the scratch that the gradient of lse needs beside sinks: BackwardPlan::kept_out.
int64_t kept_out_bytes(const AttentionProblem& problem);

/// lse', delta and the shares of dsink into the plan's row_* (formulas: cuda_backward.cuh). `kept_out`, 16-byte
/// aligned, has kept_out_bytes(); where it is used, the plan's grad_out becomes it.
Status prepare_backward_rows(BackwardPlan* plan, void* kept_out, cudaStream_t stream);

/// dsink from row_sink, in a fixed order; nothing where it is not asked for.
Status sum_backward_sinks(const BackwardPlan& plan, cudaStream_t stream);

}  // namespace sparsekit::cuda

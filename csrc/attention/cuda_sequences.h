// Which rows and keys a row of the block lists is about, where several sequences are packed into one tensor.
#pragma once

#include <cuda_runtime.h>

#include "sparsekit/attention.h"

namespace sparsekit::cuda {

/// Writes for each of the q_blocks list rows of a packed batch {first query row, end of its sequence's query rows,
/// first key, end of its sequence's keys}, all of the packed tensors; an empty range of rows for list rows behind the
/// last sequence. cu_seqlens are clamped to the tensors, so that no entry makes a kernel read out of bounds. `starts`
/// is scratch of sequences + 1 numbers.
Status list_row_extents(const AttentionProblem& problem, int4* extents, int32_t* starts, void* stream);

}  // namespace sparsekit::cuda

// Block lists: built from boolean maps, and seen from the keys (transposed). The torch-free C++ API.
#pragma once

#include "sparsekit/attention.h"

namespace sparsekit {

/// The transposed lists of `problem.lists` (see BlockTranspose), which backward walks. Slots that are empty (-1), out
/// of range or beyond the count are left out; slots of one key block ascend. `problem` gives the lists, the lengths
/// and, for packed batches, cu_seqlens; its tensors query, key, value are not read. Packed: key block n of sequence s
/// is number sum_{t<s} ceil(len_k[t] / block_k) + n.
struct TransposeBlockLists {
  AttentionProblem problem;
  int32_t* offsets = nullptr;  // [list_batch, list_heads, k_blocks + 1]
  int32_t* slots = nullptr;    // [list_batch, list_heads, q_blocks * slots_per_row]; beyond offsets[k_blocks]: -1
};
Status transpose_block_lists(const TransposeBlockLists& arguments, const ParallelFor& parallel);
Status transpose_block_lists(const TransposeBlockLists& arguments, const CudaContext& context);
size_t transpose_block_lists_workspace(const TransposeBlockLists& arguments, const CudaContext& context);

/// Lists of the true entries of each row of a boolean map, ascending; beyond the count -1. A row with more than
/// `capacity` true entries keeps its first `capacity`.
struct BlockListsFromBool {
  const bool* map = nullptr;  // [rows, columns] contiguous
  int64_t rows = 0, columns = 0, capacity = 0;
  int32_t* counts = nullptr;   // [rows]
  int32_t* indices = nullptr;  // [rows, capacity]
};
Status block_lists_from_bool(const BlockListsFromBool& arguments, const ParallelFor& parallel);
Status block_lists_from_bool(const BlockListsFromBool& arguments, const CudaContext& context);

}  // namespace sparsekit

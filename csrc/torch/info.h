// The plan ops, for either device: a problem of the given shape, and the plan as text.
#pragma once

#include <string>

#include "sparsekit/attention.h"
#include "torch/tensors.h"

namespace sparsekit {

#define SPARSEKIT_PLAN_PARAMETERS                                                                                     \
  ScalarType dtype, int64_t head_dim, int64_t value_dim, std::vector<int64_t> block_size, bool backward, bool packed, \
      int64_t group_size

/// A small problem of this kind: refusals depend on dtype, dimensions, blocks, groups of rows (0: no stripes)
/// and packing, not on lengths.
inline AttentionProblem plan_problem(ScalarType dtype, int64_t head_dim, int64_t value_dim,
                                     const std::vector<int64_t>& block_size, bool packed, int64_t group_size) {
  if (block_size.size() != 2) fail("block_size has %zu numbers; supported: 2, (query, key)", block_size.size());
  static const int32_t one_sequence[2] = {0, 1};
  AttentionProblem problem;
  problem.dtype = to_dtype(dtype, "dtype");
  problem.batch = problem.heads_q = problem.heads_kv = problem.len_q = problem.len_k = 1;
  problem.head_dim = int32_t(head_dim);
  problem.value_dim = int32_t(value_dim);
  problem.lists.block_q = int32_t(block_size[0]);
  problem.lists.block_k = int32_t(block_size[1]);
  problem.lists.q_blocks = 1;
  if (packed) problem.cu_seqlens_q = problem.cu_seqlens_k = one_sequence;
  problem.sequences = packed ? 1 : 0;
  problem.stripes.group_size = int32_t(group_size);
  problem.stripes.groups = group_size > 0 ? 1 : 0;
  return problem;
}

}  // namespace sparsekit

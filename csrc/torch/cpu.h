// How a filled struct runs on the CPU: on torch's thread pool.
#pragma once

#include "sparsekit/attention.h"
#include "sparsekit/matmul.h"
#include "sparsekit/selection.h"
#include "torch/tensors.h"

namespace sparsekit {

struct Cpu {
  static void run(const AttentionForward& p, const Tensor&) { require(attention_forward(p, torch_parallel())); }
  static void run(const AttentionBackward& p, const Tensor&) { require(attention_backward(p, torch_parallel())); }
  static void run(const AttentionMerge& m, const Tensor&) { require(attention_merge(m, torch_parallel())); }
  static void run(const TransposeBlockLists& t, const Tensor&) { require(transpose_block_lists(t, torch_parallel())); }
  static void run(const BlockListsFromBool& b, const Tensor&) { require(block_lists_from_bool(b, torch_parallel())); }
  static void run(const BlockSparseProduct& p, const Tensor&) { require(block_sparse_product(p, torch_parallel())); }
  static void run(const BlockSddmm& s, const Tensor&) { require(block_sddmm(s, torch_parallel())); }
  static void run(const TransposeBlockSparse& t, const Tensor&) {
    require(transpose_block_sparse(t, torch_parallel()));
  }
};

}  // namespace sparsekit

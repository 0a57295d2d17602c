// How a filled struct runs on the CPU: on torch's thread pool.
#pragma once

#include "sparsekit/attention.h"
#include "sparsekit/selection.h"
#include "sparsekit/tokens.h"
#include "torch/tensors.h"

namespace sparsekit {

struct Cpu {
  static void run(const AttentionForward& p, const Tensor&) { require(attention_forward(p, torch_parallel())); }
  static void run(const AttentionBackward& p, const Tensor&) { require(attention_backward(p, torch_parallel())); }
  static void run(const AttentionMerge& m, const Tensor&) { require(attention_merge(m, torch_parallel())); }
  static void run(const TransposeBlockLists& t, const Tensor&) { require(transpose_block_lists(t, torch_parallel())); }
  static void run(const BlockListsFromBool& b, const Tensor&) { require(block_lists_from_bool(b, torch_parallel())); }
  static void run(const GatherTokens& g, const Tensor&) { require(gather_tokens(g, torch_parallel())); }
  static void run(const ScatterTokens& t, const Tensor&) { require(scatter_tokens(t, torch_parallel())); }
  static void run(const ScatterTokensBackward& b, const Tensor&) {
    require(scatter_tokens_backward(b, torch_parallel()));
  }
  static void run(const CompactRows& c, const Tensor&) { require(compact_rows(c, torch_parallel())); }
  static void run(const MatchTokens& m, const Tensor&) { require(match_tokens(m, torch_parallel())); }
};

}  // namespace sparsekit

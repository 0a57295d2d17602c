// How a filled struct runs on the CPU: on torch's thread pool.
#pragma once

#include "sparsekit/attention.h"
#include "sparsekit/kv_cache.h"
#include "sparsekit/matmul.h"
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

  // ---- selection
  static void run(const BlockScores& s, const Tensor&) { require(block_scores(s, torch_parallel())); }
  static void run(const BlockScoresBackward& s, const Tensor&) { require(block_scores_backward(s, torch_parallel())); }
  static void run(const ColumnScores& s, const Tensor&) { require(column_scores(s, torch_parallel())); }
  static void run(const RowScores& s, const Tensor&) { require(row_scores(s, torch_parallel())); }
  static void run(const AttentionBlockMap& m, const Tensor&) { require(attention_block_map(m, torch_parallel())); }
  static void run(const Choice& c, const Tensor&) { require(choose(c, torch_parallel())); }
  static void run(const VerticalSlash& v, const Tensor&) { require(vertical_slash_lists(v, torch_parallel())); }
  static void run(const UnionLists& u, const Tensor&) { require(union_lists(u, torch_parallel())); }
  static void run(const InversePermutation& p, const Tensor&) { require(inverse_permutation(p, torch_parallel())); }
  static void run(const PermuteTokens& p, const Tensor&) { require(permute_tokens(p, torch_parallel())); }
  static void run(const BlockSparseProduct& p, const Tensor&) { require(block_sparse_product(p, torch_parallel())); }
  static void run(const BlockSddmm& s, const Tensor&) { require(block_sddmm(s, torch_parallel())); }
  static void run(const TransposeBlockSparse& t, const Tensor&) {
    require(transpose_block_sparse(t, torch_parallel()));
  }
  static void run(const GatherTokens& g, const Tensor&) { require(gather_tokens(g, torch_parallel())); }
  static void run(const ScatterTokens& t, const Tensor&) { require(scatter_tokens(t, torch_parallel())); }
  static void run(const ScatterTokensBackward& b, const Tensor&) {
    require(scatter_tokens_backward(b, torch_parallel()));
  }
  static void run(const CompactRows& c, const Tensor&) { require(compact_rows(c, torch_parallel())); }
  static void run(const MatchTokens& m, const Tensor&) { require(match_tokens(m, torch_parallel())); }
  static void run(const KvQuantize& q, const Tensor&) { require(kv_quantize(q, torch_parallel())); }
  static void run(const KvDequantize& q, const Tensor&) { require(kv_dequantize(q, torch_parallel())); }
  static void run(const KvAppend& a, const Tensor&) { require(kv_append(a, torch_parallel())); }
  static void run(const KvCrop& a, const Tensor&) { require(kv_crop(a, torch_parallel())); }
  static void run(const KvCompact& a, const Tensor&) { require(kv_compact(a, torch_parallel())); }
  static void run(const DecodeAttention& d, const Tensor&) { require(decode_attention(d, torch_parallel())); }
};

}  // namespace sparsekit

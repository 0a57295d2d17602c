// What attention looks at: scores of blocks, columns and rows; the choice of the best; block lists built from the
// choice, from boolean maps and from vertical and slash lines, and seen from the keys (transposed). The torch-free C++
// API.
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

// ---- scores
//
// An AttentionProblem says which query row sees which key (causality, window, positions, packed batches) and what
// score[i, j] is; `value` and, unless said otherwise, the lists but for block_q and block_k are not read. Results are
// fp32, or fp64 where dtype is f64. In a packed batch blocks of queries are numbered over all sequences, each rounded
// up (rows past the last are -inf, or 0), blocks of keys inside their sequence.

enum class BlockReduce : int32_t { mean, max, antidiagonal };

/// One number per block (m, n) of a head, [batch, heads_q, q_blocks, k_blocks], over the pairs (i, j) of the block that
/// see each other; -inf where there is none.
///   mean, max      of score[i, j]
///   antidiagonal   log of the block's share of attention as XAttention estimates it (arXiv 2503.16428, algorithm 1)
/// For antidiagonal the block is cut into tiles of stride x stride. A tile scores the mean of its antidiagonal, from
/// its first column and last row upwards; tiles of one row of tiles share a softmax over all keys; a block's share is
/// the mean over its rows of tiles of the sum over its columns of tiles, at least 2^-126.
struct BlockScores : AttentionProblem {
  BlockReduce reduce = BlockReduce::mean;
  int32_t stride = 16;     // of antidiagonal: divides both block sizes
  int64_t q_blocks = 0;    // ceil(len_q / block_q); packed: len_q / block_q + sequences
  int64_t key_blocks = 0;  // ceil(len_k / block_k); packed: of the longest sequence
  void* scores = nullptr;
  // Self-similarity of blocks (SpargeAttn, arXiv 2502.18137): the mean cosine of all pairs of a block's rows, or null.
  void* q_similarity = nullptr;  // [batch, heads_q, q_blocks]
  void* k_similarity =
      nullptr;  // [batch, heads_kv, k_blocks()]: packed numbered over all sequences, as in BlockTranspose
};
Status block_scores(const BlockScores& arguments, const ParallelFor& parallel);
Status block_scores(const BlockScores& arguments, const CudaContext& context);

/// Gradients of `scores`; that of a maximum goes to the first pair that has it.
struct BlockScoresBackward : BlockScores {
  const void* grad_scores = nullptr;  // as scores
  OutputView grad_query, grad_key;
};
Status block_scores_backward(const BlockScoresBackward& arguments, const ParallelFor& parallel);
Status block_scores_backward(const BlockScoresBackward& arguments, const CudaContext& context);

/// Attention that probe rows (`query`, at `query_positions`) pay to each key and along each diagonal:
///   columns[j] = sum_i p_ij        diagonals[o] = sum over i of p_i,j with query_positions[i] - j = o >= 0
/// where p_i is the softmax over the keys that row i sees (MInference, SampleAttention).
struct ColumnScores : AttentionProblem {
  void* columns = nullptr;    // [batch, heads_q, len_k]
  void* diagonals = nullptr;  // [batch, heads_q, len_k]; packed: diagonal o of a sequence stands at its k_begin + o
};
Status column_scores(const ColumnScores& arguments, const ParallelFor& parallel);
Status column_scores(const ColumnScores& arguments, const CudaContext& context);

/// Attention that all rows, or those listed, pay to each key: the sum or the maximum over i of exp(score[i, j] -
/// lse[i]).
struct RowScores : AttentionProblem {
  const void* lse = nullptr;      // [batch, heads_q, len_q]
  const int32_t* rows = nullptr;  // [batch|1, rows_count] rows of query, -1: an empty slot; null: all
  int64_t rows_count = 0, rows_batch = 0;
  bool maximum = false;
  void* scores = nullptr;  // [batch, heads_q, len_k]
};
Status row_scores(const RowScores& arguments, const ParallelFor& parallel);
Status row_scores(const RowScores& arguments, const CudaContext& context);

/// The attention map exp(score[i, j] - lse[i]), summed or maximised over blocks (SeerAttention's training target):
/// of all blocks [batch, heads_q, q_blocks, key_blocks]; or, with `listed`, of the slots of the lists, partial before
/// full, [batch, heads_q, q_blocks, slots_per_row]. 0 where nothing is seen, and in empty slots.
struct AttentionBlockMap : AttentionProblem {
  const void* lse = nullptr;  // [batch, heads_q, len_q]
  bool maximum = true, listed = false;
  int64_t q_blocks = 0, key_blocks = 0;
  void* map = nullptr;
};
Status attention_block_map(const AttentionBlockMap& arguments, const ParallelFor& parallel);
Status attention_block_map(const AttentionBlockMap& arguments, const CudaContext& context);

// ---- choices

enum class ChoiceRule : int32_t { top_k, top_p, threshold };

/// Of every row of scores [heads, rows, columns], the best entries.
///
/// Entry j of a row may be chosen where j < row_limit and its score is neither -inf nor NaN. The first `sink` entries
/// and the last `local` before row_limit are chosen before all others, then the best; of equal scores (-0 equals 0) the
/// one at the lower index. The rule says how many:
///   top_k       k
///   top_p       the fewest, sinks and local ones among them, whose mass reaches p * (the mass of all that may be
///   chosen).
///               The mass of an entry is score * weight, what is negative counts 0; it is measured in whole units of
///               2^(e - s), where 2^e > the largest mass and s = 52 - ceil(log2(entries)), so that sums are exact in
///               any order and every backend chooses the same. p = 1 takes every entry with a mass. by_head: the fewest
///               of all rows of the head together; of equal ones those of the lower row. Ordered by mass, not score.
///   threshold   all with score >= threshold
/// and is then cut to min_count .. width.
struct Choice {
  ChoiceRule rule = ChoiceRule::top_k;
  DType dtype = DType::f32;
  int64_t heads = 0, rows = 0, columns = 0;
  const void* scores = nullptr;  // contiguous
  int64_t k = 0;
  const int32_t* row_k = nullptr;  // [heads, rows], instead of k
  double p = 0;
  const float* row_p = nullptr;               // [heads, rows], by_head [heads]; instead of p
  const float* weights = nullptr;             // of top_p: [heads|1, rows|1, columns] or null
  int64_t weights_head = 0, weights_row = 0;  // strides
  bool by_head = false;
  const float* thresholds = nullptr;  // [heads, rows]
  int64_t min_count = 0, sink = 0, local = 0;
  const int32_t* row_limit = nullptr;  // [heads, rows] or null: columns
  int64_t width = 0;                   // sink + local and min_count are at most this
  int32_t* indices = nullptr;          // [heads, rows, width], ascending, -1 past the count
  int32_t* counts = nullptr;           // [heads, rows]
  float* mass = nullptr;  // [heads, rows] or null: sum of the chosen scores (top_p: of their score * weight)
};
Status choose(const Choice& arguments, const ParallelFor& parallel);
Status choose(const Choice& arguments, const CudaContext& context);

// ---- builders

/// Vertical lines (key positions) and slash lines (distances query position - key position >= 0) of a causal problem as
/// block lists, and column lists of the vertical lines that no block of the row covers (MInference, arXiv 2407.02490).
/// Both lists ascend without duplicates. Entries of -1 are empty.
struct VerticalSlash {
  int64_t heads = 0;             // batch and heads
  int64_t len_q = 0, len_k = 0;  // row i stands at i + len_k - len_q
  int32_t block_q = 0, block_k = 0;
  int64_t vertical_count = 0, slash_count = 0, capacity = 0;
  const int32_t* vertical = nullptr;  // [heads, vertical_count]
  const int32_t* slash = nullptr;     // [heads, slash_count]
  int32_t* counts = nullptr;          // [heads, q_blocks]; a row that needs more than `capacity` blocks keeps the first
  int32_t* indices = nullptr;         // [heads, q_blocks, capacity]
  int32_t* column_counts = nullptr;   // [heads, q_blocks]
  int32_t* column_indices = nullptr;  // [heads, q_blocks, vertical_count]
};
Status vertical_slash_lists(const VerticalSlash& arguments, const ParallelFor& parallel);
Status vertical_slash_lists(const VerticalSlash& arguments, const CudaContext& context);

/// Lists of `group` consecutive heads as one: what any of them lists, ascending, each once.
struct UnionLists {
  int64_t heads = 0, group = 1, rows = 0;                 // heads: of the result (batch included)
  int64_t capacity_in = 0, capacity = 0, key_blocks = 0;  // entries are 0 to key_blocks - 1, or -1
  const int32_t* counts_in = nullptr;                     // [heads * group, rows]
  const int32_t* indices_in = nullptr;                    // [heads * group, rows, capacity_in]
  int32_t* counts = nullptr;                              // [heads, rows]
  int32_t* indices = nullptr;                             // [heads, rows, capacity]
};
Status union_lists(const UnionLists& arguments, const ParallelFor& parallel);
Status union_lists(const UnionLists& arguments, const CudaContext& context);

/// inverse[order[i]] = i for every i with order[i] >= 0; -1 where nothing points. On the CPU a token named twice is an
/// error.
struct InversePermutation {
  int64_t lists = 0, count = 0, length = 0;
  const int32_t* order = nullptr;  // [lists, count]: -1 or 0 to length - 1
  int32_t* inverse = nullptr;      // [lists, length]
};
Status inverse_permutation(const InversePermutation& arguments, const ParallelFor& parallel);
Status inverse_permutation(const InversePermutation& arguments, const CudaContext& context);

/// out[b, h, i] = input[b, h, order[b, h, i]]; zeros where that is -1.
struct PermuteTokens {
  int64_t batch = 0, heads = 0, len_in = 0, len_out = 0, row_bytes = 0;
  const char* input = nullptr;
  char* out = nullptr;
  int64_t input_batch = 0, input_head = 0, input_row = 0;  // strides in bytes
  int64_t out_batch = 0, out_head = 0, out_row = 0;
  const int32_t* order = nullptr;            // [batch|1, order_heads, len_out]
  int64_t order_batch = 0, order_heads = 1;  // stride; heads is a multiple of order_heads
};
Status permute_tokens(const PermuteTokens& arguments, const ParallelFor& parallel);
Status permute_tokens(const PermuteTokens& arguments, const CudaContext& context);

// ---- scratch

/// Bytes of `context.workspace` that the call with the same arguments needs on CUDA; of those not named here none.
/// They depend on sizes alone. Index tensors are not checked there: an entry out of range is passed over.
size_t selection_workspace(const BlockScores& arguments, const CudaContext& context);
size_t selection_workspace(const BlockScoresBackward& arguments, const CudaContext& context);
size_t selection_workspace(const ColumnScores& arguments, const CudaContext& context);
size_t selection_workspace(const RowScores& arguments, const CudaContext& context);
size_t selection_workspace(const AttentionBlockMap& arguments, const CudaContext& context);
size_t selection_workspace(const Choice& arguments, const CudaContext& context);
size_t selection_workspace(const VerticalSlash& arguments, const CudaContext& context);

}  // namespace sparsekit

// Tokens: gathering, scattering, merging and matching rows of tensors. The torch-free C++ API.
//
// A *tensor of tokens* is seen as [samples, outer, rows, inner]: `rows` are its tokens, `outer` is whatever stands
// between the batch and the token dimension (the heads of [B, H, N, D]), `inner` is contiguous. One index serves any
// number of such tensors. A *packed* side has the samples' rows one after the other, without padding: row r of sample s
// is row cu_seqlens[s] + r.
//
//   gather    out[s, k]  = in[s, index[s, k]]                                            -1: zeros
//   scatter   copy   out[s, n] = in[s, k] of the highest k with index[s, k] = n          none: base[s, n], or zeros
//             add    out[s, n] = base[s, n] + sum of w in[s, k] over the entries with index[s, k, m] = n
//             mean   out[s, n] = sum of w in[s, k] / sum of w                            sum of w = 0: as for copy
//   nearest   target[s, i] = argmax_j cosine(metric[s, 2i], metric[s, 2j + 1])
//
// Sums are in fp32 (f64 and integers: in their own type), in the order of the entries, one writer per row of the
// result: the same bits for any number of threads. An entry of weight 0 counts for nothing, whatever its row holds.
#pragma once

#include "sparsekit/parallel.h"
#include "sparsekit/status.h"
#include "sparsekit/types.h"

namespace sparsekit {

struct CudaContext;  // sparsekit/attention.h

/// What a payload holds. `bytes`: anything that is only moved (bool, int8, complex ...), or summed by nobody.
enum class TokenType : int32_t { f32, f16, bf16, f64, i32, i64, bytes };

/// A tensor seen as [samples, outer, rows, inner]. Strides are in bytes; the row of a packed side has no sample stride.
struct TokenTensor {
  void* data = nullptr;
  int64_t sample = 0, outer = 0, row = 0;  // strides
  int64_t outers = 1;
  int64_t inner = 0;         // elements of a row, contiguous
  int32_t element_size = 0;  // bytes
  TokenType type = TokenType::bytes;

  int64_t row_bytes() const { return inner * element_size; }
};

/// The rows that all tensors of one side share.
struct TokenRows {
  int64_t samples = 0;
  int64_t rows = 0;                     // of a sample; packed: of all samples together
  const int32_t* cu_seqlens = nullptr;  // [samples + 1], 0 first, ascending; null: not packed

  int64_t begin(int64_t s) const { return cu_seqlens ? cu_seqlens[s] : 0; }
  int64_t count(int64_t s) const { return cu_seqlens ? cu_seqlens[s + 1] - cu_seqlens[s] : rows; }
};

/// Contiguous int32 or int64 [samples, rows, per_row].
struct TokenIndex {
  const void* data = nullptr;
  bool wide = false;  // int64
  int64_t rows = 0;
  int64_t per_row = 1;

  int64_t at(int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

/// out[s, k] = in[s, index[s, k]]. A packed `to` takes the first count(s) entries of a sample's index; rows of a packed
/// result that belong to no sample are zeros.
struct GatherTokens {
  TokenIndex index;  // per_row = 1; -1 gives zeros
  TokenRows from, to;
  const TokenTensor* in = nullptr;   // [tensors]
  const TokenTensor* out = nullptr;  // [tensors]
  int64_t tensors = 0;
};
Status gather_tokens(const GatherTokens& arguments, const ParallelFor& parallel);

enum class TokenReduce : int32_t { copy, add, mean };

/// out[s, index[s, k, m]] from in[s, k]. A packed `from` uses the first count(s) rows of a sample's index.
struct ScatterTokens {
  TokenReduce reduce = TokenReduce::copy;
  TokenIndex index;               // -1: goes nowhere
  const void* weights = nullptr;  // [samples, index.rows, per_row]; null: 1. For add and mean
  bool weights_f64 = false;       // double instead of float, `totals` too
  TokenRows from, to;
  const TokenTensor* in = nullptr;    // [tensors]
  const TokenTensor* base = nullptr;  // [tensors] or null
  const TokenTensor* out = nullptr;   // [tensors]
  int64_t tensors = 0;
  void* totals = nullptr;  // [samples, to.rows] (packed: [to.rows]): the sum of the weights that each row received
};
Status scatter_tokens(const ScatterTokens& arguments, const ParallelFor& parallel);

/// Gradients of scatter_tokens for its tensors and weights. With c the coefficient that forward used (w, or w / total;
/// for copy 1 for the entry that won):
///   grad_in[s, k] = sum_m c grad_out[s, n],   n = index[s, k, m]
///   grad_w[s, k, m] = <grad_out[s, n], in[s, k]>                                         add
///                   = <grad_out[s, n], in[s, k] - out[s, n]> / total + grad_totals[s, n]  mean
struct ScatterTokensBackward {
  ScatterTokens forward;  // `in` is read for grad_weights only, `out` for those of a mean, `totals` for a mean
  const TokenTensor* grad_out = nullptr;  // [tensors]
  const void* grad_totals = nullptr;      // as totals; null: zero
  const TokenTensor* grad_in = nullptr;   // [tensors]; null: not wanted
  void* grad_weights = nullptr;           // [samples, index.rows, per_row]; null: not wanted
};
Status scatter_tokens_backward(const ScatterTokensBackward& arguments, const ParallelFor& parallel);

/// In place: row j of a sample's cache becomes row keep[s, j], for the entries before the first -1, which ascend
/// strictly. Rows after them stay what they were. Paged: token t is row t % page_size of page block_table[s, t /
/// page_size].
struct CompactRows {
  TokenIndex keep;         // rows: slots of keep; per head where heads > 1: [samples, heads, rows]
  int64_t keep_heads = 1;  // 1, or the heads of the cache
  int64_t samples = 0, heads = 0;
  int64_t capacity = 0;                  // rows of a sample: of the tensor, or pages of the table times page_size
  const int32_t* block_table = nullptr;  // [samples, table_pages]; null: contiguous
  int64_t table_pages = 0, pages = 0, page_size = 0;
  int32_t* lengths = nullptr;  // [samples, keep_heads] or null: rows in use; afterwards the rows kept

  struct Cache {
    void* data = nullptr;
    int64_t sample = 0, head = 0, row = 0;  // strides in bytes; paged: `sample` is that of a page
    int64_t row_bytes = 0;
  };
  const Cache* caches = nullptr;
  int64_t tensors = 0;
};
Status compact_rows(const CompactRows& arguments, const ParallelFor& parallel);

/// Bipartite soft matching (Token Merging, arXiv 2210.09461, section 3): tokens at even positions look for the most
/// similar token at an odd position, and the `r` most similar pairs merge. See docs/tokens.md for ties and bad values.
struct MatchTokens {
  DType dtype = DType::f32;
  InputView metric;  // [samples, 1, tokens, dim]; `head` is not used
  int64_t samples = 0, tokens = 0, dim = 0;
  int64_t protect = 0;             // the first tokens are neither source nor destination
  int64_t r = 0;                   // pairs per sample; clamped to (tokens - protect) / 2 by the caller
  const void* ragged_r = nullptr;  // [samples] int32 or int64: r of each sample, clamped; null: `r`
  bool ragged_r_wide = false;
  const int32_t* counts = nullptr;  // [samples]: tokens that exist; null: all

  int64_t pair_capacity = 0;       // r, or tokens / 2 where ragged
  int64_t kept_capacity = 0;       // tokens - r, or tokens where ragged
  int32_t* source = nullptr;       // [samples, pair_capacity] ascending; -1 past a sample's r
  int32_t* destination = nullptr;  // [samples, pair_capacity]
  int32_t* kept = nullptr;         // [samples, kept_capacity] ascending; -1 past the count
  int32_t* row = nullptr;          // [samples, tokens]: each token's row of the result; -1: it does not exist
  int32_t* new_counts = nullptr;   // [samples]

  bool ragged() const { return ragged_r || counts; }
};
Status match_tokens(const MatchTokens& arguments, const ParallelFor& parallel);

/// What each implementation of the library says to payloads (and metrics) of this type, best first: `reason` is null
/// where it would run.
struct TokensPlan {
  static constexpr int capacity = 8;
  struct Entry {
    const char* name;
    const char* reason;
  } entries[capacity];
  int count = 0;
};
TokensPlan tokens_plan(TokenType type, bool match);

// ---- on CUDA: without a host sync, on the context's stream, with as much workspace as the function beside each asks
// for, which shapes alone decide. An entry that names no token counts as -1, cu_seqlens are clamped to the rows that
// exist, a list of kept rows ends before its first bad entry, a negative r is 0: docs/tokens.md.

Status gather_tokens(const GatherTokens& arguments, const CudaContext& context);
size_t scatter_tokens_workspace(const ScatterTokens& arguments);
Status scatter_tokens(const ScatterTokens& arguments, const CudaContext& context);
size_t scatter_tokens_backward_workspace(const ScatterTokensBackward& arguments);
Status scatter_tokens_backward(const ScatterTokensBackward& arguments, const CudaContext& context);
size_t compact_rows_workspace(const CompactRows& arguments);
Status compact_rows(const CompactRows& arguments, const CudaContext& context);
size_t match_tokens_workspace(const MatchTokens& arguments, const CudaContext& context);
Status match_tokens(const MatchTokens& arguments, const CudaContext& context);
TokensPlan tokens_plan_cuda(TokenType type, bool match, const CudaContext& context);

}  // namespace sparsekit

// The parts that the token ops on CUDA are made of; dispatch_cuda.cpp puts them together.
#pragma once

#include "sparsekit/attention.h"
#include "sparsekit/tokens.h"

namespace sparsekit::cuda {

/// What each row of a result is made of, in device memory. One of three forms:
///   an index       at most one source per row: `index`, int32 or int64, per sample or (flat) per row of the result
///   segments       entries [begin[n], begin[n] + count[n]) of row n = sample * rows + r (packed: the packed row)
///   per_row > 0    entries (sample * index_rows + r) * per_row on, of which -1 are none
struct DevicePlan {
  TokenRows from, to;
  const void* index = nullptr;
  bool wide = false, flat = false;  // wide: int64; flat: one entry per row of the result
  int64_t index_rows = 0;           // of a sample

  const int32_t* begin = nullptr;
  const int32_t* count = nullptr;
  int64_t per_row = 0;
  const int32_t* rows = nullptr;       // per entry: the row of the source inside the sample
  const void* coefficients = nullptr;  // per entry: float or double; null: 1
  bool coefficients_f64 = false;
  bool base_always = false;
};

/// Rows with at most one source: out = in[index], base or zeros.
Status move_rows(const DevicePlan& plan, const TokenTensor* in, const TokenTensor* base, const TokenTensor* out,
                 int64_t tensors, const CudaContext& context);
/// Rows that are sums.
Status sum_rows(const DevicePlan& plan, const TokenTensor* in, const TokenTensor* base, const TokenTensor* out,
                int64_t tensors, const CudaContext& context);
/// grad_weights of scatter_tokens_backward.
Status weight_gradients(const ScatterTokensBackward& b, const CudaContext& context);

/// Entries sorted by destination, in `context.workspace`; fills `totals`. For a copy: the last entry of each row.
size_t plan_scatter_workspace(const ScatterTokens& t);
Status plan_scatter(const ScatterTokens& t, const CudaContext& context, DevicePlan* plan);
/// The same for the gradient of the tensors. `moves`: rows have at most one source, without a coefficient.
size_t plan_scatter_backward_workspace(const ScatterTokens& t);
Status plan_scatter_backward(const ScatterTokens& t, const CudaContext& context, DevicePlan* plan, bool* moves);

/// The search of bipartite_match on tensor cores (null: it takes the metric), and what follows it.
struct MatchSearch {
  float* best = nullptr;       // [samples, sources]
  int32_t* target = nullptr;   // [samples, sources]
  int32_t* inexact = nullptr;  // [samples, tiles]: not 0 where a length left fp32; search again
  int64_t sources = 0, tiles = 0;
};
const char* match_tiles_refuses(const MatchTokens& m, const CudaContext& context);
int64_t match_tiles_count(const MatchTokens& m, const CudaContext& context);
Status match_tiles(const MatchTokens& m, const MatchSearch& search, const CudaContext& context);
/// In float64: all samples, or those that `search.inexact` (tiles > 0) names.
Status match_exactly(const MatchTokens& m, const MatchSearch& search, const CudaContext& context);
Status rank_matches(const MatchTokens& m, const MatchSearch& search, const CudaContext& context);

}  // namespace sparsekit::cuda

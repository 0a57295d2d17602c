// Checks the arguments of the selection ops on CUDA and calls their kernels. Nothing here or there waits for the
// device: what index tensors and cu_seqlens hold is clamped or passed over where it is read.
#include <climits>

#include "selection/cuda_kernels.h"
#include "selection/implementations.h"

namespace sparsekit {
namespace {

using Kind = Status::Kind;

/// Rows, keys and the numbers of the tiles after the last stay within int32; grids within what CUDA takes.
constexpr int64_t kMostRows = INT32_MAX - 65536, kMostHeads = 65535;

Status check_workspace(size_t needed, const CudaContext& context) {
  if (context.workspace_bytes >= needed) return {};
  return error(Kind::failed, "workspace has %zu bytes, needs %zu", context.workspace_bytes, needed);
}

/// What every score needs.
Status check_problem(const AttentionProblem& p) {
  Status status = check_heads(p);
  if (!status.ok()) return status;
  if (p.dtype == DType::f64) {
    return error(Kind::unsupported, "query is float64; supported on CUDA: float32, float16, bfloat16");
  }
  if (p.len_q > kMostRows || p.len_k > kMostRows || p.batch * p.heads_q > kMostHeads) {
    return error(
        Kind::unsupported,
        "query has %lld rows, key %lld, in %lld heads of all batches; supported on CUDA: %lld rows, %lld heads",
        (long long)p.len_q, (long long)p.len_k, (long long)(p.batch * p.heads_q), (long long)kMostRows,
        (long long)kMostHeads);
  }
  return {};
}

Status check_all(const BlockScores& arguments) {
  Status status = check_tiles(arguments);
  return status.ok() ? check_problem(arguments) : status;
}

Status check_map(const AttentionBlockMap& arguments) {
  Status status = check_blocks(arguments);
  if (status.ok()) status = check_problem(arguments);
  if (status.ok() && arguments.listed) status = attention_check(arguments);
  return status;
}

/// Runs `kernel` where the arguments are right and the workspace suffices.
template <class Arguments>
Status run(Status status, const Arguments& arguments, const CudaContext& context,
           Status (*kernel)(const Arguments&, const CudaContext&)) {
  if (status.ok()) status = check_workspace(selection_workspace(arguments, context), context);
  return status.ok() ? kernel(arguments, context) : status;
}

}  // namespace

size_t selection_workspace(const BlockScores& s, const CudaContext& c) { return cuda::block_scores_workspace(s, c); }
size_t selection_workspace(const BlockScoresBackward& s, const CudaContext& c) {
  return cuda::block_scores_backward_workspace(s, c);
}
size_t selection_workspace(const ColumnScores& s, const CudaContext& c) { return cuda::column_scores_workspace(s, c); }
size_t selection_workspace(const RowScores& s, const CudaContext& c) { return cuda::row_scores_workspace(s, c); }
size_t selection_workspace(const AttentionBlockMap& m, const CudaContext& c) { return cuda::block_map_workspace(m, c); }
size_t selection_workspace(const Choice& c, const CudaContext&) { return cuda::choice_workspace(c); }
size_t selection_workspace(const VerticalSlash& v, const CudaContext&) { return cuda::vertical_slash_workspace(v); }

Status block_scores(const BlockScores& arguments, const CudaContext& context) {
  return run(check_all(arguments), arguments, context, cuda::score_blocks);
}

Status block_scores_backward(const BlockScoresBackward& arguments, const CudaContext& context) {
  return run(check_all(arguments), arguments, context, cuda::score_blocks_backward);
}

Status column_scores(const ColumnScores& arguments, const CudaContext& context) {
  return run(check_problem(arguments), arguments, context, cuda::score_columns);
}

Status row_scores(const RowScores& arguments, const CudaContext& context) {
  return run(check_problem(arguments), arguments, context, cuda::score_rows);
}

Status attention_block_map(const AttentionBlockMap& arguments, const CudaContext& context) {
  return run(check_map(arguments), arguments, context, cuda::pool_attention);
}

Status choose(const Choice& arguments, const CudaContext& context) {
  Status status = check_choice(arguments);
  const int64_t rows = arguments.heads * arguments.rows;
  if (status.ok() && (arguments.columns > kMostRows || rows > INT32_MAX)) {
    status = error(Kind::unsupported, "scores has %lld rows of %lld; supported on CUDA: %d rows of %lld",
                   (long long)rows, (long long)arguments.columns, INT32_MAX, (long long)kMostRows);
  }
  return run(status, arguments, context, cuda::choose_rows);
}

Status vertical_slash_lists(const VerticalSlash& arguments, const CudaContext& context) {
  Status status;
  if (arguments.block_q <= 0 || arguments.block_k <= 0) {
    status = error(Kind::invalid_argument, "block_size is (%d, %d); supported: positive sizes", arguments.block_q,
                   arguments.block_k);
  }
  return run(status, arguments, context, cuda::vertical_slash);
}

Status union_lists(const UnionLists& arguments, const CudaContext& context) {
  return cuda::union_of_lists(arguments, context);
}

Status inverse_permutation(const InversePermutation& arguments, const CudaContext& context) {
  return cuda::invert(arguments, context);
}

Status permute_tokens(const PermuteTokens& arguments, const CudaContext& context) {
  return cuda::permute(arguments, context);
}

}  // namespace sparsekit

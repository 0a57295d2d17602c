// Checks of scores and choices that read no tensor: for the CPU and for CUDA.
#include <climits>

#include "selection/implementations.h"

namespace sparsekit {

using Kind = Status::Kind;

Status check_heads(const AttentionProblem& problem) {
  if (problem.heads_kv <= 0 ? problem.heads_q > 0 : problem.heads_q % problem.heads_kv != 0) {
    return error(Kind::invalid_argument, "query has %lld heads and key %lld; supported: a multiple of key's heads",
                 (long long)problem.heads_q, (long long)problem.heads_kv);
  }
  if (problem.head_dim <= 0) {
    return error(Kind::invalid_argument, "query: the head dimension is 0; supported: 1 and more");
  }
  return {};
}

Status check_blocks(const AttentionProblem& problem) {
  if (problem.lists.block_q <= 0 || problem.lists.block_k <= 0) {
    return error(Kind::invalid_argument, "block_size is (%d, %d); supported: positive sizes", problem.lists.block_q,
                 problem.lists.block_k);
  }
  return {};
}

Status check_tiles(const BlockScores& arguments) {
  Status status = check_blocks(arguments);
  if (!status.ok() || arguments.reduce != BlockReduce::antidiagonal) return status;
  int32_t stride = arguments.stride;
  if (stride <= 0 || arguments.lists.block_q % stride || arguments.lists.block_k % stride) {
    return error(Kind::invalid_argument, "stride is %d; supported: a divisor of both block sizes, %d and %d", stride,
                 arguments.lists.block_q, arguments.lists.block_k);
  }
  return {};
}

Status check_choice(const Choice& c) {
  if (c.columns > INT32_MAX || c.width > INT32_MAX) {
    return error(Kind::invalid_argument, "scores has rows of %lld, width is %lld; supported: less than 2^31",
                 (long long)c.columns, (long long)c.width);
  }
  int64_t most = c.width < c.columns ? c.width : INT32_MAX;  // lists as wide as the rows hold whatever is asked for
  if (c.sink < 0 || c.local < 0 || c.min_count < 0 || c.sink + c.local > most || c.min_count > most) {
    return error(Kind::invalid_argument,
                 "sink is %lld, local %lld, min_count %lld; supported: sink + local and min_count from 0 to the width "
                 "of the lists, %lld (or any where that holds a whole row)",
                 (long long)c.sink, (long long)c.local, (long long)c.min_count, (long long)c.width);
  }
  return {};
}

}  // namespace sparsekit

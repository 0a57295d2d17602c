// Which rows, keys and list rows belong together: an unpacked batch entry is one sequence, a packed batch several.
// Internal linkage and no std types, so that files of every instruction set may include it.
#pragma once

#include "sparsekit/attention.h"

namespace sparsekit {

struct Sequence {
  int64_t q_begin = 0, q_end = 0;  // rows of query
  int64_t k_begin = 0, k_end = 0;  // rows of key and value
  int64_t list_row = 0;            // its first row in the block lists
  int64_t k_block = 0;             // its first block in the transposed lists
  int64_t index = 0;

  int64_t len_q() const { return q_end - q_begin; }
  int64_t len_k() const { return k_end - k_begin; }
};

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

/// Walks the sequences of a problem in order. Lengths from cu_seqlens are clamped to the tensors, so that no entry
/// makes a kernel read out of bounds.
///   for (SequenceWalk walk(problem); walk.valid(); walk.next()) use(walk.current);
class SequenceWalk {
 public:
  explicit SequenceWalk(const AttentionProblem& problem) : problem_(problem) {
    if (!problem.packed()) {
      current.q_end = problem.len_q;
      current.k_end = problem.len_k;
    } else if (problem.sequences > 0) {
      load();
    }
  }
  bool valid() const { return current.index < (problem_.packed() ? problem_.sequences : 1); }
  void next() {
    current.list_row += ceil_div(current.len_q(), problem_.lists.block_q);
    current.k_block += ceil_div(current.len_k(), problem_.lists.block_k);
    ++current.index;
    if (problem_.packed() && valid()) load();
  }

  Sequence current;

 private:
  void load() {
    current.q_begin = clamp(problem_.cu_seqlens_q[current.index], 0, problem_.len_q);
    current.q_end = clamp(problem_.cu_seqlens_q[current.index + 1], current.q_begin, problem_.len_q);
    current.k_begin = clamp(problem_.cu_seqlens_k[current.index], 0, problem_.len_k);
    current.k_end = clamp(problem_.cu_seqlens_k[current.index + 1], current.k_begin, problem_.len_k);
  }
  const AttentionProblem& problem_;
};

}  // namespace sparsekit

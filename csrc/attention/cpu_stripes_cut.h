// How stripe-sparse attention is cut into pieces of query rows, forward and backward: by shape alone, so that results
// do not depend on the number of threads.
#pragma once

#include "attention/cpu_tiles.h"

namespace sparsekit {
namespace {
namespace stripes {

/// Rows that one piece may have: of one group and, where there are blocks, of one query block.
static int64_t rows_together(const AttentionProblem& p) {
  const int64_t rows = p.stripes.group_size;
  return p.lists.slots_per_row() > 0 ? smaller(rows, p.lists.block_q) : rows;
}

/// Whether the query heads of a key head see the same keys.
static bool heads_share_lists(const AttentionProblem& p) {
  return p.stripes.list_heads <= p.heads_kv && (p.lists.slots_per_row() == 0 || p.lists.list_heads <= p.heads_kv);
}

/// Calls visit(first, count) for pieces of at most `most` query rows.
template <class Visit>
static void for_each_piece(const AttentionProblem& p, int64_t most, Visit visit) {
  const bool blocks = p.lists.slots_per_row() > 0;
  for (int64_t first = 0, end; first < p.len_q; first = end) {
    end = smaller(first + most, p.len_q);
    end = smaller(end, (first / p.stripes.group_size + 1) * p.stripes.group_size);
    if (blocks) end = smaller(end, (first / p.lists.block_q + 1) * p.lists.block_q);
    visit(first, end - first);
  }
}

}  // namespace stripes
}  // namespace
}  // namespace sparsekit

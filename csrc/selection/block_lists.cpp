// Block lists on the CPU: from a boolean map, and transposed (seen from the keys). One pass to count, one to place;
// O(list entries), parallel over rows or list heads.
#include <initializer_list>

#include "attention/sequences.h"
#include "sparsekit/selection.h"

namespace sparsekit {
namespace {

/// Calls visit(key_block, slot_number) for every valid entry of one list head, slot numbers ascending.
template <class Visit>
void for_each_entry(const AttentionProblem& p, int64_t list_head, Visit visit) {
  const BlockLists& lists = p.lists;
  int64_t slots = lists.slots_per_row();
  for (SequenceWalk walk(p); walk.valid(); walk.next()) {
    const Sequence& sequence = walk.current;
    int64_t blocks = ceil_div(sequence.len_k(), lists.block_k);
    int64_t end = sequence.list_row + ceil_div(sequence.len_q(), lists.block_q);
    for (int64_t m = sequence.list_row; m < end && m < lists.q_blocks; ++m) {
      int64_t row = list_head * lists.q_blocks + m, slot = m * slots;
      for (const BlockList* list : {&lists.partial, &lists.full}) {
        int64_t count = list->counts ? clamp(list->counts[row], 0, list->capacity) : 0;
        for (int64_t s = 0; s < count; ++s) {
          int32_t index = list->indices[row * list->capacity + s];
          if (index >= 0 && index < blocks) visit(sequence.k_block + index, slot + s);
        }
        slot += list->capacity;
      }
    }
  }
}

void transpose_list_head(const TransposeBlockLists& t, int64_t list_head) {
  const AttentionProblem& p = t.problem;
  int64_t blocks = p.k_blocks(), capacity = p.lists.q_blocks * p.lists.slots_per_row();
  int32_t* offsets = t.offsets + list_head * (blocks + 1);
  int32_t* slots = t.slots + list_head * capacity;

  // Counting sort: offsets[n + 1] counts block n, becomes its start, and ends, advanced by the placing, as its end.
  for (int64_t n = 0; n <= blocks; ++n) offsets[n] = 0;
  for_each_entry(p, list_head, [&](int64_t block, int64_t) { ++offsets[block + 1]; });
  int32_t start = 0;
  for (int64_t n = 1; n <= blocks; ++n) {
    int32_t count = offsets[n];
    offsets[n] = start;
    start += count;
  }
  for_each_entry(p, list_head, [&](int64_t block, int64_t slot) { slots[offsets[block + 1]++] = int32_t(slot); });
  for (int64_t at = start; at < capacity; ++at) slots[at] = -1;
}

}  // namespace

Status transpose_block_lists(const TransposeBlockLists& arguments, const ParallelFor& parallel) {
  auto body = [](int64_t first, int64_t last, void* context) {
    for (int64_t at = first; at < last; ++at)
      transpose_list_head(*static_cast<const TransposeBlockLists*>(context), at);
  };
  const BlockLists& lists = arguments.problem.lists;
  parallel(0, lists.list_batch * lists.list_heads, 1, body, const_cast<TransposeBlockLists*>(&arguments));
  return {};
}

Status block_lists_from_bool(const BlockListsFromBool& arguments, const ParallelFor& parallel) {
  auto body = [](int64_t first, int64_t last, void* context) {
    const auto& b = *static_cast<const BlockListsFromBool*>(context);
    for (int64_t row = first; row < last; ++row) {
      int32_t* indices = b.indices + row * b.capacity;
      int64_t count = 0;
      for (int64_t column = 0; column < b.columns && count < b.capacity; ++column) {
        if (b.map[row * b.columns + column]) indices[count++] = int32_t(column);
      }
      b.counts[row] = int32_t(count);
      for (; count < b.capacity; ++count) indices[count] = -1;
    }
  };
  parallel(0, arguments.rows, 16, body, const_cast<BlockListsFromBool*>(&arguments));
  return {};
}

}  // namespace sparsekit

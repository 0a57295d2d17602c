// Block lists: built from boolean maps, and transposed.
#include <set>

#include "numpy/thread_pool.h"
#include "problem.h"
#include "sparsekit/selection.h"

namespace sparsekit::testing {
namespace {

TEST(lists_from_bool_hold_the_true_entries_in_order) {
  Random random(1);
  for (auto [rows, columns] : {std::pair<int64_t, int64_t>{1, 1}, {5, 7}, {33, 200}, {0, 4}, {4, 0}}) {
    for (int64_t capacity : {int64_t(0), columns / 2, columns}) {
      std::unique_ptr<bool[]> map(new bool[size_t(rows * columns)]);
      for (int64_t i = 0; i < rows * columns; ++i) map[size_t(i)] = random() % 3 == 0;
      std::vector<int32_t> counts(size_t(rows), -9), indices(size_t(rows * capacity), -9);
      BlockListsFromBool call;
      call.map = map.get(), call.rows = rows, call.columns = columns, call.capacity = capacity;
      call.counts = counts.data(), call.indices = indices.data();
      CHECK_OK(block_lists_from_bool(call, thread_pool(2)));
      for (int64_t r = 0; r < rows; ++r) {
        int32_t count = 0;
        for (int64_t c = 0; c < columns && count < capacity; ++c) {
          if (!map[size_t(r * columns + c)]) continue;
          CHECK(indices[size_t(r * capacity + count)] == c, "row %d entry %d", int(r), count);
          ++count;
        }
        CHECK(counts[size_t(r)] == count, "row %d: %d entries, %d wanted", int(r), counts[size_t(r)], count);
        for (int64_t slot = count; slot < capacity; ++slot) {
          CHECK(indices[size_t(r * capacity + slot)] == -1, "row %d slot %d", int(r), int(slot));
        }
      }
    }
  }
}

/// Every slot that names a block appears once, under that block, in ascending order; nothing else appears.
void check_transpose(const Shape& shape, unsigned seed, bool damage) {
  Random random(seed);
  Problem problem(shape, random);
  if (damage) {  // what a backend must skip: it only clamps
    for (int32_t& index : problem.indices) index = random() % 9 ? index : int32_t(random());
    for (int32_t& count : problem.full_counts) count = random() % 9 ? count : int32_t(random());
  }
  TransposeBlockLists call;
  call.problem = problem.forward();
  const int64_t lists = shape.batch * shape.heads_q, k_blocks = call.problem.k_blocks();
  const int64_t per_row = call.problem.lists.slots_per_row(), per_list = problem.q_blocks * per_row;
  std::vector<int32_t> offsets(size_t(lists * (k_blocks + 1)), -7), slots(size_t(lists * per_list), -7);
  call.offsets = offsets.data(), call.slots = slots.data();
  CHECK_OK(transpose_block_lists(call, thread_pool(2)));
  const auto q = problem.q_spans(), k = problem.k_spans();
  for (int64_t list = 0; list < lists; ++list) {
    std::vector<std::vector<int32_t>> wanted(size_t(k_blocks) + 1);
    int64_t row = 0, block_base = 0;
    for (size_t s = 0; s < q.size(); ++s) {
      const int64_t blocks = (k[s].end - k[s].begin + shape.block_k - 1) / shape.block_k;
      for (int64_t first = q[s].begin; first < q[s].end; first += shape.block_q, ++row) {
        for (int64_t slot = 0; slot < per_row; ++slot) {
          const bool full = slot >= problem.capacity;
          const int64_t at = list * problem.q_blocks + row, place = full ? slot - problem.capacity : slot;
          const int32_t count = (full ? problem.full_counts : problem.counts)[size_t(at)];
          const int32_t index = (full ? problem.full_indices : problem.indices)[size_t(at * problem.capacity + place)];
          if (place >= count || index < 0 || index >= blocks) continue;
          wanted[size_t(block_base + index)].push_back(int32_t(row * per_row + slot));
        }
      }
      block_base += blocks;
    }
    const int32_t* offset = offsets.data() + list * (k_blocks + 1);
    CHECK(offset[0] == 0, "list %d begins at %d", int(list), offset[0]);
    for (int64_t n = 0; n < k_blocks; ++n) {
      const int32_t* begin = slots.data() + list * per_list;
      std::vector<int32_t> found(begin + offset[n], begin + offset[n + 1]);
      CHECK(found == wanted[size_t(n)], "list %d block %d: %d slots, %d wanted", int(list), int(n), int(found.size()),
            int(wanted[size_t(n)].size()));
    }
    for (int64_t at = offset[k_blocks]; at < per_list; ++at) {
      CHECK(slots[size_t(list * per_list + at)] == -1, "list %d: slot %d past the end", int(list), int(at));
    }
  }
}

TEST(transpose_lists_every_slot_once) {
  for (unsigned seed = 10; seed < 16; ++seed) {
    Shape shape;
    shape.batch = 2, shape.len_q = 20 + 40 * (seed % 3), shape.len_k = 10 + 60 * (seed % 4);
    check_transpose(shape, seed, seed % 2);
  }
}

TEST(transpose_of_a_packed_batch) {
  Shape shape;
  shape.lens_q = {40, 0, 65}, shape.lens_k = {100, 33, 64};
  check_transpose(shape, 20, false);
}

}  // namespace
}  // namespace sparsekit::testing

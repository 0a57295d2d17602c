// What backward walks: the transposed lists, checked, and the order in which key blocks may add to a query tile.
//
// A query tile's gradient is the sum over the key blocks that its row lists. Key blocks are worked on in parallel;
// `rank` says how many entries of the row come before this one, and an entry adds to the tile only when that many have.
// So the sum has one order for any number of threads, without a second pass that would compute the scores again (7
// products instead of 5). Ranks are counted in the transpose itself: whatever it holds, every rank is reached.
#pragma once

#include <cstdlib>

#include "attention/cpu_tiles.h"

namespace sparsekit {
namespace {
namespace gradients {

/// Memory aligned for vectors. No destructor: unwinding would put a weak symbol into the object.
template <class T>
struct Buffer {
  T* data = nullptr;

  bool allocate(int64_t count) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, size_t(count > 0 ? count : 1) * sizeof(T)) != 0) return false;
    data = static_cast<T*>(memory);
    return true;
  }
  void release() { free(data); }
  T& operator[](int64_t i) const { return data[i]; }
};

struct KeyBlock {
  int64_t first, count;  // rows of key
  int64_t list_last;     // list rows of its sequence: sequence.list_row to list_last
  Sequence sequence;
};
struct QueryBlock {
  int64_t first, count;  // rows of query; count 0: a list row without rows
  Sequence sequence;
};

class Plan {
 public:
  bool build(const AttentionBackward& p) {
    const BlockLists& lists = p.lists;
    slots_per_row = lists.slots_per_row();
    query_block_count = lists.q_blocks;
    int64_t outer = lists.list_batch * lists.list_heads, capacity = p.k_blocks();
    entries_ = lists.q_blocks * slots_per_row;
    if (!key_blocks.allocate(capacity) || !query_blocks.allocate(query_block_count) ||
        !bounds_.allocate(outer * (capacity + 1)) || !ranks_.allocate(outer * entries_) ||
        !totals_.allocate(outer * query_block_count)) {
      return false;
    }
    list_sequences(p, capacity);
    for (int64_t o = 0; o < outer; ++o) rank_entries(p.transpose, o, capacity);
    return true;
  }

  void release() {
    key_blocks.release();
    query_blocks.release();
    bounds_.release();
    ranks_.release();
    totals_.release();
  }

  /// The entries of key block `n` in lists `outer` are [begin(outer, n), begin(outer, n + 1)).
  int64_t begin(int64_t outer, int64_t n) const { return bounds_[outer * (key_block_count + 1) + n]; }
  /// How many entries of the same list row precede entry `at`; -1: not a valid entry.
  int32_t rank(int64_t outer, int64_t at) const { return ranks_[outer * entries_ + at]; }
  int32_t total(int64_t outer, int64_t list_row) const { return totals_[outer * query_block_count + list_row]; }
  int32_t slot(const BlockTranspose& transpose, int64_t outer, int64_t at) const {
    return transpose.slots[outer * entries_ + at];
  }

  Buffer<KeyBlock> key_blocks;
  Buffer<QueryBlock> query_blocks;
  int64_t key_block_count = 0, query_block_count = 0, slots_per_row = 0;
  int64_t query_rows = 0, key_rows = 0;  // rows beyond belong to no sequence

 private:
  void list_sequences(const AttentionBackward& p, int64_t capacity) {
    for (int64_t m = 0; m < query_block_count; ++m) query_blocks[m] = {0, 0, {}};
    for (SequenceWalk walk(p); walk.valid(); walk.next()) {
      const Sequence& s = walk.current;
      int64_t list_last = s.list_row;
      for (int64_t q = s.q_begin; q < s.q_end && list_last < query_block_count; q += p.lists.block_q, ++list_last) {
        int64_t count = s.q_end - q < p.lists.block_q ? s.q_end - q : p.lists.block_q;
        query_blocks[list_last] = {q, count, s};
      }
      for (int64_t k = s.k_begin; k < s.k_end && key_block_count < capacity; k += p.lists.block_k) {
        int64_t count = s.k_end - k < p.lists.block_k ? s.k_end - k : p.lists.block_k;
        key_blocks[key_block_count++] = {k, count, list_last, s};
      }
      query_rows = s.q_end;
      key_rows = s.k_end;
    }
  }

  void rank_entries(const BlockTranspose& transpose, int64_t outer, int64_t capacity) {
    int32_t* bounds = bounds_.data + outer * (key_block_count + 1);
    int32_t* totals = totals_.data + outer * query_block_count;
    for (int64_t m = 0; m < query_block_count; ++m) totals[m] = 0;
    const int32_t* offsets = transpose.offsets + outer * (capacity + 1);
    int64_t end = clamp(offsets[0], 0, entries_);
    for (int64_t n = 0; n < key_block_count; ++n) {
      bounds[n] = int32_t(end);
      end = clamp(offsets[n + 1], end, entries_);
      for (int64_t at = bounds[n]; at < end; ++at) {
        int64_t row = slots_per_row ? slot(transpose, outer, at) / slots_per_row : 0;
        bool valid =
            slot(transpose, outer, at) >= 0 && row >= key_blocks[n].sequence.list_row && row < key_blocks[n].list_last;
        ranks_[outer * entries_ + at] = valid ? totals[row]++ : -1;
      }
    }
    bounds[key_block_count] = int32_t(end);
  }

  int64_t entries_ = 0;
  Buffer<int32_t> bounds_, ranks_, totals_;
};

}  // namespace gradients
}  // namespace
}  // namespace sparsekit

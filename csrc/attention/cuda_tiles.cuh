// What forward and backward share on the GPU: walking a row of the block lists, and which keys a query row sees.
//
// List contents are device data that nobody has checked. The walk clamps counts and passes over every slot whose block
// or in-block mask does not exist, so no caller reads out of bounds. Rows and keys fit int32 (the dispatch refuses
// longer sequences); offsets into tensors are int64.
#pragma once

#include <climits>
#include <cstdint>

#include "sparsekit/attention.h"

namespace sparsekit::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

/// Lengths up to here keep every row and key number, also of the tile after the last, within int32.
constexpr int64_t kMaxLength = INT32_MAX - 4096;

/// BlockLists::row in 32-bit arithmetic.
__device__ __forceinline__ int64_t list_row(const AttentionProblem& p, int b, int h, int m) {
  const int list_head = h / (int(p.heads_q) / int(p.lists.list_heads));
  return (int64_t(p.lists.list_batch == 1 ? 0 : b) * p.lists.list_heads + list_head) * p.lists.q_blocks + m;
}

/// Entries of a list's row that are read: its count, clamped to the list.
__device__ __forceinline__ int list_count(const BlockList& list, int64_t row) {
  return list.counts ? min(max(list.counts[row], 0), list.capacity) : 0;
}

/// The in-block mask of a slot of the partial list: its index into `bits`, -1 for none, INT_MIN where it does not
/// exist.
__device__ __forceinline__ int bits_of_slot(const BlockLists& lists, int64_t row, int slot) {
  if (!lists.bits_index) return -1;
  const int bits = lists.bits_index[row * lists.partial.capacity + slot];
  return bits < -1 || bits >= lists.bits_count ? INT_MIN : bits;
}

/// The key blocks of one list row: first the partial list, then the full one. All 32 lanes of a warp walk together and
/// see the same blocks. Each lane holds one slot of the current 32 and of the 32 after them, so that reading the list
/// never stands between two blocks.
class BlockWalk {
 public:
  int block = 0;         // of the keys
  int slot = 0;          // in its list
  bool partial = false;  // from the partial list

  __device__ __forceinline__ BlockWalk(const AttentionProblem& p, int64_t row)
      : lists_(p.lists), row_(row), k_blocks_(int((p.len_k + p.lists.block_k - 1) / p.lists.block_k)) {
    partial_count_ = list_count(lists_.partial, row);
    full_count_ = list_count(lists_.full, row);
    first_ = -kWarpSize;
    in_partial_ = true;
    fetch();
  }

  /// Moves to the next block that exists; false after the last.
  __device__ __forceinline__ bool next() {
    while (existing_ == 0) {
      if (!more_) return false;
      first_ = fetched_first_;
      in_partial_ = fetched_partial_;
      entry_ = fetched_entry_;
      existing_ = __ballot_sync(kAllLanes, entry_ >= 0);
      fetch();
    }
    const int lane = __ffs(existing_) - 1;
    existing_ &= existing_ - 1;
    block = __shfl_sync(kAllLanes, entry_, lane);
    slot = first_ + lane;
    partial = in_partial_;
    return true;
  }

 private:
  /// Loads the 32 slots after the current ones: of the same list, or the first ones of the full list.
  __device__ __forceinline__ void fetch() {
    fetched_first_ = first_ + kWarpSize;
    fetched_partial_ = in_partial_;
    if (fetched_partial_ && fetched_first_ >= partial_count_) {
      fetched_partial_ = false;
      fetched_first_ = 0;
    }
    more_ = fetched_first_ < (fetched_partial_ ? partial_count_ : full_count_);
    fetched_entry_ = -1;
    const int mine = fetched_first_ + int(threadIdx.x % kWarpSize);
    if (mine < (fetched_partial_ ? partial_count_ : full_count_)) {
      const BlockList& list = fetched_partial_ ? lists_.partial : lists_.full;
      const int entry = list.indices[row_ * list.capacity + mine];
      const bool exists =
          entry >= 0 && entry < k_blocks_ && (!fetched_partial_ || bits_of_slot(lists_, row_, mine) != INT_MIN);
      fetched_entry_ = exists ? entry : -1;
    }
  }

  const BlockLists& lists_;
  const int64_t row_;
  const int k_blocks_;
  int partial_count_, full_count_;
  int first_ = 0, entry_ = -1;  // the current 32 slots; existing_ marks those not yet walked
  unsigned existing_ = 0;
  int fetched_first_ = 0, fetched_entry_ = -1;
  bool in_partial_ = false, fetched_partial_ = false, more_ = false;
};

/// The keys (or key positions, where the problem has them) that causality and the window let one query row see.
struct KeyRange {
  int low, high;  // inclusive; none where low > high

  __device__ __forceinline__ bool holds(int key) const { return low <= key && key <= high; }
};

/// For query row `row` of batch entry `b`.
__device__ __forceinline__ KeyRange key_range(const AttentionProblem& p, int b, int row) {
  const int64_t position =
      p.query_positions ? p.query_positions[b * p.query_positions_batch + row] : row + p.len_k - p.len_q;
  int64_t low = p.window_left >= 0 ? position - p.window_left : INT_MIN;
  int64_t high = p.window_right >= 0 ? position + p.window_right : INT_MAX;
  if (p.causal) high = min(high, position);
  const int64_t least = INT_MIN, most = INT_MAX;
  return {int(min(max(low, least), most)), int(min(max(high, least), most))};
}

/// Bit i: key `first_key` + i lies in the range.
__device__ __forceinline__ uint32_t range_word(KeyRange range, int first_key) {
  const int64_t low = int64_t(range.low) - first_key, high = int64_t(range.high) - first_key;
  if (low > 31 || high < 0 || low > high) return 0;
  const uint32_t from = low > 0 ? ~0u << int(low) : ~0u;
  const uint32_t to = high < 31 ? ~0u >> (31 - int(high)) : ~0u;
  return from & to;
}

/// The packed in-block mask `bits` (an index that exists) at row `row` of the block: bit i is key `key` + i of the
/// block, for `key` a multiple of 16 (bits past the word are zero).
__device__ __forceinline__ uint32_t bits_word(const BlockLists& lists, int bits, int row, int key) {
  const int words = (lists.block_k + 31) / 32;
  return uint32_t(lists.bits[(int64_t(bits) * lists.block_q + row) * words + key / 32]) >> (key % 32);
}

/// Which of the 32 keys from `first_key` (a multiple of 16) on query row `row` sees, bit i for key first_key + i.
/// `bits` is the in-block mask (-1: none) of the key block, which begins at key `block_start`; `partial` says whose
/// list it is in. Only the bits of `wanted` are right.
__device__ __forceinline__ uint32_t visible_word(const AttentionProblem& p, int b, int row, int first_key,
                                                 int block_start, int bits, bool partial, uint32_t wanted) {
  const KeyRange in_sequence{0, int(p.len_k) - 1};
  uint32_t word = range_word(in_sequence, first_key) & wanted;
  if (!partial) return word;
  if (bits >= 0) word &= bits_word(p.lists, bits, row % p.lists.block_q, first_key - block_start);
  const KeyRange range = key_range(p, b, min(row, int(p.len_q) - 1));
  if (!p.key_positions) return word & range_word(range, first_key);
  const int32_t* positions = p.key_positions + b * p.key_positions_batch + first_key;
  for (uint32_t left = word; left; left &= left - 1) {
    const int i = __ffs(left) - 1;
    if (!range.holds(positions[i])) word &= ~(1u << i);
  }
  return word;
}

}  // namespace sparsekit::cuda

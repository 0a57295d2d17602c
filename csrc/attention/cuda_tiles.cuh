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
/// never stands between two blocks. The state is kept small: it lives beside full register files.
class BlockWalk {
 public:
  __device__ __forceinline__ BlockWalk(const AttentionProblem& p, int64_t row)
      : p_(p),
        row_(int(row)),
        partial_count_(list_count(p.lists.partial, row)),
        full_count_(list_count(p.lists.full, row)) {
    fetched_ = fetch(0);
  }

  /// Moves to the next block that exists; false after the last.
  __device__ __forceinline__ bool next() {
    existing_ &= existing_ - 1;  // the one just walked
    while (existing_ == 0) {
      first_ += kWarpSize;
      if (first_ >= partial_end() + full_count_) return false;
      entry_ = fetched_;
      existing_ = __ballot_sync(kAllLanes, entry_ >= 0);
      fetched_ = fetch(first_ + kWarpSize);
    }
    return true;
  }

  /// The block that next() moved to: its number among the keys, its slot in its list, and whether that is the partial
  /// one.
  __device__ __forceinline__ int block() const { return __shfl_sync(kAllLanes, entry_, lane()); }
  __device__ __forceinline__ bool partial() const { return first_ < partial_end(); }
  __device__ __forceinline__ int slot() const { return first_ + lane() - (partial() ? 0 : partial_end()); }

 private:
  __device__ __forceinline__ int lane() const { return __ffs(existing_) - 1; }

  /// Both lists as one sequence of 32 slots each; the full list begins with 32 of its own.
  __device__ __forceinline__ int partial_end() const {
    return (partial_count_ + kWarpSize - 1) / kWarpSize * kWarpSize;
  }

  /// This lane's entry of the 32 slots from `first` on; -1 where nothing exists.
  __device__ __forceinline__ int fetch(int first) const {
    const bool partial = first < partial_end();
    const BlockList& list = partial ? p_.lists.partial : p_.lists.full;
    const int slot = first + int(threadIdx.x % kWarpSize) - (partial ? 0 : partial_end());
    if (slot >= (partial ? partial_count_ : full_count_)) return -1;
    const int entry = list.indices[int64_t(row_) * list.capacity + slot];
    const bool exists = entry >= 0 && entry < (p_.len_k + p_.lists.block_k - 1) / p_.lists.block_k &&
                        !(partial && bits_of_slot(p_.lists, row_, slot) == INT_MIN);
    return exists ? entry : -1;
  }

  const AttentionProblem& p_;
  const int row_, partial_count_, full_count_;
  int first_ = -kWarpSize;  // of the current 32 slots
  int entry_ = -1, fetched_;
  unsigned existing_ = 0;  // those of the 32 that exist and are not behind us
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

// The producer warp of the Hopper forward: takes list rows, walks their key blocks and keeps TMA loading.
//
// Everything it reads from lists is fetched ahead: 32 entries of a row while the 32 before are at work, and the next
// row's number, counts and first entries during the current row, one dependent load per step (worth 2 % at 10 % density
// and 4 % at 5 % on an H100). All 32 lanes walk together; each holds one slot.
#pragma once

#include "attention/cuda_forward_sm90_tile.cuh"
#include "common/cuda/math.cuh"
#include "common/cuda/tma_sm90.cuh"

namespace sparsekit::sm90 {

/// (batch, query head, query block) of a list row's number.
struct Item {
  int batch, head, block;

  __device__ __forceinline__ Item(const AttentionProblem& p, int item) {
    const int q_blocks = int(p.lists.q_blocks), heads = int(p.heads_q), bh = item / q_blocks;
    block = item - bh * q_blocks;
    batch = bh / heads;
    head = bh - batch * heads;
  }
};

/// Up to 128 keys of a block that some row may see.
struct Unit {
  int start;  // first key
  int bits;   // packed bits, -1: none
  int mask;   // kCut, kRange, kBits
};

/// This lane's slot of 32, as the lists have it: nobody has checked it.
struct Slot {
  int entry = -1, bits = -1;
};

/// Counts and first 32 slots of a list row, as the lists have them: the loads may still be on their way.
struct RowHead {
  int partial_count = 0, full_count = 0;
  Slot slot;  // of the partial list if its count is above 0, else of the full one
};

__device__ __forceinline__ int row_of(const AttentionProblem& p, const Item& item) {
  return int(list_row(p, item.batch, item.head, item.block));
}

__device__ __forceinline__ Slot load_slot(const BlockLists& lists, bool partial, int row, int slot) {
  const BlockList& list = partial ? lists.partial : lists.full;
  const int64_t at = int64_t(row) * list.capacity + slot;
  return {list.indices[at], partial && lists.bits_index ? lists.bits_index[at] : -1};
}

__device__ __forceinline__ void load_counts(RowHead* head, const BlockLists& lists, int row) {
  head->partial_count = lists.partial.counts ? lists.partial.counts[row] : 0;
  head->full_count = lists.full.counts ? lists.full.counts[row] : 0;
}

__device__ __forceinline__ void load_first_slots(RowHead* head, const BlockLists& lists, int row, int lane) {
  const bool partial = min(head->partial_count, lists.partial.capacity) > 0;
  head->slot = Slot{};
  if (lane < min(partial ? head->partial_count : head->full_count, (partial ? lists.partial : lists.full).capacity)) {
    head->slot = load_slot(lists, partial, row, lane);
  }
}

/// The units of one list row: the partial list, then the full one. Entries that do not exist and units that no row of
/// the query block sees are passed over. Both lists count as one sequence of slots; the full one begins at a multiple
/// of 32.
class UnitWalk {
 public:
  __device__ __forceinline__ UnitWalk(const ForwardArguments& a, const RowHead& head, const Item& item, int lane)
      : a_(a),
        p_(a.call),
        lane_(lane),
        row_(row_of(p_, item)),
        partial_count_(min(max(head.partial_count, 0), p_.lists.partial.capacity)),
        full_count_(min(max(head.full_count, 0), p_.lists.full.capacity)),
        within_(p_.lists.block_k) {
    ahead_ = head.slot;
    if (a.ranged && !positions()) {  // the range moves with the row: first and last row bound it
      const int first_row = item.block * p_.lists.block_q;
      const KeyRange first = key_range(p_, 0, first_row);
      const KeyRange last = key_range(p_, 0, min(first_row + p_.lists.block_q, int(p_.len_q)) - 1);
      any_ = {first.low, last.high}, all_ = {last.low, first.high};
    }
  }

  /// False behind the last; `unit` is then undefined.
  __device__ __forceinline__ bool next(Unit* unit) {
    for (;;) {
      within_ += a_.keys_per_box;
      if (within_ >= p_.lists.block_k) {
        if (!next_block()) return false;
        within_ = 0;
      }
      const int lane = __ffs(existing_) - 1;
      const int start = __shfl_sync(kAllLanes, slot_.entry, lane) * p_.lists.block_k + within_;
      const int end = start + a_.keys_per_box, len_k = int(p_.len_k);
      if (start >= len_k) continue;
      *unit = {start, -1, end > len_k ? kCut : 0};
      if (first_ >= partial_end()) return true;
      unit->bits = __shfl_sync(kAllLanes, slot_.bits, lane);
      if (unit->bits >= 0) unit->mask |= kBits;
      if (!a_.ranged) return true;
      if (!positions() && (start > any_.high || end <= any_.low)) continue;
      if (positions() || end - 1 > all_.high || start < all_.low) unit->mask |= kRange;
      return true;
    }
  }

 private:
  __device__ __forceinline__ bool positions() const { return p_.query_positions || p_.key_positions; }
  __device__ __forceinline__ int partial_end() const { return (partial_count_ + 31) & ~31; }

  /// Moves to the next slot whose block and packed bits exist.
  __device__ __forceinline__ bool next_block() {
    existing_ &= existing_ - 1;
    while (existing_ == 0) {
      first_ += kWarpSize;
      if (first_ >= partial_end() + full_count_) return false;
      slot_ = ahead_;
      const int k_blocks = int((p_.len_k + p_.lists.block_k - 1) / p_.lists.block_k);
      existing_ = __ballot_sync(kAllLanes, slot_.entry >= 0 && slot_.entry < k_blocks && slot_.bits >= -1 &&
                                               slot_.bits < max(p_.lists.bits_count, int64_t(0)));
      fetch(first_ + kWarpSize);
    }
    return true;
  }

  __device__ __forceinline__ void fetch(int first) {
    const bool partial = first < partial_end();
    const int slot = first + lane_ - (partial ? 0 : partial_end());
    ahead_ = Slot{};
    if (slot < (partial ? partial_count_ : full_count_)) ahead_ = load_slot(p_.lists, partial, row_, slot);
  }

  const ForwardArguments& a_;
  const AttentionProblem& p_;
  const int lane_, row_, partial_count_, full_count_;
  KeyRange any_, all_;  // keys that some row sees, that every row sees
  int within_, first_ = -kWarpSize;
  Slot slot_, ahead_;  // of the current 32, of the 32 after them
  unsigned existing_ = 0;
};

/// atomicAdd(counter, 1), of one lane: the compiler would make it the warp's, with a shuffle that waits for the result.
__device__ __forceinline__ int fetch_and_increment(int32_t* counter) {
  int before;
  asm volatile("atom.global.add.s32 %0, [%1], 1;\n" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

template <class Tile>
class Producer {
 public:
  __device__ __forceinline__ Producer(const ForwardArguments& arguments, uint32_t shared)
      : a_(arguments), p_(arguments.call), shared_(shared), lane_(threadIdx.x % kWarpSize) {}

  __device__ __forceinline__ void run() {
    int item = -1, next_item = -1, fetched = 0;
    int ahead = int(blockIdx.x);  // the rank of the next list row (lane 0)
    RowHead head;
    auto fetch = [&] {  // a piece of the next list row; each needs the one before
      if (fetched == 0) next_item = item_of(__shfl_sync(kAllLanes, ahead, 0));
      if (next_item >= 0) {
        if (fetched == 1) ahead = take(), load_counts(&head, p_.lists, row_of(p_, Item(p_, next_item)));
        if (fetched == 2) load_first_slots(&head, p_.lists, row_of(p_, Item(p_, next_item)), lane_);
      }
      ++fetched;
    };
    for (;;) {
      while (fetched < 3) fetch();
      item = next_item, next_item = -1, fetched = 0;
      if (item < 0) break;
      run_row(Item(p_, item), head, fetch);
    }
    mbarrier_wait(shared_ + Tile::kKeyEmpty + 8 * key_.stage, key_.parity ^ 1);
    if (lane_ == 0) {
      store_shared(shared_ + Tile::kStepAt + 16 * key_.stage, int4{kStop, 0, 0, 0});
      mbarrier_arrive(shared_ + Tile::kKeyFull + 8 * key_.stage);
    }
  }

 private:
  /// Where the halves of a step begin.
  struct Starts {
    int first, second;
  };

  __device__ __forceinline__ int item_of(int rank) const {
    if (rank >= a_.items) return -1;
    return a_.order ? a_.order[rank] : rank;
  }
  /// Without an order there are as many CTAs as list rows.
  __device__ __forceinline__ int take() const {
    if (!a_.order) return a_.items;
    return lane_ == 0 ? int(gridDim.x) + fetch_and_increment(a_.counter) : 0;
  }

  template <class Fetch>
  __device__ __forceinline__ void run_row(const Item& item, const RowHead& head,
                                          Fetch& fetch) {  // `head` is read first
    const int first_row = item.block * Tile::kRows;
    if (first_row >= p_.len_q) return;
    const int kv_head = item.head / (int(p_.heads_q) / int(p_.heads_kv));
    UnitWalk walk(a_, head, item, lane_);
    Unit unit;
    if (!walk.next(&unit)) return write_empty(item, first_row);
    Starts before{0, 0};
    bool more = true;
    for (int step = 0; more; ++step) {
      Unit second{unit.start + kHalf, unit.bits, unit.mask};
      int second_bits = -1;
      if (Tile::kHalves == 2 && a_.keys_per_box == kHalf) {
        const int past_the_end = (int(p_.len_k) + kHalf - 1) / kHalf * kHalf;  // a box of zeros
        if (!walk.next(&second)) second = Unit{past_the_end, -1, kCut};
        second_bits = second.bits;
      }
      const int first_bits = unit.bits;
      int flags = unit.mask << mask_shift(0);
      if (Tile::kHalves == 2) flags |= second.mask << mask_shift(1);
      const Starts starts{unit.start, second.start};
      more = walk.next(&unit);
      if (!more) flags |= kLastStep;

      load_keys(item, kv_head, starts, flags, first_bits, second_bits);
      if (step == 0) load_query(item, first_row);
      if (step > 0) load_values(item, kv_head, before);
      before = starts;
      if (step < 3) fetch();
    }
    load_values(item, kv_head, before);
  }

  __device__ __forceinline__ void load_query(const Item& item, int first_row) {
    const uint32_t full = shared_ + Tile::kQueryFull + 8 * query_.stage;
    mbarrier_wait(shared_ + Tile::kQueryEmpty + 8 * query_.stage, query_.parity ^ 1);
    if (elect_lane()) {
      store_shared(shared_ + Tile::kRowAt + 16 * query_.stage, int4{item.batch, item.head, first_row, 0});
      mbarrier_expect(full, Tile::kQueryBytes);
      const uint32_t to = shared_ + Tile::kQueryAt + query_.stage * Tile::kQueryBytes;
#pragma unroll
      for (int panel = 0; panel < Tile::kHeadPanels; ++panel) {
        tma_load(to + panel * Tile::kQueryPanel, &a_.query, 64 * panel, first_row, item.head, item.batch, full);
      }
      mbarrier_arrive(full);
    }
    query_.advance();
  }

  __device__ __forceinline__ void load_keys(const Item& item, int kv_head, const Starts& starts, int flags,
                                            int first_bits, int second_bits) {
    const uint32_t full = shared_ + Tile::kKeyFull + 8 * key_.stage;
    mbarrier_wait(shared_ + Tile::kKeyEmpty + 8 * key_.stage, key_.parity ^ 1);
    if (elect_lane()) {
      const int bits_bytes = p_.lists.block_q * (p_.lists.block_k / 8);
      store_shared(shared_ + Tile::kStepAt + 16 * key_.stage, int4{flags, starts.first, starts.second, 0});
      mbarrier_expect(full, Tile::kKeyBytes + ((first_bits >= 0) + (second_bits >= 0)) * bits_bytes);
      load_panels<Tile::kHeadPanels>(shared_ + Tile::kKeyAt + key_.stage * Tile::kKeyBytes, &a_.key, item.batch,
                                     kv_head, starts, full);
      const uint32_t masks = shared_ + Tile::kMaskAt + key_.stage * Tile::kMaskBytes;
      auto load_bits = [&](int bits, uint32_t to) {
        bulk_load(to, p_.lists.bits + int64_t(bits) * (bits_bytes / 4), bits_bytes, full);
      };
      if (first_bits >= 0) load_bits(first_bits, masks);
      if (second_bits >= 0) load_bits(second_bits, masks + bits_bytes);
    }
    if (p_.key_bias) {
      const float* bias = p_.key_bias + item.batch * p_.key_bias_batch + item.head * p_.key_bias_head;
      copy_keys(shared_ + Tile::kBiasAt + key_.stage * Tile::kKeys * 4, starts,
                [&](int key) { return __float_as_int(bias[key] * kLog2e); });
    }
    if (p_.key_positions && a_.ranged) {
      const int32_t* positions = p_.key_positions + item.batch * p_.key_positions_batch;
      copy_keys(shared_ + Tile::kPositionAt + key_.stage * Tile::kKeys * 4, starts,
                [&](int key) { return positions[key]; });
    }
    __syncwarp();
    if (elect_lane()) mbarrier_arrive(full);
    key_.advance();
  }

  __device__ __forceinline__ void load_values(const Item& item, int kv_head, const Starts& starts) {
    const uint32_t full = shared_ + Tile::kValueFull + 8 * value_.stage;
    mbarrier_wait(shared_ + Tile::kValueEmpty + 8 * value_.stage, value_.parity ^ 1);
    if (elect_lane()) {
      mbarrier_expect(full, Tile::kValueBytes);
      load_panels<Tile::kValuePanels>(shared_ + Tile::kValueAt + value_.stage * Tile::kValueBytes, &a_.value,
                                      item.batch, kv_head, starts, full);
      mbarrier_arrive(full);
    }
    value_.advance();
  }

  /// All keys of a panel in one box, or each half in its own.
  template <int PANELS>
  __device__ __forceinline__ void load_panels(uint32_t to, const CUtensorMap* map, int batch, int kv_head,
                                              const Starts& starts, uint32_t full) {
#pragma unroll
    for (int panel = 0; panel < PANELS; ++panel) {
      tma_load(to + panel * Tile::kKeyPanel, map, 64 * panel, starts.first, kv_head, batch, full);
    }
    if (Tile::kHalves == 1 || a_.keys_per_box > kHalf) return;
#pragma unroll
    for (int panel = 0; panel < PANELS; ++panel) {
      tma_load(to + panel * Tile::kKeyPanel + kHalf * kPanelRowBytes, map, 64 * panel, starts.second, kv_head, batch,
               full);
    }
  }

  /// A word per key of the step; 0 past the end.
  template <class Word>
  __device__ __forceinline__ void copy_keys(uint32_t to, const Starts& starts, Word word) {
#pragma unroll 1
    for (int i = 0; i < Tile::kKeys / kWarpSize; ++i) {
      const int in_half = i * kWarpSize % kHalf + lane_;
      const int key = (i * kWarpSize < kHalf ? starts.first : starts.second) + in_half;
      store_shared(to + 4 * (i * kWarpSize + lane_), key < p_.len_k ? word(key) : 0);
    }
  }

  /// A query block without keys: out 0, lse -inf.
  __device__ __forceinline__ void write_empty(const Item& item, int first_row) {
    const int rows = min(Tile::kRows, int(p_.len_q) - first_row), chunks = p_.value_dim / 8;
    uint16_t* out = static_cast<uint16_t*>(p_.out.data) + item.batch * p_.out.batch + item.head * p_.out.head;
#pragma unroll 1
    for (int i = lane_; i < rows * chunks; i += kWarpSize) {
      const int row = i / chunks;
      *reinterpret_cast<uint4*>(out + (first_row + row) * p_.out.row + (i - row * chunks) * 8) = uint4{0, 0, 0, 0};
    }
    float* lse = p_.lse + (int64_t(item.batch) * p_.heads_q + item.head) * p_.len_q + first_row;
#pragma unroll 1
    for (int row = lane_; row < rows; row += kWarpSize) lse[row] = -kInfinity;
  }

  const ForwardArguments& a_;
  const AttentionForward& p_;
  const uint32_t shared_;
  const int lane_;
  Ring<Tile::kQueryStages> query_;
  Ring<Tile::kKeyStages> key_;
  Ring<Tile::kValueStages> value_;
};

}  // namespace sparsekit::sm90

// The producer warp of the Hopper forward: takes list rows, walks their key blocks and keeps TMA loading.
//
// Everything it reads from lists is fetched ahead: 32 entries of a row while the 32 before are at work, and the next
// row's number, counts and first entries during the current row, one dependent load per step. All 32 lanes walk
// together; each holds one slot.
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
  int mask;   // kCut, kRange, kBits, kUpper
};

/// This lane's slot of 32, as the lists have it: nobody has checked it.
struct Slot {
  int entry = -1, bits = -1;
};

/// Counts and first 32 slots of a list row, as the lists have them: the loads may still be on their way.
struct RowHead {
  int partial_count = 0, full_count = 0;
  int4 extent = {0, 0, 0, 0};  // packed batches
  Slot slot;                   // of the partial list if its count is above 0, else of the full one
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

/// What a list row is about. `extent` is read in packed batches.
__device__ __forceinline__ ListRow list_row_of(const ForwardArguments& a, const Item& item, const int4& extent) {
  const AttentionProblem& p = a.call;
  if (a.extents) return {0, item.head, extent.x, extent.y, extent.z, extent.w};
  return {item.batch, item.head, item.block * p.lists.block_q, int(p.len_q), 0, int(p.len_k)};
}

/// The units of one list row: the partial list, then the full one. Entries that do not exist and units that no row of
/// the query block sees are passed over. Both lists count as one sequence of slots; the full one begins at a multiple
/// of 32.
class UnitWalk {
 public:
  __device__ __forceinline__ UnitWalk(const ForwardArguments& a, const RowHead& head, int row, const ListRow& list,
                                      int lane)
      : a_(a),
        p_(a.call),
        list_(list),
        lane_(lane),
        row_(row),
        k_blocks_((list.keys_end - list.keys_begin + p_.lists.block_k - 1) >> (p_.lists.block_k == 128 ? 7 : 6)),
        partial_count_(min(max(head.partial_count, 0), p_.lists.partial.capacity)),
        full_count_(min(max(head.full_count, 0), p_.lists.full.capacity)),
        within_(p_.lists.block_k) {
    ahead_ = head.slot;
    if (a.ranged && !positions()) {  // the range moves with the row: first and last row bound it
      const KeyRange first = range_of(p_, list, list.first);
      const KeyRange last = range_of(p_, list, min(list.first + p_.lists.block_q, list.end) - 1);
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
      const int start = list_.keys_begin + __shfl_sync(kAllLanes, slot_.entry, lane) * p_.lists.block_k + within_;
      const int end = start + a_.keys_per_box;
      if (start >= list_.keys_end) continue;
      *unit = {start, -1, end > list_.keys_end ? kCut : 0};
      if (first_ >= partial_end()) return true;
      unit->bits = __shfl_sync(kAllLanes, slot_.bits, lane);
      if (unit->bits >= 0) unit->mask |= within_ ? kBits | kUpper : kBits;
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
      existing_ = __ballot_sync(kAllLanes, slot_.entry >= 0 && slot_.entry < k_blocks_ && slot_.bits >= -1 &&
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
  const ListRow& list_;
  const int lane_, row_, k_blocks_, partial_count_, full_count_;
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
        if (fetched == 1) {
          const Item next(p_, next_item);
          ahead = take(), load_counts(&head, p_.lists, row_of(p_, next));
          if (a_.extents) head.extent = a_.extents[next.block];
        }
        if (fetched == 2) {
          const Item next(p_, next_item);
          load_first_slots(&head, p_.lists, row_of(p_, next), lane_);
          prefetch_query(list_row_of(a_, next, head.extent));
        }
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
    const ListRow list = list_row_of(a_, item, head.extent);
    if (list.first >= list.end) return;
    const int kv_head = item.head / (int(p_.heads_q) / int(p_.heads_kv));
    UnitWalk walk(a_, head, row_of(p_, item), list, lane_);
    Unit unit;
    if (!walk.next(&unit)) return write_empty(list);
    Starts before{0, 0};
    bool more = true, cut_before = false;
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
      const bool cut = (unit.mask | second.mask) & kCut;
      const Starts starts{unit.start, second.start};
      more = walk.next(&unit);
      if (!more) flags |= kLastStep;

      load_keys(list, kv_head, starts, flags, first_bits, second_bits);
      if (step == 0) load_query(list);
      if (step > 0) load_values(list, kv_head, before, cut_before);
      before = starts, cut_before = cut;
      if (step < 3) fetch();
    }
    load_values(list, kv_head, before, cut_before);
  }

  /// Queries come from device memory, and their buffer is free only one step before they are needed.
  __device__ __forceinline__ void prefetch_query(const ListRow& list) {
    if (!elect_lane()) return;
#pragma unroll
    for (int panel = 0; panel < Tile::kHeadPanels; ++panel) {
      tma_prefetch(&a_.query, 64 * panel, list.first, list.head, list.batch);
    }
  }

  __device__ __forceinline__ void load_query(const ListRow& list) {
    const uint32_t full = shared_ + Tile::kQueryFull + 8 * query_.stage;
    mbarrier_wait(shared_ + Tile::kQueryEmpty + 8 * query_.stage, query_.parity ^ 1);
    if (elect_lane()) {
      store_list_row<Tile>(shared_, row_, list);
      mbarrier_expect(full, Tile::kQueryBytes);
      const uint32_t to = shared_ + Tile::kQueryAt + query_.stage * Tile::kQueryBytes;
#pragma unroll
      for (int panel = 0; panel < Tile::kHeadPanels; ++panel) {
        tma_load(to + panel * Tile::kQueryPanel, &a_.query, 64 * panel, list.first, list.head, list.batch, full);
      }
      mbarrier_arrive(full);
    }
    query_.advance(), ++row_;
  }

  __device__ __forceinline__ void load_keys(const ListRow& list, int kv_head, const Starts& starts, int flags,
                                            int first_bits, int second_bits) {
    const uint32_t full = shared_ + Tile::kKeyFull + 8 * key_.stage;
    mbarrier_wait(shared_ + Tile::kKeyEmpty + 8 * key_.stage, key_.parity ^ 1);
    if (elect_lane()) {
      const int bits_bytes = p_.lists.block_q * (p_.lists.block_k / 8);
      store_shared(shared_ + Tile::kStepAt + 16 * key_.stage, int4{flags, starts.first, starts.second, 0});
      mbarrier_expect(full, Tile::kKeyBytes + ((first_bits >= 0) + (second_bits >= 0)) * bits_bytes);
      load_panels<Tile::kHeadPanels>(shared_ + Tile::kKeyAt + key_.stage * Tile::kKeyBytes, &a_.key, list.batch,
                                     kv_head, starts, full);
      const uint32_t masks = shared_ + Tile::kMaskAt + key_.stage * Tile::kMaskBytes;
      auto load_bits = [&](int bits, uint32_t to) {
        bulk_load(to, p_.lists.bits + int64_t(bits) * (bits_bytes / 4), bits_bytes, full);
      };
      if (first_bits >= 0) load_bits(first_bits, masks);
      if (second_bits >= 0) load_bits(second_bits, masks + bits_bytes);
    }
    if (p_.key_bias) {
      const float* bias = p_.key_bias + list.batch * p_.key_bias_batch + list.head * p_.key_bias_head;
      copy_keys(shared_ + Tile::kBiasAt + key_.stage * Tile::kKeys * 4, starts, list.keys_end,
                [&](int key) { return __float_as_int(bias[key] * kLog2e); });
    }
    if (p_.key_positions && a_.ranged) {
      const int32_t* positions = p_.key_positions + list.batch * p_.key_positions_batch;
      copy_keys(shared_ + Tile::kPositionAt + key_.stage * Tile::kKeys * 4, starts, list.keys_end,
                [&](int key) { return positions[key]; });
    }
    __syncwarp();
    if (elect_lane()) mbarrier_arrive(full);
    key_.advance();
  }

  /// `cut`: some of the keys lie past the end of the sequence. What is there in a packed batch is another sequence's,
  /// and no weight of 0 makes up for a NaN: these values become 0 before the consumers hear of them.
  __device__ __forceinline__ void load_values(const ListRow& list, int kv_head, const Starts& starts, bool cut) {
    const uint32_t full = shared_ + Tile::kValueFull + 8 * value_.stage;
    const uint32_t to = shared_ + Tile::kValueAt + value_.stage * Tile::kValueBytes;
    const bool clear = cut && a_.extents;
    const uint32_t landed = clear ? shared_ + Tile::kCutValues : full;
    mbarrier_wait(shared_ + Tile::kValueEmpty + 8 * value_.stage, value_.parity ^ 1);
    if (elect_lane()) {
      mbarrier_expect(landed, Tile::kValueBytes);
      load_panels<Tile::kValuePanels>(to, &a_.value, list.batch, kv_head, starts, landed);
      mbarrier_arrive(landed);
    }
    if (clear) {
      mbarrier_wait(landed, cut_parity_);
      cut_parity_ ^= 1;
#pragma unroll 1
      for (int i = lane_; i < Tile::kValuePanels * Tile::kKeys * 8; i += kWarpSize) {
        const int row = i / 8 % Tile::kKeys, key = (row < kHalf ? starts.first : starts.second) + row % kHalf;
        if (key >= list.keys_end) store_shared(to + 16 * i, int4{0, 0, 0, 0});
      }
      fence_async_proxy();
      __syncwarp();
      if (elect_lane()) mbarrier_arrive(full);
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
    if constexpr (Tile::kHalves == 2) {
      if (a_.keys_per_box > kHalf) return;
#pragma unroll
      for (int panel = 0; panel < PANELS; ++panel) {
        tma_load(to + panel * Tile::kKeyPanel + kHalf * kPanelRowBytes, map, 64 * panel, starts.second, kv_head, batch,
                 full);
      }
    }
  }

  /// A word per key of the step; 0 past the end.
  template <class Word>
  __device__ __forceinline__ void copy_keys(uint32_t to, const Starts& starts, int end, Word word) {
#pragma unroll 1
    for (int i = 0; i < Tile::kKeys / kWarpSize; ++i) {
      const int in_half = i * kWarpSize % kHalf + lane_;
      const int key = (i * kWarpSize < kHalf ? starts.first : starts.second) + in_half;
      store_shared(to + 4 * (i * kWarpSize + lane_), key < end ? word(key) : 0);
    }
  }

  /// A query block without keys: out 0, lse -inf.
  __device__ __forceinline__ void write_empty(const ListRow& list) {
    const int first_row = list.first, rows = min(Tile::kRows, list.end - first_row), chunks = p_.value_dim / 8;
    uint16_t* out = static_cast<uint16_t*>(p_.out.data) + list.batch * p_.out.batch + list.head * p_.out.head;
#pragma unroll 1
    for (int i = lane_; i < rows * chunks; i += kWarpSize) {
      const int row = i / chunks;
      *reinterpret_cast<uint4*>(out + (first_row + row) * p_.out.row + (i - row * chunks) * 8) = uint4{0, 0, 0, 0};
    }
    float* lse = p_.lse + (int64_t(list.batch) * p_.heads_q + list.head) * p_.len_q + first_row;
#pragma unroll 1
    for (int row = lane_; row < rows; row += kWarpSize) lse[row] = -kInfinity;
  }

  const ForwardArguments& a_;
  const AttentionForward& p_;
  const uint32_t shared_;
  const int lane_;
  int row_ = 0;  // list rows with keys so far
  uint32_t cut_parity_ = 0;
  Ring<Tile::kQueryStages> query_;
  Ring<Tile::kKeyStages> key_;
  Ring<Tile::kValueStages> value_;
};

}  // namespace sparsekit::sm90

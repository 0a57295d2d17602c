// Stripe-sparse attention forward on Hopper (sm_90a): the consumers of the block-sparse kernel (cuda_forward_sm90.cuh),
// fed by a warpgroup that gathers rows.
//
// Tiling: one persistent CTA per multiprocessor. Warpgroup 0 copies the rows of K and V that a tile of the plan names
// (cuda_stripes.h), 128 keys a step, with cp.async into the panels that TMA would write: two warps for K and two for V,
// which do not wait for each other. 16 threads copy a row of 128 elements, the row numbers are read four at a time.
// Units come from a counter, the longest first; Q comes by TMA. Warpgroups 1 and 2 do not know the difference.
// Where a list has many units (groups of 1,024 rows and more), two warps pack its rows in memory instead, once for all
// of them (cuda_stripes_packed_sm90.cuh), and the two others load both K and V by TMA.
//
// A buffer is full when its 64 threads have said so: each waits for its own copies and makes them visible to wgmma.
// Where some key of a step may be hidden from some row, the warps of K write the bits of each row, and consumers take
// them for a block's packed bits.
//
// Bound: gathering; see docs/stripes-performance.md.
#pragma once

#include "attention/cuda_forward_sm90_consumer.cuh"
#include "attention/cuda_forward_sm90_producer.cuh"
#include "attention/cuda_stripes_forward_sm90.h"
#include "attention/cuda_stripes_packed_sm90.cuh"
#include "attention/cuda_stripes_tiles.cuh"
#include "common/cuda/tma_sm90.cuh"

namespace sparsekit::sm90 {

/// Sizes of one kernel: those of blocks, with room for the producers' registers and the entries of tiles. PACKED: for
/// lists of many units.
template <class ElementType, int HEAD, int VALUE, int QUERY_STAGES, int KEY_STAGES, int VALUE_STAGES,
          bool PACKED = false>
struct StripesTile : ForwardTile<ElementType, HEAD, VALUE, 2, 128, QUERY_STAGES, KEY_STAGES, VALUE_STAGES> {
  using Blocks = ForwardTile<ElementType, HEAD, VALUE, 2, 128, QUERY_STAGES, KEY_STAGES, VALUE_STAGES>;
  static constexpr bool kPacked = PACKED;
  static constexpr int kProducerRegisters = 88, kConsumerRegisters = 208;
  static constexpr int kEntriesAt = (Blocks::kEnd + 15) / 16 * 16;  // of both sides
  static constexpr int kNextAt = kEntriesAt + 2 * TileRing<128>::kBytes;
  static constexpr int kSharedBytes = kNextAt + 16 + 1024;  // two words of each side
  static_assert(kSharedBytes <= 227 * 1024, "shared memory of a CTA");
};

constexpr int kSideThreads = 64;     // that copy K, and as many that copy V
constexpr int kProducerBarrier = 5;  // named, of all producers; consumers use 1 to 4
constexpr int kSideBarrier = 6;      // + side

/// One side of the producers: SIDE 0 copies K, and what belongs to a step's keys (and V where these are packed); SIDE 1
/// copies V.
template <class Tile, int SIDE>
class StripesProducer {
 public:
  __device__ __forceinline__ StripesProducer(const StripesForward& arguments, uint32_t shared, char* memory)
      : a_(arguments),
        p_(arguments.problem),
        shared_(shared),
        memory_(memory),
        thread_(int(threadIdx.x) % kSideThreads),
        view_(SIDE == 0 ? arguments.problem.key : arguments.problem.value),
        chunks_((SIDE == 0 ? arguments.problem.head_dim : arguments.problem.value_dim) / 8) {}

  __device__ __forceinline__ void run() {
    int number = int(blockIdx.x);
    for (int turn = 0; number < a_.units; turn ^= 4) {
      int taken = 0;
      if (SIDE == 0 && thread_ == 0) taken = fetch_and_increment(a_.plan.counter);
      const int rank = number / (a_.plan.cut.parts_of_cell() * heads_of_cell(p_, a_.plan));
      run_unit(stripe_unit(p_, a_.plan, number), rank);
      if (Tile::kPacked && thread_ == 0) count(a_.packed.units + rank);
      if (SIDE == 0 && thread_ == 0) store_shared(shared_ + Tile::kNextAt + turn, int(gridDim.x) + taken);
      named_barrier_sync(kProducerBarrier, (Tile::kPacked ? 1 : 2) * kSideThreads);
      number = *reinterpret_cast<volatile int*>(memory_ + Tile::kNextAt + turn);
    }
    if (SIDE == 1) return;
    mbarrier_wait(shared_ + Tile::kKeyEmpty + 8 * ring_.stage, ring_.parity ^ 1);
    if (thread_ == 0) store_shared(shared_ + Tile::kStepAt + 16 * ring_.stage, int4{kStop, 0, 0, 0});
    mbarrier_arrive(shared_ + Tile::kKeyFull + 8 * ring_.stage);
  }

 private:
  static constexpr int kPanels = SIDE == 0 ? Tile::kHeadPanels : Tile::kValuePanels;
  static constexpr int kStages = SIDE == 0 ? Tile::kKeyStages : Tile::kValueStages;
  static constexpr int kBytes = SIDE == 0 ? Tile::kKeyBytes : Tile::kValueBytes;  // of a buffer
  static constexpr int kAt = SIDE == 0 ? Tile::kKeyAt : Tile::kValueAt;
  static constexpr int kFull = SIDE == 0 ? Tile::kKeyFull : Tile::kValueFull;
  static constexpr int kEmpty = SIDE == 0 ? Tile::kKeyEmpty : Tile::kValueEmpty;

  __device__ __forceinline__ void run_unit(const StripeUnit& unit, int rank) {
    if (unit.rows.first >= unit.rows.end) return;
    auto* places = reinterpret_cast<int32_t*>(memory_ + Tile::kEntriesAt + SIDE * TileRing<128>::kBytes);
    const TileRing<128> tiles_of(a_.plan, unit.cell, places);
    const StripeSight sight(p_, unit.batch, unit.rows.first);
    int tiles = tiles_of.count;
    if (p_.causal && !sight.positions() && a_.plan.cut.parts_of_cell() > 1) {  // what later units of the cell see
      const int end = unit.rows.end + int(p_.len_k) - int(p_.len_q);
      const int seen = entries_below(tiles_of.columns, a_.plan.counts[unit.cell].columns, end);
      tiles = tiles_of.block_tiles + (seen + 127) / 128;
    }
    if (tiles == 0) {
      if (SIDE == 0) write_empty(unit);
      return;
    }
    const char* head = static_cast<const char*>(view_.data) +
                       (unit.batch * view_.batch + unit.kv_head * view_.head) * int64_t(sizeof(uint16_t));
    int2 entries = entries_of(tiles_of, 0);
    if (Tile::kPacked && thread_ == 0) wait_count(a_.packed.tiles + rank, tiles_of.count);
    for (int tile = 0; tile < tiles; ++tile, ++step_) {
      int32_t* place = tiles_of.place(step_);  // who still reads it has not come to the barrier of the step after it
      const bool of_block = tiles_of.of_block(tile);
      *reinterpret_cast<int2*>(place + 2 * thread_) = entries;
      named_barrier_sync(kSideBarrier + SIDE, kSideThreads);
      if (tile + 1 < tiles) entries = entries_of(tiles_of, tile + 1);

      mbarrier_wait(shared_ + kEmpty + 8 * ring_.stage, ring_.parity ^ 1);
      const uint32_t full = shared_ + kFull + 8 * ring_.stage;
      if constexpr (Tile::kPacked) {
        if (thread_ < kWarpSize) load_packed(rank % a_.packed.slots, tile, full);
      } else {
        gather(shared_ + kAt + ring_.stage * kBytes, head, place, of_block);
        copy_async_commit();
      }
      if (SIDE == 0) {
        describe(unit, sight, place, of_block, tile + 1 == tiles);
        if (tile == 0) load_query(unit);
      }
      if constexpr (!Tile::kPacked) {
        copy_async_wait<0>();
        fence_async_proxy();
      }
      mbarrier_arrive(full);
      if (Tile::kPacked && tile + 1 == tiles && thread_ < kWarpSize) {  // the slot has been read once these are here
        mbarrier_wait(full, ring_.parity);
        mbarrier_wait(shared_ + Tile::kValueFull + 8 * last_value_.stage, last_value_.parity);
      }
      ring_.advance();
    }
  }

  /// This thread's two entries of a tile, or words of a BlockTile.
  __device__ __forceinline__ int2 entries_of(const TileRing<128>& tiles_of, int tile) const {
    if (!tiles_of.of_block(tile)) {
      return reinterpret_cast<const int2*>(tiles_of.columns + int64_t(tile - tiles_of.block_tiles) * 128)[thread_];
    }
    constexpr int kPairs = sizeof(BlockTile) / sizeof(int2);
    return thread_ < kPairs ? reinterpret_cast<const int2*>(tiles_of.tiles + tile)[thread_] : int2{0, 0};
  }

  /// Starts copying the rows of a tile into panels of 64 columns. What does not exist becomes zero. A thread copies one
  /// chunk of consecutive rows.
  __device__ __forceinline__ void gather(uint32_t to, const char* head, const int32_t* place, bool of_block) const {
    constexpr int kChunks = kPanels * 8, kRows = 128 * kChunks / kSideThreads;
    static_assert(kSideThreads % kChunks == 0 && kRows % 8 == 0);
    const int chunk = thread_ % kChunks, first = thread_ / kChunks * kRows;
    const uint32_t at = to + chunk / 8 * Tile::kKeyPanel + first * kPanelRowBytes;
    const uint32_t swizzled_chunk = uint32_t(chunk % 8 * kChunkBytes);
    const char* from = head + chunk * kChunkBytes;
    const int row_bytes = int(view_.row * int64_t(sizeof(uint16_t)));
    const int end = chunk < chunks_ ? int(p_.len_k) : 0, start = place[0];
#pragma unroll
    for (int i = 0; i < kRows; i += 8) {
      int rows[8];
#pragma unroll
      for (int j = 0; j < 8; j += 4) {
        const int4 entries = *reinterpret_cast<const int4*>(place + first + i + j);
        rows[j] = entries.x, rows[j + 1] = entries.y, rows[j + 2] = entries.z, rows[j + 3] = entries.w;
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int row = of_block ? start + first + i + j : rows[j] & kColumnRow;
        copy_async_16(at + (i + j) * kPanelRowBytes + (swizzled_chunk ^ uint32_t(j * kChunkBytes)),
                      from + int64_t(row) * row_bytes, row < end);
      }
    }
  }

  /// A tile of a packed cell: its keys to the buffer at hand, and its values.
  __device__ __forceinline__ void load_packed(int slot, int tile, uint32_t full) {
    if (tile == 0) fence_async_global();
    const uint32_t value_full = shared_ + Tile::kValueFull + 8 * values_.stage;
    if (elect_lane()) {
      mbarrier_expect(full, Tile::kKeyBytes);
#pragma unroll
      for (int panel = 0; panel < Tile::kHeadPanels; ++panel) {
        tma_load(shared_ + Tile::kKeyAt + ring_.stage * Tile::kKeyBytes + panel * Tile::kKeyPanel, &a_.blocks.key,
                 64 * panel, 128 * tile, slot, 0, full);
      }
    }
    __syncwarp();
    mbarrier_wait(shared_ + Tile::kValueEmpty + 8 * values_.stage, values_.parity ^ 1);
    if (elect_lane()) {
      mbarrier_expect(value_full, Tile::kValueBytes);
#pragma unroll
      for (int panel = 0; panel < Tile::kValuePanels; ++panel) {
        tma_load(shared_ + Tile::kValueAt + values_.stage * Tile::kValueBytes + panel * Tile::kKeyPanel,
                 &a_.blocks.value, 64 * panel, 128 * tile, slot, 0, value_full);
      }
      mbarrier_arrive(value_full);
    }
    __syncwarp();
    last_value_ = values_;
    values_.advance();
  }

  /// What a step's keys bring along: the bias, the bits of what is hidden, and the Step.
  __device__ __forceinline__ void describe(const StripeUnit& unit, const StripeSight& sight, const int32_t* place,
                                           bool of_block, bool last) const {
    if (p_.key_bias) {
      const float* bias = p_.key_bias + unit.batch * p_.key_bias_batch + unit.head * p_.key_bias_head;
      for (int n = thread_; n < 128; n += kSideThreads) {
        const int row = tile_row(place, of_block, n);
        store_shared(shared_ + Tile::kBiasAt + (ring_.stage * 128 + n) * 4,
                     row < p_.len_k ? __float_as_int(bias[row] * kLog2e) : 0);
      }
    }
    int flags = last ? kLastStep : 0;
    if (sight.template masks<128>(place, of_block)) {
      flags |= kBits << mask_shift(0) | kBits << mask_shift(1);
      const uint32_t to = shared_ + Tile::kMaskAt + ring_.stage * Tile::kMaskBytes;
      if (of_block || sight.positions()) {
#pragma unroll 1
        for (int i = 0; i < 2 * 128 / 32; ++i) {  // a word of a row at a time
          const int row = thread_ + i / 4 * kSideThreads, first = i % 4 * 32;
          store_shared(to + row * 16 + first / 8, int(sight.word(place, of_block, unit.rows.first + row, first, ~0u)));
        }
      } else {
        write_column_bits(to, place, unit.rows.first);
      }
    }
    if (thread_ == 0) store_shared(shared_ + Tile::kStepAt + 16 * ring_.stage, int4{flags, 0, kHalf, 0});
  }

  /// The bits of a tile of columns where position and row number are one. Its entries ascend, so what a row sees are
  /// entries up to a place, and of those that only the band shows, the ones from another place on. Bit by bit, as where
  /// there are positions, this took as long as 20 other steps.
  __device__ __forceinline__ void write_column_bits(uint32_t to, const int32_t* place, int first_row) const {
    uint32_t plain[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) plain[w] = __ballot_sync(kAllLanes, place[32 * w + thread_ % kWarpSize] >= 0);
#pragma unroll 1
    for (int row = thread_; row < 128; row += kSideThreads) {
      const int64_t at = int64_t(first_row) + row + p_.len_k - p_.len_q;
      const int past = entries_up_to(place, at), before_band = entries_up_to(place, at - p_.stripes.local);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const uint32_t up_to = first_bits(past - 32 * w), outside = first_bits(before_band - 32 * w);
        const uint32_t columns = plain[w] & (p_.causal ? up_to : ~0u), band = ~plain[w] & up_to & ~outside;
        store_shared(to + row * 16 + w * 4, int(columns | band));
      }
    }
  }
  /// How many of the 128 entries are rows up to `row`; padding is none.
  static __device__ __forceinline__ int entries_up_to(const int32_t* place, int64_t row) {
    const int64_t limit = min(row, int64_t(kColumnRow) - 1);
    int count = 0;
#pragma unroll
    for (int step = 64; step > 0; step /= 2) {
      if ((place[count + step - 1] & kColumnRow) <= limit) count += step;
    }
    return count + ((place[count] & kColumnRow) <= limit);
  }
  /// The lowest `count` bits.
  static __device__ __forceinline__ uint32_t first_bits(int count) {
    return count <= 0 ? 0 : count >= 32 ? ~0u : (1u << count) - 1;
  }

  __device__ __forceinline__ void load_query(const StripeUnit& unit) {
    if (thread_ < kWarpSize) {
      const uint32_t full = shared_ + Tile::kQueryFull + 8 * query_.stage;
      mbarrier_wait(shared_ + Tile::kQueryEmpty + 8 * query_.stage, query_.parity ^ 1);
      if (elect_lane()) {
        // The bits of a step hide what lies past the end of the keys.
        store_list_row<Tile>(shared_, row_, {unit.batch, unit.head, unit.rows.first, unit.rows.end, 0, INT32_MAX / 2});
        mbarrier_expect(full, Tile::kQueryBytes);
        const uint32_t to = shared_ + Tile::kQueryAt + query_.stage * Tile::kQueryBytes;
#pragma unroll
        for (int panel = 0; panel < Tile::kHeadPanels; ++panel) {
          tma_load(to + panel * Tile::kQueryPanel, &a_.blocks.query, 64 * panel, unit.rows.first, unit.head, unit.batch,
                   full);
        }
        mbarrier_arrive(full);
      }
      __syncwarp();
    }
    query_.advance(), ++row_;
  }

  /// A unit without keys: out 0, lse -inf.
  __device__ __forceinline__ void write_empty(const StripeUnit& unit) const {
    const int rows = unit.rows.end - unit.rows.first, chunks = p_.value_dim / 8;
    uint16_t* out = static_cast<uint16_t*>(p_.out.data) + unit.batch * p_.out.batch + unit.head * p_.out.head;
#pragma unroll 1
    for (int i = thread_; i < rows * chunks; i += kSideThreads) {
      const int row = i / chunks;
      *reinterpret_cast<uint4*>(out + (unit.rows.first + row) * p_.out.row + (i - row * chunks) * 8) =
          uint4{0, 0, 0, 0};
    }
    float* lse = p_.lse + (int64_t(unit.batch) * p_.heads_q + unit.head) * p_.len_q + unit.rows.first;
    for (int row = thread_; row < rows; row += kSideThreads) lse[row] = -kInfinity;
  }

  const StripesForward& a_;
  const AttentionForward& p_;
  const uint32_t shared_;
  char* const memory_;  // the same place
  const int thread_;
  const InputView& view_;
  const int chunks_;
  int step_ = 0, row_ = 0;  // row_: units with keys so far
  Ring<kStages> ring_;
  Ring<Tile::kQueryStages> query_;
  Ring<Tile::kValueStages> values_, last_value_;  // where this side loads them too
};

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kCtas)
    stripes_forward(const __grid_constant__ StripesForward arguments) {
  extern __shared__ char memory[];
  uint32_t shared;  // opaque, or the compiler computes it anew in every step
  asm volatile("mov.u32 %0, %1;\n" : "=r"(shared) : "r"((shared_address(memory) + 1023) & ~1023u));
  const int warpgroup = __shfl_sync(kAllLanes, int(threadIdx.x) / kGroupThreads, 0);
  if (threadIdx.x == 0) {
    constexpr int kWarps = 4 * Tile::kGroups;  // that release a buffer
    auto init = [&](int full, int empty, int stages, int producers) {
      for (int i = 0; i < stages; ++i) {
        mbarrier_init(shared + full + 8 * i, producers);
        mbarrier_init(shared + empty + 8 * i, kWarps);
      }
    };
    init(Tile::kQueryFull, Tile::kQueryEmpty, Tile::kQueryStages, 1);
    init(Tile::kKeyFull, Tile::kKeyEmpty, Tile::kKeyStages, kSideThreads);
    init(Tile::kValueFull, Tile::kValueEmpty, Tile::kValueStages, Tile::kPacked ? 1 : kSideThreads);
    mbarrier_fence_init();
    prefetch_tensor_map(&arguments.blocks.query);
  }
  __syncthreads();
  // One if/else with a role per branch: setmaxnreg takes effect in no other form.
  if (warpgroup == 0) {
    fewer_registers<Tile::kProducerRegisters>();
    char* base = memory + (shared - shared_address(memory));
    if (threadIdx.x < kSideThreads) {
      StripesProducer<Tile, 0>(arguments, shared, base).run();
    } else if constexpr (Tile::kPacked) {
      constexpr int kAt = Tile::kNextAt + 8;
      StripesPacker<Tile>(arguments, shared + kAt, reinterpret_cast<int*>(base + kAt)).run();
    } else {
      StripesProducer<Tile, 1>(arguments, shared, base).run();
    }
  } else {
    more_registers<Tile::kConsumerRegisters>();
    Consumer<Tile>(arguments.blocks, shared, warpgroup - 1).run();
  }
}

template <class Tile>
constexpr StripesForwardKernel stripes_kernel_of() {
  return {stripes_forward<Tile>, Tile::kHead, Tile::kValue, Tile::kThreads, Tile::kSharedBytes, Tile::kPacked};
}

template <class Element>
StripesForwardKernels stripes_forward_kernels_16bit() {
  static const StripesForwardKernel kernels[] = {
      stripes_kernel_of<StripesTile<Element, 64, 64, 2, 4, 4>>(),
      stripes_kernel_of<StripesTile<Element, 128, 128, 2, 2, 2>>(),
      stripes_kernel_of<StripesTile<Element, 128, 128, 1, 2, 3, true>>(),
  };
  return {kernels, int(sizeof kernels / sizeof *kernels)};
}

}  // namespace sparsekit::sm90

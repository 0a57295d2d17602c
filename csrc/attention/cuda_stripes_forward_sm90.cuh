// Stripe-sparse attention forward on Hopper (sm_90a): the consumers of the block-sparse kernel (cuda_forward_sm90.cuh),
// fed by a warpgroup that gathers rows.
//
// Tiling: one persistent CTA per multiprocessor. The 128 threads of warpgroup 0 copy the rows of K and V that a tile of
// the plan names (cuda_stripes.h), 128 keys a step, with cp.async into the panels that TMA would write: thread t
// copies chunk t % 16 of every eighth row, so that half a warp reads 256 bytes of one row. Units come from a counter,
// the longest first; Q comes by TMA. Warpgroups 1 and 2 do not know the difference.
//
// A buffer is full when all 128 threads have said so: each waits for its own copies, one load behind the one it has just
// started, and makes them visible to wgmma. Where some key of a step may be hidden from some row, thread t writes the
// bits of row t, and consumers take them for a block's packed bits.
//
// Bound: tensor cores, as for blocks. Gathering takes about 270 instructions of each producer warp for a step, beside
// 850 of the two consumer warps that share its scheduler.
#pragma once

#include "attention/cuda_forward_sm90_consumer.cuh"
#include "attention/cuda_forward_sm90_producer.cuh"
#include "attention/cuda_stripes_forward_sm90.h"
#include "attention/cuda_stripes_tiles.cuh"
#include "common/cuda/tma_sm90.cuh"

namespace sparsekit::sm90 {

/// Sizes of one kernel: those of blocks, with room for the producers' registers and the entries of four tiles.
template <class ElementType, int HEAD, int VALUE, int QUERY_STAGES, int KEY_STAGES, int VALUE_STAGES>
struct StripesTile : ForwardTile<ElementType, HEAD, VALUE, 2, 128, QUERY_STAGES, KEY_STAGES, VALUE_STAGES> {
  using Blocks = ForwardTile<ElementType, HEAD, VALUE, 2, 128, QUERY_STAGES, KEY_STAGES, VALUE_STAGES>;
  static constexpr int kProducerRegisters = 88, kConsumerRegisters = 208;
  static constexpr int kEntriesAt = (Blocks::kEnd + 15) / 16 * 16, kNextAt = kEntriesAt + TileRing<128>::kBytes;
  static constexpr int kSharedBytes = kNextAt + 8 + 1024;
  static_assert(kSharedBytes <= 227 * 1024, "shared memory of a CTA");
};

constexpr int kProducerBarrier = 5;  // named; consumers use 1 to 4

template <class Tile>
class StripesProducer {
 public:
  __device__ __forceinline__ StripesProducer(const StripesForward& arguments, uint32_t shared, char* memory)
      : a_(arguments), p_(arguments.problem), shared_(shared), memory_(memory), thread_(threadIdx.x) {}

  __device__ __forceinline__ void run() {
    int number = int(blockIdx.x);
    for (int turn = 0; number < a_.units; turn ^= 4) {
      int taken = 0;
      if (thread_ == 0) taken = fetch_and_increment(a_.plan.counter);
      run_unit(stripe_unit(p_, a_.plan, number));
      if (thread_ == 0) store_shared(shared_ + Tile::kNextAt + turn, int(gridDim.x) + taken);
      named_barrier_sync(kProducerBarrier, kGroupThreads);
      number = *reinterpret_cast<volatile int*>(memory_ + Tile::kNextAt + turn);
    }
    finish_loads();
    mbarrier_wait(shared_ + Tile::kKeyEmpty + 8 * key_.stage, key_.parity ^ 1);
    if (thread_ == 0) store_shared(shared_ + Tile::kStepAt + 16 * key_.stage, int4{kStop, 0, 0, 0});
    mbarrier_arrive(shared_ + Tile::kKeyFull + 8 * key_.stage);
  }

 private:
  __device__ __forceinline__ void run_unit(const StripeUnit& unit) {
    if (unit.rows.first >= unit.rows.end) return;
    const TileRing<128> ring(a_.plan, unit.cell, reinterpret_cast<int32_t*>(memory_ + Tile::kEntriesAt));
    const StripeSight sight(p_, unit.batch, unit.rows.first);
    int tiles = ring.count;
    if (p_.causal && !sight.positions() && a_.plan.cut.parts_of_cell() > 1) {  // what later units of the cell see
      const int end = unit.rows.end + int(p_.len_k) - int(p_.len_q);
      const int seen = entries_below(ring.columns, a_.plan.counts[unit.cell].columns, end);
      tiles = ring.block_tiles + (seen + 127) / 128;
    }
    if (tiles == 0) return write_empty(unit);
    const int64_t element = sizeof(typename Tile::Element);
    const char* key =
        static_cast<const char*>(p_.key.data) + (unit.batch * p_.key.batch + unit.kv_head * p_.key.head) * element;
    const char* value = static_cast<const char*>(p_.value.data) +
                        (unit.batch * p_.value.batch + unit.kv_head * p_.value.head) * element;
    const float* bias =
        p_.key_bias ? p_.key_bias + unit.batch * p_.key_bias_batch + unit.head * p_.key_bias_head : nullptr;

    int entry = entry_of(ring, 0);
    for (int tile = 0; tile < tiles; ++tile, ++step_) {
      int32_t* place = ring.place(step_);
      const bool of_block = ring.of_block(tile);
      place[thread_] = entry;  // read by the loads of the tile four steps ago at the latest
      named_barrier_sync(kProducerBarrier, kGroupThreads);
      if (tile + 1 < tiles) entry = entry_of(ring, tile + 1);

      mbarrier_wait(shared_ + Tile::kKeyEmpty + 8 * key_.stage, key_.parity ^ 1);
      gather<Tile::kHeadPanels>(shared_ + Tile::kKeyAt + key_.stage * Tile::kKeyBytes, key,
                                int(p_.key.row * element), place, of_block, p_.head_dim / 8);
      describe(unit, sight, place, of_block, bias, tile + 1 == tiles);
      loading(shared_ + Tile::kKeyFull + 8 * key_.stage);
      key_.advance();
      if (tile == 0) load_query(unit);
      if (tile > 0) load_values(ring, tile - 1, step_ - 1, value);
    }
    load_values(ring, tiles - 1, step_ - 1, value);
  }

  /// This thread's entry of a tile, or its word of a BlockTile.
  __device__ __forceinline__ int entry_of(const TileRing<128>& ring, int tile) const {
    if (!ring.of_block(tile)) return ring.columns[int64_t(tile - ring.block_tiles) * 128 + thread_];
    constexpr int kWords = sizeof(BlockTile) / 4;
    return thread_ < kWords ? reinterpret_cast<const int32_t*>(ring.tiles + tile)[thread_] : 0;
  }

  __device__ __forceinline__ void load_values(const TileRing<128>& ring, int tile, int step, const char* value) {
    mbarrier_wait(shared_ + Tile::kValueEmpty + 8 * value_.stage, value_.parity ^ 1);
    gather<Tile::kValuePanels>(shared_ + Tile::kValueAt + value_.stage * Tile::kValueBytes, value,
                               int(p_.value.row * int64_t(sizeof(typename Tile::Element))), ring.place(step),
                               ring.of_block(tile), p_.value_dim / 8);
    loading(shared_ + Tile::kValueFull + 8 * value_.stage);
    value_.advance();
  }

  /// Starts copying the rows of a tile into panels of 64 columns. What does not exist becomes zero.
  template <int PANELS>
  __device__ __forceinline__ void gather(uint32_t to, const char* head, int row_bytes, const int32_t* place,
                                         bool of_block, int chunks) {
    constexpr int kChunks = PANELS * 8, kRows = kGroupThreads / kChunks;  // at a time
    static_assert(kGroupThreads % kChunks == 0 && kRows % 8 == 0);
    const int chunk = thread_ % kChunks, row = thread_ / kChunks;
    const uint32_t at = to + chunk / 8 * Tile::kKeyPanel + swizzled<kPanelRowBytes>(row, chunk % 8);
    const char* from = head + chunk * kChunkBytes;
    const int end = chunk < chunks ? int(p_.len_k) : 0;
#pragma unroll 8
    for (int i = 0; i < 128; i += kRows) {
      const int key = tile_row(place, of_block, row + i);
      copy_async_16(at + i * kPanelRowBytes, from + int64_t(key) * row_bytes, key < end);
    }
  }

  /// What a step's keys bring along: the bias, the bits of what is hidden, and the Step.
  __device__ __forceinline__ void describe(const StripeUnit& unit, const StripeSight& sight, const int32_t* place,
                                           bool of_block, const float* bias, bool last) {
    if (bias) {
      const int row = tile_row(place, of_block, thread_);
      store_shared(shared_ + Tile::kBiasAt + (key_.stage * 128 + thread_) * 4,
                   row < p_.len_k ? __float_as_int(bias[row] * kLog2e) : 0);
    }
    int flags = last ? kLastStep : 0;
    if (sight.template masks<128>(place, of_block)) {
      flags |= kBits << mask_shift(0) | kBits << mask_shift(1);
      int4 bits;
      const int row = unit.rows.first + thread_;
      bits.x = int(sight.word(place, of_block, row, 0, ~0u));
      bits.y = int(sight.word(place, of_block, row, 32, ~0u));
      bits.z = int(sight.word(place, of_block, row, 64, ~0u));
      bits.w = int(sight.word(place, of_block, row, 96, ~0u));
      store_shared(shared_ + Tile::kMaskAt + key_.stage * Tile::kMaskBytes + thread_ * 16, bits);
    }
    if (thread_ == 0) store_shared(shared_ + Tile::kStepAt + 16 * key_.stage, int4{flags, 0, kHalf, 0});
  }

  /// A load was started whose end `full` is to hear of: closes it, and reports the one before.
  __device__ __forceinline__ void loading(uint32_t full) {
    copy_async_commit();
    if (pending_) {
      copy_async_wait<1>();
      fence_async_proxy();
      mbarrier_arrive(pending_);
    }
    pending_ = full;
  }
  __device__ __forceinline__ void finish_loads() {
    if (!pending_) return;
    copy_async_wait<0>();
    fence_async_proxy();
    mbarrier_arrive(pending_);
    pending_ = 0;
  }

  __device__ __forceinline__ void load_query(const StripeUnit& unit) {
    if (thread_ < kWarpSize) {
      const uint32_t full = shared_ + Tile::kQueryFull + 8 * query_.stage;
      mbarrier_wait(shared_ + Tile::kQueryEmpty + 8 * query_.stage, query_.parity ^ 1);
      if (elect_lane()) {
        store_shared(shared_ + Tile::kRowAt + 16 * query_.stage, int4{unit.batch, unit.head, unit.rows.first, 0});
        mbarrier_expect(full, Tile::kQueryBytes);
        const uint32_t to = shared_ + Tile::kQueryAt + query_.stage * Tile::kQueryBytes;
#pragma unroll
        for (int panel = 0; panel < Tile::kHeadPanels; ++panel) {
          tma_load(to + panel * Tile::kQueryPanel, &a_.blocks.query, 64 * panel, unit.rows.first, unit.head,
                   unit.batch, full);
        }
        mbarrier_arrive(full);
      }
      __syncwarp();
    }
    query_.advance();
  }

  /// A unit without keys: out 0, lse -inf.
  __device__ __forceinline__ void write_empty(const StripeUnit& unit) {
    const int rows = unit.rows.end - unit.rows.first, chunks = p_.value_dim / 8;
    uint16_t* out = static_cast<uint16_t*>(p_.out.data) + unit.batch * p_.out.batch + unit.head * p_.out.head;
#pragma unroll 1
    for (int i = thread_; i < rows * chunks; i += kGroupThreads) {
      const int row = i / chunks;
      *reinterpret_cast<uint4*>(out + (unit.rows.first + row) * p_.out.row + (i - row * chunks) * 8) =
          uint4{0, 0, 0, 0};
    }
    float* lse = p_.lse + (int64_t(unit.batch) * p_.heads_q + unit.head) * p_.len_q + unit.rows.first;
    if (thread_ < rows) lse[thread_] = -kInfinity;
  }

  const StripesForward& a_;
  const AttentionForward& p_;
  const uint32_t shared_;
  char* const memory_;  // the same place
  const int thread_;
  int step_ = 0;
  uint32_t pending_ = 0;  // barrier of the load before the last
  Ring<Tile::kQueryStages> query_;
  Ring<Tile::kKeyStages> key_;
  Ring<Tile::kValueStages> value_;
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
    init(Tile::kKeyFull, Tile::kKeyEmpty, Tile::kKeyStages, kGroupThreads);
    init(Tile::kValueFull, Tile::kValueEmpty, Tile::kValueStages, kGroupThreads);
    mbarrier_fence_init();
    prefetch_tensor_map(&arguments.blocks.query);
  }
  __syncthreads();
  // One if/else with a role per branch: setmaxnreg takes effect in no other form.
  if (warpgroup == 0) {
    fewer_registers<Tile::kProducerRegisters>();
    StripesProducer<Tile>(arguments, shared, memory + (shared - shared_address(memory))).run();
  } else {
    more_registers<Tile::kConsumerRegisters>();
    Consumer<Tile>(arguments.blocks, shared, warpgroup - 1).run();
  }
}

template <class Tile>
constexpr StripesForwardKernel stripes_kernel_of() {
  return {stripes_forward<Tile>, Tile::kHead, Tile::kValue, Tile::kThreads, Tile::kSharedBytes};
}

template <class Element>
StripesForwardKernels stripes_forward_kernels_16bit() {
  static const StripesForwardKernel kernels[] = {
      stripes_kernel_of<StripesTile<Element, 64, 64, 2, 4, 4>>(),
      stripes_kernel_of<StripesTile<Element, 128, 128, 2, 2, 2>>(),
  };
  return {kernels, int(sizeof kernels / sizeof *kernels)};
}

}  // namespace sparsekit::sm90

// Rows of K and V that a cell of a stripe plan lists, packed in memory tile by tile, so that the many units of the cell
// (groups of 1,024 rows and more) load them as blocks. Two producer warps of every CTA of the attention kernel pack
// while the others work: cells in the order in which units take them, into a ring of slots. A cell counts its tiles
// that are there, and its units wait for all of them; it counts its units that have read them, and who packs the slot's
// next cell waits for those. Both only ever wait for what was taken before, by a CTA that runs.
//
// Bound: nothing that shows. 16 heads of 32,768 tokens at 10 % in groups of 2,048 rows: 430 MB read and written once,
// 1/16 of what the units read.
#pragma once

#include "attention/cuda_forward_sm90_producer.cuh"
#include "attention/cuda_stripes_forward_sm90.h"
#include "attention/cuda_stripes_tiles.cuh"

namespace sparsekit::sm90 {

constexpr int kPackers = 64;        // threads
constexpr int kPackerBarrier = 15;  // named

/// Makes what this thread wrote to memory, or has learnt that others wrote, visible to TMA.
__device__ __forceinline__ void fence_async_global() { asm volatile("fence.proxy.async.global;\n" ::: "memory"); }

/// One more. What this thread knows to have happened is known to whoever waits for the count.
__device__ __forceinline__ void count(int32_t* counter) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;\n" ::"l"(counter) : "memory");
}
__device__ __forceinline__ void wait_count(const int32_t* counter, int wanted) {
  int counted;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];\n" : "=r"(counted) : "l"(counter) : "memory");
  } while (counted < wanted);
}

template <class Tile>
class StripesPacker {
 public:
  /// `next`: two words of shared memory.
  __device__ __forceinline__ StripesPacker(const StripesForward& arguments, uint32_t shared_next, int* next)
      : a_(arguments), p_(arguments.problem), shared_next_(shared_next), next_(next), thread_(threadIdx.x % kPackers) {}

  __device__ __forceinline__ void run() {
    const int tiles_a_cell = int(a_.plan.column_capacity / 128), items = a_.plan.cells * tiles_a_cell;
    const int units_a_cell = a_.plan.cut.parts_of_cell() * heads_of_cell(p_, a_.plan);
    int number = int(blockIdx.x);
    for (int turn = 0; number < items; turn ^= 1) {
      int taken = 0;
      if (thread_ == 0) taken = fetch_and_increment(a_.packed.counter);
      const int rank = number / tiles_a_cell, first = number % tiles_a_cell * 128;
      const StripeUnit unit = stripe_unit(p_, a_.plan, rank * units_a_cell);  // any of the cell's
      const bool exists = first < a_.plan.counts[unit.cell].columns;
      if (exists) {
        if (thread_ == 0 && rank >= a_.packed.slots) {
          wait_count(a_.packed.units + rank - a_.packed.slots, units_a_cell);
        }
        named_barrier_sync(kPackerBarrier, kPackers);
        const int32_t* entries = a_.plan.columns + unit.cell * a_.plan.column_capacity + first;
        const int64_t row = rank % a_.packed.slots * a_.plan.column_capacity + first;
        copy<Tile::kHead>(p_.key, p_.head_dim, unit, entries, a_.packed.key + row * Tile::kHead);
        copy<Tile::kValue>(p_.value, p_.value_dim, unit, entries, a_.packed.value + row * Tile::kValue);
        fence_async_global();
      }
      if (thread_ == 0) store_shared(shared_next_ + 4 * turn, int(gridDim.x) + taken);
      named_barrier_sync(kPackerBarrier, kPackers);
      if (exists && thread_ == 0) count(a_.packed.tiles + rank);
      number = *reinterpret_cast<volatile int*>(next_ + turn);
    }
  }

 private:
  /// The rows of 128 entries, DIM columns of each: zeros where there is no row, and behind `dim`.
  template <int DIM>
  __device__ __forceinline__ void copy(const InputView& view, int dim, const StripeUnit& unit, const int32_t* entries,
                                       uint16_t* to) const {
    constexpr int kChunks = DIM / 8, kStep = kPackers / kChunks, kBatch = 8;
    static_assert(kPackers % kChunks == 0 && 128 % (kStep * kBatch) == 0);
    const int chunk = thread_ % kChunks, first = thread_ / kChunks;
    const char* head = static_cast<const char*>(view.data) + 2 * (unit.batch * view.batch + unit.kv_head * view.head) +
                       chunk * kChunkBytes;
    const int64_t row_bytes = 2 * view.row;
    const int end = chunk * 8 < dim ? int(p_.len_k) : 0;
#pragma unroll 1
    for (int i = first; i < 128; i += kStep * kBatch) {
      uint4 rows[kBatch];
      int numbers[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) numbers[j] = entries[i + j * kStep] & kColumnRow;
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        rows[j] = uint4{0, 0, 0, 0};
        if (numbers[j] < end) rows[j] = __ldg(reinterpret_cast<const uint4*>(head + numbers[j] * row_bytes));
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        *reinterpret_cast<uint4*>(to + int64_t(i + j * kStep) * DIM + chunk * 8) = rows[j];
      }
    }
  }

  const StripesForward& a_;
  const AttentionForward& p_;
  const uint32_t shared_next_;
  int* const next_;  // the same place
  const int thread_;
};

}  // namespace sparsekit::sm90

// Sets of key blocks as bits in shared memory, one set per warp: they sort and drop duplicates by themselves.
#pragma once

#include "selection/cuda_support.cuh"

namespace sparsekit::cuda {

/// All 32 lanes call every member together.
class WarpBitmap {
 public:
  __device__ __forceinline__ WarpBitmap(uint32_t* words, int count) : words_(words), count_(count) {}

  __device__ __forceinline__ void clear() {
    for (int w = lane_of(); w < count_; w += kWarp) words_[w] = 0;
    __syncwarp();
  }
  /// Of one lane.
  __device__ __forceinline__ void set(int at) { atomicOr(&words_[at / 32], 1u << at % 32); }
  __device__ __forceinline__ bool holds(int at) const { return words_[at / 32] >> at % 32 & 1; }

  /// Writes the first `capacity` set bits, ascending, -1 behind them; those that do not fit are cleared.
  __device__ int emit(int32_t* to, int64_t capacity) {
    __syncwarp();
    int64_t taken = 0;
    for (int first = 0; first < count_; first += kWarp) {
      const int w = first + lane_of();
      const uint32_t word = w < count_ ? words_[w] : 0;
      const int own = __popc(word), through = warp_scan(own);
      int64_t at = taken + through - own;
      uint32_t kept = word;
      for (uint32_t left = word; left; left &= left - 1, ++at) {
        if (at < capacity) {
          to[at] = w * 32 + __ffs(int(left)) - 1;
        } else {
          kept &= ~(left & -left);
        }
      }
      if (kept != word) words_[w] = kept;
      taken += __shfl_sync(kLanes, through, kWarp - 1);
    }
    taken = min(taken, capacity);
    for (int64_t at = taken + lane_of(); at < capacity; at += kWarp) to[at] = -1;
    __syncwarp();
    return int(taken);
  }

 private:
  uint32_t* words_;
  int count_;
};

/// Warps of a CTA that keep a set of `words` words each, at most 8; 0 where not even one does.
inline int warps_with_bitmaps(int64_t words) {
  const int64_t fit = 96 * 1024 / (4 * (words > 0 ? words : 1));  // what every card since 8.0 grants to a CTA
  return int(fit < 8 ? fit : 8);
}

}  // namespace sparsekit::cuda

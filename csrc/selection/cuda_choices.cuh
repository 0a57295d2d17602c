// Scores as integers in the order of their choice, and their masses: what both choice kernels are made of.
//
// The key of a score: its bits, turned over where the sign is set, the sign turned where not, so that keys compare as
// unsigned integers as scores do; -0 is made 0 first, and `kNever` is the key of what may not be chosen (-inf, NaN).
#pragma once

#include "selection/cuda_support.cuh"

namespace sparsekit::cuda {

constexpr uint32_t kNever = 0, kZero = 0x80000000u, kAbove = 0xffffffffu;  // kAbove: no key is greater

__device__ __forceinline__ uint32_t key_of(float score) {
  if (!(score > -__builtin_huge_valf())) return kNever;
  const uint32_t bits = __float_as_uint(score + 0.f);
  return bits & kZero ? ~bits : bits | kZero;
}
__device__ __forceinline__ float score_of(uint32_t key) { return __uint_as_float(key & kZero ? key & ~kZero : ~key); }

/// Masses in whole units of 2^-shift (see Choice): sums of them are exact in any order.
struct Units {
  int shift;

  /// Of entries of which the greatest key is `highest`; `bits` = ceil(log2(entries)).
  __device__ __forceinline__ Units(uint32_t highest, int bits) {
    const uint32_t magnitude = finite(highest);
    int exponent = 0;  // magnitude < 2^exponent
    if (magnitude >> 23) {
      exponent = int(magnitude >> 23) - 126;
    } else if (magnitude) {
      exponent = 32 - __clz(int(magnitude)) - 149;
    }
    shift = 52 - bits - exponent;
  }

  /// Of one entry, rounded to the nearest unit, ties to even.
  __device__ __forceinline__ uint64_t of(uint32_t key) const {
    const uint32_t magnitude = finite(key);
    const int biased = int(magnitude >> 23);
    const uint32_t mantissa = biased ? (magnitude & 0x7fffffu) | 0x800000u : magnitude;
    const int up = (biased ? biased : 1) - 150 + shift;
    if (up >= 0) return uint64_t(mantissa) << (up & 63);  // below 2^52
    const int down = -up;
    if (down > 24) return 0;
    const uint32_t whole = mantissa >> down, rest = mantissa & ((1u << down) - 1), half = 1u << (down - 1);
    return whole + (rest > half || (rest == half && (whole & 1)));
  }

 private:
  __device__ __forceinline__ static uint32_t finite(uint32_t key) {
    const uint32_t magnitude = key > kZero ? key & ~kZero : 0;
    return magnitude < 0x7f800000u ? magnitude : 0x7f7fffffu;
  }
};

/// What is taken: keys > key, and of those equal to it the first `ties`.
struct Cut {
  uint32_t key;
  int64_t ties;
};

/// The cuts of whole heads (top-p by head), in the workspace; null otherwise.
struct HeadCuts {
  uint32_t* keys = nullptr;   // [heads]
  int64_t* ties = nullptr;    // [heads]
  int64_t* before = nullptr;  // [heads, rows]: entries equal to the cut's key in the rows before
};

struct ChoiceCall {
  Choice c;
  int bits = 0;  // ceil(log2(entries that share a cut))
  HeadCuts head;
  int candidates = 0;  // top-k of long rows: room for the candidates of a row; 0: no sample is taken
};

/// A row of the problem: [0, sinks) and [local, limit) are taken first.
template <class Element>
struct ChoiceRow {
  const Element* scores;
  const float* weights;
  int limit, sinks, local;

  __device__ __forceinline__ ChoiceRow(const Choice& c, int64_t number) {
    scores = static_cast<const Element*>(c.scores) + number * c.columns;
    weights = c.weights ? c.weights + number / c.rows * c.weights_head + number % c.rows * c.weights_row : nullptr;
    limit = int(c.row_limit ? clamped(c.row_limit[number], 0, c.columns) : c.columns);
    sinks = int(c.sink < limit ? c.sink : limit);
    local = int(c.local < limit - sinks ? limit - c.local : sinks);
  }
  __device__ __forceinline__ bool forced(int j) const { return j < sinks || j >= local; }
  __device__ __forceinline__ float value(int j) const {
    const float score = widened(scores[j]);
    return weights ? score * weights[j] : score;
  }
};

/// min_count, width and what there is, applied to a number of entries beside the forced ones.
__device__ __forceinline__ int64_t bounded(const Choice& c, int64_t others, int64_t forced, int64_t eligible) {
  int64_t total = forced + others;
  total = total < c.min_count ? c.min_count : total;
  total = total > c.width ? c.width : total;
  return clamped(total - forced, 0, eligible);
}

/// The units that top-p wants beside the forced ones, of `total` units that may be chosen; 0: none.
__device__ __forceinline__ uint64_t wanted_units(double p, uint64_t total, uint64_t forced) {
  if (!(p > 0)) return 0;
  const uint64_t wanted = uint64_t(ceil(p * double(total)));
  return wanted > forced ? wanted - forced : 0;
}

}  // namespace sparsekit::cuda

// What a consumer thread does with its scores between two products: transform, hide, the running maximum, exponentials.
//
// The accumulator layout of common/cuda/wgmma_sm90.cuh: scores[4 j + 2 r + c] is row group + 8 r (of the warp's 16),
// column 8 j + 2 pair + c, where group = lane / 4, pair = lane % 4.
#pragma once

#include "attention/cuda_forward_sm90_tile.cuh"
#include "common/cuda/math.cuh"
#include "common/cuda/mma.cuh"

namespace sparsekit::sm90 {

/// Products to scores in units of log 2, where a plain factor does not do: softcap, key bias (in shared memory, times
/// log2 e), scale <= 0.
template <int COUNT>
__device__ __forceinline__ void transform_scores(float (&s)[COUNT], const ForwardArguments& a, uint32_t bias,
                                                 int pair) {
  if (a.call.softcap > 0.f) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) s[i] = a.cap_out * tanh_fast(s[i] * a.cap_in);
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) s[i] *= a.factor;
  }
  if (!a.call.key_bias) return;
#pragma unroll
  for (int j = 0; j < COUNT / 4; ++j) {
    const int2 added = load_shared_int2(bias + (8 * j + 2 * pair) * 4);
    s[4 * j] += __int_as_float(added.x), s[4 * j + 1] += __int_as_float(added.y);
    s[4 * j + 2] += __int_as_float(added.x), s[4 * j + 3] += __int_as_float(added.y);
  }
}

/// The lowest `count` bits, for any count.
__device__ __forceinline__ uint32_t low_bits(int count) { return ~__funnelshift_lc(0u, ~0u, max(count, 0)); }

/// Hides the keys of one half (scores `s`, first key `start`) from this thread's rows, `row` and `row` + 8: s = -inf
/// there. `what`: kCut, kRange, kBits. `bits`: address of row `row`'s packed bits of the half, `bits_stride` bytes a
/// row. `positions`: address of the half's key positions.
__device__ __forceinline__ void hide_keys(float* s, const AttentionProblem& p, const ListRow& list, int row, int start,
                                          int what, uint32_t bits, int bits_stride, uint32_t positions, int pair) {
  // Bit i of visible[r][w]: row r sees key 32 w + i of the half.
  const int keys = list.keys_end - start;
  uint32_t visible[2][2] = {{low_bits(keys), low_bits(keys - 32)}, {low_bits(keys), low_bits(keys - 32)}};
  if (what & kBits) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int2 packed = load_shared_int2(bits + 8 * r * bits_stride);
      visible[r][0] &= packed.x, visible[r][1] &= packed.y;
    }
  }
  if (what & kRange && !p.key_positions) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const KeyRange range = range_of(p, list, min(row + 8 * r, list.end - 1));
      const int below = max(range.low, 0) - start, upto = max(min(range.high, list.keys_end - 1), -1) + 1 - start;
#pragma unroll
      for (int w = 0; w < 2; ++w) visible[r][w] &= low_bits(upto - 32 * w) & ~low_bits(below - 32 * w);
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const uint32_t word = visible[r][w] >> (2 * pair);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float* here = s + 16 * w + 4 * j + 2 * r;
        if (!(word & (1u << 8 * j))) here[0] = -kInfinity;
        if (!(word & (2u << 8 * j))) here[1] = -kInfinity;
      }
    }
  }
  if (what & kRange && p.key_positions) {
    const KeyRange first = range_of(p, list, min(row, list.end - 1));
    const KeyRange second = range_of(p, list, min(row + 8, list.end - 1));
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int2 at = load_shared_int2(positions + (8 * j + 2 * pair) * 4);
      if (!first.holds(at.x)) s[4 * j] = -kInfinity;
      if (!first.holds(at.y)) s[4 * j + 1] = -kInfinity;
      if (!second.holds(at.x)) s[4 * j + 2] = -kInfinity;
      if (!second.holds(at.y)) s[4 * j + 3] = -kInfinity;
    }
  }
}

/// Pairs of 16-bit numbers as exponentials() makes them, none below zero: compared as numbers or as bits.
template <class Element>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  static constexpr uint32_t k256 = 0x4380;
  static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
    asm("max.bf16x2 %0, %0, %1;\n" : "+r"(a) : "r"(b));
    return a;
  }
};
template <>
struct Pair<__half> {
  static constexpr uint32_t k256 = 0x5c00;
  static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
    asm("max.f16x2 %0, %0, %1;\n" : "+r"(a) : "r"(b));
    return a;
  }
};

/// The running softmax of this thread's two rows. P = 2^((s - reference) factor). The reference is a maximum of scores,
/// but moves only when a P passes 2^8: so exponentials need not wait for a maximum. They are taken with the reference
/// there is; their own maximum, in pairs of 16 bits beside them, says in which steps (few, and the first of a row) they
/// have to be taken again. Row by row, so that no row's bits depend on its neighbours.
template <class Element>
struct Softmax {
  float reference[2] = {-kInfinity, -kInfinity};
  float sum[2] = {0.f, 0.f};  // of this thread's columns

  /// Scores to probabilities in pairs of 16 bits, the A operand of the product with V. `sums`: this thread's, of each
  /// row; `most`: its largest probabilities, a pair for each row.
  template <int COUNT>
  __device__ __forceinline__ void exponentials(const float (&s)[COUNT], uint32_t (&p)[COUNT / 2], float factor,
                                               float (&sums)[2], uint32_t (&most)[2]) const {
    const float base0 = reference[0] == -kInfinity ? 0.f : reference[0] * factor;
    const float base1 = reference[1] == -kInfinity ? 0.f : reference[1] * factor;
    float even0 = 0.f, odd0 = 0.f, even1 = 0.f, odd1 = 0.f;
#pragma unroll
    for (int j = 0; j < COUNT / 4; ++j) {
      const float a = exp2_fast(fmaf(s[4 * j], factor, -base0)), b = exp2_fast(fmaf(s[4 * j + 1], factor, -base0));
      const float c = exp2_fast(fmaf(s[4 * j + 2], factor, -base1)), d = exp2_fast(fmaf(s[4 * j + 3], factor, -base1));
      p[2 * j] = pack<Element>(a, b), p[2 * j + 1] = pack<Element>(c, d);
      most[0] = j ? Pair<Element>::larger(most[0], p[2 * j]) : p[0];
      most[1] = j ? Pair<Element>::larger(most[1], p[2 * j + 1]) : p[1];
      even0 += a, odd0 += b, even1 += c, odd1 += d;
    }
    sums[0] = even0 + odd0, sums[1] = even1 + odd1;
  }

  /// Whether a row of this warp needs another reference.
  __device__ __forceinline__ bool passed(const uint32_t (&most)[2]) const {
    const uint32_t largest = max(max(most[0] & 0xffff, most[0] >> 16), max(most[1] & 0xffff, most[1] >> 16));
    const bool passed = largest > Pair<Element>::k256 || fminf(reference[0], reference[1]) == -kInfinity;
    return __any_sync(kAllLanes, passed);
  }

  /// Moves the reference of the rows that need it to their maximum; O must be multiplied by alpha.
  template <int COUNT>
  __device__ __forceinline__ void move(const float (&s)[COUNT], float factor, const uint32_t (&most)[2],
                                       float (&alpha)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float even = fmaxf(s[2 * r], s[2 * r + 1]), odd = fmaxf(s[4 + 2 * r], s[5 + 2 * r]);
#pragma unroll
      for (int j = 2; j < COUNT / 4; j += 2) {
        even = fmaxf(even, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
        odd = fmaxf(odd, fmaxf(s[4 * j + 4 + 2 * r], s[4 * j + 5 + 2 * r]));
      }
      const float largest = row_max(fmaxf(even, odd));
      uint32_t of_row = max(most[r] & 0xffff, most[r] >> 16);
      of_row = max(of_row, __shfl_xor_sync(kAllLanes, of_row, 1));
      of_row = max(of_row, __shfl_xor_sync(kAllLanes, of_row, 2));
      const bool moves = reference[r] == -kInfinity ? largest > -kInfinity : of_row > Pair<Element>::k256;
      alpha[r] = moves ? exp2_fast((reference[r] - largest) * factor) : 1.f;
      if (moves) reference[r] = largest;
      sum[r] *= alpha[r];
    }
  }
};

}  // namespace sparsekit::sm90

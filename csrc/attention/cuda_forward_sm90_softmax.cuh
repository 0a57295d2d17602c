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

/// Hides the keys of one half (scores `s`, first key `start`) from this thread's rows, `row` and `row` + 8: s = -inf
/// there. `what`: kCut, kRange, kBits. `bits`: address of row `row`'s packed bits of the half, `bits_stride` bytes a
/// row. `positions`: address of the half's key positions.
__device__ __forceinline__ void hide_keys(float* s, const AttentionProblem& p, int batch, int row, int start, int what,
                                          uint32_t bits, int bits_stride, uint32_t positions, int pair) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    KeyRange seen{0, int(p.len_k) - 1}, range{};
    const bool by_position = what & kRange && p.key_positions;
    if (what & kRange) {
      range = key_range(p, batch, min(row + 8 * r, int(p.len_q) - 1));
      if (!by_position) seen = {max(seen.low, range.low), min(seen.high, range.high)};
    }
    int2 packed{-1, -1};
    if (what & kBits) packed = load_shared_int2(bits + 8 * r * bits_stride);
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const uint32_t word = (range_word(seen, start + 32 * w) & uint32_t(w ? packed.y : packed.x)) >> (2 * pair);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        bool first = word >> (8 * j) & 1, second = word >> (8 * j + 1) & 1;
        if (by_position) {
          const int2 at = load_shared_int2(positions + (32 * w + 8 * j + 2 * pair) * 4);
          first = first && range.holds(at.x), second = second && range.holds(at.y);
        }
        float* here = s + 16 * w + 4 * j + 2 * r;
        if (!first) here[0] = -kInfinity;
        if (!second) here[1] = -kInfinity;
      }
    }
  }
}

/// The running softmax of this thread's two rows. P = 2^((s - largest) factor); `sum` is of this thread's columns.
struct Softmax {
  float largest[2] = {-kInfinity, -kInfinity};
  float sum[2] = {0.f, 0.f};

  /// Takes the step's scores into `largest`. True where O must be multiplied by alpha (sum already is). `largest` moves
  /// only where a row's maximum grew by more than 2^8: P stays below 256, and most steps need neither shuffles nor the
  /// O-sized multiplication. Row by row, so that no row's bits depend on its neighbours.
  template <int COUNT>
  __device__ __forceinline__ bool take(const float (&s)[COUNT], float factor, float (&alpha)[2]) {
    constexpr float kSlack = 8.f;
    float most[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float even = fmaxf(s[2 * r], s[2 * r + 1]), odd = fmaxf(s[4 + 2 * r], s[5 + 2 * r]);
#pragma unroll
      for (int j = 2; j < COUNT / 4; j += 2) {
        even = fmaxf(even, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
        odd = fmaxf(odd, fmaxf(s[4 * j + 4 + 2 * r], s[4 * j + 5 + 2 * r]));
      }
      most[r] = fmaxf(even, odd);
    }
    // -inf minus -inf is NaN: not grown.
    const bool grew = (most[0] - largest[0]) * factor > kSlack || (most[1] - largest[1]) * factor > kSlack;
    if (!__any_sync(kAllLanes, grew)) return false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float row = row_max(most[r]);
      const bool moves = (row - largest[r]) * factor > kSlack;
      alpha[r] = moves ? exp2_fast((largest[r] - row) * factor) : 1.f;
      if (moves) largest[r] = row;
      sum[r] *= alpha[r];
    }
    return true;
  }

  /// Scores to probabilities, in pairs of 16 bits: the A operand of the product with V.
  template <class Element, int COUNT>
  __device__ __forceinline__ void exponentials(const float (&s)[COUNT], uint32_t (&p)[COUNT / 2], float factor) {
    const float base0 = largest[0] == -kInfinity ? 0.f : largest[0] * factor;
    const float base1 = largest[1] == -kInfinity ? 0.f : largest[1] * factor;
    float even0 = 0.f, odd0 = 0.f, even1 = 0.f, odd1 = 0.f;
#pragma unroll
    for (int j = 0; j < COUNT / 4; ++j) {
      const float a = exp2_fast(fmaf(s[4 * j], factor, -base0)), b = exp2_fast(fmaf(s[4 * j + 1], factor, -base0));
      const float c = exp2_fast(fmaf(s[4 * j + 2], factor, -base1)), d = exp2_fast(fmaf(s[4 * j + 3], factor, -base1));
      p[2 * j] = pack<Element>(a, b), p[2 * j + 1] = pack<Element>(c, d);
      even0 += a, odd0 += b, even1 += c, odd1 += d;
    }
    sum[0] += even0 + odd0, sum[1] += even1 + odd1;
  }
};

}  // namespace sparsekit::sm90

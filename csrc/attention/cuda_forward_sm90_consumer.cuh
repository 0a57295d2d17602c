// A consumer warpgroup of the Hopper forward: 64 query rows, all products and softmax.
//
// A step issues S = q k^T of its keys, then O += P v of the step before, and takes exponentials of S while (through the
// other warpgroup, or the other CTA) the tensor cores stay busy. Across list rows too: Q is free for the next row when
// the last scores of a row are there, one step before they become O.
#pragma once

#include "attention/cuda_forward_sm90_softmax.cuh"
#include "common/cuda/wgmma_sm90.cuh"

namespace sparsekit::sm90 {

/// Transposes 4 x 4 words over the four lanes of a row: x[i] of lane p and x[p] of lane i change places (p = lane % 4).
__device__ __forceinline__ void transpose_in_row(uint32_t (&x)[4], int p) {
#pragma unroll
  for (int step = 1; step <= 2; ++step) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int low = step == 1 ? 2 * k : k, high = low + step;  // they differ in the step's bit
      const bool upper = p & step;
      const uint32_t received = __shfl_xor_sync(kAllLanes, upper ? x[low] : x[high], step);
      x[low] = upper ? received : x[low], x[high] = upper ? x[high] : received;
    }
  }
}

template <class Tile>
class Consumer {
 public:
  /// `group`: which 64 rows of the query block.
  __device__ __forceinline__ Consumer(const ForwardArguments& arguments, uint32_t shared, int group)
      : a_(arguments),
        shared_(shared),
        group_(Tile::kGroups == 1 ? 0 : group),
        warp_(threadIdx.x % kGroupThreads / kWarpSize),
        lane_(threadIdx.x % kWarpSize),
        factor_(arguments.plain ? arguments.factor : 1.f),
        query_low_(descriptor_low(shared + Tile::kQueryAt + group_ * 64 * kPanelRowBytes, 16)),
        key_low_(descriptor_low(shared + Tile::kKeyAt, 16)),
        value_low_(descriptor_low(shared + Tile::kValueAt, Tile::kKeyPanel)) {
    // Opaque, or the compiler computes them anew in every step.
    asm volatile("" : "+r"(query_low_), "+r"(key_low_), "+r"(value_low_));
  }

  __device__ __forceinline__ void run() {
    clear_outputs();
    if (!take_step()) return;
    wait_query();
    first_step();
    if constexpr (kBuffers == 1) {
      while (advance<0>()) {
      }
    } else {
      while (advance<0>() && advance<1>()) {
      }
    }
  }

 private:
  using Element = typename Tile::Element;
  static constexpr int kScores = Tile::kKeys / 2, kOutputs = Tile::kValue / 2;  // registers of a thread

  /// At small head dimensions registers hold P of two steps: exponentials need not wait for the product with P before.
  static constexpr int kBuffers = Tile::kProbabilityBuffers;

  /// The next step; p_[BUFFER] is of the step before. False: that was the last.
  template <int BUFFER>
  __device__ __forceinline__ bool advance() {
    const bool new_row = flags_ & kLastStep;
    if (!take_step()) {
      wait_values();
      issue_values(p_[BUFFER]);
      wgmma_wait<0>();
      pin(o_);
      write_rows(softmax_, row_);
      return false;
    }
    if (new_row) {
      step<true, BUFFER>();
    } else {
      step<false, BUFFER>();
    }
    return true;
  }

  /// Waits for the next step's keys. False: there is none.
  __device__ __forceinline__ bool take_step() {
    mbarrier_wait(shared_ + Tile::kKeyFull + 8 * key_.stage, key_.parity);
    const int4 step = load_shared_int4(shared_ + Tile::kStepAt + 16 * key_.stage);
    flags_ = __shfl_sync(kAllLanes, step.x, 0);
    starts_[0] = step.y, starts_[1] = step.z;
    return !(flags_ & kStop);
  }
  __device__ __forceinline__ void wait_query() {
    mbarrier_wait(shared_ + Tile::kQueryFull + 8 * query_.stage, query_.parity);
  }
  __device__ __forceinline__ void wait_values() {
    mbarrier_wait(shared_ + Tile::kValueFull + 8 * value_.stage, value_.parity);
  }
  /// This warp is done with a buffer. Every warp says so for itself: it has waited for its own products only.
  __device__ __forceinline__ void release(int barrier) {
    __syncwarp();
    if (lane_ == 0) mbarrier_arrive(shared_ + barrier);
  }
  __device__ __forceinline__ void release_keys() {
    release(Tile::kKeyEmpty + 8 * key_.stage);
    key_.advance();
  }
  __device__ __forceinline__ void release_values() {
    release(Tile::kValueEmpty + 8 * value_.stage);
    value_.advance();
  }

  /// s = q k^T. `s` is local to a step and not set: as a member it would be moved from register to register in between.
  __device__ __forceinline__ void issue_scores(float (&s)[kScores]) {
    const uint32_t q = query_low_ + query_.stage * (Tile::kQueryBytes >> 4);
    const uint32_t k = key_low_ + key_.stage * (Tile::kKeyBytes >> 4);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < Tile::kHead / 16; ++i) {
      const int panel = i / 4, inside = i % 4 * 32;
      wgmma_shared<Element>(s, descriptor(q + ((panel * Tile::kQueryPanel + inside) >> 4)),
                            descriptor(k + ((panel * Tile::kKeyPanel + inside) >> 4)), i > 0);
    }
    wgmma_commit();
  }

  /// o_ += p v. It has a fence of its own: without, ptxas serialises the products (C7520).
  __device__ __forceinline__ void issue_values(uint32_t (&p)[kScores / 2]) {
    const uint32_t v = value_low_ + value_.stage * (Tile::kValueBytes >> 4);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < Tile::kKeys / 16; ++i) {
      wgmma_registers<Element>(o_, &p[4 * i], descriptor(v + ((i * 16 * kPanelRowBytes) >> 4)));
    }
    wgmma_commit();
  }

  /// From products to scores that a maximum may be taken of; then the step's keys, and behind the row's last products
  /// its queries, may be overwritten.
  __device__ __forceinline__ void finish_scores(float (&s)[kScores]) {
    pin(s);
    if (flags_ & kLastStep) release(Tile::kQueryEmpty + 8 * query_.stage);
    if (!a_.plain) transform_scores(s, a_, shared_ + Tile::kBiasAt + key_.stage * Tile::kKeys * 4, lane_ % 4);
    if (flags_ & kAnyMask) hide(s);
    release_keys();
  }

  __device__ __forceinline__ void hide(float (&s)[kScores]) {
    const AttentionProblem& p = a_.call;
    const ListRow list = load_list_row<Tile>(shared_, row_);
    const int local = group_ * 64 + warp_ * 16 + lane_ / 4;
    const uint32_t bits = shared_ + Tile::kMaskAt + key_.stage * Tile::kMaskBytes;
    const uint32_t positions = shared_ + Tile::kPositionAt + key_.stage * Tile::kKeys * 4;
    const int stride = p.lists.block_k / 8;
#pragma unroll
    for (int half = 0; half < Tile::kHalves; ++half) {
      const int what = flags_ >> mask_shift(half) & 15;
      if (!what) continue;
      // Blocks of 128 have 16 bytes of bits a row, shared by both halves; blocks of 64 lie behind one another.
      const bool upper = Tile::kHalves == 2 ? half : what & kUpper;
      const int in_block = p.lists.block_k == 128 ? 8 * upper : half * Tile::kRows * 8;
      hide_keys(s + 32 * half, p, list, list.first + local, starts_[half], what, bits + in_block + local * stride,
                stride, positions + half * kHalf * 4, lane_ % 4);
    }
  }

  /// The first step of the first list row.
  __device__ __forceinline__ void first_step() {
    float s[kScores] = {};
    issue_scores(s);
    wgmma_wait<0>();
    finish_scores(s);
    first_probabilities(s, p_[0]);
  }

  /// One step, its keys taken: its scores beside O of the step before. NEW_ROW: that was the last of its list row.
  template <bool NEW_ROW, int BUFFER>
  __device__ __forceinline__ void step() {
    float s[kScores] = {}, alpha[2];
    auto& p = p_[(BUFFER + 1) % kBuffers];
    bool moved = false;
    if constexpr (NEW_ROW) {
      query_.advance(), ++row_;
      wait_query();
    }
    issue_scores(s);
    wait_values();
    issue_values(p_[BUFFER]);
    wgmma_wait<1>();
    finish_scores(s);
    if constexpr (!NEW_ROW && kBuffers == 2) moved = probabilities(s, p, alpha);
    wgmma_wait<0>();
    pin(o_);
    pin(p_[BUFFER]);
    release_values();
    if constexpr (NEW_ROW) {
      write_rows(softmax_, row_ - 1);
      clear_outputs();
      first_probabilities(s, p);
    } else {
      if constexpr (kBuffers == 1) moved = probabilities(s, p, alpha);
      if (moved) {
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) o_[i] *= alpha[i / 2 % 2];
      }
    }
  }

  /// Probabilities of a step's scores. True: O must be multiplied by alpha.
  __device__ __forceinline__ bool probabilities(const float (&s)[kScores], uint32_t (&p)[kScores / 2],
                                                float (&alpha)[2]) {
    float sums[2];
    uint32_t most[2];
    softmax_.exponentials(s, p, factor_, sums, most);
    const bool passed = softmax_.passed(most);
    if (passed) {
      softmax_.move(s, factor_, most, alpha);
      softmax_.exponentials(s, p, factor_, sums, most);
    }
    softmax_.sum[0] += sums[0], softmax_.sum[1] += sums[1];
    return passed;
  }

  /// Probabilities of the first scores of a row.
  __device__ __forceinline__ void first_probabilities(const float (&s)[kScores], uint32_t (&p)[kScores / 2]) {
    float alpha[2];
    uint32_t most[2] = {0, 0};
    softmax_ = {};
    softmax_.move(s, factor_, most, alpha);
    softmax_.exponentials(s, p, factor_, softmax_.sum, most);
  }

  /// out = O / (l + 2^(sink - m)), lse = m + log l. The four lanes of a row exchange what they have of 32 columns until
  /// each has 8 neighbouring ones: 16 bytes, stored at once, with neither shared memory nor a barrier in between.
  __device__ __forceinline__ void write_rows(const Softmax<Element>& softmax, int row_number) {
    const AttentionForward& p = a_.call;
    const ListRow list = load_list_row<Tile>(shared_, row_number);
    const int pair = lane_ % 4, first_row = list.first + group_ * 64 + warp_ * 16 + lane_ / 4;
    uint16_t* out = static_cast<uint16_t*>(p.out.data) + list.batch * p.out.batch + list.head * p.out.head + 8 * pair;
    float inverse[2];
    uint16_t* to[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = row_sum(softmax.sum[r]), most = softmax.reference[r] * factor_;  // in units of log 2
      float normaliser = sum;
      if (p.sinks && sum > 0.f) normaliser += exp2_fast(p.sinks[list.head] * kLog2e - most);
      inverse[r] = sum == 0.f ? 0.f : __fdividef(1.f, normaliser);  // NaN stays NaN
      const int row = first_row + 8 * r;
      to[r] = row < list.end ? out + row * p.out.row : nullptr;
      if (pair == 0 && row < list.end) {
        p.lse[(int64_t(list.batch) * p.heads_q + list.head) * p.len_q + row] =
            sum == 0.f ? -kInfinity : (most + log2_fast(sum)) * kLn2;
      }
    }
#pragma unroll
    for (int k = 0; k < Tile::kValue / 32; ++k) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        uint32_t x[4];  // of every 8 columns this lane's two
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* o = o_ + 16 * k + 4 * i + 2 * r;
          x[i] = pack<Element>(o[0] * inverse[r], o[1] * inverse[r]);
        }
        transpose_in_row(x, pair);
        if (to[r] && 32 * k + 8 * pair < p.value_dim) {
          *reinterpret_cast<uint4*>(to[r] + 32 * k) = uint4{x[0], x[1], x[2], x[3]};
        }
      }
    }
  }

  __device__ __forceinline__ void clear_outputs() {
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) o_[i] = 0.f;
  }

  const ForwardArguments& a_;
  const uint32_t shared_;
  const int group_, warp_, lane_;
  const float factor_;
  uint32_t query_low_, key_low_, value_low_;
  Ring<Tile::kQueryStages> query_;
  Ring<Tile::kKeyStages> key_;
  Ring<Tile::kValueStages> value_;
  int row_ = 0, flags_ = 0, starts_[2];
  float o_[kOutputs];
  uint32_t p_[kBuffers][kScores / 2];
  Softmax<Element> softmax_;
};

}  // namespace sparsekit::sm90

// A consumer warpgroup of the Hopper forward: 64 query rows, all products and softmax.
//
// A step issues S = q k^T of its keys, then O += P v of the step before, and takes exponentials of S while (through the
// other warpgroup, or the other CTA) the tensor cores stay busy. Across list rows too, where Q has two buffers.
#pragma once

#include "attention/cuda_forward_sm90_softmax.cuh"
#include "common/cuda/wgmma_sm90.cuh"

namespace sparsekit::sm90 {

/// Stores four 8x8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8; register i of
/// lane l holds elements (row l / 4, columns 2 (l % 4) and + 1) of matrix i.
__device__ __forceinline__ void store_matrices(uint32_t at, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(at), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
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
    if (Tile::kTurns && group_ == 1) named_barrier_arrive(kTurnBarrier, 2 * kGroupThreads);  // group 0 goes first
    if (!take_step()) return;
    wait_query();
    first_step();
    for (;;) {
      while (!(flags_ & kLastStep)) {
        take_step();
        step<false>();
      }
      if constexpr (Tile::kAcrossRows) {
        if (!take_step()) break;
        step<true>();
      } else {
        finish_row();
        if (!take_step()) return;
        wait_query();
        first_step();
      }
    }
    finish_row();
  }

 private:
  static constexpr int kScores = Tile::kKeys / 2, kOutputs = Tile::kValue / 2;  // registers of a thread
  static constexpr int kTurnBarrier = 1, kRowBarrier = 3;                       // + group

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

  /// s_ = q k^T
  __device__ __forceinline__ void issue_scores() {
    const uint32_t q = query_low_ + query_.stage * (Tile::kQueryBytes >> 4);
    const uint32_t k = key_low_ + key_.stage * (Tile::kKeyBytes >> 4);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < Tile::kHead / 16; ++i) {
      const int panel = i / 4, inside = i % 4 * 32;
      wgmma_shared<typename Tile::Element>(s_, descriptor(q + ((panel * Tile::kQueryPanel + inside) >> 4)),
                                           descriptor(k + ((panel * Tile::kKeyPanel + inside) >> 4)), i > 0);
    }
    wgmma_commit();
  }

  /// o_ += p v. It has a fence of its own: without, ptxas serialises the products (C7520).
  __device__ __forceinline__ void issue_values() {
    const uint32_t v = value_low_ + value_.stage * (Tile::kValueBytes >> 4);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < Tile::kKeys / 16; ++i) {
      wgmma_registers<typename Tile::Element>(o_, &p_[4 * i], descriptor(v + ((i * 16 * kPanelRowBytes) >> 4)));
    }
    wgmma_commit();
  }

  /// From products to scores that a maximum may be taken of; then the step's keys may be overwritten.
  __device__ __forceinline__ void finish_scores() {
    pin(s_);
    if (!a_.plain) transform_scores(s_, a_, shared_ + Tile::kBiasAt + key_.stage * Tile::kKeys * 4, lane_ % 4);
    if (flags_ & kAnyMask) hide();
    release_keys();
  }

  __device__ __forceinline__ void hide() {
    const AttentionProblem& p = a_.call;
    const int4 at = load_shared_int4(shared_ + Tile::kRowAt + 16 * query_.stage);
    const int local = group_ * 64 + warp_ * 16 + lane_ / 4;
    const uint32_t bits = shared_ + Tile::kMaskAt + key_.stage * Tile::kMaskBytes;
    const uint32_t positions = shared_ + Tile::kPositionAt + key_.stage * Tile::kKeys * 4;
    const int stride = p.lists.block_k / 8;
#pragma unroll
    for (int half = 0; half < Tile::kHalves; ++half) {
      const int what = flags_ >> mask_shift(half) & 7;
      if (!what) continue;
      // Blocks of 128 have 16 bytes of bits a row, shared by both halves; blocks of 64 lie behind one another.
      const int in_block = p.lists.block_k == 128 ? (starts_[half] & 64) / 8 : half * Tile::kRows * 8;
      hide_keys(s_ + 32 * half, p, at.x, at.z + local, starts_[half], what, bits + in_block + local * stride, stride,
                positions + half * kHalf * 4, lane_ % 4);
    }
  }

  /// The first step of a list row with no row before it.
  __device__ __forceinline__ void first_step() {
    float alpha[2];
    issue_scores();
    wgmma_wait<0>();
    finish_scores();
    softmax_ = Softmax{};
    softmax_.take(s_, factor_, alpha);
    softmax_.template exponentials<typename Tile::Element>(s_, p_, factor_);
  }

  /// One step, its keys taken: its scores beside O of the step before. NEW_ROW: that was the last of its list row.
  template <bool NEW_ROW>
  __device__ __forceinline__ void step() {
    float alpha[2];
    const Ring<Tile::kQueryStages> before = query_;
    if constexpr (NEW_ROW) {
      query_.advance();
      wait_query();
    }
    if (Tile::kTurns) named_barrier_sync(kTurnBarrier + group_, 2 * kGroupThreads);
    issue_scores();
    wait_values();
    issue_values();
    if (Tile::kTurns) named_barrier_arrive(kTurnBarrier + 1 - group_, 2 * kGroupThreads);
    wgmma_wait<1>();
    finish_scores();
    const Softmax finished = softmax_;
    if constexpr (NEW_ROW) softmax_ = Softmax{};
    const bool moved = softmax_.take(s_, factor_, alpha);
    wgmma_wait<0>();  // issuing blocks until the tensor cores are nearly done: O is there by now
    pin(o_);
    pin(p_);
    release_values();
    if constexpr (NEW_ROW) {
      write_rows(finished, before.stage);
    } else if (moved) {
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) o_[i] *= alpha[i / 2 % 2];
    }
    softmax_.template exponentials<typename Tile::Element>(s_, p_, factor_);
  }

  /// The last product of a list row with no row after it.
  __device__ __forceinline__ void finish_row() {
    wait_values();
    issue_values();
    wgmma_wait<0>();
    pin(o_);
    pin(p_);
    release_values();
    write_rows(softmax_, query_.stage);
    query_.advance();
  }

  /// out = O / (l + 2^(sink - m)), lse = m + log l. O goes through its own rows of Q's buffer, so that global memory is
  /// written 16 bytes at a time; then the buffer is released, and O is 0.
  __device__ __forceinline__ void write_rows(const Softmax& softmax, int query_stage) {
    using Element = typename Tile::Element;
    const AttentionForward& p = a_.call;
    const int4 at = load_shared_int4(shared_ + Tile::kRowAt + 16 * query_stage);
    const int first_row = at.z + group_ * 64 + warp_ * 16, rows = int(p.len_q) - first_row;
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = row_sum(softmax.sum[r]), most = softmax.largest[r] * factor_;  // in units of log 2
      float normaliser = sum;
      if (p.sinks && sum > 0.f) normaliser += exp2_fast(p.sinks[at.y] * kLog2e - most);
      inverse[r] = sum == 0.f ? 0.f : __fdividef(1.f, normaliser);  // NaN stays NaN
      const int row = lane_ / 4 + 8 * r;
      if (lane_ % 4 == 0 && row < rows) {
        p.lse[(int64_t(at.x) * p.heads_q + at.y) * p.len_q + first_row + row] =
            sum == 0.f ? -kInfinity : (most + log2_fast(sum)) * kLn2;
      }
    }
    named_barrier_sync(kRowBarrier + group_, kGroupThreads);  // no warp's product reads these rows of Q any more
    const uint32_t staged =
        shared_ + Tile::kQueryAt + query_stage * Tile::kQueryBytes + (group_ * 64 + warp_ * 16) * kPanelRowBytes;
    const uint32_t mine = staged + lane_ % 16 * kPanelRowBytes;
#pragma unroll
    for (int k = 0; k < Tile::kValue / 16; ++k) {
      const float* o = o_ + 8 * k;
      const int chunk = (2 * k % 8 + lane_ / 16) ^ (lane_ % 8);
      store_matrices(
          mine + k / 4 * Tile::kQueryPanel + chunk * kChunkBytes, pack<Element>(o[0] * inverse[0], o[1] * inverse[0]),
          pack<Element>(o[2] * inverse[1], o[3] * inverse[1]), pack<Element>(o[4] * inverse[0], o[5] * inverse[0]),
          pack<Element>(o[6] * inverse[1], o[7] * inverse[1]));
    }
    __syncwarp();
    constexpr int kChunks = Tile::kValue / 8;  // of a row
    uint16_t* out = static_cast<uint16_t*>(p.out.data) + at.x * p.out.batch + at.y * p.out.head;
#pragma unroll 4
    for (int i = lane_; i < 16 * kChunks; i += kWarpSize) {
      const int row = i / kChunks, chunk = i % kChunks;
      if (row >= rows || chunk * 8 >= p.value_dim) continue;
      const int4 values = load_shared_int4(staged + chunk / 8 * Tile::kQueryPanel + row * kPanelRowBytes +
                                           ((chunk % 8) ^ (row % 8)) * kChunkBytes);
      *reinterpret_cast<int4*>(out + (first_row + row) * p.out.row + chunk * 8) = values;
    }
    fence_async_proxy();  // what was staged, before TMA writes the next Q
    release(Tile::kQueryEmpty + 8 * query_stage);
    clear_outputs();
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
  int flags_ = 0, starts_[2];
  float s_[kScores], o_[kOutputs];
  uint32_t p_[kScores / 2];
  Softmax softmax_;
};

}  // namespace sparsekit::sm90

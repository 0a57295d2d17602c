// The ring of tiles in shared memory and the products of it (Hopper): what block-sparse products and sampled ones
// share.
//
//   D[64 x 256] += A[64 x 64] B[64 x 256]   a warpgroup, a step: four wgmma of m64n256k16, operands in shared memory
//
// Two warpgroups share a step. SPLIT: A has 128 rows, 64 for each, and both read the same 256 columns of B. Else A has
// 64 rows for both, and B 512 columns, 256 for each. 64 rows of weights on the short side and 256 tokens on the long
// one need 10 KB of shared memory per 128 cycles of wgmma; the other way round, with a block of 64, it would be bound
// by it. Bytes of L2 per step: SPLIT 48 KB for 4.2 MFLOP (85 FLOP/B), else 72 KB (57).
//
// Operands lie as TMA writes them (common/cuda/tma_sm90.cuh), either way round: TA, TB say that the contraction goes
// down the panel's rows, as in a product with transposed weights or in dW = dy^T x.
#pragma once

#include "common/cuda/barriers_sm90.cuh"
#include "common/cuda/tma_sm90.cuh"
#include "common/cuda/wgmma_sm90.cuh"

namespace sparsekit::cuda {

constexpr int kGroupThreads = 128;             // of a warpgroup
constexpr int kThreads90 = 3 * kGroupThreads;  // two that multiply, one whose first warp loads
constexpr int kConsumerWarps = 8;
constexpr int kSums = 128;                         // of a thread
constexpr int32_t kNowhere = -(int32_t(1) << 30);  // a coordinate that TMA finds outside of any tensor: zeros

template <bool SPLIT>
struct Step {
  static constexpr int kM = SPLIT ? 128 : 64, kN = SPLIT ? 256 : 512, kStages = SPLIT ? 4 : 3;
  static constexpr int kBytesA = kM * 128, kBytesB = kN * 128, kBytes = kBytesA + kBytesB;
  static constexpr int kRingBytes = kStages * kBytes;

  /// Where a warpgroup has its operands in a stage, and its sums in the tile.
  __device__ __forceinline__ static int a_of(int group) { return SPLIT ? group * 64 * 128 : 0; }
  __device__ __forceinline__ static int b_of(int group) { return kBytesA + (SPLIT ? 0 : group * 256 * 128); }
  __device__ __forceinline__ static int m_of(int group) { return SPLIT ? group * 64 : 0; }
  __device__ __forceinline__ static int n_of(int group) { return SPLIT ? 0 : group * 256; }
};

#define SPARSEKIT_NAMES_OF_96 SPARSEKIT_NAMES_OF_64 ", " SPARSEKIT_NAMES_4 ", " SPARSEKIT_NAMES_5
#define SPARSEKIT_OPERANDS_OF_96 SPARSEKIT_OPERANDS_OF_64, SPARSEKIT_D16(d, 64), SPARSEKIT_D16(d, 80)
/// D [64 x 64 BOXES] in the first 32 BOXES sums of each thread.
template <class Element, bool TA, bool TB, int BOXES>
__device__ __forceinline__ void wgmma_m64(float (&d)[kSums], uint64_t a, uint64_t b, bool accumulate) {
#define SPARSEKIT_WGMMA(N, COUNT, A, B, P, TAKES_A, TAKES_B, TYPE)                                                     \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P ", 0;\nwgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE      \
               "." TYPE " {" SPARSEKIT_NAMES_OF_##COUNT "}, %" A ", %" B ", p, 1, 1, %" TAKES_A ", %" TAKES_B ";\n}\n" \
               : SPARSEKIT_OPERANDS_OF_##COUNT                                                                         \
               : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(TA)), "n"(int(TB)))
#define SPARSEKIT_WGMMA_OF(TYPE)                                                             \
  if constexpr (BOXES == 1) SPARSEKIT_WGMMA("64", 32, "32", "33", "34", "35", "36", TYPE);   \
  if constexpr (BOXES == 2) SPARSEKIT_WGMMA("128", 64, "64", "65", "66", "67", "68", TYPE);  \
  if constexpr (BOXES == 3) SPARSEKIT_WGMMA("192", 96, "96", "97", "98", "99", "100", TYPE); \
  if constexpr (BOXES == 4) SPARSEKIT_WGMMA("256", 128, "128", "129", "130", "131", "132", TYPE)
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    SPARSEKIT_WGMMA_OF("bf16");
  } else {
    SPARSEKIT_WGMMA_OF("f16");
  }
#undef SPARSEKIT_WGMMA_OF
#undef SPARSEKIT_WGMMA
}

/// Addresses in shared memory of a kernel's ring: stages, then whatever the kernel adds, then the barriers.
template <bool SPLIT>
struct Pipeline {
  static constexpr int kBarrierBytes = Step<SPLIT>::kStages * 16;

  uint32_t stages, barriers;
  Ring<Step<SPLIT>::kStages> ring;

  __device__ __forceinline__ uint32_t stage() const { return stages + uint32_t(ring.stage * Step<SPLIT>::kBytes); }
  __device__ __forceinline__ uint32_t full() const { return barriers + uint32_t(ring.stage * 16); }
  __device__ __forceinline__ uint32_t empty() const { return full() + 8; }

  /// One thread, before the first __syncthreads.
  __device__ __forceinline__ void init() const {
    for (int i = 0; i < Step<SPLIT>::kStages; ++i) {
      mbarrier_init(barriers + uint32_t(i * 16), 1);
      mbarrier_init(barriers + uint32_t(i * 16) + 8, kConsumerWarps);
    }
    mbarrier_fence_init();
  }
};

/// d = the product of the next `steps` (one or more) steps of the ring, all of whose stages it releases. Of B, BOXES
/// times 64 columns from byte `b_of` of a stage on.
template <class Element, bool TA, bool TB, bool SPLIT, int BOXES = 4>
__device__ __forceinline__ void multiply(float (&d)[kSums], Pipeline<SPLIT>& pipeline, int32_t steps, int group,
                                         int b_of) {
  constexpr uint32_t kStepA = (TA ? 2048 : 32) / 16, kStepB = (TB ? 2048 : 32) / 16;  // of 16 numbers
  const bool leader = threadIdx.x % 32 == 0;
  uint32_t before = 0;  // the barrier to arrive at when the products of the step before have ended
#pragma unroll 1
  for (int32_t step = 0; step < steps; ++step) {
    mbarrier_wait(pipeline.full(), pipeline.ring.parity);
    const uint32_t a = descriptor_low(pipeline.stage() + Step<SPLIT>::a_of(group), 16);
    const uint32_t b = descriptor_low(pipeline.stage() + uint32_t(b_of), TB ? 64 * 128 : 16);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      wgmma_m64<Element, TA, TB, BOXES>(d, descriptor(a + k * kStepA), descriptor(b + k * kStepB), step > 0 || k > 0);
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (step > 0 && leader) mbarrier_arrive(before);
    before = pipeline.empty();
    pipeline.ring.advance();
  }
  wgmma_wait<0>();
  pin(d);
  if (leader) mbarrier_arrive(before);
}

}  // namespace sparsekit::cuda

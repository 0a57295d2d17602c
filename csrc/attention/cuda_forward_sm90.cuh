// Block-sparse attention forward on Hopper (sm_90a): wgmma, TMA, warps of their own for loading.
//
//   S = q k^T,  P = exp2(S scale log2e - m),  l += rowsum P,  O = O exp2(m_old - m) + P v,  out = O / l
//
// Tiling: one persistent CTA per multiprocessor, three warpgroups. The first two own 64 rows of a query block of 128
// each (208 registers a thread: S 64, O up to 128, P 32) and share its key blocks, 128 keys a step: one block of 128,
// or any two of 64. One warp of the third loads (88 registers). Query blocks of 64: one consumer warpgroup, two CTAs.
// Rows of the lists come from a counter over a list that is sorted on the device, the longest first.
//
// Order: q k^T of a step is issued before P v of the step before, across list rows too. Exponentials are taken with the
// maximum of earlier steps and only checked (cuda_forward_sm90_softmax.cuh). Keys with any mask take a branch; steps of
// full blocks contain no mask arithmetic.
//
// Bound: tensor cores and the card's power limit (head dimension 128), the chain from S to P (64), L2 bandwidth (query
// blocks of 64). Figures: docs/attention-performance-cuda.md.
//
// Sources: FlashAttention-3 (Shah et al. 2024) sections 3.1 and 3.2; that O is rescaled rarely is FlashAttention-4's
// idea.
#pragma once

#include "attention/cuda_forward_sm90_consumer.cuh"
#include "attention/cuda_forward_sm90_producer.cuh"

namespace sparsekit::sm90 {

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kCtas)
    attention_forward(const __grid_constant__ ForwardArguments arguments) {
  extern __shared__ char memory[];
  uint32_t shared;  // opaque, or the compiler computes it anew in every step
  asm volatile("mov.u32 %0, %1;\n" : "=r"(shared) : "r"((shared_address(memory) + 1023) & ~1023u));
  const int warpgroup = __shfl_sync(kAllLanes, int(threadIdx.x) / kGroupThreads, 0);
  if (threadIdx.x == 0) {
    constexpr int kWarps = 4 * Tile::kGroups;  // that release a buffer
    auto init = [&](int full, int empty, int stages) {
      for (int i = 0; i < stages; ++i) {
        mbarrier_init(shared + full + 8 * i, 1);
        mbarrier_init(shared + empty + 8 * i, kWarps);
      }
    };
    init(Tile::kQueryFull, Tile::kQueryEmpty, Tile::kQueryStages);
    init(Tile::kKeyFull, Tile::kKeyEmpty, Tile::kKeyStages);
    init(Tile::kValueFull, Tile::kValueEmpty, Tile::kValueStages);
    mbarrier_init(shared + Tile::kCutValues, 1);
    mbarrier_fence_init();
    prefetch_tensor_map(&arguments.query);
    prefetch_tensor_map(&arguments.key);
    prefetch_tensor_map(&arguments.value);
  }
  __syncthreads();
  // One if/else with a role per branch: setmaxnreg takes effect in no other form.
  if (warpgroup == Tile::kGroups) {
    if constexpr (Tile::kSharesRegisters) fewer_registers<Tile::kProducerRegisters>();
    if (threadIdx.x < Tile::kGroups * kGroupThreads + kWarpSize) Producer<Tile>(arguments, shared).run();
  } else {
    if constexpr (Tile::kSharesRegisters) more_registers<Tile::kConsumerRegisters>();
    Consumer<Tile>(arguments, shared, warpgroup).run();
  }
}

template <class Tile>
constexpr ForwardKernel kernel_of() {
  return {attention_forward<Tile>, Tile::kHead,       Tile::kValue, Tile::kRows, Tile::kKeys, Tile::kCtas,
          Tile::kThreads,          Tile::kSharedBytes};
}

}  // namespace sparsekit::sm90

// Synchronisation on Hopper: mbarriers that copies of the TMA unit complete, named barriers between warpgroups, the
// fence between ordinary accesses and the asynchronous units, and registers handed from one warpgroup to another. PTX
// ISA 8.0, sm_90 (setmaxnreg: sm_90a).
//
// An mbarrier counts phases. A phase ends when its arrivals have come and the bytes they announced have been written; a
// waiter names the parity (0, 1, 0, ...) of the phase that it waits for. A fresh barrier counts as "phase of parity 1
// has ended", so whoever waits for a buffer to become empty begins with parity 1 and passes.
#pragma once

#include <cstdint>

namespace sparsekit::cuda {

/// Barriers are 8 bytes of shared memory at an address that is a multiple of 8. One thread sets them up, then
/// mbarrier_fence_init and __syncthreads come before their first use.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void mbarrier_fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

/// One arrival. What this thread wrote before is visible to those whom the phase's end releases.
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

/// The phase ends only after `bytes` more have been copied by the TMA unit. No arrival; comes before the copies.
__device__ __forceinline__ void mbarrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}

/// Waits until the phase of this parity has ended. try_wait suspends the thread for a while in hardware.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n"
        "}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

/// A buffer's number and the parity of its barriers, for walking a ring of STAGES buffers. Consumers wait for
/// `parity`, producers (for the buffer to be empty) for `parity ^ 1`.
template <int STAGES>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

/// Named barrier `id` (1 to 15; 0 is __syncthreads): waits until `threads` threads of whole warps have come. arrive
/// counts without waiting.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

/// True in one lane of the warp, the same one each time. Unlike a comparison it tells the compiler that one lane is
/// left, which then needs no loop over lanes around every TMA instruction.
__device__ __forceinline__ bool elect_lane() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred one;\n"
      "elect.sync _|one, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, one;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
}

/// Makes this thread's earlier accesses to shared memory precede what TMA and wgmma do there after the next barrier.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

/// Registers per thread of this warpgroup from here on (24 to 256, multiples of 8); all four warps call it. ptxas
/// ignores it (warning C7507 or C7508, then spills) without a register bound at entry, or where the kernel has a real
/// call.
template <int COUNT>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(COUNT));
}

}  // namespace sparsekit::cuda

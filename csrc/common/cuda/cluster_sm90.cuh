// Clusters of CTAs on Hopper: a barrier among them, arrivals at another CTA's mbarrier, and TMA loads that land in
// several CTAs at once. PTX ISA 8.0, sm_90.
//
// A multicast load writes the same offset of each CTA's shared memory and completes on the barrier at the same offset
// there, so each CTA expects the bytes of every box that is loaded for it, whoever loads it. No CTA may end while
// others still write to it or arrive there: cluster_sync comes last.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace sparsekit::cuda {

/// Waits for all threads of the cluster that have not ended.
__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;\n" ::
          : "memory");
}

/// Where CTA `rank` of the cluster has what is at `address` here.
__device__ __forceinline__ uint32_t address_in_cluster(uint32_t address, int rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

/// As mbarrier_arrive, at an address of address_in_cluster.
__device__ __forceinline__ void mbarrier_arrive_in_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

/// As tma_load of a matrix (head and batch 0), to each CTA whose bit is in `ctas`.
__device__ __forceinline__ void tma_load_multicast(uint32_t to, const CUtensorMap* map, int column, int row,
                                                   uint32_t barrier, uint16_t ctas) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%2, %3, %4, %4}], [%5], %6;\n" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(0), "r"(barrier), "h"(ctas)
      : "memory");
}

}  // namespace sparsekit::cuda

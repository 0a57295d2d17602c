// Copies by Hopper's tensor memory accelerator (TMA): one thread starts a whole box, an mbarrier counts its bytes.
// PTX ISA 8.0, sm_90. Tensor maps are made on the host (common/cuda/tensor_map.h).
//
// A box of 64 columns of 16 bits (128 bytes) x R rows lands as a "panel": row r at r * 128 bytes, its eight 16-byte
// chunks permuted, chunk c at c ^ (r mod 8). Panels must be aligned to 1024 bytes. That is the layout that wgmma reads
// without bank conflicts (common/cuda/wgmma_sm90.cuh), and swizzled<128> of shared_memory.cuh.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace sparsekit::cuda {

/// Starts a copy of the box at (column, row, head, batch) to shared memory at `to`; it completes on `barrier`, which
/// must expect the bytes of the whole box. What lies outside the tensor arrives as zeros, and counts.
__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap* map, int column, int row, int head, int batch,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];\n" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(barrier)
      : "memory");
}

/// Fetches the box into the L2 cache.
__device__ __forceinline__ void tma_prefetch(const CUtensorMap* map, int column, int row, int head, int batch) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];\n" ::"l"(map), "r"(column),
               "r"(row), "r"(head), "r"(batch)
               : "memory");
}

/// Starts a copy of the box from shared memory to the tensor; what lies outside the tensor is not written. Shared
/// memory that threads wrote needs fence_async_proxy in each of them and a barrier first.
__device__ __forceinline__ void tma_store(const CUtensorMap* map, uint32_t from, int column, int row, int head,
                                          int batch) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];\n" ::"l"(map),
               "r"(from), "r"(column), "r"(row), "r"(head), "r"(batch)
               : "memory");
}

/// Closes the group of this thread's stores, and waits for all its groups: until their sources may be overwritten, or
/// until they are written.
__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;\n" ::: "memory"); }
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;\n" ::: "memory");
}
__device__ __forceinline__ void tma_store_wait() { asm volatile("cp.async.bulk.wait_group 0;\n" ::: "memory"); }

/// Starts a copy of `bytes` contiguous bytes (both addresses and the count are multiples of 16).
__device__ __forceinline__ void bulk_load(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

/// Fetches a tensor map into the cache that TMA reads it from.
__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

}  // namespace sparsekit::cuda

// What kv_append, kv_crop and kv_compact share. Every head reads its own lengths, so nothing waits for the host.
#pragma once

#include <cuda_runtime.h>

#include "common/cuda/launch.h"
#include "common/cuda/mma.cuh"
#include "kv_cache/cuda_quantize.cuh"
#include "sparsekit/attention.h"

namespace sparsekit::cuda {

__host__ __device__ inline int slices_of(int dim) { return (dim + kSlice - 1) / kSlice; }

/// Copies a row of `bytes` (a multiple of 16) by 16 bytes, thread `thread` of `threads`.
__device__ __forceinline__ void copy_row(void* to, const void* from, int bytes, int thread, int threads) {
  for (int i = thread * 16; i < bytes; i += threads * 16)
    *reinterpret_cast<uint4*>(static_cast<char*>(to) + i) =
        *reinterpret_cast<const uint4*>(static_cast<const char*>(from) + i);
}

/// Tokens of `recent` that leave the ring.
__host__ __device__ inline int64_t flushed(const Cache& c, int64_t recent) {
  return recent < c.ring ? 0 : (recent - c.window) / c.unit * c.unit;
}

inline Status check_heads(const Cache& c) {
  if (c.batch * c.heads <= 0x7fffffff) return {};
  return error(Status::Kind::unsupported, "the cache has %lld heads; supported: 2^31 - 1",
               (long long)(c.batch * c.heads));
}

template <class Arguments>
Status launch(const void* kernel, dim3 grid, const Arguments& arguments, const CudaContext& context, const char* what) {
  void* pointers[] = {const_cast<Arguments*>(&arguments)};
  return status_of(
      cudaLaunchKernel(kernel, grid, dim3(kQuantizeThreads), pointers, 0, static_cast<cudaStream_t>(context.stream)),
      what);
}

}  // namespace sparsekit::cuda

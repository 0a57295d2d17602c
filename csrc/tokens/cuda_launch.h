// Starting a kernel. A function of its own so that a test build may run kernels elsewhere.
#pragma once

#include <cuda_runtime.h>

#include "common/cuda/launch.h"

namespace sparsekit::cuda {

template <class... Parameters, class... Arguments>
void start(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, void* stream,
           const Arguments&... arguments) {
  kernel<<<grid, unsigned(threads), shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
}

template <class... Parameters>
Status allow_shared_memory(void (*kernel)(Parameters...), int bytes) {
  return status_of(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                   "asking for shared memory");
}

static inline Status started(const char* what) { return status_of(cudaGetLastError(), what); }

}  // namespace sparsekit::cuda

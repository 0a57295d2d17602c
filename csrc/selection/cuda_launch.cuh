// Launches with their shared memory granted, and what they met as a Status.
#pragma once

#include <cuda_runtime.h>

#include "common/cuda/launch.h"

namespace sparsekit::cuda {

/// Launches on `stream`. More than 48 KB of shared memory, the kernel's own variables included (none here has 16 KB of
/// them), must be granted to it first; errors stay with the runtime until launched() fetches them.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, cudaStream_t stream,
            const Arguments&... arguments) {
  if (shared > 32 * 1024) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  kernel<<<grid, threads, shared, stream>>>(arguments...);
}

inline Status launched(const char* what) { return status_of(cudaGetLastError(), what); }

}  // namespace sparsekit::cuda

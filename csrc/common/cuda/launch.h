// Host side of a CUDA launch: errors as Status, and what the current device offers.
#pragma once

#include <cuda_runtime.h>

#include "sparsekit/status.h"

namespace sparsekit::cuda {

/// Ok, or the CUDA error with the call that met it.
static inline Status status_of(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return {};
  return error(Status::Kind::failed, "%s failed: %s", what, cudaGetErrorString(code));
}

/// Shared memory of the current device in bytes: what one CTA may have, and what one multiprocessor has for all of its
/// CTAs (each of which also costs 1 KB that the system keeps). 163/164 KB on 8.0, 99/100 KB on 8.6 and 8.9, 227/228 KB
/// on 9.0.
struct SharedMemory {
  int per_block = 0, per_multiprocessor = 0;
};
static inline Status shared_memory_of_device(SharedMemory* found) {
  int device = 0;
  cudaError_t code = cudaGetDevice(&device);
  if (code == cudaSuccess)
    code = cudaDeviceGetAttribute(&found->per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (code == cudaSuccess)
    code = cudaDeviceGetAttribute(&found->per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  return status_of(code, "reading the device's shared memory size");
}

}  // namespace sparsekit::cuda

#include <cuda_runtime_api.h>

#include <atomic>

namespace sparsekit {

/// Compute capability (10 * major + minor) and multiprocessors of a device. Read once per device: an attribute costs
/// about a microsecond, and a call may be that short.
void cuda_device_properties(int device, int* compute_capability, int* multiprocessors) {
  constexpr int most_devices = 64;
  static std::atomic<int> known[most_devices];  // multiprocessors << 16 | compute capability; 0: not read yet
  int packed = device < most_devices ? known[device].load(std::memory_order_relaxed) : 0;
  if (packed == 0) {
    int major = 0, minor = 0, count = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    packed = count << 16 | (10 * major + minor);
    if (device < most_devices) known[device].store(packed, std::memory_order_relaxed);
  }
  *compute_capability = packed & 0xffff;
  *multiprocessors = packed >> 16;
}

}  // namespace sparsekit

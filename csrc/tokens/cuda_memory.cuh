// Loads of what is read once.
#pragma once

#include <cstdint>

namespace sparsekit::cuda {

/// 16 bytes that leave nothing in L1 and bring their whole line of 128 bytes to L2, which they leave soon. For sums,
/// with streaming stores: an ordinary load or store in place of either costs them 3 to 20 % (H200), where copies of
/// rows are 4 % faster with ordinary ones.
__device__ __forceinline__ uint4 load_16_once(const void* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

}  // namespace sparsekit::cuda

// fp32 through three tf32 products.
#include "matmul/cuda_sddmm_sm80.cuh"

namespace sparsekit::cuda {

SddmmKernel sddmm_kernel_f32(const SddmmChoice& c) {
  if (!c.aligned) return sddmm_kernel_of<SddmmTile<float, 32, 64, 2, 2, 2, false>>(c.at, c.bt);
  if (c.rows <= 32) return sddmm_kernel_of<SddmmTile<float, 32, 64, 2, 2, 4, true>>(c.at, c.bt);
  return sddmm_kernel_of<SddmmTile<float, 64, 64, 2, 2, 4, true>>(c.at, c.bt);
}

}  // namespace sparsekit::cuda

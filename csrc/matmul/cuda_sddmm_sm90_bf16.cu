#include "matmul/cuda_sddmm_sm90.cuh"

namespace sparsekit::cuda {

SddmmKernel90 sddmm_kernel_90_bf16(bool ta, bool tb, bool split) {
  return sddmm_kernel_90_of<__nv_bfloat16>(ta, tb, split);
}

}  // namespace sparsekit::cuda

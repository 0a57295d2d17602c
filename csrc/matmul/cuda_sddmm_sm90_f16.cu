#include "matmul/cuda_sddmm_sm90.cuh"

namespace sparsekit::cuda {

SddmmKernel90 sddmm_kernel_90_f16(bool ta, bool tb, bool split) { return sddmm_kernel_90_of<__half>(ta, tb, split); }

}  // namespace sparsekit::cuda

#include "matmul/cuda_sddmm_sm80.cuh"

namespace sparsekit::cuda {

SddmmKernel sddmm_kernel_bf16(const SddmmChoice& choice) { return sddmm_kernel_16bit<__nv_bfloat16>(choice); }

}  // namespace sparsekit::cuda

#include "matmul/cuda_sddmm_sm80.cuh"

namespace sparsekit::cuda {

SddmmKernel sddmm_kernel_f16(const SddmmChoice& choice) { return sddmm_kernel_16bit<__half>(choice); }

}  // namespace sparsekit::cuda

#include "matmul/cuda_sddmm_panels_sm80.cuh"

namespace sparsekit::cuda {

SampledKernel sampled_kernel_of(DType dtype) {
  return dtype == DType::bf16 ? sampled_kernel<__nv_bfloat16> : sampled_kernel<__half>;
}

}  // namespace sparsekit::cuda

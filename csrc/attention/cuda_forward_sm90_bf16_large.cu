#include "attention/cuda_forward_sm90_16bit.cuh"

namespace sparsekit::sm90 {

ForwardKernels forward_kernels_bf16_large() { return forward_kernels_16bit_large<__nv_bfloat16>(); }

}  // namespace sparsekit::sm90

#include "attention/cuda_forward_sm90_16bit.cuh"

namespace sparsekit::sm90 {

ForwardKernels forward_kernels_bf16() { return forward_kernels_16bit<__nv_bfloat16>(); }

}  // namespace sparsekit::sm90

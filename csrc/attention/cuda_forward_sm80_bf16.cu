#include "attention/cuda_forward_sm80_16bit.cuh"

namespace sparsekit::sm80 {

ForwardKernels forward_kernels_bf16() { return forward_kernels_16bit<__nv_bfloat16>(); }

}  // namespace sparsekit::sm80

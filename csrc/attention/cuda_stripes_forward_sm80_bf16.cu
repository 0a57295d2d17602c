#include "attention/cuda_stripes_forward_sm80.cuh"

namespace sparsekit::sm80 {

StripesForwardKernels stripes_forward_kernels_bf16() { return stripes_forward_kernels_16bit<__nv_bfloat16>(); }

}  // namespace sparsekit::sm80

#include "attention/cuda_stripes_backward.cuh"

namespace sparsekit::cuda {

StripesBackwardKernels stripes_backward_kernels_bf16() { return stripes_backward_kernels_16bit<__nv_bfloat16>(); }

}  // namespace sparsekit::cuda

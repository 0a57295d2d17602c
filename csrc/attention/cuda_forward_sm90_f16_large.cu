#include "attention/cuda_forward_sm90_16bit.cuh"

namespace sparsekit::sm90 {

ForwardKernels forward_kernels_f16_large() { return forward_kernels_16bit_large<__half>(); }

}  // namespace sparsekit::sm90

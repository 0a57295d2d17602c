#include "attention/cuda_forward_sm80_16bit.cuh"

namespace sparsekit::sm80 {

ForwardKernels forward_kernels_f16() { return forward_kernels_16bit<__half>(); }

}  // namespace sparsekit::sm80

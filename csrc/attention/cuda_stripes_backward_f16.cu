#include "attention/cuda_stripes_backward.cuh"

namespace sparsekit::cuda {

StripesBackwardKernels stripes_backward_kernels_f16() { return stripes_backward_kernels_16bit<__half>(); }

}  // namespace sparsekit::cuda

#include "attention/cuda_stripes_backward_sm90.cuh"

namespace sparsekit::sm90 {

StripesBackwardKernels stripes_backward_kernels_f16() { return stripes_backward_kernels_16bit<__half>(); }

}  // namespace sparsekit::sm90

// fp32 through three tf32 products. Its tiles are half as many elements as the 16-bit ones: the same bytes. 128 rows of
// 256 dimensions do not fit the 99 KB of sm_86 beside K and V; launching with 64 rows does.
#include "attention/cuda_forward_sm80.cuh"

namespace sparsekit::sm80 {

ForwardKernels forward_kernels_f32() {
  static const ForwardKernel kernels[] = {
      kernel_of<ForwardTile<float, 64, 64, 16, 32, 2>>(),
      kernel_of<ForwardTile<float, 128, 128, 16, 32, 1>>(),
      kernel_of<ForwardTile<float, 256, 256, 16, 16, 1>>(),
  };
  return {kernels, int(sizeof kernels / sizeof *kernels)};
}

}  // namespace sparsekit::sm80

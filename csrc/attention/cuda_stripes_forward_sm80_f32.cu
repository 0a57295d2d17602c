// fp32 through three tf32 products, with the tiles of blocks (cuda_forward_sm80_f32.cu).
#include "attention/cuda_stripes_forward_sm80.cuh"

namespace sparsekit::sm80 {

StripesForwardKernels stripes_forward_kernels_f32() {
  static const StripesForwardKernel kernels[] = {
      stripes_kernel_of<ForwardTile<float, 64, 64, 16, 32, 2>>(),
      stripes_kernel_of<ForwardTile<float, 128, 128, 16, 32, 1>>(),
      stripes_kernel_of<ForwardTile<float, 256, 256, 16, 16, 1>>(),
  };
  return {kernels, int(sizeof kernels / sizeof *kernels)};
}

}  // namespace sparsekit::sm80

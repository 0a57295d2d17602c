// fp32 through three tf32 products, with the tiles of blocks (cuda_backward_launch.cuh).
#include "attention/cuda_stripes_backward.cuh"

namespace sparsekit::cuda {

StripesBackwardKernels stripes_backward_kernels_f32() {
  static const StripesBackwardKernel kernels[] = {
      stripes_backward_kernel_of<BackwardTiles<float, 64, 32, 32, 4, 2, 2, 3>>(),
      stripes_backward_kernel_of<BackwardTiles<float, 128, 32, 32, 4, 2, 2, 2>>(),
      stripes_backward_kernel_of<BackwardTiles<float, 256, 32, 32, 4, 2, 2, 1>>(),
  };
  return {kernels, int(sizeof kernels / sizeof *kernels), finish_sums<float>};
}

}  // namespace sparsekit::cuda

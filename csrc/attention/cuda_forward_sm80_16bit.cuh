// The tile sizes of bf16 and fp16. 64 keys a tile everywhere: it divides both block sizes, and S of 32 x 64 beside O of
// 32 x 128 is what 255 registers hold. From value dimension 192 on a warp has only 16 rows.
#pragma once

#include "attention/cuda_forward_sm80.cuh"

namespace sparsekit::sm80 {

template <class Element>
ForwardKernels forward_kernels_16bit() {
  static const ForwardKernel kernels[] = {
      kernel_of<ForwardTile<Element, 32, 32, 32, 64, 3>>(),   kernel_of<ForwardTile<Element, 64, 64, 32, 64, 3>>(),
      kernel_of<ForwardTile<Element, 96, 96, 32, 64, 2>>(),   kernel_of<ForwardTile<Element, 128, 128, 32, 64, 2>>(),
      kernel_of<ForwardTile<Element, 192, 128, 32, 64, 2>>(), kernel_of<ForwardTile<Element, 192, 192, 16, 64, 1>>(),
      kernel_of<ForwardTile<Element, 256, 256, 16, 64, 1>>(),
  };
  return {kernels, int(sizeof kernels / sizeof *kernels)};
}

}  // namespace sparsekit::sm80

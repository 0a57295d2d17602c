// The tile sizes of bf16 and fp16.
//
// S of 32 rows x 64 keys beside O of 32 x 128 is what 255 registers hold; O of 64 columns leaves room for 128 keys,
// with half as many maxima, barriers and list steps (320 against 290 TFLOP/s on an H200). Tiles of 64 keys also serve
// blocks of
// 64. From value dimension 192 on a warp has only 16 rows.
#pragma once

#include "attention/cuda_forward_sm80.cuh"

namespace sparsekit::sm80 {

template <class Element>
ForwardKernels forward_kernels_16bit() {
  static const ForwardKernel kernels[] = {
      kernel_of<ForwardTile<Element, 32, 32, 32, 128, 2>>(),  kernel_of<ForwardTile<Element, 32, 32, 32, 64, 3>>(),
      kernel_of<ForwardTile<Element, 64, 64, 32, 128, 2>>(),  kernel_of<ForwardTile<Element, 64, 64, 32, 64, 3>>(),
      kernel_of<ForwardTile<Element, 96, 96, 32, 64, 2>>(),   kernel_of<ForwardTile<Element, 128, 128, 32, 64, 2>>(),
      kernel_of<ForwardTile<Element, 192, 128, 32, 64, 2>>(), kernel_of<ForwardTile<Element, 192, 192, 16, 64, 1>>(),
      kernel_of<ForwardTile<Element, 256, 256, 16, 64, 1>>(),
  };
  return {kernels, int(sizeof kernels / sizeof *kernels)};
}

}  // namespace sparsekit::sm80

// The kernels of bf16 and fp16: what fits shared memory (227 KB for the CTAs of a multiprocessor) and registers.
//
//   head, value dims | query block | keys a step | buffers of Q, K, V (KB each)
//   64, 64           | 128         | 128         | 2 x 16, 4 x 16, 4 x 16
//   96, 96           | 128         | 128         | 2 x 32, 2 x 32, 2 x 32
//   128, 128         | 128         | 128         | 1 x 32, 2 x 32, 3 x 32    2 to 5 % faster at 5 % than 2, 2, 2
//   192, 128         | 128         | 128         | 1 x 48, 2 x 48, 2 x 32
//   256, 256         | 128         | 64          | 1 x 64, 2 x 32, 2 x 32    S of 128 keys beside O of 256 columns: no
//   64, 64           | 64          | 128         | 1 x 8, 3 x 16, 3 x 16     two CTAs
//   128, 128         | 64          | 64          | 1 x 16, 3 x 16, 2 x 16    two CTAs; more and smaller buffers: L2
#pragma once

#include "attention/cuda_forward_sm90.cuh"

namespace sparsekit::sm90 {

template <class Element>
ForwardKernels forward_kernels_16bit() {
  static const ForwardKernel kernels[] = {
      kernel_of<ForwardTile<Element, 64, 64, 2, 128, 2, 4, 4>>(),
      kernel_of<ForwardTile<Element, 64, 64, 1, 128, 1, 3, 3>>(),
      kernel_of<ForwardTile<Element, 96, 96, 2, 128, 2, 2, 2>>(),
      kernel_of<ForwardTile<Element, 128, 128, 2, 128, 1, 2, 3>>(),
      kernel_of<ForwardTile<Element, 128, 128, 1, 64, 1, 3, 2>>(),
  };
  return {kernels, int(sizeof kernels / sizeof *kernels)};
}

template <class Element>
ForwardKernels forward_kernels_16bit_large() {
  static const ForwardKernel kernels[] = {
      kernel_of<ForwardTile<Element, 192, 128, 2, 128, 1, 2, 2>>(),
      kernel_of<ForwardTile<Element, 256, 256, 2, 64, 1, 2, 2>>(),
  };
  return {kernels, int(sizeof kernels / sizeof *kernels)};
}

}  // namespace sparsekit::sm90

// The forward kernels of sm_80, by dtype and head dimension. Each dtype is compiled in a file of its own
// (cuda_forward_sm80_<dtype>.cu); cuda_forward_sm80.cu chooses and launches.
#pragma once

#include "sparsekit/attention.h"

namespace sparsekit::sm80 {

/// One compiled kernel and what its launch needs to know.
struct ForwardKernel {
  void (*kernel)(const AttentionForward arguments, const int32_t* order);
  int head_dim, value_dim;  // upper bounds
  int rows_per_warp;
  int keys;  // of one tile
  int ctas;  // of 128 rows that its registers allow on a multiprocessor
};

/// The kernels of a dtype, cheapest first.
struct ForwardKernels {
  const ForwardKernel* first;
  int count;
};
ForwardKernels forward_kernels_bf16();
ForwardKernels forward_kernels_f16();
ForwardKernels forward_kernels_f32();

}  // namespace sparsekit::sm80

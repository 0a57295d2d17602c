// The kernels of stripe-sparse attention, by dtype and head dimension. Each dtype is compiled in files of its own;
// cuda_stripes.cu chooses and launches.
#pragma once

#include "attention/cuda_stripes.h"

namespace sparsekit::sm80 {

/// One compiled forward kernel and what its launch needs to know.
struct StripesForwardKernel {
  void (*kernel)(const AttentionForward arguments, const cuda::StripePlan plan);
  int head_dim, value_dim;  // upper bounds
  int rows_per_warp;
  int keys;  // of one tile
  int ctas;  // of 128 rows that its registers allow on a multiprocessor
};

/// The kernels of a dtype, cheapest first.
struct StripesForwardKernels {
  const StripesForwardKernel* first;
  int count;
};
StripesForwardKernels stripes_forward_kernels_bf16();
StripesForwardKernels stripes_forward_kernels_f16();
StripesForwardKernels stripes_forward_kernels_f32();

}  // namespace sparsekit::sm80

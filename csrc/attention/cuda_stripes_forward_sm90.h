// The Hopper kernels of stripe-sparse attention; cuda_stripes_sm90.cu chooses and launches.
#pragma once

#include "attention/cuda_forward_sm90.h"
#include "attention/cuda_stripes.h"

namespace sparsekit::sm90 {

/// Arguments of a kernel.
struct StripesForward {
  ForwardArguments blocks;  // what consumers read. Its call has the bits' stride of blocks of 128, and no end of keys
  AttentionForward problem;
  cuda::StripePlan plan;
  int32_t units = 0;
};

struct StripesForwardKernel {
  void (*kernel)(const StripesForward arguments);
  int head_dim, value_dim;  // upper bounds
  int threads, shared_bytes;
};

/// The kernels of a dtype, cheapest first.
struct StripesForwardKernels {
  const StripesForwardKernel* first;
  int count;
};
StripesForwardKernels stripes_forward_kernels_bf16();
StripesForwardKernels stripes_forward_kernels_f16();

}  // namespace sparsekit::sm90

// The backward kernels of stripe-sparse attention, by dtype and head dimension; cuda_stripes_backward.cu chooses and
// launches.
#pragma once

#include "attention/cuda_backward.cuh"
#include "attention/cuda_stripes.h"

namespace sparsekit::cuda {

/// Arguments of a kernel.
struct StripesBackward {
  BackwardPlan rows;  // the caller's arguments, and what was prepared for each query row
  StripePlan plan;
  // Sums of dK / scale and of dV in fp32, [batch, heads_kv, len_k, DIM], in the order of sum_column().
  float *key_sum = nullptr, *value_sum = nullptr;
  bool keys = true;      // whether units add to them, or sections do
  int sections = 0;      // of a key head's keys
  int section_keys = 0;  // of each; a multiple of 128
  int stages = 2;        // buffers of K and V
};

struct StripesBackwardKernel {
  void (*units)(const StripesBackward work);     // dQ, and dK and dV by atomics where they are wanted
  void (*sections)(const StripesBackward work);  // dK and dV in a fixed order
  int (*shared_bytes)(int stages, bool bias_gradient);
  int dim;   // upper bound of both dimensions
  int rows;  // of a unit
  int keys;  // of a tile
  int threads, ctas;
};

/// The kernels of a dtype: by dim, and of one dim those with more rows first.
struct StripesBackwardKernels {
  const StripesBackwardKernel* first;
  int count;
  /// Writes the sums of dK and dV, as far as `work` has them, in the element type.
  Status (*finish)(const StripesBackward& work, int dim, cudaStream_t stream);
};
StripesBackwardKernels stripes_backward_kernels_bf16();
StripesBackwardKernels stripes_backward_kernels_f16();
StripesBackwardKernels stripes_backward_kernels_f32();

}  // namespace sparsekit::cuda

namespace sparsekit::sm90 {

// Units of Hopper (cuda_stripes_backward_sm90.cuh): neither softcap nor bias, no sections, no `finish`.
cuda::StripesBackwardKernels stripes_backward_kernels_bf16();
cuda::StripesBackwardKernels stripes_backward_kernels_f16();

}  // namespace sparsekit::sm90

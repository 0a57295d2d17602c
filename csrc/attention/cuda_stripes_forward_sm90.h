// The Hopper kernels of stripe-sparse attention; cuda_stripes_sm90.cu chooses and launches.
#pragma once

#include "attention/cuda_forward_sm90.h"
#include "attention/cuda_stripes.h"

namespace sparsekit::sm90 {

/// Where kernels for cells of many units pack the rows that these list (cuda_stripes_packed_sm90.cuh). The cell of rank
/// r (in the plan's order) has slot r % slots.
struct PackedStripes {
  uint16_t* key = nullptr;     // [slots][column_capacity][head_dim of the kernel]
  uint16_t* value = nullptr;   // [slots][column_capacity][value_dim of the kernel]
  int32_t* tiles = nullptr;    // [cells here], by rank: tiles of 128 rows that are there; 0 at launch
  int32_t* units = nullptr;    // [cells here], by rank: units that have read them; 0 at launch
  int32_t* counter = nullptr;  // tiles taken beyond one per CTA; 0 at launch
  int32_t slots = 0;
};

/// Arguments of a kernel.
struct StripesForward {
  ForwardArguments blocks;  // what consumers read. Its call has the bits' stride of blocks of 128, and no end of keys
  AttentionForward problem;
  cuda::StripePlan plan;
  PackedStripes packed;
  int32_t units = 0;
};

struct StripesForwardKernel {
  void (*kernel)(const StripesForward arguments);
  int head_dim, value_dim;  // upper bounds
  int threads, shared_bytes;
  bool packed;  // for cells of many units
};

/// The kernels of a dtype, cheapest first.
struct StripesForwardKernels {
  const StripesForwardKernel* first;
  int count;
};
StripesForwardKernels stripes_forward_kernels_bf16();
StripesForwardKernels stripes_forward_kernels_f16();

}  // namespace sparsekit::sm90

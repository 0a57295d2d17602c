// The forward kernels of Hopper, by dtype, head dimension and rows of a query block. cuda_forward_sm90.cu chooses and
// launches; the kernels are compiled in cuda_forward_sm90_<dtype>*.cu.
#pragma once

#include <cuda.h>
#include <vector_types.h>

#include "sparsekit/attention.h"

namespace sparsekit::sm90 {

/// What a kernel gets: the call, the tensors as TMA sees them, and the work list.
struct ForwardArguments {
  CUtensorMap query, key, value;  // boxes: 64 columns x the query block's rows, x keys_per_box
  AttentionForward call;
  const int32_t* order = nullptr;  // list rows (batch, query head, query block), longest first; null: their own order
  const int4* extents = nullptr;   // packed batches: rows and keys of each list row, cuda_sequences.h
  int32_t* counter = nullptr;      // how many of them were taken beyond one per CTA; 0 at launch
  int32_t items = 0;               // list rows
  int32_t keys_per_box = 0;
  bool ranged = false;  // causality or a window
  // Scores in units of log 2. Plain: factor * s. Else cap_out * tanh(cap_in * s) or factor * s, plus the bias.
  float factor = 0, cap_in = 0, cap_out = 0;
  bool plain = true;
};

/// One compiled kernel and what its launch needs to know.
struct ForwardKernel {
  void (*kernel)(const ForwardArguments arguments);
  int head_dim, value_dim;  // upper bounds
  int rows;                 // of a query block
  int keys;                 // of one step: a box holds at most as many
  int ctas;                 // on a multiprocessor
  int threads, shared_bytes;
};

/// The kernels of a dtype, cheapest first.
struct ForwardKernels {
  const ForwardKernel* first;
  int count;
};
ForwardKernels forward_kernels_bf16();
ForwardKernels forward_kernels_f16();
ForwardKernels forward_kernels_bf16_large();  // head dimensions above 128
ForwardKernels forward_kernels_f16_large();

}  // namespace sparsekit::sm90

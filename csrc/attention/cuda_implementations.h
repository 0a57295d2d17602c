// The CUDA implementations, one folder of files per architecture. dispatch_cuda.cpp lists them best first.
#pragma once

#include "sparsekit/attention.h"

namespace sparsekit {

using CudaAttention = AttentionImplementation<CudaContext>;

extern const CudaAttention attention_cuda_sm90;          // cuda_forward_sm90.cu: forward on Hopper
extern const CudaAttention attention_cuda_sm80;          // cuda_forward_sm80.cu, cuda_backward_sm80.cu
extern const CudaAttention attention_cuda_stripes_sm90;  // cuda_stripes_sm90.cu: columns beside blocks, the same
extern const CudaAttention attention_cuda_stripes_sm80;  // cuda_stripes.cu, cuda_stripes_backward.cu

// The backward half of attention_cuda_sm80.
Status attention_backward_sm80(const AttentionBackward& arguments, const CudaContext& context);
size_t attention_backward_workspace_sm80(const AttentionProblem& problem, const CudaContext& context);

// The backward half of attention_cuda_stripes_sm80 (cuda_stripes_backward.cu).
Status stripes_backward(const AttentionBackward& arguments, const CudaContext& context);
size_t stripes_backward_workspace(const AttentionProblem& problem, const CudaContext& context);
// The same of attention_cuda_stripes_sm90, which takes neither softcap nor bias. Deterministic gradients come from the
// kernels above.
Status stripes_backward_sm90(const AttentionBackward& arguments, const CudaContext& context);
size_t stripes_backward_workspace_sm90(const AttentionProblem& problem, const CudaContext& context);

}  // namespace sparsekit

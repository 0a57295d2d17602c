// Attention backward for bf16 elements.
#include "attention/cuda_backward_launch.cuh"

namespace sparsekit::cuda {

template Status launch_backward<__nv_bfloat16>(BackwardPlan plan, cudaStream_t stream);

}  // namespace sparsekit::cuda

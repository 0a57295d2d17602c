// Attention backward for f16 elements.
#include "attention/cuda_backward_launch.cuh"

namespace sparsekit::cuda {

template Status launch_backward<__half>(BackwardPlan plan, cudaStream_t stream);

}  // namespace sparsekit::cuda

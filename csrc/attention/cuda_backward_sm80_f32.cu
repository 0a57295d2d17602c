// Attention backward for f32 elements.
#include "attention/cuda_backward_launch.cuh"

namespace sparsekit::cuda {

template Status launch_backward<float>(BackwardPlan plan, cudaStream_t stream);

}  // namespace sparsekit::cuda

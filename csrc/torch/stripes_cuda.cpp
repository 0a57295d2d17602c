// The ops of stripe-sparse attention on CUDA.
#include "torch/cuda.h"
#include "torch/stripes.h"

namespace sparsekit {

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CUDA, m) { SPARSEKIT_REGISTER_STRIPES(m, Cuda); }

}  // namespace sparsekit

// The attention ops, the block-list ops and the plan on CUDA.
#include "torch/attention.h"
#include "torch/cuda.h"
#include "torch/info.h"

namespace sparsekit {
namespace {

std::string attention_plan_cuda(SPARSEKIT_PLAN_PARAMETERS) {
  CudaContext context;
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_device_index(&device));
  cuda_device_properties(device, &context.compute_capability, &context.multiprocessors);
  return plan_text(attention_plan(plan_problem(dtype, head_dim, value_dim, block_size, packed, group_size),
                                  backward ? Direction::backward : Direction::forward, context));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CUDA, m) {
  SPARSEKIT_REGISTER_ATTENTION(m, Cuda);
  SPARSEKIT_REGISTER_SELECTION(m, Cuda);
}

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CompositeExplicitAutograd, m) {
  m.impl("attention_plan_cuda", TORCH_BOX(attention_plan_cuda));
}

}  // namespace sparsekit

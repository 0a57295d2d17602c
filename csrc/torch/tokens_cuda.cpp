// The token ops on CUDA.
#include "torch/cuda.h"
#include "torch/tokens.h"
#include "torch/tokens_match.h"

namespace sparsekit {
namespace {

struct CudaTokens {
  static void run(const GatherTokens& g, const Tensor& index) {
    CudaCall call(index);
    require(gather_tokens(g, call.context));
  }
  static void run(const ScatterTokens& t, const Tensor& index) {
    CudaCall call(index);
    require(scatter_tokens(t, call.with_workspace(scatter_tokens_workspace(t))));
  }
  static void run(const ScatterTokensBackward& b, const Tensor& index) {
    CudaCall call(index);
    require(scatter_tokens_backward(b, call.with_workspace(scatter_tokens_backward_workspace(b))));
  }
  static void run(const CompactRows& c, const Tensor& keep) {
    CudaCall call(keep);
    require(compact_rows(c, call.with_workspace(compact_rows_workspace(c))));
  }
  static void run(const MatchTokens& m, const Tensor& metric) {
    CudaCall call(metric);
    require(match_tokens(m, call.with_workspace(match_tokens_workspace(m, call.context))));
  }
};

std::string tokens_plan_cuda_text(ScalarType dtype, bool match) {
  CudaContext context;
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_device_index(&device));
  cuda_device_properties(device, &context.compute_capability, &context.multiprocessors);
  return plan_text(tokens_plan_cuda(to_token_type(dtype), match, context));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CUDA, m) {
  SPARSEKIT_REGISTER_TOKENS(m, CudaTokens);
  SPARSEKIT_REGISTER_TOKEN_MATCH(m, CudaTokens);
}

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CompositeExplicitAutograd, m) {
  m.impl("tokens_plan_cuda", TORCH_BOX(tokens_plan_cuda_text));
}

}  // namespace sparsekit

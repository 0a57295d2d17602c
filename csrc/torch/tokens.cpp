// The token ops on the CPU.
#include "torch/tokens.h"

#include "torch/cpu.h"
#include "torch/tokens_match.h"

namespace sparsekit {
namespace {

std::string tokens_plan_cpu(ScalarType dtype, bool match) {
  return plan_text(tokens_plan(to_token_type(dtype), match));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CPU, m) {
  SPARSEKIT_REGISTER_TOKENS(m, Cpu);
  SPARSEKIT_REGISTER_TOKEN_MATCH(m, Cpu);
}

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CompositeExplicitAutograd, m) {
  m.impl("tokens_plan_cpu", TORCH_BOX(tokens_plan_cpu));
}

}  // namespace sparsekit

// What would run, for sparsekit.info(): the CPU's instruction sets and its attention plan.
#include "torch/info.h"
#include "common/cpu/features.h"

namespace sparsekit {
namespace {

std::string cpu_features() {
  std::string names;
  for (int i = 0; i < isa_count; ++i) {
    if (isa_offered(Isa(i))) names += (names.empty() ? "" : " ") + std::string(isa_name(Isa(i)));
  }
  return names;
}

std::string attention_plan_cpu(SPARSEKIT_PLAN_PARAMETERS) {
  return plan_text(attention_plan(plan_problem(dtype, head_dim, value_dim, block_size, packed, group_size),
                                  backward ? Direction::backward : Direction::forward, torch_parallel()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CompositeExplicitAutograd, m) {
  m.impl("cpu_features", TORCH_BOX(cpu_features));
  m.impl("attention_plan_cpu", TORCH_BOX(attention_plan_cpu));
}

}  // namespace sparsekit

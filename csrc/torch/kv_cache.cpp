// The cache ops on the CPU.
#include "torch/kv_cache.h"

#include "torch/cpu.h"

namespace sparsekit {
namespace {

/// "name: runs" or "name: the reason it refuses", a line per implementation.
std::string decode_plan_cpu(ScalarType dtype, int64_t head_dim, int64_t value_dim) {
  DecodeAttention problem;
  problem.dtype = to_dtype(dtype, "dtype");
  problem.head_dim = int32_t(head_dim);
  problem.value_dim = int32_t(value_dim);
  return plan_text(decode_plan(problem));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CPU, m) { SPARSEKIT_REGISTER_KV_CACHE(m, Cpu); }

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CompositeExplicitAutograd, m) {
  m.impl("decode_plan_cpu", TORCH_BOX(decode_plan_cpu));
}

}  // namespace sparsekit

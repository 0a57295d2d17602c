// Which CUDA implementation runs: the first of the table that does not refuse the problem on this card.
#include <cstdlib>
#include <cstring>

#include "attention/cuda_implementations.h"
#include "attention/plan.h"

namespace sparsekit {
namespace {

constexpr const CudaAttention* table[] = {
    &attention_cuda_sm90,
    &attention_cuda_sm80,
    &attention_cuda_stripes_sm90,
    &attention_cuda_stripes_sm80,
};

const char* refuses(const CudaAttention& entry, const AttentionProblem& problem, Direction direction,
                    const CudaContext& context) {
  if (context.compute_capability < 80) return "needs a GPU of compute capability 8.0 (Ampere) or newer";
  const char* forced = std::getenv("SPARSEKIT_CUDA_KERNELS");  // a part of the names that may run, as "sm80"
  if (forced && !std::strstr(entry.name, forced)) return "SPARSEKIT_CUDA_KERNELS forces another implementation";
  const bool stripes = &entry == &attention_cuda_stripes_sm90 || &entry == &attention_cuda_stripes_sm80;
  if (problem.stripes.any() != stripes)
    return stripes ? "takes columns (stripes) only" : "takes blocks only, no columns";
  return entry.refuses(problem, direction, context);
}

Status choose(const AttentionProblem& problem, Direction direction, const CudaContext& context,
              const CudaAttention** chosen) {
  Status status = attention_check(problem);
  if (!status.ok()) return status;
  for (const CudaAttention* entry : table) {
    if (refuses(*entry, problem, direction, context)) continue;
    *chosen = entry;
    return {};
  }
  return refusal(attention_plan(problem, direction, context));
}

}  // namespace

AttentionPlan attention_plan(const AttentionProblem& problem, Direction direction, const CudaContext& context) {
  AttentionPlan plan;
  for (const CudaAttention* entry : table) {
    plan.entries[plan.count++] = {entry->name, refuses(*entry, problem, direction, context)};
  }
  return plan;
}

size_t attention_workspace(const AttentionProblem& problem, Direction direction, const CudaContext& context) {
  const CudaAttention* chosen = nullptr;
  return choose(problem, direction, context, &chosen).ok() ? chosen->workspace(problem, direction, context) : 0;
}

Status attention_forward(const AttentionForward& arguments, const CudaContext& context) {
  const CudaAttention* chosen = nullptr;
  Status status = choose(arguments, Direction::forward, context, &chosen);
  return status.ok() ? chosen->forward(arguments, context) : status;
}

Status attention_backward(const AttentionBackward& arguments, const CudaContext& context) {
  const CudaAttention* chosen = nullptr;
  Status status = choose(arguments, Direction::backward, context, &chosen);
  return status.ok() ? chosen->backward(arguments, context) : status;
}

}  // namespace sparsekit

// Which CPU implementation runs: the first of the table that the processor offers, SPARSEKIT_ISA allows and that does
// not refuse the problem. The last entry, the reference, refuses nothing.
#include "attention/cpu_implementations.h"
#include "attention/plan.h"
#include "common/cpu/features.h"

namespace sparsekit {
namespace {

struct Entry {
  const CpuAttention* implementation;
  Isa isa;
};

constexpr Entry table[] = {
#ifdef SPARSEKIT_X86
    {&attention_cpu_amx, Isa::amx},           {&attention_cpu_avx512_bf16, Isa::avx512_bf16},
    {&attention_cpu_avx512, Isa::avx512},     {&attention_cpu_avx2, Isa::avx2},
#endif
    {&attention_cpu_portable, Isa::portable}, {&attention_cpu_reference, Isa::reference},
};

const char* refuses(const Entry& entry, const AttentionProblem& problem, Direction direction,
                    const ParallelFor& parallel) {
  const char* reason = isa_refuses(entry.isa);
  return reason ? reason : entry.implementation->refuses(problem, direction, parallel);
}

Status choose(const AttentionProblem& problem, Direction direction, const ParallelFor& parallel,
              const CpuAttention** chosen) {
  Isa limit;
  bool forced;
  if (const char* text = isa_limit(&limit, &forced)) return error(Status::Kind::invalid_argument, "%s", text);
  Status status = attention_check(problem);
  if (status.ok()) status = attention_check_lists(problem, /*duplicates=*/false);
  if (!status.ok()) return status;
  for (const Entry& entry : table) {
    if (refuses(entry, problem, direction, parallel)) continue;
    *chosen = entry.implementation;
    return {};
  }
  return refusal(attention_plan(problem, direction, parallel));
}

}  // namespace

AttentionPlan attention_plan(const AttentionProblem& problem, Direction direction, const ParallelFor& parallel) {
  AttentionPlan plan;
  for (const Entry& entry : table) {
    plan.entries[plan.count++] = {entry.implementation->name, refuses(entry, problem, direction, parallel)};
  }
  return plan;
}

Status attention_forward(const AttentionForward& arguments, const ParallelFor& parallel) {
  const CpuAttention* chosen = nullptr;
  Status status = choose(arguments, Direction::forward, parallel, &chosen);
  return status.ok() ? chosen->forward(arguments, parallel) : status;
}

Status attention_backward(const AttentionBackward& arguments, const ParallelFor& parallel) {
  const CpuAttention* chosen = nullptr;
  Status status = choose(arguments, Direction::backward, parallel, &chosen);
  return status.ok() ? chosen->backward(arguments, parallel) : status;
}

}  // namespace sparsekit

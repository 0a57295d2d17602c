// Which CPU implementation runs: the first of the table that the processor offers, SPARSEKIT_ISA allows and that does
// not refuse the problem. The last entry, the reference, refuses nothing.
#include <cstring>

#include "common/cpu/features.h"
#include "matmul/implementations.h"

namespace sparsekit {
namespace {

struct Entry {
  const CpuMatmul* implementation;
  Isa isa;
};

constexpr Entry table[] = {
#ifdef SPARSEKIT_X86
    {&matmul_cpu_avx512_bf16, Isa::avx512_bf16}, {&matmul_cpu_avx512, Isa::avx512},       {&matmul_cpu_avx2, Isa::avx2},
#endif
    {&matmul_cpu_portable, Isa::portable},       {&matmul_cpu_reference, Isa::reference},
};

const char* refuses(const Entry& entry, DType dtype, const BlockSparsePattern& pattern) {
  const char* reason = isa_refuses(entry.isa);
  return reason ? reason : entry.implementation->refuses(dtype, pattern);
}

Status choose(DType dtype, const BlockSparsePattern& pattern, const CpuMatmul** chosen) {
  Isa limit;
  bool forced;
  if (const char* text = isa_limit(&limit, &forced)) return error(Status::Kind::invalid_argument, "%s", text);
  Status status = block_sparse_check(pattern);
  if (!status.ok()) return status;
  for (const Entry& entry : table) {
    if (refuses(entry, dtype, pattern)) continue;
    *chosen = entry.implementation;
    return {};
  }
  return error(Status::Kind::unsupported, "block-sparse product: no implementation takes this problem");
}

}  // namespace

MatmulPlan block_sparse_plan(const BlockSparseProduct& arguments) {
  MatmulPlan plan;
  for (const Entry& entry : table) {
    plan.entries[plan.count++] = {entry.implementation->name, refuses(entry, arguments.dtype, arguments.pattern)};
  }
  return plan;
}

Status block_sparse_product(const BlockSparseProduct& arguments, const ParallelFor& parallel) {
  const CpuMatmul* chosen = nullptr;
  Status status = choose(arguments.dtype, arguments.pattern, &chosen);
  if (status.ok() && arguments.transposed)
    status = block_sparse_check_transpose(arguments.pattern, arguments.transpose);
  return status.ok() ? chosen->product(arguments, parallel) : status;
}

Status block_sddmm(const BlockSddmm& arguments, const ParallelFor& parallel) {
  const CpuMatmul* chosen = nullptr;
  Status status = choose(arguments.dtype, arguments.pattern, &chosen);
  return status.ok() ? chosen->sddmm(arguments, parallel) : status;
}

}  // namespace sparsekit

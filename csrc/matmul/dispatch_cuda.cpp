// Which CUDA implementation runs: the first of the table that does not refuse the problem on this card.
#include "matmul/cuda_implementations.h"

namespace sparsekit {
namespace {

constexpr const CudaMatmul* table[] = {
    &matmul_cuda_few_tokens,
    &matmul_cuda_sm90,
    &matmul_cuda_small_blocks,
    &matmul_cuda_sm80,
};

constexpr const char* kTooOld = "needs a GPU of compute capability 8.0 (Ampere) or newer";

const char* refuses(const CudaMatmul& entry, const BlockSparseProduct& p, const CudaContext& context) {
  return context.compute_capability < 80 ? kTooOld : entry.refuses(p, context);
}
const char* refuses(const CudaMatmul& entry, const BlockSddmm& s, const CudaContext& context) {
  if (context.compute_capability < 80) return kTooOld;
  return entry.sddmm ? entry.refuses_sddmm(s, context) : "sampled products are not in this implementation";
}

/// The first that takes the problem; else what the last one, which takes most, says.
template <class Problem>
Status choose(const Problem& problem, const CudaContext& context, const CudaMatmul** chosen) {
  const char* reason = nullptr;
  for (const CudaMatmul* entry : table) {
    reason = refuses(*entry, problem, context);
    if (reason) continue;
    *chosen = entry;
    return {};
  }
  return error(Status::Kind::unsupported, "block-sparse product on CUDA: %s", reason);
}

}  // namespace

MatmulPlan block_sparse_plan(const BlockSparseProduct& arguments, const CudaContext& context) {
  MatmulPlan plan;
  for (const CudaMatmul* entry : table) {
    plan.entries[plan.count++] = {entry->name, refuses(*entry, arguments, context)};
  }
  return plan;
}

bool block_sparse_product_takes(const BlockSparseProduct& arguments, const CudaContext& context) {
  const CudaMatmul* chosen = nullptr;
  return choose(arguments, context, &chosen).ok();
}

size_t block_sparse_product_workspace(const BlockSparseProduct& arguments, const CudaContext& context) {
  const CudaMatmul* chosen = nullptr;
  return choose(arguments, context, &chosen).ok() ? chosen->workspace(arguments, context) : 0;
}

Status block_sparse_product(const BlockSparseProduct& arguments, const CudaContext& context) {
  const CudaMatmul* chosen = nullptr;
  Status status = choose(arguments, context, &chosen);
  if (!status.ok()) return status;
  const int64_t features = arguments.transposed ? arguments.pattern.cols : arguments.pattern.rows;
  return arguments.tokens == 0 || features == 0 ? status : chosen->product(arguments, context);
}

size_t block_sddmm_workspace(const BlockSddmm& arguments, const CudaContext& context) {
  const CudaMatmul* chosen = nullptr;
  return choose(arguments, context, &chosen).ok() ? chosen->workspace_sddmm(arguments, context) : 0;
}

Status block_sddmm(const BlockSddmm& arguments, const CudaContext& context) {
  const CudaMatmul* chosen = nullptr;
  Status status = choose(arguments, context, &chosen);
  if (!status.ok()) return status;
  const BlockSparsePattern& w = arguments.pattern;
  return w.nnz == 0 || w.rows == 0 ? status : chosen->sddmm(arguments, context);
}

}  // namespace sparsekit

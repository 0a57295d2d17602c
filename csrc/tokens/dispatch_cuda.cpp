// The token ops on CUDA, put together from their kernels: a plan where rows are sums, then one launch for all tensors.
#include <cstdint>

#include "tokens/check.h"
#include "tokens/cuda_implementations.h"

namespace sparsekit {
namespace {

constexpr const char* needs_ampere = "needs a GPU of compute capability 8.0 (Ampere) or newer";

Status check_card(const CudaContext& context, size_t workspace) {
  if (context.compute_capability < 80)
    return error(Status::Kind::unsupported, "the token ops: this GPU %s", needs_ampere);
  if (context.workspace_bytes >= workspace) return {};
  return error(Status::Kind::failed, "workspace has %zu bytes, needs %zu", context.workspace_bytes, workspace);
}

struct SearchMemory {
  cuda::MatchSearch search;
  size_t bytes;

  SearchMemory(const MatchTokens& m, const CudaContext& context) {
    search.sources = (m.tokens + 1) / 2;
    search.tiles = cuda::match_tiles_refuses(m, context) ? 0 : cuda::match_tiles_count(m, context);
    const size_t all = size_t(m.samples * search.sources);
    bytes = 4 * (2 * all + size_t(m.samples * search.tiles));
    search.best = static_cast<float*>(context.workspace);
    search.target = reinterpret_cast<int32_t*>(search.best + all);
    search.inexact = search.target + all;
  }
};

}  // namespace

Status gather_tokens(const GatherTokens& g, const CudaContext& context) {
  Status status = check_card(context, 0);
  if (status.ok() && g.from.rows > INT32_MAX) {
    status = error(Status::Kind::unsupported, "tensors: found %lld tokens; supported: at most 2^31 - 1",
                   (long long)g.from.rows);
  }
  if (!status.ok()) return status;
  cuda::DevicePlan plan;
  plan.from = g.from;
  plan.to = g.to;
  plan.index = g.index.data;
  plan.wide = g.index.wide;
  plan.index_rows = g.index.rows;
  return cuda::move_rows(plan, g.in, nullptr, g.out, g.tensors, context);
}

size_t scatter_tokens_workspace(const ScatterTokens& t) { return cuda::plan_scatter_workspace(t); }

Status scatter_tokens(const ScatterTokens& t, const CudaContext& context) {
  Status status = check_card(context, scatter_tokens_workspace(t));
  if (status.ok()) status = check_token_types(t);
  cuda::DevicePlan plan;
  if (status.ok()) status = cuda::plan_scatter(t, context, &plan);
  if (!status.ok()) return status;
  return t.reduce == TokenReduce::copy ? cuda::move_rows(plan, t.in, t.base, t.out, t.tensors, context)
                                       : cuda::sum_rows(plan, t.in, t.base, t.out, t.tensors, context);
}

size_t scatter_tokens_backward_workspace(const ScatterTokensBackward& b) {
  return b.grad_in ? cuda::plan_scatter_backward_workspace(b.forward) : 0;
}

Status scatter_tokens_backward(const ScatterTokensBackward& b, const CudaContext& context) {
  Status status = check_card(context, scatter_tokens_backward_workspace(b));
  if (status.ok() && b.grad_in) {
    cuda::DevicePlan plan;
    bool moves = false;
    status = cuda::plan_scatter_backward(b.forward, context, &plan, &moves);
    if (status.ok()) {
      status = moves ? cuda::move_rows(plan, b.grad_out, nullptr, b.grad_in, b.forward.tensors, context)
                     : cuda::sum_rows(plan, b.grad_out, nullptr, b.grad_in, b.forward.tensors, context);
    }
  }
  if (status.ok() && b.grad_weights) status = cuda::weight_gradients(b, context);
  return status;
}

size_t match_tokens_workspace(const MatchTokens& m, const CudaContext& context) {
  return SearchMemory(m, context).bytes;
}

Status match_tokens(const MatchTokens& m, const CudaContext& context) {
  if (m.tokens > INT32_MAX / 4) {
    return error(Status::Kind::unsupported, "metric: found %lld tokens; supported on CUDA: at most 2^29",
                 (long long)m.tokens);
  }
  SearchMemory memory(m, context);
  Status status = check_card(context, memory.bytes);
  const cuda::MatchSearch& search = memory.search;
  if (status.ok() && search.tiles > 0 && m.samples > 0) status = cuda::match_tiles(m, search, context);
  if (status.ok()) status = cuda::match_exactly(m, search, context);
  if (status.ok()) status = cuda::rank_matches(m, search, context);
  return status;
}

TokensPlan tokens_plan_cuda(TokenType type, bool match, const CudaContext& context) {
  const char* reason = context.compute_capability < 80 ? needs_ampere : nullptr;
  TokensPlan plan;
  if (match) {
    plan.entries[plan.count++] = {"cuda_sm80", reason                   ? reason
                                               : type == TokenType::f64 ? "float64 runs on the exact search"
                                                                        : nullptr};
    plan.entries[plan.count++] = {"cuda_exact", reason};
  } else {
    plan.entries[plan.count++] = {"cuda", reason};
  }
  return plan;
}

}  // namespace sparsekit

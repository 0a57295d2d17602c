// decode_attention on CUDA: checks of shapes, the choice of the kernel, the workspace, the launches. What tensors hold
// is clamped on the device (cuda_format.cuh, cuda_decode.cuh).
#include "kv_cache/cuda_decode.h"

namespace sparsekit {
namespace {

using Kind = Status::Kind;

constexpr const CudaDecodeKernel* table[] = {
    &decode_cuda_sm80,
    &decode_cuda_simple,
};

const char* refuses(const CudaDecodeKernel& kernel, const DecodeAttention& problem, const CudaContext& context) {
  if (context.compute_capability < 80) return "needs a GPU of compute capability 8.0 (Ampere) or newer";
  return kernel.refuses(problem, context);
}

Status check(const DecodeAttention& p) {
  if (p.heads_kv <= 0 || p.heads_q % p.heads_kv != 0) {
    return error(Kind::invalid_argument, "query has %lld heads, the cache %lld; supported: a multiple",
                 (long long)p.heads_q, (long long)p.heads_kv);
  }
  if (p.len_q < 1 || p.len_q > 16) {
    return error(Kind::unsupported, "query has %lld rows; supported: 1 to 16", (long long)p.len_q);
  }
  if (p.dtype == DType::f64) return error(Kind::unsupported, "query: float64; supported: float32, float16, bfloat16");
  if (!(p.softcap >= 0)) return error(Kind::invalid_argument, "softcap is %g; supported: from 0", p.softcap);
  if (p.batch > 65535 || p.heads_kv > 65535) {
    return error(Kind::unsupported, "query: batch %lld, the cache %lld heads; supported on CUDA: up to 65535",
                 (long long)p.batch, (long long)p.heads_kv);
  }
  if (p.cache) return kv_check(*p.cache);
  if (p.plain->dtype == DType::f64)
    return error(Kind::unsupported, "key: float64; supported: float32, float16, bfloat16");
  return {};
}

const CudaDecodeKernel* choose(const DecodeAttention& p, const CudaContext& context) {
  for (const CudaDecodeKernel* kernel : table) {
    if (!refuses(*kernel, p, context)) return kernel;
  }
  return nullptr;
}

int64_t rows_of(const DecodeAttention& p) { return p.heads_q / p.heads_kv * p.len_q; }

int64_t aligned_bytes(int64_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

DecodePlan decode_plan(const DecodeAttention& problem, const CudaContext& context) {
  DecodePlan plan;
  for (const CudaDecodeKernel* kernel : table)
    plan.entries[plan.count++] = {kernel->name, refuses(*kernel, problem, context)};
  return plan;
}

size_t decode_attention_workspace(const DecodeAttention& p, const CudaContext& context) {
  const CudaDecodeKernel* kernel = check(p).ok() ? choose(p, context) : nullptr;
  if (!kernel) return 0;
  int splits = 1, slots = 1;
  kernel->cut(p, context, &splits, &slots);
  const int64_t states = p.batch * p.heads_kv * slots * rows_of(p);
  return size_t(aligned_bytes(states * p.value_dim * 4) + states * 8);
}

Status decode_attention(const DecodeAttention& p, const CudaContext& context) {
  Status status = check(p);
  if (!status.ok()) return status;
  const CudaDecodeKernel* kernel = choose(p, context);
  if (!kernel) {
    return error(Kind::unsupported, "decode_attention: head_dim %d, value_dim %d; supported on CUDA: up to 512",
                 p.head_dim, p.value_dim);
  }
  if (context.workspace_bytes < decode_attention_workspace(p, context))
    return error(Kind::failed, "decode_attention: the workspace is too small");
  int splits = 1, slots = 1;
  kernel->cut(p, context, &splits, &slots);
  return decode_cuda_launch(*kernel, p, splits, slots, context);
}

}  // namespace sparsekit

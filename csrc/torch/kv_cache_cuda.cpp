// The cache ops on CUDA.
#include "torch/cuda.h"
#include "torch/kv_cache.h"

namespace sparsekit {
namespace {

struct CudaKv {
  static void run(const KvQuantize& q, const Tensor& x) {
    CudaCall call(x);
    require(kv_quantize(q, call.context));
  }
  static void run(const KvDequantize& q, const Tensor& codes) {
    CudaCall call(codes);
    require(kv_dequantize(q, call.context));
  }
  static void run(const KvAppend& a, const Tensor& window) {
    CudaCall call(window);
    require(kv_append(a, call.context));
  }
  static void run(const KvCrop& a, const Tensor& window) {
    CudaCall call(window);
    require(kv_crop(a, call.context));
  }
  static void run(const KvCompact& a, const Tensor& window) {
    CudaCall call(window);
    require(kv_compact(a, call.with_workspace(kv_compact_workspace(a))));
  }
  static void run(const DecodeAttention& d, const Tensor& query) {
    CudaCall call(query);
    require(decode_attention(d, call.with_workspace(decode_attention_workspace(d, call.context))));
  }
};

/// "name: runs" or "name: the reason it refuses", a line per implementation: of a cache of `bits` (0: a plain cache of
/// query's dtype) for `rows` query rows per key head.
std::string decode_plan_cuda(ScalarType dtype, int64_t head_dim, int64_t value_dim, int64_t bits, int64_t group_size,
                             bool per_channel) {
  CudaContext context;
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_device_index(&device));
  cuda_device_properties(device, &context.compute_capability, &context.multiprocessors);
  DecodeAttention problem;
  problem.dtype = to_dtype(dtype, "dtype");
  problem.batch = problem.heads_q = problem.heads_kv = problem.len_q = 1;
  problem.head_dim = int32_t(head_dim);
  problem.value_dim = int32_t(value_dim);
  KvCache cache;
  cache.key.bits = cache.value.bits = int32_t(bits);
  cache.key.dim = int32_t(head_dim);
  cache.value.dim = int32_t(value_dim);
  cache.key.group_size = cache.value.group_size = int32_t(group_size);
  cache.key.per_channel = per_channel;
  cache.value.value_layout = true;
  cache.dtype = problem.dtype;
  PlainCache plain;
  plain.dtype = problem.dtype;
  plain.page_size = 16;
  plain.key_page = plain.value_page = plain.key_head = plain.value_head = 16 * head_dim;
  plain.key_token = plain.value_token = head_dim;
  if (bits) {
    problem.cache = &cache;
  } else {
    problem.plain = &plain;
  }
  return plan_text(decode_plan(problem, context));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CUDA, m) { SPARSEKIT_REGISTER_KV_CACHE(m, CudaKv); }

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CompositeExplicitAutograd, m) {
  m.impl("decode_plan_cuda", TORCH_BOX(decode_plan_cuda));
}

}  // namespace sparsekit

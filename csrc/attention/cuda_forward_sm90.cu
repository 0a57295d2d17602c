// The host side of the Hopper forward, and its entry in the table of implementations: which problems it takes, which
// kernel, the tensor maps, and the launch.
#include "attention/cuda_forward_sm90.h"

#include <cuda_runtime.h>

#include <algorithm>

#include "attention/cuda_implementations.h"
#include "attention/cuda_schedule.h"
#include "attention/cuda_sequences.h"
#include "attention/cuda_tiles.cuh"
#include "common/cuda/launch.h"
#include "common/cuda/math.cuh"
#include "common/cuda/tensor_map.h"

namespace sparsekit {
namespace sm90 {
namespace {

constexpr int kCounterBytes = 16;  // in front of the order

int64_t list_rows(const AttentionProblem& p) { return p.batch * p.heads_q * p.lists.q_blocks; }

/// The cheapest kernel that holds the problem's dimensions and has its query block; null: none.
const ForwardKernel* kernel_for(const AttentionProblem& p) {
  const bool bf16 = p.dtype == DType::bf16;
  for (const ForwardKernels& kernels : {bf16 ? forward_kernels_bf16() : forward_kernels_f16(),
                                        bf16 ? forward_kernels_bf16_large() : forward_kernels_f16_large()}) {
    for (const ForwardKernel* kernel = kernels.first; kernel < kernels.first + kernels.count; ++kernel) {
      if (p.head_dim <= kernel->head_dim && p.value_dim <= kernel->value_dim && p.lists.block_q == kernel->rows) {
        return kernel;
      }
    }
  }
  return nullptr;
}

const char* refuses(const AttentionProblem& p, Direction direction, const CudaContext& context) {
  if (context.compute_capability != 90) return "needs a GPU of compute capability 9.0 (Hopper)";
  if (p.dtype != DType::bf16 && p.dtype != DType::f16) return "dtype: supported are float16, bfloat16";
  if ((p.lists.block_q != 64 && p.lists.block_q != 128) || (p.lists.block_k != 64 && p.lists.block_k != 128)) {
    return "block_size: supported are 64 and 128 in any pairing";
  }
  // Smaller ones would multiply zeros: the Ampere kernel has sizes of their own for them.
  if (p.head_dim < 64 || p.value_dim < 64) return "head_dim, value_dim: supported are 64 and larger";
  if (p.head_dim % 8 || p.value_dim % 8) return "head_dim, value_dim: supported are multiples of 16 bytes";
  if (!kernel_for(p)) return "head_dim, value_dim: supported are up to 256 with query blocks of 128, 128 with 64";
  const char* reason = cuda::tensor_map_refuses(p.query, p.dtype, p.batch, p.heads_q, p.len_q);
  if (!reason) reason = cuda::tensor_map_refuses(p.key, p.dtype, p.batch, p.heads_kv, p.len_k);
  if (!reason) reason = cuda::tensor_map_refuses(p.value, p.dtype, p.batch, p.heads_kv, p.len_k);
  if (reason) return reason;
  if (reinterpret_cast<uintptr_t>(p.lists.bits) % 16) return "partial_bits: supported are addresses of 16 bytes";
  if (p.len_q > cuda::kMaxLength || p.len_k > cuda::kMaxLength) {
    return "query, key: supported are up to 2^31 - 4097 rows";
  }
  if (p.sequences > cuda::kMaxLength) return "cu_seqlens: supported are up to 2^31 - 4097 sequences";
  if (list_rows(p) > INT32_MAX / 2) return "query: supported are up to 2^30 query blocks over batch and heads";
  // Last: what forward and backward are refused for has the same reason in both.
  if (direction == Direction::backward) return "backward is not in this implementation";
  return nullptr;
}

/// The counter, of packed batches the extents of the list rows, and the order; or in its place, before it is made, what
/// the extents need as scratch.
size_t extents_bytes(const AttentionProblem& p) { return p.packed() ? size_t(p.lists.q_blocks) * sizeof(int4) : 0; }
size_t workspace(const AttentionProblem& p, Direction, const CudaContext&) {
  const int64_t numbers = p.packed() ? std::max(list_rows(p), p.sequences + 1) : list_rows(p);
  return kCounterBytes + extents_bytes(p) + size_t(numbers) * sizeof(int32_t);
}

Status make_maps(ForwardArguments* a, const ForwardKernel& kernel) {
  const AttentionForward& p = a->call;
  Status status = cuda::make_tensor_map(&a->query, p.query, p.dtype, p.batch, p.heads_q, p.len_q, p.head_dim,
                                        kernel.rows, p.query.data);
  if (status.ok()) {
    status = cuda::make_tensor_map(&a->key, p.key, p.dtype, p.batch, p.heads_kv, p.len_k, p.head_dim, a->keys_per_box,
                                   p.query.data);
  }
  if (status.ok()) {
    status = cuda::make_tensor_map(&a->value, p.value, p.dtype, p.batch, p.heads_kv, p.len_k, p.value_dim,
                                   a->keys_per_box, p.query.data);
  }
  return status;
}

Status forward(const AttentionForward& p, const CudaContext& context) {
  if (list_rows(p) == 0 || p.len_q == 0) return {};
  const size_t needed = workspace(p, Direction::forward, context);
  if (context.workspace_bytes < needed) {
    return error(Status::Kind::invalid_argument, "workspace is %zu bytes; needed: %zu", context.workspace_bytes,
                 needed);
  }
  const int64_t out_strides = p.out.batch | p.out.head | p.out.row;
  if ((reinterpret_cast<uintptr_t>(p.out.data) | uintptr_t(out_strides * size_of(p.dtype))) % 16) {
    return error(Status::Kind::unsupported, "out: supported are addresses and strides that are multiples of 16 bytes");
  }
  const ForwardKernel& kernel = *kernel_for(p);
  ForwardArguments a{};
  a.call = p;
  a.items = int32_t(list_rows(p));
  a.keys_per_box = std::min(p.lists.block_k, kernel.keys);
  a.ranged = p.has_mask();
  a.plain = p.softcap <= 0.f && !p.key_bias && p.scale > 0.f;
  a.factor = p.scale * cuda::kLog2e;
  if (p.softcap > 0.f) a.cap_in = p.scale / p.softcap, a.cap_out = p.softcap * cuda::kLog2e;
  Status status = make_maps(&a, kernel);
  if (!status.ok()) return status;

  const int ctas = std::min(a.items, kernel.ctas * context.multiprocessors);
  char* const extents = static_cast<char*>(context.workspace) + kCounterBytes;
  int32_t* const order = reinterpret_cast<int32_t*>(extents + extents_bytes(p));
  if (p.packed()) {
    a.extents = reinterpret_cast<const int4*>(extents);
    status = cuda::list_row_extents(p, reinterpret_cast<int4*>(extents), order, context.stream);
    if (!status.ok()) return status;
  }
  if (a.items > ctas) {
    a.counter = static_cast<int32_t*>(context.workspace);
    a.order = order;
    status = cuda::schedule_longest_first(p, order, context.stream, a.counter);
    if (!status.ok()) return status;
  }
  const cudaError_t code = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel.kernel),
                                                cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes);
  if (code != cudaSuccess) return cuda::status_of(code, "setting the forward kernel's shared memory");
  kernel.kernel<<<unsigned(ctas), unsigned(kernel.threads), size_t(kernel.shared_bytes),
                  static_cast<cudaStream_t>(context.stream)>>>(a);
  return cuda::status_of(cudaGetLastError(), "launching block-sparse attention forward");
}

Status backward(const AttentionBackward&, const CudaContext&) {
  return error(Status::Kind::unsupported, "backward is not in the implementation sm90");
}

}  // namespace
}  // namespace sm90

const CudaAttention attention_cuda_sm90 = {"sm90", sm90::refuses, sm90::workspace, sm90::forward, sm90::backward};

}  // namespace sparsekit

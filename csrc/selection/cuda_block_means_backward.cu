// Gradients of block scores by the mean, on the GPU.
//
// With g = grad[m, n] * scale / (pairs of block (m, n) that see each other), K_n and Q_m the sums over blocks:
//   dq_i = sum over n that m sees whole of g K_n  +  over n that causality cuts of g (sum of the k_j that i sees)
//   dk_j = sum over heads and m that see n whole of g Q_m  +  over m that it cuts of g (sum of the q_i that see j)
// A CTA per block of the result, a thread per element of its rows. What a row sees grows by one key from row to row,
// what sees a key by one row from key to key backwards: running sums, each in one order.
//
// Bound: reading query and key twice and writing their gradients, until the sums over blocks catch up.
#include "selection/cuda_block_means.cuh"
#include "selection/cuda_kernels.h"

namespace sparsekit::cuda {
namespace {

constexpr int kThreads = 128;

__device__ __forceinline__ void put(float* to, float x) { *to = x; }
__device__ __forceinline__ void put(__half* to, float x) { *to = __float2half_rn(x); }
__device__ __forceinline__ void put(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }

template <class Element>
__device__ __forceinline__ Element* grads_of(const OutputView& view, int64_t b, int64_t h, int64_t row) {
  return static_cast<Element*>(view.data) + b * view.batch + h * view.head + row * view.row;
}

/// grad * scale / pairs, for a pair of blocks that see each other.
__device__ __forceinline__ float weight(const BlockScoresBackward& p, const Span& span, int64_t head, int m, int n) {
  if (n >= p.key_blocks || span.list_row + m >= p.q_blocks) return 0.f;
  const float grad =
      static_cast<const float*>(p.grad_scores)[(head * p.q_blocks + span.list_row + m) * p.key_blocks + n];
  return grad * p.scale / BlockPair(p, span, m, n).pairs();
}

/// grid (query blocks, heads)
template <class Element>
__global__ void __launch_bounds__(kThreads) grad_of_queries(BlockScoresBackward p, BlockMeans means) {
  const int head = blockIdx.y, b = head / int(p.heads_q), h = head % int(p.heads_q);
  const int kv_head = h / int(p.heads_q / p.heads_kv), dim = p.head_dim, block_k = p.lists.block_k;
  Span span;
  int m;
  if (!find_span(means.blocks, false, blockIdx.x, &span, &m)) return;
  const SeenBlocks bounds(p, span, m);
  const int64_t first_row = int64_t(m) * p.lists.block_q;
  const int rows = int(min(int64_t(p.lists.block_q), span.len_q() - first_row));
  const int64_t position = first_row + span.len_k() - span.len_q();  // of the first row
  const Element* key = rows_of<Element>(p.key, b, kv_head, span.k_begin);
  Element* out = grads_of<Element>(p.grad_query, b, h, span.q_begin + first_row);
  const int64_t k_row = (int64_t(b) * p.heads_kv + kv_head) * means.k_blocks + span.k_block;
  const int known = int(clamped(means.k_blocks - span.k_block, 0, bounds.whole));  // cu_seqlens may hold anything
  for (int d = int(threadIdx.x); d < dim; d += kThreads) {
    float sum = 0.f;
    for (int n = 0; n < known; ++n) {
      const float keys = float(min(int64_t(block_k), span.len_k() - int64_t(n) * block_k));
      sum = fmaf(weight(p, span, head, m, n) * keys, means.k.whole[(k_row + n) * dim + d], sum);
    }
    int64_t j = int64_t(bounds.whole) * block_k, change = j;
    float factor = 0.f;
    for (int i = 0; i < rows; ++i) {
      for (; j <= position + i && j < span.len_k(); ++j) {
        if (j == change) {  // into the next block
          factor = weight(p, span, head, m, int(j / block_k));
          change += block_k;
        }
        sum = fmaf(factor, widened(key[j * p.key.row + d]), sum);
      }
      put(out + i * p.grad_query.row + d, sum);
    }
  }
}

/// grid (key blocks, key heads)
template <class Element>
__global__ void __launch_bounds__(kThreads) grad_of_keys(BlockScoresBackward p, BlockMeans means) {
  const int b = int(blockIdx.y) / int(p.heads_kv), kv_head = int(blockIdx.y) % int(p.heads_kv);
  const int heads_each = int(p.heads_q / p.heads_kv), dim = p.head_dim, block_q = p.lists.block_q;
  Span span;
  int n;
  if (!find_span(means.blocks, true, blockIdx.x, &span, &n)) return;
  const int64_t first_key = int64_t(n) * p.lists.block_k, shift = span.len_k() - span.len_q();
  const int keys = int(min(int64_t(p.lists.block_k), span.len_k() - first_key));
  const int blocks = int(min(int64_t(ceil_div(span.len_q(), block_q)), p.q_blocks - span.list_row));
  // Blocks from `whole` on see all of the keys, those from `seen` on some.
  int seen = 0, whole = 0;
  if (p.causal) {
    const int64_t all = clamped(first_key + keys - 1 - shift, 0, INT32_MAX),
                  some = clamped(first_key - shift, 0, INT32_MAX);
    whole = int(min(int64_t(blocks), (all + block_q - 1) / block_q));
    seen = int(min(int64_t(whole), some / block_q));
  }
  const int64_t cut_begin = int64_t(seen) * block_q, cut_end = min(int64_t(whole) * block_q, int64_t(span.len_q()));
  Element* out = grads_of<Element>(p.grad_key, b, kv_head, span.k_begin + first_key);
  for (int d = int(threadIdx.x); d < dim; d += kThreads) {
    float sum = 0.f;
    for (int h = kv_head * heads_each; h < (kv_head + 1) * heads_each; ++h) {
      const int64_t head = int64_t(b) * p.heads_q + h;
      for (int m = whole; m < blocks; ++m) {
        const float rows = float(min(int64_t(block_q), span.len_q() - int64_t(m) * block_q));
        sum = fmaf(weight(p, span, head, m, n) * rows, means.q.whole[(head * p.q_blocks + span.list_row + m) * dim + d],
                   sum);
      }
    }
    int64_t next = cut_end;  // rows from here on, to cut_end, are in the sum
    for (int j = keys - 1; j >= 0; --j) {
      const int64_t least = max(cut_begin, first_key + j - shift);  // the first row that sees key j
      for (; next > least; --next) {
        const int m = int((next - 1) / block_q);
        for (int h = kv_head * heads_each; h < (kv_head + 1) * heads_each; ++h) {
          const float factor = weight(p, span, int64_t(b) * p.heads_q + h, m, n);
          const Element* query = rows_of<Element>(p.query, b, h, span.q_begin + next - 1);
          sum = fmaf(factor, widened(query[d]), sum);
        }
      }
      put(out + j * p.grad_key.row + d, sum);
    }
  }
}

template <class Element>
void run(const BlockScoresBackward& p, const BlockMeans& means, cudaStream_t stream) {
  if (p.q_blocks > 0) {
    const dim3 grid(unsigned(p.q_blocks), unsigned(p.batch * p.heads_q));
    launch(grad_of_queries<Element>, grid, kThreads, 0, stream, p, means);
  }
  if (means.k_blocks > 0) {
    const dim3 grid(unsigned(means.k_blocks), unsigned(p.batch * p.heads_kv));
    launch(grad_of_keys<Element>, grid, kThreads, 0, stream, p, means);
  }
}

}  // namespace

size_t block_scores_backward_workspace(const BlockScoresBackward& p, const CudaContext&) {
  return p.reduce == BlockReduce::mean ? block_means_bytes(p) : blocks_backward_workspace(p);
}

Status score_blocks_backward(const BlockScoresBackward& p, const CudaContext& context) {
  if (p.reduce != BlockReduce::mean) return blocks_backward(p, context);
  const auto stream = static_cast<cudaStream_t>(context.stream);
  BlockMeans means = block_means_of(p, context.workspace, /*parts=*/false);
  BlockScoresBackward call = p;
  call.q_similarity = call.k_similarity = nullptr;
  find_block_means(call, &means, false, context.multiprocessors, stream);
  if (p.packed()) {  // rows and keys of no sequence; gradients are dense in memory
    const int64_t size = size_of(p.dtype) * p.head_dim;
    cudaMemsetAsync(p.grad_query.data, 0, size_t(p.len_q * p.heads_q * size), stream);
    cudaMemsetAsync(p.grad_key.data, 0, size_t(p.len_k * p.heads_kv * size), stream);
  }
  switch (p.dtype) {
    case DType::f16: run<__half>(call, means, stream); break;
    case DType::bf16: run<__nv_bfloat16>(call, means, stream); break;
    default: run<float>(call, means, stream);
  }
  return launched("block_scores_backward");
}

}  // namespace sparsekit::cuda

// Gradients of block scores by the maximum and by antidiagonals, on the GPU: right, repeatable, and no faster than that
// takes. Trained gates pool by the mean (cuda_block_means_backward.cu).
//
//   max            the gradient of a block goes to the first pair that has its maximum: dq_i += g k_j, dk_j += g q_i
//   antidiagonal   with w[r, c] = exp(tile[r, c] - lse[r]), S the sums of w over blocks, and of_w = grad / S of c's
//   block:
//                  each pair of tile (r, c) gets w[r, c] (of_w[r, c] - sum over c of w of_w) / (pairs of the tile)
//
// max: the pairs are found tile by tile, then each row (key) collects those that name it, in order of their blocks.
// antidiagonal: tiles are computed again for the sums over a row, for query and for key; what a tile gives to a row is
// added to fp32 sums in the workspace by one thread, tile by tile.
#include <algorithm>
#include <climits>

#include "selection/cuda_block_folds.cuh"
#include "selection/cuda_kernels.h"

namespace sparsekit::cuda {
namespace {

struct Gradient {
  BlockFold f;
  BlockScoresBackward p;
  int2* pairs = nullptr;                   // max: [batch, heads_q, q_blocks, key_blocks], (-1, -1) for none
  const float* lse = nullptr;              // antidiagonal: [batch, heads_q, q_blocks * rows of a block]
  const float* sums = nullptr;             // [batch, heads_q, q_blocks, key_blocks]
  float* dots = nullptr;                   // as lse
  float *query = nullptr, *key = nullptr;  // [batch, heads_q, len_q, head_dim], [batch, heads_kv, len_k, head_dim]

  __device__ __forceinline__ float grad(int64_t row, int64_t n) const {  // row: of all heads' blocks
    return static_cast<const float*>(p.grad_scores)[row * f.key_blocks + n];
  }
};

__device__ __forceinline__ void put(float* to, float x) { *to = x; }
__device__ __forceinline__ void put(__half* to, float x) { *to = __float2half_rn(x); }
__device__ __forceinline__ void put(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }

template <class Element>
__device__ __forceinline__ Element* grads_of(const OutputView& view, int64_t b, int64_t h, int64_t row) {
  return static_cast<Element*>(view.data) + b * view.batch + h * view.head + row * view.row;
}

// ---- max

/// The first of equal maxima: by query row, then by key.
struct Best {
  float score;
  int i, j;  // of the sequence; -1: none

  __device__ __forceinline__ void take(float s, int row, int key) {
    if (row < 0) return;
    if (i < 0 || s > score || (s == score && (row < i || (row == i && key < j)))) score = s, i = row, j = key;
  }
};

/// grid (query blocks, heads): the pair of every key block.
template <class Element>
__global__ void __launch_bounds__(kThreads) find_pairs(Gradient g) {
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  __shared__ float best_scores[kThreads];
  __shared__ int best_rows[kThreads], best_keys[kThreads];
  const BlockFold& f = g.f;
  const AttentionProblem& p = f.p;
  Place at;
  if (!at.find(f, blockIdx.x, blockIdx.y)) return;
  auto* scores = reinterpret_cast<float*>(dynamic_shared);
  const int tid = int(threadIdx.x), block_q = p.lists.block_q, block_k = p.lists.block_k;
  const int64_t begin = int64_t(at.m0) * block_q, end = min(begin + block_q, int64_t(at.span.len_q()));
  const int blocks = int(min(f.key_blocks, int64_t(ceil_div(at.span.len_k(), block_k))));
  const Element* query = rows_of<Element>(p.query, at.b, at.h, at.span.q_begin);
  const Element* key = rows_of<Element>(p.key, at.b, at.kv_head, at.span.k_begin);
  ScoreTile<Element> tile;
  for (int n = 0; n < blocks; ++n) {
    const int64_t key0 = int64_t(n) * block_k, key_end = min(key0 + block_k, int64_t(at.span.len_k()));
    if (p.causal && key0 > at.position(end - 1)) break;
    Best best = {0.f, -1, -1};
    for (int64_t row = begin; row < end; row += kRows) {
      for (int64_t first = key0; first < key_end; first += kKeys) {
        tile.multiply(
            1, p.head_dim, f.vectors,
            [&](int r, int) { return row + r < end ? query + (row + r) * p.query.row : nullptr; },
            [&](int k, int) { return first + k < key_end ? key + (first + k) * p.key.row : nullptr; }, dynamic_shared);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < kKeys / 8; ++j)
            scores[tile.row_of(i) * kPitch + tile.key_of(j, i)] = tile.c[j][i] * p.scale;
        }
        __syncthreads();
        if (tid < kRows && row + tid < end) {
          const int64_t stop = p.causal ? min(key_end, at.position(row + tid) + 1) : key_end;
          for (int64_t j = first; j < min(stop, first + kKeys); ++j) {
            best.take(scores[tid * kPitch + int(j - first)], int(row) + tid, int(j));
          }
        }
        __syncthreads();
      }
    }
    best_scores[tid] = best.score;
    best_rows[tid] = best.i;
    best_keys[tid] = best.j;
    __syncthreads();
    if (tid == 0) {
      for (int t = 1; t < kRows; ++t) best.take(best_scores[t], best_rows[t], best_keys[t]);
      g.pairs[(int64_t(at.head) * f.q_blocks + at.row0) * f.key_blocks + n] = make_int2(best.i, best.j);
    }
    __syncthreads();
  }
}

/// grid (query blocks, heads): a warp per row collects the blocks whose pair has it.
template <class Element>
__global__ void __launch_bounds__(kThreads) max_to_queries(Gradient g) {
  const AttentionProblem& p = g.f.p;
  Place at;
  if (!at.find(g.f, blockIdx.x, blockIdx.y)) return;
  const int64_t row = int64_t(at.head) * g.f.q_blocks + at.row0, begin = int64_t(at.m0) * p.lists.block_q;
  const int64_t end = min(begin + p.lists.block_q, int64_t(at.span.len_q()));
  const Element* key = rows_of<Element>(p.key, at.b, at.kv_head, at.span.k_begin);
  for (int64_t i = begin + warp_of(); i < end; i += kThreads / kWarp) {
    Element* out = grads_of<Element>(g.p.grad_query, at.b, at.h, at.span.q_begin + i);
    for (int d0 = 0; d0 < p.head_dim; d0 += kWarp) {
      const int d = d0 + lane_of();
      float sum = 0.f;
      for (int64_t n0 = 0; n0 < g.f.key_blocks; n0 += kWarp) {
        const int64_t n = n0 + lane_of();
        const int2 pair = n < g.f.key_blocks ? g.pairs[row * g.f.key_blocks + n] : make_int2(-1, -1);
        for (unsigned left = __ballot_sync(kLanes, pair.x == i); left; left &= left - 1) {
          const int lane = __ffs(int(left)) - 1, j = __shfl_sync(kLanes, pair.y, lane);
          if (d < p.head_dim) sum = fmaf(g.grad(row, n0 + lane) * p.scale, widened(key[j * p.key.row + d]), sum);
        }
      }
      if (d < p.head_dim) put(out + d, sum);
    }
  }
}

/// grid (key blocks, key heads): likewise per key, over the heads that share it.
template <class Element>
__global__ void __launch_bounds__(kThreads) max_to_keys(Gradient g) {
  const AttentionProblem& p = g.f.p;
  const int b = int(blockIdx.y) / int(p.heads_kv), kv_head = int(blockIdx.y) % int(p.heads_kv);
  const int heads_each = int(p.heads_q / p.heads_kv);
  Span span;
  int n;
  if (!find_span(g.f.blocks, true, blockIdx.x, &span, &n)) return;
  const int64_t begin = int64_t(n) * p.lists.block_k, end = min(begin + p.lists.block_k, int64_t(span.len_k()));
  const int64_t rows = clamped(g.f.q_blocks - span.list_row, 0, ceil_div(span.len_q(), p.lists.block_q));
  for (int64_t j = begin + warp_of(); j < end; j += kThreads / kWarp) {
    Element* out = grads_of<Element>(g.p.grad_key, b, kv_head, span.k_begin + j);
    for (int d0 = 0; d0 < p.head_dim; d0 += kWarp) {
      const int d = d0 + lane_of();
      float sum = 0.f;
      for (int h = kv_head * heads_each; n < g.f.key_blocks && h < (kv_head + 1) * heads_each; ++h) {
        const int64_t first = (int64_t(b) * p.heads_q + h) * g.f.q_blocks + span.list_row;
        const Element* query = rows_of<Element>(p.query, b, h, span.q_begin);
        for (int64_t m0 = 0; m0 < rows; m0 += kWarp) {
          const int64_t m = m0 + lane_of();
          const int2 pair = m < rows ? g.pairs[(first + m) * g.f.key_blocks + n] : make_int2(-1, -1);
          for (unsigned left = __ballot_sync(kLanes, pair.y == j); left; left &= left - 1) {
            const int lane = __ffs(int(left)) - 1, i = __shfl_sync(kLanes, pair.x, lane);
            if (d < p.head_dim)
              sum = fmaf(g.grad(first + m0 + lane, n) * p.scale, widened(query[i * p.query.row + d]), sum);
          }
        }
      }
      if (d < p.head_dim) put(out + d, sum);
    }
  }
}

// ---- antidiagonal

/// The scores of an antidiagonal_tile become what each pair of a tile gets: w (of_w - dot) / pairs * scale; or, for the
/// dots themselves, w of_w.
__device__ __forceinline__ void weigh_tiles(const Gradient& g, const Place& at, int64_t row0, int64_t row_end,
                                            int64_t key0, bool for_dots, float* scores) {
  const BlockFold& f = g.f;
  const int stride = f.stride, block_q = f.p.lists.block_q, block_k = f.p.lists.block_k;
  for (int e = int(threadIdx.x); e < kRows * kKeys; e += kThreads) {
    const int r = e / kKeys, n = e % kKeys;
    float& score = scores[r * kPitch + n];
    const int64_t first = row0 + int64_t(r) * stride, begin = key0 + int64_t(n) * stride, column = begin / block_k;
    float x = 0.f;
    if (score != -kInfinity && first < row_end && column < f.key_blocks) {
      const int64_t block = int64_t(at.head) * f.q_blocks + at.span.list_row + first / block_q;
      const int64_t tile_row = (int64_t(at.head) * f.q_blocks + at.span.list_row) * f.rows_per_block() + first / stride;
      const float weight = exp2_fast((score - g.lse[tile_row]) * kLog2e), sum = g.sums[block * f.key_blocks + column];
      const float of_weight = sum > 0.f ? g.grad(block, column) / sum : 0.f;
      if (for_dots) {
        x = weight * of_weight;
      } else {
        const TileRow row(at, first, stride);
        x = weight * (of_weight - g.dots[tile_row]) * f.p.scale /
            float(row.seen(f.p.causal, row.pairs(at, begin, stride), begin));
      }
    }
    score = x;
  }
  __syncthreads();
}

/// grid (groups, heads): the dots of 64 rows of tiles, or (TO_QUERY) their part of the gradient.
template <class Element, bool TO_QUERY>
__global__ void __launch_bounds__(kThreads) tiles_to_rows(Gradient g) {
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  const BlockFold& f = g.f;
  const AttentionProblem& p = f.p;
  Place at;
  if (!at.find(f, blockIdx.x, blockIdx.y)) return;
  const int stride = f.stride, rows = at.count * f.rows_per_block(), dim = p.head_dim;
  const int64_t begin = int64_t(at.m0) * p.lists.block_q;
  const int64_t end = min(begin + int64_t(rows) * stride, int64_t(at.span.len_q()));
  auto* scores = reinterpret_cast<float*>(dynamic_shared);
  const Element* key = rows_of<Element>(p.key, at.b, at.kv_head, at.span.k_begin);
  float* out = g.query + (int64_t(at.head) * p.len_q + at.span.q_begin) * dim;
  ScoreTile<Element> tile;
  for (int first = 0; first < rows; first += kRows) {
    const int64_t row0 = begin + int64_t(first) * stride;
    float dot = 0.f;
    for (int64_t key0 = 0; key0 < at.span.len_k(); key0 += int64_t(kKeys) * stride) {
      if (p.causal && key0 > at.position(end - 1)) break;
      antidiagonal_tile(f, at, row0, end, key0, at.span.len_k(), tile, dynamic_shared);
      weigh_tiles(g, at, row0, end, key0, !TO_QUERY, scores);
      if (!TO_QUERY) {
        if (threadIdx.x < kRows) {
          for (int n = 0; n < kKeys; ++n) dot += scores[int(threadIdx.x) * kPitch + n];
        }
      } else {
        for (int r = 0; r < kRows && row0 + int64_t(r) * stride < end; ++r) {
          const TileRow row(at, row0 + int64_t(r) * stride, stride);
          for (int t = warp_of(); t < row.rows; t += kThreads / kWarp) {
            float* to = out + (row0 + int64_t(r) * stride + row.rows - 1 - t) * dim;
            for (int d = lane_of(); d < dim; d += kWarp) {
              float sum = to[d];
              for (int n = 0; n < kKeys; ++n) {
                const int64_t first_key = key0 + int64_t(n) * stride;
                const int seen = row.seen(p.causal, row.pairs(at, first_key, stride), first_key);
                if (t < seen) sum = fmaf(scores[r * kPitch + n], widened(key[(first_key + t) * p.key.row + d]), sum);
              }
              to[d] = sum;
            }
          }
        }
      }
      __syncthreads();
    }
    const int r = first + int(threadIdx.x);
    if (!TO_QUERY && threadIdx.x < kRows && r < rows) {
      g.dots[(int64_t(at.head) * f.q_blocks + at.row0) * f.rows_per_block() + r] = dot;
    }
  }
}

/// grid (128 * stride keys, key heads): what all rows of tiles of the heads that share the keys give to them.
template <class Element>
__global__ void __launch_bounds__(kThreads) tiles_to_keys(Gradient g, Spans spans) {
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  const BlockFold& f = g.f;
  const AttentionProblem& p = f.p;
  const int heads_kv = int(p.heads_kv), heads_each = int(p.heads_q / p.heads_kv), stride = f.stride, dim = p.head_dim;
  Place at;
  int inside;
  if (!find_span(spans, true, blockIdx.x, &at.span, &inside)) return;
  if (f.blocks.table) at.span = f.blocks.table[at.span.index];
  at.b = int(blockIdx.y) / heads_kv;
  at.kv_head = int(blockIdx.y) % heads_kv;
  at.m0 = 0;
  at.row0 = at.span.list_row;
  const int64_t key0 = int64_t(inside) * kKeys * stride;
  const int64_t row_end = min(int64_t(at.span.len_q()), max(f.q_blocks - at.row0, int64_t(0)) * p.lists.block_q);
  auto* scores = reinterpret_cast<float*>(dynamic_shared);
  float* out = g.key + (int64_t(blockIdx.y) * p.len_k + at.span.k_begin) * dim;
  ScoreTile<Element> tile;
  for (at.h = at.kv_head * heads_each; at.h < (at.kv_head + 1) * heads_each; ++at.h) {
    at.head = at.b * int(p.heads_q) + at.h;
    const Element* query = rows_of<Element>(p.query, at.b, at.h, at.span.q_begin);
    for (int64_t row0 = 0; row0 < row_end; row0 += int64_t(kRows) * stride) {
      if (p.causal && at.position(min(row0 + int64_t(kRows) * stride, row_end) - 1) < key0) continue;
      antidiagonal_tile(f, at, row0, row_end, key0, at.span.len_k(), tile, dynamic_shared);
      weigh_tiles(g, at, row0, row_end, key0, false, scores);
      for (int n = 0; n < kKeys; ++n) {
        const int64_t first = key0 + int64_t(n) * stride;
        const int keys = int(clamped(at.span.len_k() - first, 0, stride));
        for (int t = warp_of(); t < keys; t += kThreads / kWarp) {
          for (int d = lane_of(); d < dim; d += kWarp) {
            float sum = out[(first + t) * dim + d];
            for (int r = 0; r < kRows && row0 + int64_t(r) * stride < row_end; ++r) {
              const TileRow row(at, row0 + int64_t(r) * stride, stride);
              if (t >= row.seen(p.causal, row.pairs(at, first, stride), first)) continue;
              const int64_t i = row0 + int64_t(r) * stride + row.rows - 1 - t;
              sum = fmaf(scores[r * kPitch + n], widened(query[i * p.query.row + d]), sum);
            }
            out[(first + t) * dim + d] = sum;
          }
        }
      }
      __syncthreads();
    }
  }
}

/// grid-stride: [batch, heads, rows, dim] of fp32 to the gradient.
template <class Element>
__global__ void store_gradient(const float* from, OutputView to, int64_t heads, int64_t rows, int dim, int64_t count) {
  for (int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; at < count; at += int64_t(gridDim.x) * blockDim.x) {
    const int64_t row = at / dim, head = row / rows;
    put(grads_of<Element>(to, head / heads, head % heads, row % rows) + at % dim, from[at]);
  }
}

template <class Element>
void store(const float* from, const OutputView& to, const AttentionProblem& p, int64_t heads, int64_t rows,
           cudaStream_t stream) {
  const int64_t count = p.batch * heads * rows * p.head_dim;
  if (count == 0) return;
  launch(store_gradient<Element>, unsigned(clamped(ceil_div<int64_t>(count, 1024), 1, 4096)), 256, 0, stream, from, to,
         heads, rows, int(p.head_dim), count);
}

struct Memory {
  char* at;
  template <class T>
  T* take(int64_t count) {
    char* here = at;
    at += padded_bytes(count * int64_t(sizeof(T)));
    return reinterpret_cast<T*>(here);
  }
};

template <class Element>
void run_max(const BlockScoresBackward& p, const Gradient& g, cudaStream_t stream) {
  const dim3 rows(unsigned(p.q_blocks), unsigned(p.batch * p.heads_q));
  launch(find_pairs<Element>, rows, kThreads, kFoldBytes, stream, g);
  launch(max_to_queries<Element>, rows, kThreads, 0, stream, g);
  if (p.k_blocks() > 0) {
    launch(max_to_keys<Element>, dim3(unsigned(p.k_blocks()), unsigned(p.batch * p.heads_kv)), kThreads, 0, stream, g);
  }
}

template <class Element>
void run_antidiagonal(const BlockScoresBackward& p, const Gradient& g, const Spans& keys, cudaStream_t stream) {
  const dim3 rows(unsigned(tiles_of(p.len_q, g.f.groups.block_q, p)), unsigned(p.batch * p.heads_q));
  launch(tiles_to_rows<Element, false>, rows, kThreads, kFoldBytes, stream, g);
  launch(tiles_to_rows<Element, true>, rows, kThreads, kFoldBytes, stream, g);
  const int64_t tiles = tiles_of(p.len_k, keys.block_k, p);
  launch(tiles_to_keys<Element>, dim3(unsigned(tiles), unsigned(p.batch * p.heads_kv)), kThreads, kFoldBytes, stream, g,
         keys);
  store<Element>(g.query, p.grad_query, p, p.heads_q, p.len_q, stream);
  store<Element>(g.key, p.grad_key, p, p.heads_kv, p.len_k, stream);
}

}  // namespace

size_t blocks_backward_workspace(const BlockScoresBackward& p) {
  const int64_t blocks = p.batch * p.heads_q * p.q_blocks, tables = 3 * int64_t(spans_bytes(p));
  if (p.reduce == BlockReduce::max) return size_t(tables) + padded_bytes(blocks * p.key_blocks * 8);
  const int64_t tile_rows = blocks * (p.lists.block_q / p.stride);
  return size_t(tables) + padded_bytes(tile_rows * 4) * 2 + padded_bytes(blocks * p.key_blocks * 4) +
         padded_bytes(p.batch * p.heads_q * p.len_q * p.head_dim * 4) +
         padded_bytes(p.batch * p.heads_kv * p.len_k * p.head_dim * 4);
}

Status blocks_backward(const BlockScoresBackward& p, const CudaContext& context) {
  const auto stream = static_cast<cudaStream_t>(context.stream);
  Memory memory{static_cast<char*>(context.workspace)};
  Gradient g;
  g.p = p;
  g.f.p = p;
  g.f.q_blocks = p.q_blocks;
  g.f.key_blocks = g.f.width = p.key_blocks;
  const bool max = p.reduce == BlockReduce::max;
  g.f.stride = max ? 1 : p.stride;
  g.f.listed = max;  // one block of queries per CTA
  void* tables = memory.take<char>(2 * int64_t(spans_bytes(p)));
  void* key_table = memory.take<char>(int64_t(spans_bytes(p)));
  set_places(&g.f, tables, stream);
  const int64_t size = size_of(p.dtype) * p.head_dim, blocks = p.batch * p.heads_q * p.q_blocks;
  if (p.packed() || p.len_q == 0 || p.len_k == 0) {  // rows and keys of no sequence; gradients are dense in memory
    cudaMemsetAsync(p.grad_query.data, 0, size_t(p.batch * p.len_q * p.heads_q * size), stream);
    cudaMemsetAsync(p.grad_key.data, 0, size_t(p.batch * p.len_k * p.heads_kv * size), stream);
    if (p.len_q == 0 || p.len_k == 0) return launched("block_scores_backward");
  }
  if (max) {
    g.pairs = memory.take<int2>(blocks * p.key_blocks);
    cudaMemsetAsync(g.pairs, 0xff, size_t(blocks * p.key_blocks) * sizeof(int2), stream);
    switch (p.dtype) {
      case DType::f16: run_max<__half>(p, g, stream); break;
      case DType::bf16: run_max<__nv_bfloat16>(p, g, stream); break;
      default: run_max<float>(p, g, stream);
    }
    return launched("block_scores_backward");
  }
  const int64_t tile_rows = blocks * g.f.rows_per_block();
  auto* lse = memory.take<float>(tile_rows);
  g.lse = g.f.lse = lse;
  g.dots = memory.take<float>(tile_rows);
  auto* sums = memory.take<float>(blocks * p.key_blocks);
  g.sums = g.f.out = sums;
  g.query = memory.take<float>(p.batch * p.heads_q * p.len_q * p.head_dim);
  g.key = memory.take<float>(p.batch * p.heads_kv * p.len_k * p.head_dim);
  cudaMemsetAsync(g.query, 0, size_t(p.batch * p.heads_q * p.len_q * p.head_dim) * 4, stream);
  cudaMemsetAsync(g.key, 0, size_t(p.batch * p.heads_kv * p.len_k * p.head_dim) * 4, stream);
  fill(sums, blocks * p.key_blocks, 0.f, stream);
  find_tile_sums(g.f, lse, context.multiprocessors, stream);
  const Spans keys = spans_of(p, g.f.groups.block_q, int(clamped(int64_t(kKeys) * p.stride, 1, INT32_MAX)), key_table);
  list_spans_of(keys, stream);
  switch (p.dtype) {
    case DType::f16: run_antidiagonal<__half>(p, g, keys, stream); break;
    case DType::bf16: run_antidiagonal<__nv_bfloat16>(p, g, keys, stream); break;
    default: run_antidiagonal<float>(p, g, keys, stream);
  }
  return launched("block_scores_backward");
}

}  // namespace sparsekit::cuda

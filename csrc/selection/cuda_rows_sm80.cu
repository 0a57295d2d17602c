// Folds over rows: the attention that rows pay to each key (row_scores), that probe rows pay to each key and along each
// diagonal (column_scores).
//
//   scores[j] = sum or max over rows i of exp(scale q_i.k_j - lse_i)      diagonals[o] = the same over i - j = o
//
// row_scores: a CTA has 128 keys of one head and goes over the rows, 64 at a time, in order: every sum has one order.
// column_scores: first the lse of the probe rows, a CTA per 64 of them, which goes over the keys; then the same fold.
// Shares go to their diagonals as whole numbers of 2^-shift, by atomics: sums do not depend on the order, and are
// exact. Bound: tiles of scores (cuda_score_tiles.cuh), twice for column_scores.
#include <algorithm>
#include <cmath>

#include "selection/cuda_kernels.h"
#include "selection/cuda_rows.cuh"
#include "selection/cuda_score_tiles.cuh"

namespace sparsekit::cuda {
namespace {

/// One tile of 128 keys, of the head of the CTA.
template <class Element>
__device__ __forceinline__ void fold_tile(const RowFold& call, int key_tile) {
  using Tile = ScoreTile<Element>;
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  __shared__ int rows[Tile::kRows], highs[Tile::kRows];  // numbers of rows, -1: none; the last key that a row sees
  __shared__ float lses[Tile::kRows];
  const RowScores& p = call.p;
  const int head = blockIdx.y, b = head / int(p.heads_q), h = head % int(p.heads_q);
  const int kv_head = h / int(p.heads_q / p.heads_kv), tid = int(threadIdx.x);
  Span span;
  int block;
  if (!find_span(call.spans, true, key_tile, &span, &block)) return;
  const int first = block * Tile::kKeys, keys = min(Tile::kKeys, span.len_k() - first);  // in the sequence
  const auto* query = rows_of<Element>(p.query, b, h, 0);
  const auto* key = rows_of<Element>(p.key, b, kv_head, span.k_begin + first);
  const auto* lse = static_cast<const float*>(p.lse) + int64_t(head) * p.len_q;
  const int32_t* positions = p.query_positions ? p.query_positions + b * p.query_positions_batch : nullptr;
  unsigned long long* diagonals = call.diagonals ? call.diagonals + int64_t(head) * p.len_k + span.k_begin : nullptr;

  float folded[Tile::kKeys / 8][2];
#pragma unroll
  for (int j = 0; j < Tile::kKeys / 8; ++j) folded[j][0] = folded[j][1] = 0.f;
  int64_t start = p.rows ? 0 : span.q_begin;
  const int64_t end = p.rows ? p.rows_count : span.q_end;
  if (p.causal && !p.rows && !positions) start = max(start, int64_t(first) - span.offset());  // earlier rows see none
  Tile tile;
  for (; start < end; start += Tile::kRows) {
    bool sees = false;
    if (tid < Tile::kRows) {
      int row = start + tid < end ? int(start) + tid : -1;
      if (row >= 0 && p.rows) row = p.rows[b * p.rows_batch + row];
      if (row < span.q_begin || row >= span.q_end) row = -1;
      const float own = row >= 0 ? lse[row] : 0.f;
      if (own == -kInfinity) row = -1;
      rows[tid] = row;
      lses[tid] = own;
      highs[tid] = !p.causal || row < 0 ? INT32_MAX : positions ? max(positions[row], -1) : row + span.offset();
      sees = row >= 0 && highs[tid] >= first;
    }
    if (!__syncthreads_or(sees)) continue;
    tile.multiply(
        1, p.head_dim, call.vectors, [&](int r, int) { return rows[r] >= 0 ? query + rows[r] * p.query.row : nullptr; },
        [&](int n, int) { return n < keys ? key + n * p.key.row : nullptr; }, dynamic_shared);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = Tile::row_of(i), high = highs[r] - first;
      const bool exists = rows[r] >= 0;
      const float base = lses[r];
#pragma unroll
      for (int j = 0; j < Tile::kKeys / 8; ++j) {
        const int n = Tile::key_of(j, i);
        float share = exp2_fast(fmaf(tile.c[j][i], p.scale, -base) * kLog2e);
        share = exists && n <= high ? share : 0.f;
        folded[j][i % 2] = p.maximum ? larger(folded[j][i % 2], share) : folded[j][i % 2] + share;
        if (diagonals && exists && n <= high && n < keys) {
          const int64_t o = int64_t(positions[rows[r]]) - (first + n);
          if (o >= 0 && o < span.len_k()) add_share(diagonals + o, share, call.unit);
        }
      }
    }
    __syncthreads();
  }
  // Lanes with the same keys, then warps, in order.
  auto* parts = reinterpret_cast<float*>(dynamic_shared);
#pragma unroll
  for (int j = 0; j < Tile::kKeys / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float x = folded[j][e];
#pragma unroll
      for (int step = 4; step < kWarp; step *= 2) {
        const float other = __shfl_xor_sync(kLanes, x, step);
        x = p.maximum ? larger(x, other) : x + other;
      }
      if (lane_of() < 4) parts[warp_of() * Tile::kKeys + Tile::key_of(j, e)] = x;
    }
  }
  __syncthreads();
  if (tid < keys) {
    float x = parts[tid];
    for (int w = 1; w < Tile::kThreads / kWarp; ++w) {
      const float other = parts[w * Tile::kKeys + tid];
      x = p.maximum ? larger(x, other) : x + other;
    }
    static_cast<float*>(p.scores)[int64_t(head) * p.len_k + span.k_begin + first + tid] = x;
  }
}

/// grid (128 keys, heads), or fewer CTAs that take several tiles of keys each.
template <class Element>
__global__ void __launch_bounds__(ScoreTile<Element>::kThreads) fold_rows(RowFold call) {
  if (call.done && call.done[blockIdx.y / unsigned(call.p.heads_q)]) return;
  for (int tile = int(blockIdx.x); tile < call.tiles; tile += int(gridDim.x)) {
    fold_tile<Element>(call, tile);
    __syncthreads();
  }
}

/// grid (64 rows, heads): lse[row] over the keys that the row sees, -inf where there is none.
template <class Element>
__global__ void __launch_bounds__(ScoreTile<Element>::kThreads)
    lse_of_rows(ColumnScores p, Spans spans, bool vectors, const int* done, float* lse) {
  using Tile = ScoreTile<Element>;
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  const int head = blockIdx.y, b = head / int(p.heads_q), h = head % int(p.heads_q);
  const int kv_head = h / int(p.heads_q / p.heads_kv);
  if (done && done[b]) return;
  Span span;
  int block;
  if (!find_span(spans, false, blockIdx.x, &span, &block)) return;
  const int first = span.q_begin + block * Tile::kRows, rows = min(Tile::kRows, span.q_end - first);
  const auto* query = rows_of<Element>(p.query, b, h, first);
  const auto* key = rows_of<Element>(p.key, b, kv_head, span.k_begin);
  const int32_t* positions = p.query_positions + b * p.query_positions_batch + first;
  int highs[2];
  float highest[2] = {-kInfinity, -kInfinity}, total[2] = {0.f, 0.f};
  int last = span.len_k() - 1;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = Tile::row_of(2 * i);
    highs[i] = r >= rows ? -1 : p.causal ? max(min(positions[r], last), -1) : last;
  }
  if (p.causal) {  // the last key that any row sees
    int high = -1;
    for (int r = 0; r < rows; ++r) high = max(high, min(positions[r], last));
    last = high;
  }
  Tile tile;
  for (int start = 0; start <= last; start += Tile::kKeys) {
    tile.multiply(
        1, p.head_dim, vectors, [&](int r, int) { return r < rows ? query + r * p.query.row : nullptr; },
        [&](int n, int) { return start + n < span.len_k() ? key + (start + n) * p.key.row : nullptr; }, dynamic_shared);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float most = highest[i];
#pragma unroll
      for (int j = 0; j < Tile::kKeys / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = tile.c[j][2 * i + e];
          score = start + Tile::key_of(j, e) <= highs[i] ? score * p.scale : -kInfinity;
          most = larger(most, score);
        }
      }
      const float base = most == -kInfinity ? 0.f : most;
      float sum = total[i] * exp2_fast((highest[i] - base) * kLog2e);
#pragma unroll
      for (int j = 0; j < Tile::kKeys / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) sum += exp2_fast((tile.c[j][2 * i + e] - base) * kLog2e);
      }
      total[i] = sum;
      highest[i] = most;
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float most = row_max(highest[i]), base = most == -kInfinity ? 0.f : most;
    const float sum = row_sum(total[i] * exp2_fast((highest[i] - base) * kLog2e));
    const int r = Tile::row_of(2 * i);
    if (r < rows && lane_of() % 4 == 0) lse[int64_t(head) * p.len_q + first + r] = base + logf(sum);
  }
}

/// grid (any, batch): diagonals as fp32, of whole units; or, before the fold, none.
__global__ void diagonals_to_float(RowFold call, float* to) {
  if (call.done && call.done[blockIdx.y]) return;
  const int64_t count = call.p.heads_q * call.p.len_k, first = int64_t(blockIdx.y) * count;
  for (int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; at < count; at += int64_t(gridDim.x) * blockDim.x) {
    if (to) {
      to[first + at] = share_of(call.diagonals[first + at], call.unit);
    } else {
      call.diagonals[first + at] = 0;
    }
  }
}

template <class Element>
void fold(const RowFold& call, cudaStream_t stream) {
  const RowScores& p = call.p;
  // Where there may be nothing left to do, few CTAs: 32,768 that return at once take 15 us.
  const auto ctas = unsigned(call.done ? std::min(call.tiles, 32) : call.tiles);
  launch(fold_rows<Element>, dim3(ctas, unsigned(p.batch * p.heads_q)), ScoreTile<Element>::kThreads,
         ScoreTile<Element>::kBytes, stream, call);
}

void fold(RowFold call, cudaStream_t stream) {
  call.tiles = int(tiles_of(call.p.len_k, ScoreTile<float>::kKeys, call.p));
  if (call.p.packed()) {  // keys of no sequence
    cudaMemsetAsync(call.p.scores, 0, size_t(call.p.batch * call.p.heads_q * call.p.len_k) * sizeof(float), stream);
  }
  switch (call.p.dtype) {
    case DType::f16: return fold<__half>(call, stream);
    case DType::bf16: return fold<__nv_bfloat16>(call, stream);
    default: return fold<float>(call, stream);
  }
}

template <class Element>
void find_lse(const ColumnScores& p, const RowFold& call, float* lse, cudaStream_t stream) {
  const int64_t tiles = tiles_of(p.len_q, ScoreTile<Element>::kRows, p);
  launch(lse_of_rows<Element>, dim3(unsigned(tiles), unsigned(p.batch * p.heads_q)), ScoreTile<Element>::kThreads,
         ScoreTile<Element>::kBytes, stream, p, call.spans, call.vectors, call.done, lse);
}

}  // namespace

size_t row_scores_workspace(const RowScores& p, const CudaContext&) { return spans_bytes(p); }

Status score_rows(const RowScores& p, const CudaContext& context) {
  const auto stream = static_cast<cudaStream_t>(context.stream);
  RowFold call;
  call.p = p;
  call.spans = spans_of(p, ScoreTile<float>::kRows, ScoreTile<float>::kKeys, context.workspace);
  call.vectors = in_vectors(p.query, p) && in_vectors(p.key, p);
  list_spans_of(call.spans, stream);
  fold(call, stream);
  return launched("row_scores");
}

size_t column_scores_workspace(const ColumnScores& p, const CudaContext& context) {
  const int64_t heads = p.batch * p.heads_q;
  return spans_bytes(p) + padded_bytes(heads * p.len_k * 8) + padded_bytes(heads * p.len_q * 4) +
         (few_columns(p) ? few_columns_workspace(p, context) : 0);
}

Status score_columns(const ColumnScores& p, const CudaContext& context) {
  const auto stream = static_cast<cudaStream_t>(context.stream);
  const int64_t heads = p.batch * p.heads_q, count = heads * p.len_k;
  auto* memory = static_cast<char*>(context.workspace);
  RowFold call;
  static_cast<AttentionProblem&>(call.p) = p;
  call.spans = spans_of(p, ScoreTile<float>::kRows, ScoreTile<float>::kKeys, memory);
  call.vectors = in_vectors(p.query, p) && in_vectors(p.key, p);
  call.diagonals = reinterpret_cast<unsigned long long*>(memory + spans_bytes(p));
  auto* lse = reinterpret_cast<float*>(memory + spans_bytes(p) + padded_bytes(count * 8));
  call.p.lse = lse;
  call.p.scores = p.columns;
  call.unit = share_unit(p.len_q);
  if (few_columns(p)) {
    call.done = score_few_columns(p, context, reinterpret_cast<char*>(lse) + padded_bytes(heads * p.len_q * 4));
  }
  list_spans_of(call.spans, stream);
  const dim3 grid(unsigned(clamped(ceil_div<int64_t>(p.heads_q * p.len_k, 1024), 1, 1024)), unsigned(p.batch));
  launch(diagonals_to_float, grid, 256, 0, stream, call, static_cast<float*>(nullptr));
  if (p.len_q > 0) {
    switch (p.dtype) {
      case DType::f16: find_lse<__half>(p, call, lse, stream); break;
      case DType::bf16: find_lse<__nv_bfloat16>(p, call, lse, stream); break;
      default: find_lse<float>(p, call, lse, stream);
    }
  }
  fold(call, stream);
  launch(diagonals_to_float, grid, 256, 0, stream, call, static_cast<float*>(p.diagonals));
  return launched("column_scores");
}

}  // namespace sparsekit::cuda

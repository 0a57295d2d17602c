// Attention backward, query-stationary: dQ without atomics (deterministic), and the last step of dQ with them.
// Formulas: cuda_backward.cuh.
//
// backward_queries: one CTA per (batch, query head, query tile) walks the forward list of its row; Q and dO stay in
// shared memory and dQ in registers while K and V stream in (two buffers). S, dP and dX are computed a second time: 7
// products in all instead of 5, for a result that does not depend on the order in which CTAs run.
// finish_queries: dQ = scale * the fp32 sum that backward_keys made, in the element type.
#pragma once

#include "attention/cuda_backward.cuh"

namespace sparsekit::cuda {

template <class Tiles>
struct QueriesSharedMemory {  // byte offsets
  int q = 0, dout, dx, rows, k, v, bytes;
  __host__ __device__ explicit QueriesSharedMemory(int stages) {
    dout = q + Tiles::Q_BYTES;
    dx = dout + Tiles::Q_BYTES;
    rows = dx + Tiles::SCORE_BYTES;  // [lse, delta][TILE_Q]
    k = rows + 2 * Tiles::TILE_Q * int(sizeof(float));
    v = k + stages * Tiles::K_BYTES;
    bytes = v + stages * Tiles::K_BYTES;
  }
};

template <class Tiles>
__global__ void __launch_bounds__(Tiles::THREADS, 1) backward_queries(const __grid_constant__ BackwardPlan plan) {
  using Element = typename Tiles::Element;
  constexpr int TILE_Q = Tiles::TILE_Q, TILE_K = Tiles::TILE_K;
  extern __shared__ __align__(128) unsigned char shared[];
  const AttentionBackward& a = plan.a;
  const QueriesSharedMemory<Tiles> at(plan.stages);
  const uint32_t base = shared_address(shared);
  const int batch = blockIdx.z, head = blockIdx.y, head_kv = head / int(a.heads_q / a.heads_kv);
  const int q_row = blockIdx.x * TILE_Q, rows = int(a.len_q) - q_row;
  const int warp = threadIdx.x / kWarpSize;
  const int score_row = warp / Tiles::SCORE_K * (Tiles::SCORE_MT * 16);
  const int score_column = warp % Tiles::SCORE_K * (Tiles::SCORE_NT * 8);
  const int query_column = warp % Tiles::SCORE_K * (Tiles::QUERY_NT * 8);
  const int64_t list = list_row(a, batch, head, q_row / a.lists.block_q);

  copy_tile<Tiles, TILE_Q>(base + at.q,
                           static_cast<const Element*>(a.query.data) +
                               (batch * a.query.batch + head * a.query.head + int64_t(q_row) * a.query.row),
                           a.query.row, rows, a.head_dim);
  copy_tile<Tiles, TILE_Q>(base + at.dout,
                           static_cast<const Element*>(a.grad_out.data) +
                               (batch * a.grad_out.batch + head * a.grad_out.head + int64_t(q_row) * a.grad_out.row),
                           a.grad_out.row, rows, a.value_dim);
  auto* rows_lse = reinterpret_cast<float*>(shared + at.rows);
  const int64_t first = (int64_t(batch) * a.heads_q + head) * plan.padded_rows + q_row;
  for (int i = threadIdx.x; i < TILE_Q; i += Tiles::THREADS) {
    rows_lse[i] = plan.row_lse[first + i];
    rows_lse[TILE_Q + i] = plan.row_delta[first + i];
  }

  TilePair pair;
  pair.batch = batch;
  pair.head = head;
  pair.q_row = q_row;
  BlockWalk walk(a, list);
  int block_end = 0;
  pair.k_row = 0;
  auto next = [&]() {  // the key tiles of the listed blocks
    pair.k_row += TILE_K;
    if (pair.k_row < block_end) return true;
    if (!walk.next()) return false;
    pair.k_row = walk.block() * a.lists.block_k;
    block_end = int(min(int64_t(pair.k_row) + a.lists.block_k, a.len_k));
    pair.partial = walk.partial();
    pair.bits = pair.partial ? bits_of_slot(a.lists, list, walk.slot()) : -1;
    return true;
  };
  auto start_keys = [&](int stage) {
    const int keys = int(a.len_k) - pair.k_row;
    copy_tile<Tiles, TILE_K>(
        base + at.k + stage * Tiles::K_BYTES,
        static_cast<const Element*>(a.key.data) + (batch * a.key.batch + head_kv * a.key.head + pair.k_row * a.key.row),
        a.key.row, keys, a.head_dim);
    copy_tile<Tiles, TILE_K>(base + at.v + stage * Tiles::K_BYTES,
                             static_cast<const Element*>(a.value.data) +
                                 (batch * a.value.batch + head_kv * a.value.head + pair.k_row * a.value.row),
                             a.value.row, keys, a.value_dim);
  };

  float grad_query[Tiles::QUERY_MT][Tiles::QUERY_NT][4];
  clear(grad_query);
  bool more = next();
  if (more) start_keys(0);
  copy_async_commit();
  int stage = 0;
  while (more) {
    const TilePair now = pair;
    const uint32_t k = base + at.k + stage * Tiles::K_BYTES, v = base + at.v + stage * Tiles::K_BYTES;
    copy_async_wait<0>();
    __syncthreads();
    more = next();
    if (more && plan.stages == 2) start_keys(stage ^ 1);
    copy_async_commit();
    float score[Tiles::SCORE_MT][Tiles::SCORE_NT][4], gradient[Tiles::SCORE_MT][Tiles::SCORE_NT][4];
    clear(score);
    product<Element, Tiles::DIM>(score, Operand<false, Tiles::ROW_BYTES>{base + at.q, score_row, 0},
                                 Operand<true, Tiles::ROW_BYTES>{k, score_column, 0});
    weights<Tiles>(plan, now, rows_lse, score);
    clear(gradient);
    product<Element, Tiles::DIM>(gradient, Operand<false, Tiles::ROW_BYTES>{base + at.dout, score_row, 0},
                                 Operand<true, Tiles::ROW_BYTES>{v, score_column, 0});
    score_gradient<Tiles>(plan, now, rows_lse, rows_lse + TILE_Q, nullptr, score, gradient);
    store_scores<Tiles>(shared + at.dx, gradient);
    __syncthreads();
    product<Element, TILE_K>(grad_query, Operand<false, Tiles::SCORE_ROW_BYTES>{base + at.dx, score_row, 0},
                             Operand<false, Tiles::ROW_BYTES>{k, 0, query_column});
    if (plan.stages == 2) {
      stage ^= 1;
    } else {
      __syncthreads();
      if (more) start_keys(0);
      copy_async_commit();
    }
  }
  copy_async_wait<0>();
  __syncthreads();
  store_accumulator<Tiles>(shared + at.q, score_row, query_column, grad_query, a.scale);
  __syncthreads();
  write_tile<Tiles, TILE_Q>(
      shared + at.q,
      static_cast<Element*>(a.grad_query.data) +
          (batch * a.grad_query.batch + head * a.grad_query.head + int64_t(q_row) * a.grad_query.row),
      a.grad_query.row, rows, a.head_dim);
}

template <class Tiles>
__global__ void __launch_bounds__(Tiles::THREADS) finish_queries(const __grid_constant__ BackwardPlan plan) {
  using Element = typename Tiles::Element;
  extern __shared__ __align__(128) unsigned char shared[];
  const AttentionBackward& a = plan.a;
  const int batch = blockIdx.z, head = blockIdx.y, q_row = blockIdx.x * Tiles::TILE_Q;
  const int warp = threadIdx.x / kWarpSize;
  const int64_t first = (int64_t(batch) * a.heads_q + head) * plan.padded_rows + q_row;
  const float* sum = plan.query_sum + first * Tiles::DIM;
  float grad_query[Tiles::QUERY_MT][Tiles::QUERY_NT][4];
#pragma unroll
  for (int i = 0; i < Tiles::QUERY_MT; ++i)
#pragma unroll
    for (int j = 0; j < Tiles::QUERY_NT; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c)
        grad_query[i][j][c] = __ldcs(sum + dq_index<Tiles>((i * Tiles::QUERY_NT + j) * 4 + c));
  store_accumulator<Tiles>(shared, warp / Tiles::SCORE_K * (Tiles::SCORE_MT * 16),
                           warp % Tiles::SCORE_K * (Tiles::QUERY_NT * 8), grad_query, a.scale);
  __syncthreads();
  write_tile<Tiles, Tiles::TILE_Q>(
      shared,
      static_cast<Element*>(a.grad_query.data) +
          (batch * a.grad_query.batch + head * a.grad_query.head + int64_t(q_row) * a.grad_query.row),
      a.grad_query.row, int(a.len_q) - q_row, a.head_dim);
}

}  // namespace sparsekit::cuda

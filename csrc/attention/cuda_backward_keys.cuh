// Attention backward, key-stationary: dK, dV, and dQ by fp32 atomics. Formulas: cuda_backward.cuh.
//
// One CTA per (batch, key head, key tile), longest list first. K and V stay in shared memory and dK, dV in registers
// while the CTA walks the transposed slots of its key block, for each query head of its group; Q and dO stream in by
// cp.async, two buffers each. Per pair of tiles five products:
//   S = Q K^T   dP = dO V^T   dV += P^T dO   dQ += dX K   dK += dX^T Q
// P and dX pass through shared memory, since every warp needs columns that others made. Two barriers per pair:
//   1  Q and dO have arrived; the next ones start into the other buffers; S, P, dP, dX
//   2  P and dX are complete; dV, dQ (atomics into the scratch), dK
// Bound: shared-memory bandwidth. 32 x 32 warp tiles give 16 FLOP per byte of ldmatrix in S, dP and dQ and 21 in dV,
// dK, about 18 together, 128 bytes per clock and multiprocessor: 2300 FLOP per clock. Source: FlashAttention-2 (Dao
// 2023), algorithm 2, with the rows of a block list in place of all query blocks.
#pragma once

#include "attention/cuda_backward.cuh"

namespace sparsekit::cuda {

template <class Tiles>
struct KeysSharedMemory {  // byte offsets
  int k = 0, v, p, dx, q, dout, rows, bias_sums, bytes;
  __host__ __device__ KeysSharedMemory(int stages, bool bias_gradient) {
    v = k + Tiles::K_BYTES;
    p = v + Tiles::K_BYTES;
    dx = p + Tiles::SCORE_BYTES;
    q = dx + Tiles::SCORE_BYTES;
    dout = q + stages * Tiles::Q_BYTES;
    rows = dout + stages * Tiles::Q_BYTES;  // [stages][lse, delta][TILE_Q]
    bias_sums = rows + stages * 2 * Tiles::TILE_Q * int(sizeof(float));
    const int per_thread = Tiles::SCORE_NT * 2;
    bytes = bias_sums + (bias_gradient ? (Tiles::THREADS * per_thread + Tiles::SCORE_Q * Tiles::TILE_K) * 4 : 0);
  }
};

/// Walks the tile pairs of one key tile: query heads of the group, their transposed slots, the query tiles of a block.
template <class Tiles>
class PairWalk {
 public:
  TilePair pair;
  int group_head = -1;

  __device__ __forceinline__ PairWalk(const BackwardPlan& plan, int batch, int head_kv, int k_block, int k_row)
      : plan_(plan), head_kv_(head_kv), k_block_(k_block) {
    pair.batch = batch;
    pair.k_row = k_row;
  }

  __device__ __forceinline__ bool next() {
    const AttentionProblem& p = plan_.a;
    pair.q_row += Tiles::TILE_Q;
    if (pair.q_row < block_end_) return true;
    for (;;) {
      while (entry_ >= entries_) {
        if (!next_head()) return false;
      }
      const int slot_number = ahead_;
      ++entry_;
      if (entry_ < entries_) ahead_ = slots_[entry_];
      if (slot_number < 0) continue;
      const int block = int(unsigned(slot_number) / unsigned(plan_.slots_per_row));
      const int slot = slot_number - block * int(plan_.slots_per_row);
      pair.q_row = block * p.lists.block_q;
      block_end_ = int(min(int64_t(block + 1) * p.lists.block_q, p.len_q));
      if (block >= p.lists.q_blocks || pair.q_row >= block_end_) continue;
      pair.partial = slot < p.lists.partial.capacity;
      pair.bits = pair.partial ? bits_of_slot(p.lists, list_row(p, pair.batch, pair.head, block), slot) : -1;
      if (pair.bits == INT_MIN) continue;
      return true;
    }
  }

 private:
  __device__ __forceinline__ bool next_head() {
    const AttentionProblem& p = plan_.a;
    const int group = int(p.heads_q / p.heads_kv);
    if (++group_head >= group) return false;
    pair.head = head_kv_ * group + group_head;
    const int64_t list = list_row(p, pair.batch, pair.head, 0) / max(p.lists.q_blocks, int64_t(1));
    const int64_t k_blocks = (p.len_k + p.lists.block_k - 1) / p.lists.block_k;
    const int32_t* offsets = plan_.a.transpose.offsets + list * (k_blocks + 1) + k_block_;
    const int64_t begin = min(max(int64_t(offsets[0]), int64_t(0)), plan_.slots_per_head);
    const int64_t end = min(max(int64_t(offsets[1]), begin), plan_.slots_per_head);
    slots_ = plan_.a.transpose.slots + list * plan_.slots_per_head + begin;
    entry_ = 0;
    entries_ = int(end - begin);
    if (entries_ > 0) ahead_ = slots_[0];
    return true;
  }

  const BackwardPlan& plan_;
  const int head_kv_, k_block_;
  const int32_t* slots_ = nullptr;  // of the key block
  int entry_ = 0, entries_ = 0;
  int ahead_ = -1;  // slots_[entry_], loaded a pair early
  int block_end_ = 0;
};

template <class Tiles>
__global__ void __launch_bounds__(Tiles::THREADS, Tiles::CTAS)
    backward_keys(const __grid_constant__ BackwardPlan plan) {
  using Element = typename Tiles::Element;
  constexpr int TILE_Q = Tiles::TILE_Q, TILE_K = Tiles::TILE_K;
  extern __shared__ __align__(128) unsigned char shared[];
  const AttentionBackward& a = plan.a;
  const KeysSharedMemory<Tiles> at(plan.stages, a.grad_key_bias != nullptr);
  const uint32_t base = shared_address(shared);
  // Batch and head come from the grid and not from the order: what blockIdx gives stays in uniform registers, what
  // memory gives takes one of the 255 of each thread (1.5 % at dim 128).
  const int batch = blockIdx.z, head_kv = blockIdx.y, tiles = a.lists.block_k / TILE_K;
  int k_block = int(blockIdx.x / unsigned(tiles));
  if (plan.order)
    k_block = plan.order[(int64_t(batch) * gridDim.y + head_kv) * (gridDim.x / unsigned(tiles)) + k_block];
  const int k_row = k_block * a.lists.block_k + int(blockIdx.x % unsigned(tiles)) * TILE_K;
  if (k_row >= a.len_k) return;
  const int warp = threadIdx.x / kWarpSize;
  const int score_row = warp / Tiles::SCORE_K * (Tiles::SCORE_MT * 16);
  const int score_column = warp % Tiles::SCORE_K * (Tiles::SCORE_NT * 8);
  const int query_column = warp % Tiles::SCORE_K * (Tiles::QUERY_NT * 8);
  const int key_row = warp / Tiles::KEY_D * (Tiles::KEY_MT * 16);
  const int key_column = warp % Tiles::KEY_D * (Tiles::KEY_NT * 8);
  const int keys = int(min(int64_t(TILE_K), a.len_k - k_row));
  const int group = int(a.heads_q / a.heads_kv);

  auto start_pair = [&](const TilePair& pair, int stage) {
    const int rows = int(a.len_q) - pair.q_row;
    copy_tile<Tiles, TILE_Q>(base + at.q + stage * Tiles::Q_BYTES,
                             static_cast<const Element*>(a.query.data) +
                                 (pair.batch * a.query.batch + pair.head * a.query.head + pair.q_row * a.query.row),
                             a.query.row, rows, a.head_dim);
    copy_tile<Tiles, TILE_Q>(
        base + at.dout + stage * Tiles::Q_BYTES,
        static_cast<const Element*>(a.grad_out.data) +
            (pair.batch * a.grad_out.batch + pair.head * a.grad_out.head + pair.q_row * a.grad_out.row),
        a.grad_out.row, rows, a.value_dim);
    constexpr int CHUNKS = TILE_Q / 4;  // of 4 floats
    if (threadIdx.x < 2 * CHUNKS) {
      const int64_t first = (int64_t(pair.batch) * a.heads_q + pair.head) * plan.padded_rows + pair.q_row;
      const float* from = (threadIdx.x < CHUNKS ? plan.row_lse : plan.row_delta) + first + threadIdx.x % CHUNKS * 4;
      copy_async_16(base + at.rows + stage * 2 * TILE_Q * 4 + threadIdx.x * 16, from, true);
    }
  };

  // The key bias gradient of head `head`: column sums of all threads, added up over the warps of one column.
  float* bias_sums = a.grad_key_bias ? reinterpret_cast<float*>(shared + at.bias_sums) : nullptr;
  float* thread_bias_sums = bias_sums ? bias_sums + threadIdx.x : nullptr;
  auto write_bias_gradient = [&](int head) {
    float* by_warp = bias_sums + Tiles::THREADS * Tiles::SCORE_NT * 2;  // [SCORE_Q][TILE_K]
    const ScorePart<Tiles> part;
    for (int i = 0; i < Tiles::SCORE_NT * 2; ++i) {
      float sum = thread_bias_sums[i * Tiles::THREADS];
      thread_bias_sums[i * Tiles::THREADS] = 0.f;
      for (int step = 4; step < kWarpSize; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
      if (threadIdx.x % kWarpSize < 4) by_warp[warp / Tiles::SCORE_K * TILE_K + part.column + i / 2 * 8 + i % 2] = sum;
    }
    __syncthreads();
    if (threadIdx.x < keys) {
      float sum = 0.f;
      for (int i = 0; i < Tiles::SCORE_Q; ++i) sum += by_warp[i * TILE_K + threadIdx.x];
      a.grad_key_bias[(int64_t(batch) * a.heads_q + head) * a.len_k + k_row + threadIdx.x] = sum;
    }
    __syncthreads();
  };

  PairWalk<Tiles> walk(plan, batch, head_kv, k_block, k_row);
  bool more = walk.next();
  if (more) start_pair(walk.pair, 0);
  copy_tile<Tiles, TILE_K>(base + at.k,
                           static_cast<const Element*>(a.key.data) +
                               (batch * a.key.batch + head_kv * a.key.head + int64_t(k_row) * a.key.row),
                           a.key.row, keys, a.head_dim);
  copy_tile<Tiles, TILE_K>(base + at.v,
                           static_cast<const Element*>(a.value.data) +
                               (batch * a.value.batch + head_kv * a.value.head + int64_t(k_row) * a.value.row),
                           a.value.row, keys, a.value_dim);
  copy_async_commit();
  if (bias_sums) {
    for (int i = 0; i < Tiles::SCORE_NT * 2; ++i) thread_bias_sums[i * Tiles::THREADS] = 0.f;
    for (int head = head_kv * group; head < (head_kv + 1) * group; ++head)
      if (threadIdx.x < keys)
        a.grad_key_bias[(int64_t(batch) * a.heads_q + head) * a.len_k + k_row + threadIdx.x] = 0.f;
  }

  float grad_key[Tiles::KEY_MT][Tiles::KEY_NT][4], grad_value[Tiles::KEY_MT][Tiles::KEY_NT][4];
  clear(grad_key);
  clear(grad_value);
  int stage = 0;
  while (more) {
    const TilePair pair = walk.pair;
    const uint32_t q = base + at.q + stage * Tiles::Q_BYTES, dout = base + at.dout + stage * Tiles::Q_BYTES;
    const float* rows_lse = reinterpret_cast<const float*>(shared + at.rows) + stage * 2 * TILE_Q;
    copy_async_wait<0>();
    __syncthreads();
    more = walk.next();
    if (more && plan.stages == 2) start_pair(walk.pair, stage ^ 1);
    copy_async_commit();

    {
      float score[Tiles::SCORE_MT][Tiles::SCORE_NT][4], gradient[Tiles::SCORE_MT][Tiles::SCORE_NT][4];
      clear(score);
      product<Element, Tiles::DIM>(score, Operand<false, Tiles::ROW_BYTES>{q, score_row, 0},
                                   Operand<true, Tiles::ROW_BYTES>{base + at.k, score_column, 0});
      weights<Tiles>(plan, pair, rows_lse, score);
      store_scores<Tiles>(shared + at.p, score);
      clear(gradient);
      product<Element, Tiles::DIM>(gradient, Operand<false, Tiles::ROW_BYTES>{dout, score_row, 0},
                                   Operand<true, Tiles::ROW_BYTES>{base + at.v, score_column, 0});
      score_gradient<Tiles>(plan, pair, rows_lse, rows_lse + TILE_Q, thread_bias_sums, score, gradient);
      store_scores<Tiles>(shared + at.dx, gradient);
    }
    __syncthreads();
    product<Element, TILE_Q>(grad_value, Operand<true, Tiles::SCORE_ROW_BYTES>{base + at.p, 0, key_row},
                             Operand<false, Tiles::ROW_BYTES>{dout, 0, key_column});
    if (plan.query_sum) {
      float grad_query[Tiles::QUERY_MT][Tiles::QUERY_NT][4];
      clear(grad_query);
      product<Element, TILE_K>(grad_query, Operand<false, Tiles::SCORE_ROW_BYTES>{base + at.dx, score_row, 0},
                               Operand<false, Tiles::ROW_BYTES>{base + at.k, 0, query_column});
      const int64_t first = (int64_t(pair.batch) * a.heads_q + pair.head) * plan.padded_rows + pair.q_row;
      add_to_query_sum<Tiles>(plan.query_sum + first * Tiles::DIM, grad_query);
    }
    product<Element, TILE_Q>(grad_key, Operand<true, Tiles::SCORE_ROW_BYTES>{base + at.dx, 0, key_row},
                             Operand<false, Tiles::ROW_BYTES>{q, 0, key_column});
    if (bias_sums && (!more || walk.pair.head != pair.head)) write_bias_gradient(pair.head);
    if (plan.stages == 2) {
      stage ^= 1;
    } else {  // the only buffers are free once every warp has its dK
      __syncthreads();
      if (more) start_pair(walk.pair, 0);
      copy_async_commit();
    }
  }

  // Through the K and V tiles, so that rows are written in 16-byte pieces.
  copy_async_wait<0>();
  __syncthreads();
  store_accumulator<Tiles>(shared + at.k, key_row, key_column, grad_key, a.scale);
  store_accumulator<Tiles>(shared + at.v, key_row, key_column, grad_value, 1.f);
  __syncthreads();
  write_tile<Tiles, TILE_K>(
      shared + at.k,
      static_cast<Element*>(a.grad_key.data) +
          (batch * a.grad_key.batch + head_kv * a.grad_key.head + int64_t(k_row) * a.grad_key.row),
      a.grad_key.row, keys, a.head_dim);
  write_tile<Tiles, TILE_K>(
      shared + at.v,
      static_cast<Element*>(a.grad_value.data) +
          (batch * a.grad_value.batch + head_kv * a.grad_value.head + int64_t(k_row) * a.grad_value.row),
      a.grad_value.row, keys, a.value_dim);
}

}  // namespace sparsekit::cuda

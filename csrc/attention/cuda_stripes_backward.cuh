// Stripe-sparse attention backward, query-stationary: dQ of a unit, and its share of dK and dV. Formulas:
// cuda_backward.cuh.
//
// A CTA owns the rows of a unit (cuda_stripes.h): Q and dO stay in shared memory and dQ in registers, while K and V of
// the plan's tiles are gathered row by row. Per tile five products, whose operands pass through shared memory:
//   S = Q K^T   dP = dO V^T   dV = P^T dO   dK = dX^T Q   dQ += dX K
// Columns lie anywhere and belong to many units, so dK and dV of a tile are added to fp32 sums in memory: by atomics,
// or deterministically by a second launch in which a CTA owns a section of the keys and walks all units in order (dQ in
// the first, dK and dV in the second: seven products).
//
// Bound: shared-memory bandwidth of the products, as for blocks, and the additions: 2 DIM floats per key and unit.
// Units of 128 rows (dim 128) halve those; 16 bytes per lane and addition where the machine has them (9.0), each
// covering whole 32-byte sectors. Source: FlashAttention-2 (Dao 2023), algorithm 2, its loops exchanged.
#pragma once

#include "attention/cuda_stripes_backward.h"
#include "attention/cuda_stripes_tiles.cuh"

namespace sparsekit::cuda {

template <class Tiles>
struct StripesSharedMemory {  // byte offsets
  int q = 0, dout, p, dx, k, v, rows, ring, bias_sums, bytes;
  __host__ __device__ StripesSharedMemory(int stages, bool bias_gradient) {
    dout = q + Tiles::Q_BYTES;
    p = dout + Tiles::Q_BYTES;
    dx = p + Tiles::SCORE_BYTES;
    k = dx + Tiles::SCORE_BYTES;
    v = k + stages * Tiles::K_BYTES;
    rows = v + stages * Tiles::K_BYTES;  // [lse, delta][TILE_Q]
    ring = rows + 2 * Tiles::TILE_Q * int(sizeof(float));
    bias_sums = ring + TileRing<Tiles::TILE_K>::kBytes;  // [SCORE_Q][TILE_K]
    bytes = bias_sums + (bias_gradient ? Tiles::SCORE_Q * Tiles::TILE_K * int(sizeof(float)) : 0);
  }
};

/// copy_tile for the rows of a tile of keys.
template <class Tiles>
__device__ __forceinline__ void gather_tile(uint32_t tile, const typename Tiles::Element* head, int64_t stride,
                                            const int32_t* place, bool of_block, int end, int dim) {
  constexpr int CHUNKS = Tiles::ROW_BYTES / kChunkBytes, PER_CHUNK = kChunkBytes / int(sizeof(typename Tiles::Element));
  static_assert(Tiles::TILE_K * CHUNKS % Tiles::THREADS == 0);
  constexpr int COPIES = Tiles::TILE_K * CHUNKS / Tiles::THREADS;
  int from[COPIES];  // read before the copies, which the compiler leaves in their order
#pragma unroll
  for (int i = 0; i < COPIES; ++i) {
    from[i] = tile_row(place, of_block, (i * Tiles::THREADS + int(threadIdx.x)) / CHUNKS);
  }
#pragma unroll
  for (int i = 0; i < COPIES; ++i) {
    const int at = i * Tiles::THREADS + int(threadIdx.x), row = at / CHUNKS, chunk = at % CHUNKS;
    const bool valid = chunk * PER_CHUNK < dim && from[i] < end;
    copy_async_16(tile + swizzled<Tiles::ROW_BYTES>(row, chunk),
                  valid ? head + from[i] * stride + chunk * PER_CHUNK : head, valid);
  }
}

// ---- scores: weights() and score_gradient() of cuda_backward.cuh for the keys of a tile

/// The tile at hand.
struct StripeTileAt {
  const int32_t* place;
  bool of_block;
  const float* bias;  // of the head, by rows of key; or null

  __device__ __forceinline__ int row(int n) const { return tile_row(place, of_block, n); }
};

template <class Tiles>
__device__ __forceinline__ void stripe_weights(const BackwardPlan& plan, const StripeSight& sight,
                                               const StripeTileAt& tile, int first_row, const float* rows_lse,
                                               float (&score)[Tiles::SCORE_MT][Tiles::SCORE_NT][4]) {
  const AttentionProblem& p = plan.a;
  const ScorePart<Tiles> part;
  const bool masked = sight.masks<Tiles::TILE_K>(tile.place, tile.of_block);
  static_assert(Tiles::SCORE_NT * 8 <= 32);  // columns of a warp: bits of one word
  const int shift = part.column - part.warp_column;
  const uint32_t wanted = (0x03030303u >> (32 - Tiles::SCORE_NT * 8)) << shift;
#pragma unroll
  for (int i = 0; i < Tiles::SCORE_MT; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = part.row + 16 * i + 8 * half;
      const float lse = rows_lse[row];
      if (!masked && !plan.general) {
#pragma unroll
        for (int j = 0; j < Tiles::SCORE_NT; ++j)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& x = score[i][j][2 * half + c];
            x = weight_of<Tiles>(x, p.scale, lse);
          }
        continue;
      }
      uint32_t seen = wanted;
      if (masked) seen = sight.word(tile.place, tile.of_block, first_row + row, part.warp_column, wanted);
      seen >>= shift;
#pragma unroll
      for (int j = 0; j < Tiles::SCORE_NT; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = score[i][j][2 * half + c];
          float weight = 0.f;
          if (seen >> (8 * j + c) & 1) {
            if (plan.general) {
              x *= p.scale;
              if (p.softcap > 0.f) x = capped_score<Tiles>(plan, x);
              if (tile.bias) x += tile.bias[tile.row(part.column + 8 * j + c)];
              weight = weight_of<Tiles>(x, 1.f, lse);
            } else {
              weight = weight_of<Tiles>(x, p.scale, lse);
            }
          }
          x = weight;
        }
    }
}

/// d capped / dx, see softcap_factor().
template <class Tiles>
__device__ __forceinline__ float stripe_softcap_factor(const BackwardPlan& plan, float bias, float lse, float weight) {
  if (weight == 0.f) return 0.f;
  const float score = sizeof(typename Tiles::Element) == 2 ? (log2_fast(weight) + lse) * kLn2 : logf(weight) + lse;
  const float t = (score - bias) * plan.inverse_softcap;
  return fmaxf(0.f, 1.f - t * t);
}

/// dX from `weight` = P and dP. `bias_sums` [SCORE_Q][TILE_K], where asked for, gets the warps' column sums of dS.
template <class Tiles>
__device__ __forceinline__ void stripe_score_gradient(const BackwardPlan& plan, const StripeTileAt& tile,
                                                      const float* rows_lse, const float* rows_delta, float* bias_sums,
                                                      const float (&weight)[Tiles::SCORE_MT][Tiles::SCORE_NT][4],
                                                      float (&gradient)[Tiles::SCORE_MT][Tiles::SCORE_NT][4]) {
  const ScorePart<Tiles> part;
#pragma unroll
  for (int i = 0; i < Tiles::SCORE_MT; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float delta = rows_delta[part.row + 16 * i + 8 * half];
#pragma unroll
      for (int j = 0; j < Tiles::SCORE_NT; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = gradient[i][j][2 * half + c];
          x = weight[i][j][2 * half + c] * (x - delta);
        }
    }
  if (bias_sums) {
    const int warp_row = int(threadIdx.x) / kWarpSize / Tiles::SCORE_K;
#pragma unroll
    for (int j = 0; j < Tiles::SCORE_NT; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < Tiles::SCORE_MT; ++i) sum += gradient[i][j][c] + gradient[i][j][2 + c];
        for (int step = 4; step < kWarpSize; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
        if (threadIdx.x % kWarpSize < 4) bias_sums[warp_row * Tiles::TILE_K + part.column + 8 * j + c] = sum;
      }
  }
  if (plan.general && plan.a.softcap > 0.f) {
#pragma unroll
    for (int j = 0; j < Tiles::SCORE_NT; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int key = tile.row(part.column + 8 * j + c);
        const float bias = tile.bias && key < plan.a.len_k ? tile.bias[key] : 0.f;
#pragma unroll
        for (int i = 0; i < Tiles::SCORE_MT; ++i)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            gradient[i][j][2 * half + c] *= stripe_softcap_factor<Tiles>(
                plan, bias, rows_lse[part.row + 16 * i + 8 * half], weight[i][j][2 * half + c]);
      }
  }
}

// ---- sums of dK and dV

/// Where column d of a row stands in its sum: the four values that a lane has of 16 columns are neighbours.
SPARSEKIT_HOST_DEVICE constexpr int sum_column(int d) { return d / 16 * 16 + d % 8 / 2 * 4 + d / 8 % 2 * 2 + d % 2; }

/// Adds a warp's accumulator, rows first_row ... of the tile and columns first_column ..., to the sums of a key head:
/// the rows of key in [low, high).
template <class Tiles>
__device__ __forceinline__ void add_to_sums(float* sums, const StripeTileAt& tile, int low, int high, int first_row,
                                            int first_column,
                                            const float (&accumulator)[Tiles::KEY_MT][Tiles::KEY_NT][4]) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < Tiles::KEY_MT; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = tile.row(first_row + 16 * i + 8 * half + lane / 4);
      if (key < low || key >= high) continue;
      float* to = sums + int64_t(key) * Tiles::DIM + first_column + lane % 4 * 4;
#pragma unroll
      for (int j = 0; j < Tiles::KEY_NT; j += 2) {
        const float* left = accumulator[i][j] + 2 * half;
        const float* right = accumulator[i][j + 1] + 2 * half;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"l"(to + 8 * j), "f"(left[0]),
                     "f"(left[1]), "f"(right[0]), "f"(right[1])
                     : "memory");
#else
        atomicAdd(to + 8 * j, left[0]);
        atomicAdd(to + 8 * j + 1, left[1]);
        atomicAdd(to + 8 * j + 2, right[0]);
        atomicAdd(to + 8 * j + 3, right[1]);
#endif
      }
    }
}

// ---- the kernel

/// The tiles of a unit in the order of its plan: all of them, or with SECTION those with keys in [low, high).
template <int KEYS, bool SECTION>
class SectionWalk {
 public:
  __device__ __forceinline__ SectionWalk(const TileRing<KEYS>& ring, int columns, int low, int high)
      : ring_(ring), low_(low), high_(high) {
    if (!SECTION) return;
    first_ = ring.block_tiles + entries_below(ring.columns, columns, low) / KEYS;
    end_ = ring.block_tiles + (entries_below(ring.columns, columns, high) + KEYS - 1) / KEYS;
  }
  /// The first tile from `tile` on.
  __device__ __forceinline__ int from(int tile) const {
    if constexpr (SECTION) {
      while (tile < ring_.block_tiles && (ring_.tiles[tile].start < low_ || ring_.tiles[tile].start >= high_)) ++tile;
      if (tile >= ring_.block_tiles) tile = max(tile, first_);
    }
    return tile;
  }
  __device__ __forceinline__ bool holds(int tile) const {
    return SECTION ? tile < ring_.block_tiles || tile < end_ : tile < ring_.count;
  }

 private:
  const TileRing<KEYS>& ring_;
  const int low_, high_;
  int first_ = 0, end_ = 0;  // tiles of columns
};

/// SECTION: only the keys in [low, high), and no dQ.
template <class Tiles, bool SECTION>
__device__ __forceinline__ void walk_unit(const StripesBackward& work, const StripeUnit& unit, int low, int high,
                                          unsigned char* shared) {
  using Element = typename Tiles::Element;
  constexpr int TILE_Q = Tiles::TILE_Q, TILE_K = Tiles::TILE_K;
  const AttentionBackward& a = work.rows.a;
  const StripesSharedMemory<Tiles> at(work.stages, a.grad_key_bias != nullptr);
  const uint32_t base = shared_address(shared), q = base + at.q, dout = base + at.dout;
  const int warp = threadIdx.x / kWarpSize;
  const int score_row = warp / Tiles::SCORE_K * (Tiles::SCORE_MT * 16);
  const int score_column = warp % Tiles::SCORE_K * (Tiles::SCORE_NT * 8);
  const int query_column = warp % Tiles::SCORE_K * (Tiles::QUERY_NT * 8);
  const int key_row = warp / Tiles::KEY_D * (Tiles::KEY_MT * 16);
  const int key_column = warp % Tiles::KEY_D * (Tiles::KEY_NT * 8);
  const int rows = unit.rows.end - unit.rows.first;

  const TileRing<TILE_K> ring(work.plan, unit.cell, reinterpret_cast<int32_t*>(shared + at.ring));
  const SectionWalk<TILE_K, SECTION> walk(ring, work.plan.counts[unit.cell].columns, low, high);
  const StripeSight sight(a, unit.batch, unit.rows.first);
  auto fill = [&](int number, int tile) {
    if (walk.holds(tile)) ring.fill(ring.place(number), tile);
  };
  auto exists = [&](int number, int tile) {  // its place is filled
    return walk.holds(tile) && !sight.ends(ring.place(number), ring.of_block(tile), unit.rows.end - 1);
  };

  int tile = walk.from(0), next = walk.from(tile + 1);
  fill(0, tile);
  fill(1, next);
  copy_async_commit();
  copy_tile<Tiles, TILE_Q>(
      q,
      static_cast<const Element*>(a.query.data) +
          (unit.batch * a.query.batch + unit.head * a.query.head + int64_t(unit.rows.first) * a.query.row),
      a.query.row, rows, a.head_dim);
  copy_tile<Tiles, TILE_Q>(
      dout,
      static_cast<const Element*>(a.grad_out.data) +
          (unit.batch * a.grad_out.batch + unit.head * a.grad_out.head + int64_t(unit.rows.first) * a.grad_out.row),
      a.grad_out.row, rows, a.value_dim);
  copy_async_commit();
  auto* rows_lse = reinterpret_cast<float*>(shared + at.rows);
  const int64_t first = (int64_t(unit.batch) * a.heads_q + unit.head) * work.rows.padded_rows + unit.rows.first;
  for (int i = threadIdx.x; i < TILE_Q; i += Tiles::THREADS) {
    rows_lse[i] = i < rows ? work.rows.row_lse[first + i] : kInfinity;
    rows_lse[TILE_Q + i] = i < rows ? work.rows.row_delta[first + i] : 0.f;
  }

  const Element* key = static_cast<const Element*>(a.key.data) + (unit.batch * a.key.batch + unit.kv_head * a.key.head);
  const Element* value =
      static_cast<const Element*>(a.value.data) + (unit.batch * a.value.batch + unit.kv_head * a.value.head);
  auto load_keys = [&](int number, int of_tile, int stage) {
    const int32_t* place = ring.place(number);
    const bool of_block = ring.of_block(of_tile);
    gather_tile<Tiles>(base + at.k + stage * Tiles::K_BYTES, key, a.key.row, place, of_block, int(a.len_k), a.head_dim);
    gather_tile<Tiles>(base + at.v + stage * Tiles::K_BYTES, value, a.value.row, place, of_block, int(a.len_k),
                       a.value_dim);
  };
  const int64_t sum = (int64_t(unit.batch) * a.heads_kv + unit.kv_head) * a.len_k * Tiles::DIM;
  float* bias_sums =
      (SECTION || work.keys) && a.grad_key_bias ? reinterpret_cast<float*>(shared + at.bias_sums) : nullptr;
  const int64_t query_head = int64_t(unit.batch) * a.heads_q + unit.head;
  const float* bias = a.key_bias ? a.key_bias + unit.batch * a.key_bias_batch + unit.head * a.key_bias_head : nullptr;

  float grad_query[Tiles::QUERY_MT][Tiles::QUERY_NT][4];
  clear(grad_query);
  copy_async_wait<1>();
  __syncthreads();  // the first two places are filled
  bool more = exists(0, tile);
  if (more) load_keys(0, tile, 0);
  copy_async_commit();
  int stage = 0;
  for (int number = 0; more; ++number) {
    const StripeTileAt now{ring.place(number), ring.of_block(tile), bias};
    const uint32_t k = base + at.k + stage * Tiles::K_BYTES, v = base + at.v + stage * Tiles::K_BYTES;
    copy_async_wait<0>();
    __syncthreads();  // K, V and the next place are here, and nobody reads the last tile any more
    more = exists(number + 1, next);
    if (more && work.stages == 2) load_keys(number + 1, next, stage ^ 1);
    tile = next;
    next = walk.from(next + 1);
    fill(number + 2, next);
    copy_async_commit();

    {
      float score[Tiles::SCORE_MT][Tiles::SCORE_NT][4], gradient[Tiles::SCORE_MT][Tiles::SCORE_NT][4];
      clear(score);
      product<Element, Tiles::DIM>(score, Operand<false, Tiles::ROW_BYTES>{q, score_row, 0},
                                   Operand<true, Tiles::ROW_BYTES>{k, score_column, 0});
      stripe_weights<Tiles>(work.rows, sight, now, unit.rows.first, rows_lse, score);
      store_scores<Tiles>(shared + at.p, score);
      clear(gradient);
      product<Element, Tiles::DIM>(gradient, Operand<false, Tiles::ROW_BYTES>{dout, score_row, 0},
                                   Operand<true, Tiles::ROW_BYTES>{v, score_column, 0});
      stripe_score_gradient<Tiles>(work.rows, now, rows_lse, rows_lse + TILE_Q, bias_sums, score, gradient);
      store_scores<Tiles>(shared + at.dx, gradient);
    }
    __syncthreads();
    if (SECTION || work.keys) {
      float grad[Tiles::KEY_MT][Tiles::KEY_NT][4];
      clear(grad);
      product<Element, TILE_Q>(grad, Operand<true, Tiles::SCORE_ROW_BYTES>{base + at.p, 0, key_row},
                               Operand<false, Tiles::ROW_BYTES>{dout, 0, key_column});
      add_to_sums<Tiles>(work.value_sum + sum, now, low, high, key_row, key_column, grad);
      clear(grad);
      product<Element, TILE_Q>(grad, Operand<true, Tiles::SCORE_ROW_BYTES>{base + at.dx, 0, key_row},
                               Operand<false, Tiles::ROW_BYTES>{q, 0, key_column});
      add_to_sums<Tiles>(work.key_sum + sum, now, low, high, key_row, key_column, grad);
    }
    if (!SECTION) {
      product<Element, TILE_K>(grad_query, Operand<false, Tiles::SCORE_ROW_BYTES>{base + at.dx, score_row, 0},
                               Operand<false, Tiles::ROW_BYTES>{k, 0, query_column});
    }
    if (bias_sums && threadIdx.x < TILE_K) {
      const int row = now.row(threadIdx.x);
      float total = 0.f;
      for (int i = 0; i < Tiles::SCORE_Q; ++i) total += bias_sums[i * TILE_K + threadIdx.x];
      if (row >= low && row < high) atomicAdd(a.grad_key_bias + query_head * a.len_k + row, total);
    }
    if (work.stages == 2) {
      stage ^= 1;
    } else {  // the only buffers are free once every warp has its dQ
      __syncthreads();
      if (more) load_keys(number + 1, tile, 0);
      copy_async_commit();
    }
  }
  copy_async_wait<0>();
  __syncthreads();
  if (SECTION) return;
  store_accumulator<Tiles>(shared + at.q, score_row, query_column, grad_query, a.scale);
  __syncthreads();
  write_tile<Tiles, TILE_Q>(
      shared + at.q,
      static_cast<Element*>(a.grad_query.data) + (unit.batch * a.grad_query.batch + unit.head * a.grad_query.head +
                                                  int64_t(unit.rows.first) * a.grad_query.row),
      a.grad_query.row, rows, a.head_dim);
}

/// A CTA for a unit.
template <class Tiles>
__global__ void __launch_bounds__(Tiles::THREADS, Tiles::CTAS)
    stripes_backward_units(const __grid_constant__ StripesBackward work) {
  extern __shared__ __align__(128) unsigned char shared[];
  const AttentionProblem& p = work.rows.a;
  const StripeUnit unit = stripe_unit(p, work.plan, blockIdx.x);
  if (unit.rows.first < unit.rows.end) walk_unit<Tiles, false>(work, unit, 0, int(p.len_k), shared);
}

/// A CTA for a section of the keys of one (batch, key head): all units of its query heads, one after the other.
template <class Tiles>
__global__ void __launch_bounds__(Tiles::THREADS, Tiles::CTAS)
    stripes_backward_sections(const __grid_constant__ StripesBackward work) {
  extern __shared__ __align__(128) unsigned char shared[];
  const AttentionProblem& p = work.rows.a;
  const StripePlan& plan = work.plan;
  const int low = int(blockIdx.x) % work.sections * work.section_keys;
  const int high = int(min(int64_t(low) + work.section_keys, p.len_k));
  const int per_head = plan.cut.cells(), heads = int(p.heads_q / p.heads_kv);
  StripeUnit unit;
  unit.batch = int(blockIdx.x) / work.sections / int(p.heads_kv);
  unit.kv_head = int(blockIdx.x) / work.sections % int(p.heads_kv);
  for (unit.head = unit.kv_head * heads; unit.head < (unit.kv_head + 1) * heads; ++unit.head) {
    const int list =
        (plan.list_batch == 1 ? 0 : unit.batch) * plan.list_heads + unit.head / (int(p.heads_q) / plan.list_heads);
    const int end = min((list + 1) * per_head, plan.first_cell + plan.cells);
    for (int cell = max(list * per_head, plan.first_cell); cell < end; ++cell) {
      unit.cell = cell - plan.first_cell;
      for (int part = 0; part < plan.cut.parts_of_cell(); ++part) {
        unit.rows = plan.cut.unit(cell % per_head, part);
        if (unit.rows.first < unit.rows.end) walk_unit<Tiles, true>(work, unit, low, high, shared);
      }
    }
  }
}

/// dK or dV in the element type: 16 columns of a row per thread.
template <class Element>
__global__ void finish_sums(const float* sums, int dim_of_sums, OutputView to, int dim, float factor, int heads,
                            int64_t len_k, int64_t rows) {
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, row = thread / (dim_of_sums / 16);
  const int first = int(thread % (dim_of_sums / 16)) * 16;
  if (row >= rows || first >= dim) return;
  float in[16];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    *reinterpret_cast<float4*>(in + 4 * i) =
        __ldcs(reinterpret_cast<const float4*>(sums + row * dim_of_sums + first + 4 * i));
  }
  alignas(16) Element out[16];
#pragma unroll
  for (int d = 0; d < 16; ++d) out[d] = from_float<Element>(factor * in[sum_column(d)]);
  Element* at = static_cast<Element*>(to.data) +
                (row / len_k / heads * to.batch + row / len_k % heads * to.head + row % len_k * to.row + first);
  constexpr int PER_CHUNK = kChunkBytes / int(sizeof(Element));
#pragma unroll
  for (int d = 0; d < 16; d += PER_CHUNK) {
    if (first + d < dim) *reinterpret_cast<uint4*>(at + d) = *reinterpret_cast<const uint4*>(out + d);
  }
}

template <class Element>
Status finish_sums(const StripesBackward& work, int dim, cudaStream_t stream) {
  const AttentionBackward& a = work.rows.a;
  const int64_t rows = a.batch * a.heads_kv * a.len_k;
  if (rows == 0) return {};
  constexpr int threads = 256;
  const unsigned grid = unsigned((rows * (dim / 16) + threads - 1) / threads);
  finish_sums<Element><<<grid, threads, 0, stream>>>(work.key_sum, dim, a.grad_key, a.head_dim, a.scale,
                                                     int(a.heads_kv), a.len_k, rows);
  finish_sums<Element><<<grid, threads, 0, stream>>>(work.value_sum, dim, a.grad_value, a.value_dim, 1.f,
                                                     int(a.heads_kv), a.len_k, rows);
  return status_of(cudaGetLastError(), "stripe-sparse attention backward: finish_sums");
}

template <class Tiles>
constexpr StripesBackwardKernel stripes_backward_kernel_of() {
  return {stripes_backward_units<Tiles>,
          stripes_backward_sections<Tiles>,
          [](int stages, bool bias) { return StripesSharedMemory<Tiles>(stages, bias).bytes; },
          Tiles::DIM,
          Tiles::TILE_Q,
          Tiles::TILE_K,
          Tiles::THREADS,
          Tiles::CTAS};
}

/// bf16 and fp16: warps of 32 x 32 scores. At dim 64 units of 64 rows, of which three share a multiprocessor, were
/// faster than units of 128 (6.8 against 7.5 ms), at dim 128 slower (14.1 against 12.0 ms).
template <class Element>
StripesBackwardKernels stripes_backward_kernels_16bit() {
  //                                                         dim   Q   K  warps Q K CTAs
  static const StripesBackwardKernel kernels[] = {
      stripes_backward_kernel_of<BackwardTiles<Element, 64, 64, 64, 4, 2, 2, 3>>(),
      stripes_backward_kernel_of<BackwardTiles<Element, 128, 128, 64, 8, 4, 2, 1>>(),
      stripes_backward_kernel_of<BackwardTiles<Element, 128, 64, 64, 4, 2, 2, 2>>(),
      stripes_backward_kernel_of<BackwardTiles<Element, 256, 64, 64, 8, 4, 2, 1>>(),
  };
  return {kernels, int(sizeof kernels / sizeof *kernels), finish_sums<Element>};
}

}  // namespace sparsekit::cuda

// Attention backward on tensor cores: what the key-stationary and the query-stationary kernel share.
//
// With lse' = log(exp(lse) + exp(sink)) (= lse without sinks) and X the scores before softcap:
//   P = exp(score - lse')      dP = dO V^T      dS = P (dP - delta)      dX = dS (1 - (capped / c)^2) with softcap c
//   delta_i = dO_i . O_i - dlse_i exp(lse'_i - lse_i)
//   dV = P^T dO      dQ = scale dX K      dK = scale dX^T Q      dbias_j = sum_i dS_ij
//   dsink = -sum_i exp(sink - lse'_i) dO_i . O_i
// Rows that see no key, and rows past the end, get lse' = +inf and so P = 0: no other code knows about them.
//
// A kernel works on pairs of a query tile (TILE_Q rows) and a key tile (TILE_K keys) that lie inside one listed block.
// Source: FlashAttention-2 (Dao 2023), section 3.1.2 and algorithm 2.
#pragma once

#include "attention/cuda_tiles.cuh"
#include "common/cuda/launch.h"
#include "common/cuda/math.cuh"
#include "common/cuda/mma.cuh"
#include "common/cuda/shared_memory.cuh"
#include "sparsekit/attention.h"

namespace sparsekit::cuda {

/// Arguments of the kernels: the caller's, and the scratch.
struct BackwardPlan {
  AttentionBackward a;
  int64_t padded_rows = 0;     // len_q rounded up to a multiple of 64
  float* row_lse = nullptr;    // [batch, heads_q, padded_rows] lse', 16-bit elements: log2(e) lse'; else +inf
  float* row_delta = nullptr;  // [batch, heads_q, padded_rows]
  float* row_sink = nullptr;   // [batch, heads_q, padded_rows] contribution to dsink
  void* kept_out = nullptr;    // [batch, heads_q, len_q, value_dim] dO without the rows whose sink takes all; or null
  float* query_sum =
      nullptr;  // dQ / scale in fp32, in the order of dq_index(); null: the query-stationary pass makes dQ
  const int32_t* order = nullptr;  // [batch, heads_kv, k_blocks] key blocks, longest list first; null: as they come
  int64_t slots_per_row = 0;
  int64_t slots_per_head = 0;
  float inverse_softcap = 0.f;
  bool general = false;  // softcap or key_bias: the score is more than scale * q.k
  int32_t stages = 2;    // buffers of the streamed tiles
};

/// Tile sizes of one head-dim class. Warps are laid out ROWS x COLUMNS over each product's result.
///   score    TILE_Q x TILE_K   SCORE_Q x (WARPS / SCORE_Q) warps
///   dK, dV   TILE_K x DIM      KEY_K x (WARPS / KEY_K) warps
///   dQ       TILE_Q x DIM      SCORE_Q x (WARPS / SCORE_Q) warps
template <class Element_, int DIM_, int TILE_Q_, int TILE_K_, int WARPS_, int SCORE_Q_, int KEY_K_, int CTAS_>
struct BackwardTiles {
  using Element = Element_;
  static constexpr int DIM = DIM_, TILE_Q = TILE_Q_, TILE_K = TILE_K_, WARPS = WARPS_, CTAS = CTAS_;
  static constexpr int THREADS = WARPS * 32;
  static constexpr int SCORE_Q = SCORE_Q_, SCORE_K = WARPS / SCORE_Q, KEY_K = KEY_K_, KEY_D = WARPS / KEY_K;
  static constexpr int ROW_BYTES = DIM * int(sizeof(Element)), SCORE_ROW_BYTES = TILE_K * int(sizeof(Element));
  static constexpr int Q_BYTES = TILE_Q * ROW_BYTES, K_BYTES = TILE_K * ROW_BYTES;
  static constexpr int SCORE_BYTES = TILE_Q * SCORE_ROW_BYTES;
  // 16 x 8 accumulator tiles per warp
  static constexpr int SCORE_MT = TILE_Q / SCORE_Q / 16, SCORE_NT = TILE_K / SCORE_K / 8;
  static constexpr int KEY_MT = TILE_K / KEY_K / 16, KEY_NT = DIM / KEY_D / 8;
  static constexpr int QUERY_MT = TILE_Q / SCORE_Q / 16, QUERY_NT = DIM / SCORE_K / 8;
  static_assert(SCORE_MT > 0 && SCORE_NT > 0 && KEY_MT > 0 && KEY_NT > 0 && QUERY_NT > 0);
  static_assert(SCORE_NT % 2 == 0 && KEY_NT % 2 == 0 && QUERY_NT % 2 == 0, "ldmatrix loads pairs of B tiles");
};

// ---- tiles

/// Starts copying `ROWS` rows of `DIM` elements into the swizzled tile at `tile`; rows from `rows` on and elements from
/// `dim` on become zero. `source` points to the first row.
template <class Tiles, int ROWS>
__device__ __forceinline__ void copy_tile(uint32_t tile, const typename Tiles::Element* source, int64_t stride,
                                          int rows, int dim) {
  constexpr int CHUNKS = Tiles::ROW_BYTES / kChunkBytes, PER_CHUNK = kChunkBytes / int(sizeof(typename Tiles::Element));
  static_assert(ROWS * CHUNKS % Tiles::THREADS == 0);
  if constexpr (Tiles::THREADS % CHUNKS == 0) {  // a thread keeps its column
    constexpr int STEP = Tiles::THREADS / CHUNKS;
    const int chunk = threadIdx.x % CHUNKS, first = threadIdx.x / CHUNKS;
    const bool column = chunk * PER_CHUNK < dim;
    const auto* from = source + first * stride + chunk * PER_CHUNK;
#pragma unroll
    for (int row = first; row < ROWS + first; row += STEP, from += STEP * stride) {
      const bool valid = column && row < rows;
      copy_async_16(tile + swizzled<Tiles::ROW_BYTES>(row, chunk), valid ? from : source, valid);
    }
  } else {
#pragma unroll
    for (int i = 0; i < ROWS * CHUNKS; i += Tiles::THREADS) {
      const int row = (i + threadIdx.x) / CHUNKS, chunk = (i + threadIdx.x) % CHUNKS;
      const bool valid = chunk * PER_CHUNK < dim && row < rows;
      copy_async_16(tile + swizzled<Tiles::ROW_BYTES>(row, chunk),
                    valid ? source + row * stride + chunk * PER_CHUNK : source, valid);
    }
  }
}

/// Stores two neighbouring elements of a tile.
template <class Element, int ROW_BYTES>
__device__ __forceinline__ void store_pair(unsigned char* tile, int row, int column, float first, float second) {
  const int byte = column * int(sizeof(Element));
  unsigned char* at = tile + swizzled<ROW_BYTES>(row, byte / kChunkBytes) + byte % kChunkBytes;
  if constexpr (sizeof(Element) == 2) {
    *reinterpret_cast<uint32_t*>(at) = pack<Element>(first, second);
  } else {
    *reinterpret_cast<float2*>(at) = make_float2(first, second);
  }
}

/// Writes a warp's accumulator, times `factor`, into a tile.
template <class Tiles, int MT, int NT>
__device__ __forceinline__ void store_accumulator(unsigned char* tile, int first_row, int first_column,
                                                  const float (&accumulator)[MT][NT][4], float factor) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < MT; ++i)
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_pair<typename Tiles::Element, Tiles::ROW_BYTES>(
            tile, first_row + 16 * i + 8 * half + lane / 4, first_column + 8 * j + 2 * (lane % 4),
            factor * accumulator[i][j][2 * half], factor * accumulator[i][j][2 * half + 1]);
}

/// Writes the first `rows` rows and `dim` elements of a tile to global memory.
template <class Tiles, int ROWS>
__device__ __forceinline__ void write_tile(const unsigned char* tile, typename Tiles::Element* destination,
                                           int64_t stride, int rows, int dim) {
  constexpr int CHUNKS = Tiles::ROW_BYTES / kChunkBytes, PER_CHUNK = kChunkBytes / int(sizeof(typename Tiles::Element));
#pragma unroll 4
  for (int i = threadIdx.x; i < ROWS * CHUNKS; i += Tiles::THREADS) {
    const int row = i / CHUNKS, chunk = i % CHUNKS;
    if (row < rows && chunk * PER_CHUNK < dim)
      *reinterpret_cast<uint4*>(destination + row * stride + chunk * PER_CHUNK) =
          *reinterpret_cast<const uint4*>(tile + swizzled<Tiles::ROW_BYTES>(row, chunk));
  }
}

// ---- products

/// One operand of a warp's product in shared memory: `tile`, its part from (row, column) on. As A, `TRANSPOSED` means
/// that the tile's rows run along k; as B, that they run along n.
template <bool TRANSPOSED_, int ROW_BYTES_>
struct Operand {
  static constexpr bool TRANSPOSED = TRANSPOSED_;
  static constexpr int ROW_BYTES = ROW_BYTES_;
  uint32_t tile;
  int row, column;
};

__device__ __forceinline__ float load_shared(uint32_t address) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];\n" : "=f"(x) : "r"(address));
  return x;
}

/// fp32 element (row, column) of a swizzled tile.
template <int ROW_BYTES>
__device__ __forceinline__ float element(uint32_t tile, int row, int column) {
  return load_shared(tile + swizzled<ROW_BYTES>(row, column / 4) + column % 4 * 4);
}

/// accumulator[m][n] += sum over K of A B, A = MT x 16 rows, B = NT x 8 columns.
template <class Element, int K, class A, class B, int MT, int NT>
__device__ __forceinline__ void product(float (&accumulator)[MT][NT][4], A a, B b) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(Element) == 2) {
    // The operands of step k + 16 are loaded before the products of step k: with the loads in between, shared memory
    // and tensor cores take turns (4350 and 4100 clocks per multiprocessor and two tile pairs at dim 128) instead of
    // overlapping.
    uint32_t as[2][MT][4], bs[2][NT / 2][4];
    const auto load = [&](int k, int buffer) {
#pragma unroll
      for (int i = 0; i < MT; ++i) {
        if constexpr (A::TRANSPOSED) {
          load_matrices_transposed(as[buffer][i],
                                   address_columns16<A::ROW_BYTES>(a.tile, a.row + k, (a.column + 16 * i) / 8, lane));
        } else {
          load_matrices(as[buffer][i], address_rows16<A::ROW_BYTES>(a.tile, a.row + 16 * i, (a.column + k) / 8, lane));
        }
      }
#pragma unroll
      for (int j = 0; j < NT / 2; ++j) {
        if constexpr (B::TRANSPOSED) {
          load_matrices(bs[buffer][j],
                        address_columns16<B::ROW_BYTES>(b.tile, b.row + 16 * j, (b.column + k) / 8, lane));
        } else {
          load_matrices_transposed(bs[buffer][j],
                                   address_rows16<B::ROW_BYTES>(b.tile, b.row + k, (b.column + 16 * j) / 8, lane));
        }
      }
    };
    load(0, 0);
#pragma unroll
    for (int k = 0; k < K; k += 16) {
      const int buffer = k / 16 % 2;
      if (k + 16 < K) load(k + 16, buffer ^ 1);
#pragma unroll
      for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int j = 0; j < NT; ++j)
          mma_m16n8k16<Element>(accumulator[i][j], as[buffer][i], bs[buffer][j / 2][j % 2 * 2],
                                bs[buffer][j / 2][j % 2 * 2 + 1]);
    }
  } else {  // fp32: scalar loads (ldmatrix cannot transpose 32-bit elements), three tf32 products each
    const int g = lane / 4, t = lane % 4;
#pragma unroll 2
    for (int k = 0; k < K; k += 8) {
      Tf32Pair as[MT][4];
#pragma unroll
      for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int m = 16 * i + g + r % 2 * 8, kk = k + t + r / 2 * 4;
          as[i][r] = split_tf32(A::TRANSPOSED ? element<A::ROW_BYTES>(a.tile, a.row + kk, a.column + m)
                                              : element<A::ROW_BYTES>(a.tile, a.row + m, a.column + kk));
        }
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        Tf32Pair bs[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int n = 8 * j + g, kk = k + t + r * 4;
          bs[r] = split_tf32(B::TRANSPOSED ? element<B::ROW_BYTES>(b.tile, b.row + n, b.column + kk)
                                           : element<B::ROW_BYTES>(b.tile, b.row + kk, b.column + n));
        }
#pragma unroll
        for (int i = 0; i < MT; ++i) mma_m16n8k8_f32(accumulator[i][j], as[i], bs);
      }
    }
  }
}

template <int MT, int NT>
__device__ __forceinline__ void clear(float (&accumulator)[MT][NT][4]) {
#pragma unroll
  for (int i = 0; i < MT; ++i)
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r) accumulator[i][j][r] = 0.f;
}

// ---- scores

/// A pair of tiles: where it lies, and what masks it.
struct TilePair {
  int batch = 0, head = 0;   // of the queries
  int q_row = 0, k_row = 0;  // first query row and first key
  int bits = -1;             // entry of lists.bits, or none
  bool partial = false;      // bits, causality, window and positions apply
};

/// The thread's part of a score tile begins at (row, column): accumulator value [i][j][r] lies at
/// (row + 16 i + r / 2 * 8, column + 8 j + r % 2). `warp_column` is the first column of its warp.
template <class Tiles>
struct ScorePart {
  int row, warp_column, column;
  __device__ __forceinline__ ScorePart() {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    row = warp / Tiles::SCORE_K * (Tiles::SCORE_MT * 16) + lane / 4;
    warp_column = warp % Tiles::SCORE_K * (Tiles::SCORE_NT * 8);
    column = warp_column + lane % 4 * 2;
  }
};

/// exp(logit - lse'). 16-bit elements: `lse` comes times log2(e), which saves a multiplication. fp32 elements: in
/// natural units, since the rounding of log2(e) * lse' would alone cost a few 1e-6 of the weight.
template <class Tiles>
__device__ __forceinline__ float weight_of(float x, float scale, float lse) {
  if constexpr (sizeof(typename Tiles::Element) == 2) return exp2_fast(fmaf(x, scale * kLog2e, -lse));
  return exp2_fast(fmaf(x, scale, -lse) * kLog2e);
}

template <class Tiles>
__device__ __forceinline__ float capped_score(const BackwardPlan& plan, float x) {
  const float t = x * plan.inverse_softcap;
  return plan.a.softcap * (sizeof(typename Tiles::Element) == 2 ? tanh_fast(t) : tanhf(t));
}

/// Scores to weights P in place. `rows_lse` holds the tile's part of BackwardPlan::row_lse in shared memory.
template <class Tiles>
__device__ __forceinline__ void weights(const BackwardPlan& plan, const TilePair& pair, const float* rows_lse,
                                        float (&score)[Tiles::SCORE_MT][Tiles::SCORE_NT][4]) {
  const AttentionProblem& p = plan.a;
  const ScorePart<Tiles> part;
  const bool masked = pair.partial || pair.k_row + Tiles::TILE_K > p.len_k;
  if (!masked && !plan.general) {
#pragma unroll
    for (int i = 0; i < Tiles::SCORE_MT; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float lse = rows_lse[part.row + 16 * i + 8 * half];
#pragma unroll
        for (int j = 0; j < Tiles::SCORE_NT; ++j)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& x = score[i][j][2 * half + c];
            x = weight_of<Tiles>(x, p.scale, lse);
          }
      }
    return;
  }
  static_assert(Tiles::SCORE_NT * 8 <= 32);  // columns of a warp: bits of one word
  constexpr uint32_t COLUMNS = ~0u >> (32 - Tiles::SCORE_NT * 8);
  const int block_start = pair.k_row / p.lists.block_k * p.lists.block_k;
  const float* bias =
      p.key_bias ? p.key_bias + pair.batch * p.key_bias_batch + pair.head * p.key_bias_head + pair.k_row : nullptr;
#pragma unroll
  for (int i = 0; i < Tiles::SCORE_MT; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = part.row + 16 * i + 8 * half;
      const float lse = rows_lse[row];
      uint32_t seen = COLUMNS;
      if (masked)
        seen = visible_word(p, pair.batch, pair.q_row + row, pair.k_row + part.warp_column, block_start, pair.bits,
                            pair.partial, COLUMNS);
      seen >>= part.column - part.warp_column;
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
              if (bias) x += bias[part.column + 8 * j + c];
              weight = weight_of<Tiles>(x, 1.f, lse);
            } else {
              weight = weight_of<Tiles>(x, p.scale, lse);
            }
          }
          x = weight;
        }
    }
}

/// Softcap: d capped / d x = 1 - (capped / c)^2, with capped = log P + lse' - bias, so that the scores need not be kept
/// beside P. Where P has underflowed the factor is of no importance: dS is 0.
template <class Tiles>
__device__ __forceinline__ float softcap_factor(const BackwardPlan& plan, const TilePair& pair, float lse, int column,
                                                float weight) {
  if (weight == 0.f) return 0.f;
  const AttentionProblem& p = plan.a;
  float capped = sizeof(typename Tiles::Element) == 2 ? (log2_fast(weight) + lse) * kLn2 : logf(weight) + lse;
  if (p.key_bias)
    capped -= p.key_bias[pair.batch * p.key_bias_batch + pair.head * p.key_bias_head + pair.k_row + column];
  const float t = capped * plan.inverse_softcap;
  return fmaxf(0.f, 1.f - t * t);
}

/// dX = P (dP - delta), with softcap times its derivative, from `weight` = P, into `gradient` = dP. `bias_sums`, where
/// asked for, collects the thread's column sums of dS: [SCORE_NT * 2] with stride THREADS.
template <class Tiles>
__device__ __forceinline__ void score_gradient(const BackwardPlan& plan, const TilePair& pair, const float* rows_lse,
                                               const float* rows_delta, float* bias_sums,
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
#pragma unroll
    for (int j = 0; j < Tiles::SCORE_NT; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < Tiles::SCORE_MT; ++i) sum += gradient[i][j][c] + gradient[i][j][2 + c];
        bias_sums[(2 * j + c) * Tiles::THREADS] += sum;
      }
  }
  if (plan.general && plan.a.softcap > 0.f) {
#pragma unroll
    for (int i = 0; i < Tiles::SCORE_MT; ++i)
#pragma unroll
      for (int j = 0; j < Tiles::SCORE_NT; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r)
          gradient[i][j][r] *= softcap_factor<Tiles>(plan, pair, rows_lse[part.row + 16 * i + r / 2 * 8],
                                                     part.column + 8 * j + r % 2, weight[i][j][r]);
  }
}

/// Writes the thread's part of a score tile (P or dX), rounded to the element type.
template <class Tiles>
__device__ __forceinline__ void store_scores(unsigned char* tile,
                                             const float (&score)[Tiles::SCORE_MT][Tiles::SCORE_NT][4]) {
  const ScorePart<Tiles> part;
#pragma unroll
  for (int i = 0; i < Tiles::SCORE_MT; ++i)
#pragma unroll
    for (int j = 0; j < Tiles::SCORE_NT; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_pair<typename Tiles::Element, Tiles::SCORE_ROW_BYTES>(
            tile, part.row + 16 * i + 8 * half, part.column + 8 * j, score[i][j][2 * half], score[i][j][2 * half + 1]);
}

// ---- dQ summed in fp32 by atomics

/// Where value `r` of the accumulator of this thread lies in the TILE_Q x DIM floats of a query tile: accumulators stay
/// in their own order, so that a warp's atomics cover whole 128-byte lines (16 bytes per lane where the machine has
/// vector reductions).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kVectorReduction = true;
#else
constexpr bool kVectorReduction = false;
#endif

template <class Tiles>
__device__ __forceinline__ int dq_index(int r) {
  constexpr int VALUES = Tiles::QUERY_MT * Tiles::QUERY_NT * 4;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  return kVectorReduction ? ((warp * VALUES + r / 4 * 4) * 32 + lane * 4 + r % 4) : (warp * VALUES + r) * 32 + lane;
}

template <class Tiles>
__device__ __forceinline__ void add_to_query_sum(float* tile_sum,
                                                 const float (&accumulator)[Tiles::QUERY_MT][Tiles::QUERY_NT][4]) {
#pragma unroll
  for (int i = 0; i < Tiles::QUERY_MT; ++i)
#pragma unroll
    for (int j = 0; j < Tiles::QUERY_NT; ++j) {
      const int r = (i * Tiles::QUERY_NT + j) * 4;
      const float (&v)[4] = accumulator[i][j];
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
      asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"l"(tile_sum + dq_index<Tiles>(r)),
                   "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
                   : "memory");
#else
#pragma unroll
      for (int c = 0; c < 4; ++c) atomicAdd(tile_sum + dq_index<Tiles>(r + c), v[c]);
#endif
    }
}

}  // namespace sparsekit::cuda

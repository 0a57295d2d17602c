// Block-sparse attention forward on tensor cores (mma.sync + cp.async), every card from Ampere on.
//
//   S = q k^T,  P = exp2(S scale log2e - m),  l += rowsum P,  O = O exp2(m_old - m) + P v,  out = O / l
//
// Tiling: one CTA owns 128 or 64 query rows of one head and walks their key blocks in tiles of KEYS keys; a warp owns
// 32 rows (16 where O would not fit its registers) and all keys of the tile, so softmax never leaves the warp. Q, one K
// tile and one V tile are in shared memory: V loads behind q k^T, the next K behind P v. A second buffer of each gained
// nothing on an H200 and would cost an A100 its second CTA. P goes from accumulators to operands in registers.
//
// Bound: tensor cores. 32 rows per warp, because with 16 ldmatrix would need all of shared memory's 128 bytes per clock
// (4096 FLOP per 512 bytes and k-step); two CTAs per multiprocessor, so that one multiplies while the other takes
// exponentials.
//
// Sources: FlashAttention-2 (Dao 2023) sections 3.1 and 3.3; the lazy rescaling of O is FlashAttention-4's.
// fp32 runs the same code with products of three tf32 ones (common/cuda/mma.cuh).
#pragma once

#include "attention/cuda_forward_sm80.h"
#include "attention/cuda_tiles.cuh"
#include "common/cuda/math.cuh"
#include "common/cuda/mma.cuh"
#include "common/cuda/shared_memory.cuh"

namespace sparsekit::sm80 {

using namespace sparsekit::cuda;

/// Sizes of one kernel. HEAD and VALUE are upper bounds: smaller dimensions run with zeros behind them.
template <class ElementType, int HEAD, int VALUE, int ROWS_PER_WARP, int KEYS, int CTAS>
struct ForwardTile {
  using Element = ElementType;
  static constexpr int kHead = HEAD, kValue = VALUE;
  static constexpr int kRowsPerWarp = ROWS_PER_WARP;
  static constexpr int kKeys = KEYS;
  static constexpr int kCtas = CTAS;  // of 128 rows that should share a multiprocessor: decides registers per thread
  static constexpr int kThreads = 128 / ROWS_PER_WARP * kWarpSize;
  static constexpr int kKeyRowBytes = HEAD * int(sizeof(Element)), kValueRowBytes = VALUE * int(sizeof(Element));
  static constexpr int kRowTiles = ROWS_PER_WARP / 16;
};

/// Where a lane stands: accumulator element c of row tile i is row `16 i + group + 8 (c / 2)`, column `2 pair + c % 2`.
struct Lane {
  int lane, group, pair, warp, warps;

  __device__ __forceinline__ Lane()
      : lane(threadIdx.x % kWarpSize),
        group(lane / 4),
        pair(lane % 4),
        warp(threadIdx.x / kWarpSize),
        warps(blockDim.x / kWarpSize) {}
};

/// Starts copying `count` rows (a multiple of 8) from global to shared memory, shared among all warps. Rows from `end`
/// on and chunks from `chunks` on become zero: no NaN behind a sequence's end may reach a product.
template <int ROW_BYTES>
__device__ __forceinline__ void load_rows(uint32_t tile, const char* head, int row_bytes, int first, int count, int end,
                                          int chunks, const Lane& at) {
  constexpr int kChunks = ROW_BYTES / kChunkBytes;
  for (int eight = at.warp; eight < count / 8; eight += at.warps) {
#pragma unroll
    for (int i = 0; i < kChunks / 4; ++i) {
      const int row = (i * kWarpSize + at.lane) / kChunks, chunk = (i * kWarpSize + at.lane) % kChunks;
      const int from = first + eight * 8 + row;
      copy_async_16(tile + eight * 8 * ROW_BYTES + swizzled<ROW_BYTES>(row, chunk),
                    head + int64_t(from) * row_bytes + chunk * kChunkBytes, from < end && chunk < chunks);
    }
  }
}

/// c += a b for the operands of 32 bytes of k: k = 16 in 16 bit, k = 8 in fp32.
template <class Element>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (sizeof(Element) == 2) {
    mma_m16n8k16<Element>(c, a, b0, b1);
  } else {
    const Tf32Pair pa[4] = {split_tf32(__uint_as_float(a[0])), split_tf32(__uint_as_float(a[1])),
                            split_tf32(__uint_as_float(a[2])), split_tf32(__uint_as_float(a[3]))};
    const Tf32Pair pb[2] = {split_tf32(__uint_as_float(b0)), split_tf32(__uint_as_float(b1))};
    mma_m16n8k8_f32(c, pa, pb);
  }
}

template <class Tile>
using Scores = float[Tile::kRowTiles][Tile::kKeys / 8][4];
template <class Tile>
using Outputs = float[Tile::kRowTiles][Tile::kValue / 8][4];

/// s = q k^T. `q` and `k` are this lane's ldmatrix addresses of chunk 0.
template <class Tile>
__device__ __forceinline__ void multiply_keys(Scores<Tile>& s, uint32_t q, uint32_t k) {
  constexpr int kRow = Tile::kKeyRowBytes;
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i)
#pragma unroll
    for (int n = 0; n < Tile::kKeys / 8; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c) s[i][n][c] = 0.f;
  // fp32 is 10 instructions per product: unrolled fully it would be the longest compilation of the project.
  constexpr int kUnroll = sizeof(typename Tile::Element) == 2 ? kRow / 32 : 2;
#pragma unroll kUnroll
  for (int step = 0; step < kRow / 32; ++step) {
    uint32_t a[Tile::kRowTiles][4];
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) load_matrices(a[i], advance_chunks<kRow>(q, step) + i * 16 * kRow);
#pragma unroll
    for (int n = 0; n < Tile::kKeys / 16; ++n) {
      uint32_t b[4];
      load_matrices(b, advance_chunks<kRow>(k, step) + n * 16 * kRow);
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles; ++i) {
        multiply_add<typename Tile::Element>(s[i][2 * n], a[i], b[0], b[1]);
        multiply_add<typename Tile::Element>(s[i][2 * n + 1], a[i], b[2], b[3]);
      }
    }
  }
}

/// o += p v, 16-bit: `v` is this lane's ldmatrix address of chunk 0.
template <class Tile>
__device__ __forceinline__ void multiply_values_16bit(Outputs<Tile>& o, const Scores<Tile>& p, uint32_t v) {
  using Element = typename Tile::Element;
  constexpr int kRow = Tile::kValueRowBytes;
#pragma unroll
  for (int step = 0; step < Tile::kKeys / 16; ++step) {
    uint32_t a[Tile::kRowTiles][4];
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
      const float (&left)[4] = p[i][2 * step], (&right)[4] = p[i][2 * step + 1];
      a[i][0] = pack<Element>(left[0], left[1]);
      a[i][1] = pack<Element>(left[2], left[3]);
      a[i][2] = pack<Element>(right[0], right[1]);
      a[i][3] = pack<Element>(right[2], right[3]);
    }
#pragma unroll
    for (int n = 0; n < Tile::kValue / 16; ++n) {
      uint32_t b[4];
      load_matrices_transposed(b, advance_chunks<kRow>(v, n) + step * 16 * kRow);
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles; ++i) {
        mma_m16n8k16<Element>(o[i][2 * n], a[i], b[0], b[1]);
        mma_m16n8k16<Element>(o[i][2 * n + 1], a[i], b[2], b[3]);
      }
    }
  }
}

/// o += p v, fp32. ldmatrix does not transpose 32-bit elements: V is read element by element. The order of the keys in
/// a product is free as long as P and V agree, so k = t stands for key 2t and k = t + 4 for key 2t + 1: P's
/// accumulators are then its operand as they are. The 8 chunks that a warp reads at once are distinct modulo 128 bytes:
/// no conflict.
template <class Tile>
__device__ __forceinline__ void multiply_values_f32(Outputs<Tile>& o, const Scores<Tile>& p, const char* v,
                                                    const Lane& at) {
  constexpr int kRow = Tile::kValueRowBytes;
#pragma unroll
  for (int step = 0; step < Tile::kKeys / 8; ++step) {
    const int key = step * 8 + 2 * at.pair;
#pragma unroll
    for (int n = 0; n < Tile::kValue / 8; ++n) {
      const int chunk = 2 * n + at.group / 4, byte = at.group % 4 * 4;
      const uint32_t b0 = *reinterpret_cast<const uint32_t*>(v + swizzled<kRow>(key, chunk) + byte);
      const uint32_t b1 = *reinterpret_cast<const uint32_t*>(v + swizzled<kRow>(key + 1, chunk) + byte);
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles; ++i) {
        const float (&c)[4] = p[i][step];
        const uint32_t a[4] = {__float_as_uint(c[0]), __float_as_uint(c[2]), __float_as_uint(c[1]),
                               __float_as_uint(c[3])};
        multiply_add<float>(o[i][n], a, b0, b1);
      }
    }
  }
}

/// KEYS keys of a listed block.
struct KeyTile {
  int start = 0;         // first key
  int bits = -1;         // in-block mask, -1: none
  bool masked = false;   // some key may be hidden from some row
  bool partial = false;  // from the partial list
};

/// The key tiles of one CTA in the order of its lists. Uniform over the CTA.
template <int KEYS>
class TileWalk {
 public:
  KeyTile tile;

  __device__ __forceinline__ TileWalk(const AttentionProblem& p, int64_t row, int first_row, int last_row)
      : p_(p), walk_(p, row), row_(int(row)), first_row_(first_row), last_row_(last_row), within_(p.lists.block_k) {}

  __device__ __forceinline__ bool next() {
    for (;;) {
      within_ += KEYS;
      if (within_ >= p_.lists.block_k) {
        if (!walk_.next()) return false;
        within_ = 0;
      }
      const int start = walk_.block() * p_.lists.block_k + within_, end = start + KEYS;
      if (start >= p_.len_k) continue;
      tile = {start, -1, end > p_.len_k, walk_.partial()};
      if (!tile.partial) return true;
      tile.bits = bits_of_slot(p_.lists, row_, walk_.slot());
      tile.masked = true;
      if (p_.query_positions || p_.key_positions) return true;
      // Without positions the visible range moves with the row: the CTA's first and last row bound it.
      const KeyRange first = key_range(p_, 0, first_row_), last = key_range(p_, 0, last_row_);
      if (start > last.high || end <= first.low) continue;
      tile.masked = tile.bits >= 0 || end > p_.len_k || end - 1 > first.high || start < last.low;
      return true;
    }
  }

 private:
  const AttentionProblem& p_;
  BlockWalk walk_;
  const int row_, first_row_, last_row_;
  int within_;
};

/// Hides what a row of a masked tile does not see: s = -inf there.
template <class Tile>
__device__ __forceinline__ void mask_scores(Scores<Tile>& s, const AttentionProblem& p, int b, int first_row,
                                            const KeyTile& tile, const Lane& at) {
  const int block_start = tile.start - tile.start % p.lists.block_k;
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + 16 * i + 8 * half + at.group;
#pragma unroll
      for (int n = 0; n < Tile::kKeys / 8; n += 4) {
        const uint32_t word = visible_word(p, b, row, tile.start + 8 * n, block_start, tile.bits, tile.partial,
                                           0x03030303u << (2 * at.pair)) >>
                              (2 * at.pair);
#pragma unroll
        for (int j = 0; j < 4 && n + j < Tile::kKeys / 8; ++j) {
          if (!(word >> (8 * j) & 1)) s[i][n + j][2 * half] = -kInfinity;
          if (!(word >> (8 * j + 1) & 1)) s[i][n + j][2 * half + 1] = -kInfinity;
        }
      }
    }
  }
}

/// Products to scores in units of log 2, where a plain factor does not do: softcap, key bias, scale <= 0.
template <class Tile>
__device__ __forceinline__ void transform_scores(Scores<Tile>& s, const AttentionProblem& p, const float* bias,
                                                 int start, const Lane& at) {
#pragma unroll
  for (int n = 0; n < Tile::kKeys / 8; ++n) {
    float added[2] = {0.f, 0.f};
    if (bias) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int key = start + 8 * n + 2 * at.pair + c;
        if (key < p.len_k) added[c] = bias[key] * kLog2e;
      }
    }
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float x = s[i][n][c] * p.scale;
        if (p.softcap > 0.f) x = p.softcap * tanh_fast(x / p.softcap);
        s[i][n][c] = fmaf(x, kLog2e, added[c % 2]);
      }
    }
  }
}

/// The running softmax of a lane's rows (2 of each row tile). `largest` is in the units of s: P = 2^((s - largest)
/// factor).
template <class Tile>
struct Softmax {
  float largest[Tile::kRowTiles][2], sum[Tile::kRowTiles][2];  // sum: of this lane's columns alone

  __device__ __forceinline__ Softmax() {
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) largest[i][half] = -kInfinity, sum[i][half] = 0.f;
    }
  }

  /// Turns scores into P. O and the sum are rescaled only where a row's maximum grew by more than 2^8: P stays below
  /// 256, which fp16 holds and which costs no relative accuracy; most tiles then skip the O-sized multiplication.
  __device__ __forceinline__ void add(Scores<Tile>& s, Outputs<Tile>& o, float factor) {
    constexpr float kSlack = 8.f;
    float maximum[Tile::kRowTiles][2];
    bool grew = false;
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float m = fmaxf(s[i][0][2 * half], s[i][0][2 * half + 1]);
#pragma unroll
        for (int n = 1; n < Tile::kKeys / 8; ++n) m = fmaxf(m, fmaxf(s[i][n][2 * half], s[i][n][2 * half + 1]));
        maximum[i][half] = row_max(m);
        grew |= (maximum[i][half] - largest[i][half]) * factor > kSlack;  // -inf - -inf is NaN: not grown
      }
    }
    if (__any_sync(kAllLanes, grew)) {
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          // Row by row, so that no row's bits depend on its neighbours.
          const bool rescale = (maximum[i][half] - largest[i][half]) * factor > kSlack;
          const float alpha = rescale ? exp2_fast((largest[i][half] - maximum[i][half]) * factor) : 1.f;
          if (rescale) largest[i][half] = maximum[i][half];
          sum[i][half] *= alpha;
#pragma unroll
          for (int n = 0; n < Tile::kValue / 8; ++n) {
            o[i][n][2 * half] *= alpha;
            o[i][n][2 * half + 1] *= alpha;
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float base = largest[i][half] == -kInfinity ? 0.f : largest[i][half] * factor;
#pragma unroll
        for (int n = 0; n < Tile::kKeys / 8; ++n) {
#pragma unroll
          for (int c = 2 * half; c < 2 * half + 2; ++c) {
            s[i][n][c] = exp2_fast(fmaf(s[i][n][c], factor, -base));
            sum[i][half] += s[i][n][c];
          }
        }
      }
    }
  }
};

/// out = O / (l + 2^(sink - m)), lse = m + log l. O goes through the warp's own rows of Q's tile, so that global memory
/// is written 16 bytes at a time.
template <class Tile>
__device__ __forceinline__ void write_rows(Outputs<Tile>& o, Softmax<Tile>& softmax, float factor,
                                           const AttentionForward& p, int b, int h, int first_row, char* staged,
                                           const Lane& at) {
  using Element = typename Tile::Element;
  constexpr int kRow = Tile::kKeyRowBytes;
  static_assert(Tile::kValueRowBytes <= kRow, "O is staged in Q's rows");
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int local = 16 * i + 8 * half + at.group, row = first_row + local;
      const float sum = row_sum(softmax.sum[i][half]);
      const float m = softmax.largest[i][half] * factor;  // in units of log 2
      float normaliser = sum;
      if (p.sinks && sum > 0.f) normaliser += exp2_fast(p.sinks[h] * kLog2e - m);
      const float inverse = sum == 0.f ? 0.f : 1.f / normaliser;  // NaN stays NaN
#pragma unroll
      for (int n = 0; n < Tile::kValue / 8; ++n) {
        const float x = o[i][n][2 * half] * inverse, y = o[i][n][2 * half + 1] * inverse;
        if constexpr (sizeof(Element) == 2) {
          char* place = staged + swizzled<kRow>(local, n) + at.pair * 4;
          *reinterpret_cast<uint32_t*>(place) = pack<Element>(x, y);
        } else {
          char* place = staged + swizzled<kRow>(local, 2 * n + at.pair / 2) + at.pair % 2 * 8;
          *reinterpret_cast<float2*>(place) = make_float2(x, y);
        }
      }
      if (at.pair == 0 && row < p.len_q) {
        const float lse = sum == 0.f ? -kInfinity : (m + log2_fast(sum)) * kLn2;
        p.lse[(int64_t(b) * p.heads_q + h) * p.len_q + row] = lse;
      }
    }
  }
  __syncwarp();
  constexpr int kChunks = Tile::kValueRowBytes / kChunkBytes;
  const int chunks = p.value_dim * int(sizeof(Element)) / kChunkBytes;
  char* out = static_cast<char*>(p.out.data) + (b * p.out.batch + h * p.out.head) * int64_t(sizeof(Element));
#pragma unroll 4
  for (int i = at.lane; i < Tile::kRowsPerWarp * kChunks; i += kWarpSize) {
    const int local = i / kChunks, chunk = i % kChunks, row = first_row + local;
    if (row < p.len_q && chunk < chunks) {
      const uint4 values = *reinterpret_cast<const uint4*>(staged + swizzled<kRow>(local, chunk));
      *reinterpret_cast<uint4*>(out + row * p.out.row * int64_t(sizeof(Element)) + chunk * kChunkBytes) = values;
    }
  }
}

/// `order` gives the list rows (batch, query head, query block) longest first; null: in their own order. Consecutive
/// CTAs share a list row where a query block is larger than a CTA's rows.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kCtas)
    attention_forward(const __grid_constant__ AttentionForward p, const int32_t* order) {
  using Element = typename Tile::Element;
  constexpr int kKeys = Tile::kKeys, kRow = Tile::kKeyRowBytes, kValueRow = Tile::kValueRowBytes;
  extern __shared__ __align__(128) char shared[];
  const Lane at;

  // Which rows.
  const int cta_rows = at.warps * Tile::kRowsPerWarp;
  const int ctas_per_block = p.lists.block_q / cta_rows;
  const int item = order ? order[blockIdx.x / ctas_per_block] : int(blockIdx.x) / ctas_per_block;
  const int m = item % int(p.lists.q_blocks), bh = item / int(p.lists.q_blocks);
  const int b = bh / int(p.heads_q), h = bh % int(p.heads_q);
  const int kv_head = h / (int(p.heads_q) / int(p.heads_kv));
  const int cta_row = m * p.lists.block_q + int(blockIdx.x) % ctas_per_block * cta_rows;
  if (cta_row >= p.len_q) return;  // the second CTA of a ragged last block
  const int first_row = cta_row + at.warp * Tile::kRowsPerWarp;

  const uint32_t q_tile = shared_address(shared), k_tile = q_tile + cta_rows * kRow, v_tile = k_tile + kKeys * kRow;
  const int64_t element = sizeof(Element);
  const char* key = static_cast<const char*>(p.key.data) + (b * p.key.batch + kv_head * p.key.head) * element;
  const char* value = static_cast<const char*>(p.value.data) + (b * p.value.batch + kv_head * p.value.head) * element;
  const int key_chunks = p.head_dim * int(sizeof(Element)) / kChunkBytes;
  const int value_chunks = p.value_dim * int(sizeof(Element)) / kChunkBytes;
  auto load_key = [&](int start) {
    load_rows<kRow>(k_tile, key, int(p.key.row * element), start, kKeys, int(p.len_k), key_chunks, at);
  };
  auto load_value = [&](int start) {
    load_rows<kValueRow>(v_tile, value, int(p.value.row * element), start, kKeys, int(p.len_k), value_chunks, at);
  };

  const char* query = static_cast<const char*>(p.query.data) + (b * p.query.batch + h * p.query.head) * element;
  load_rows<kRow>(q_tile, query, int(p.query.row * element), cta_row, cta_rows, int(p.len_q), key_chunks, at);

  const bool transformed = p.softcap > 0.f || p.key_bias || !(p.scale > 0.f);
  const float factor = transformed ? 1.f : p.scale * kLog2e;
  const float* bias = p.key_bias ? p.key_bias + b * p.key_bias_batch + h * p.key_bias_head : nullptr;

  Outputs<Tile> o;
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i)
#pragma unroll
    for (int n = 0; n < Tile::kValue / 8; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c) o[i][n][c] = 0.f;
  Softmax<Tile> softmax;

  TileWalk<kKeys> ahead(p, list_row(p, b, h, m), cta_row, min(cta_row + cta_rows, int(p.len_q)) - 1);
  bool more = ahead.next();
  if (more) load_key(ahead.tile.start);
  copy_async_commit();

  const uint32_t q_lane = address_rows16<kRow>(q_tile, at.warp * Tile::kRowsPerWarp, 0, at.lane);
  const uint32_t k_lane = address_columns16<kRow>(k_tile, 0, 0, at.lane);
  const uint32_t v_lane = address_rows16<kValueRow>(v_tile, 0, 0, at.lane);
  while (more) {
    const KeyTile tile = ahead.tile;
    more = ahead.next();
    copy_async_wait<0>();
    __syncthreads();  // K (and Q) are here, and nobody reads the last V any more
    load_value(tile.start);
    copy_async_commit();

    Scores<Tile> s;
    multiply_keys<Tile>(s, q_lane, k_lane);
    copy_async_wait<0>();
    __syncthreads();  // V is here, and nobody reads K any more
    if (more) load_key(ahead.tile.start);
    copy_async_commit();

    if (transformed) transform_scores<Tile>(s, p, bias, tile.start, at);
    if (tile.masked) mask_scores<Tile>(s, p, b, first_row, tile, at);
    softmax.add(s, o, factor);
    if constexpr (sizeof(Element) == 2) {
      multiply_values_16bit<Tile>(o, s, v_lane);
    } else {
      multiply_values_f32<Tile>(o, s, shared + (v_tile - q_tile), at);
    }
  }
  // Without a tile Q may still be arriving, from all threads, where O is about to be staged.
  copy_async_wait<0>();
  __syncthreads();
  write_rows<Tile>(o, softmax, factor, p, b, h, first_row, shared + at.warp * Tile::kRowsPerWarp * kRow, at);
}

template <class Tile>
constexpr ForwardKernel kernel_of() {
  return {attention_forward<Tile>, Tile::kHead, Tile::kValue, Tile::kRowsPerWarp, Tile::kKeys, Tile::kCtas};
}

}  // namespace sparsekit::sm80

// Folds over blocks on the GPU: block scores by the maximum and by antidiagonals, and the pooled attention map.
//
//   max            max over the pairs of a block of score[i, j]
//   map            max or sum over them of exp(score[i, j] - lse[i])
//   antidiagonal   log of the mean over a block's rows of tiles of the sum over its columns of tiles of
//                  exp(tile[r, c] - lse[r]), where tile[r, c] is the mean of an antidiagonal (XAttention, arXiv
//                  2503.16428, algorithm 1) and lse that of tile[r, :]: two passes over the keys, as nothing of size R
//                  x C is kept
//
// A tile's antidiagonal is one product of stride * head_dim: the rows of the tile from its last one upwards, the keys
// from its first one downwards. So all three are tiles of scores (cuda_score_tiles.cuh), put into shared memory, folded
// along rows and then down columns to the blocks that lie in the tile. The few tiles that causality cuts are summed
// apart.
//
// A CTA has as many blocks of queries as 64 rows hold (larger blocks take several tiles) and goes over groups of as
// many key blocks as 128 keys hold, or over the slots of a list. Every sum has one order. Bound: tiles of scores.
#include <algorithm>
#include <climits>

#include "selection/cuda_block_folds.cuh"
#include "selection/cuda_kernels.h"

namespace sparsekit::cuda {
namespace {

enum class Kind { max, map, antidiagonal };

/// grid (groups, heads): lse of every row of tiles over all keys.
template <class Element>
__global__ void __launch_bounds__(kThreads) lse_of_tile_rows(BlockFold f, float* lse) {
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  Place at;
  if (!at.find(f, blockIdx.x, blockIdx.y)) return;
  const int stride = f.stride, rows = at.count * f.rows_per_block();
  const int64_t begin = int64_t(at.m0) * f.p.lists.block_q;
  const int64_t end = min(begin + int64_t(rows) * stride, int64_t(at.span.len_q()));
  float* to = lse + (int64_t(at.head) * f.q_blocks + at.row0) * f.rows_per_block();
  const auto* scores = reinterpret_cast<const float*>(dynamic_shared) + int(threadIdx.x) * kPitch;
  ScoreTile<Element> tile;
  for (int first = 0; first < rows; first += kRows) {
    const int64_t row0 = begin + int64_t(first) * stride;
    int64_t keys = at.span.len_k();
    if (f.p.causal) keys = min(keys, at.position(min(row0 + int64_t(kRows) * stride, end) - 1) + 1);
    float highest = -kInfinity, total = 0.f;
    for (int64_t key0 = 0; key0 < keys; key0 += int64_t(kKeys) * stride) {
      antidiagonal_tile(f, at, row0, end, key0, at.span.len_k(), tile, dynamic_shared);
      if (threadIdx.x < kRows) {
        float most = highest;
        for (int n = 0; n < kKeys; ++n) most = larger(most, scores[n]);
        const float base = most == -kInfinity ? 0.f : most;
        total *= exp2_fast((highest - base) * kLog2e);
        for (int n = 0; n < kKeys; ++n) total += exp2_fast((scores[n] - base) * kLog2e);
        highest = most;
      }
      __syncthreads();
    }
    const int r = first + int(threadIdx.x);
    if (threadIdx.x < kRows && r < rows) to[r] = highest == -kInfinity ? highest : highest + logf(total);
  }
}

/// What a query row sees, as positions of keys, and its lse.
struct RowBounds {
  int low[kRows], high[kRows];
  float lse[kRows];
};

/// grid (groups, heads, columns): see the top of this file.
template <class Element, Kind KIND>
__global__ void __launch_bounds__(kThreads) fold_blocks(BlockFold f) {
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  __shared__ RowBounds bounds;
  __shared__ float kept[kKeys];  // of blocks that take several tiles
  const AttentionProblem& p = f.p;
  const BlockLists& lists = p.lists;
  Place at;
  if (!at.find(f, blockIdx.x, blockIdx.y)) return;
  auto* scores = reinterpret_cast<float*>(dynamic_shared);
  const int tid = int(threadIdx.x), stride = f.stride, rows_each = f.rows_per_block(), keys_each = f.keys_per_block();
  const int rows = at.count * rows_each, row_tiles = ceil_div(rows, kRows);
  const int blocks_wide = f.listed ? 1 : max(1, kKeys / keys_each), keys = blocks_wide * keys_each;
  const int key_tiles = ceil_div(keys, kKeys), len_k = at.span.len_k();
  const bool several = row_tiles * key_tiles > 1, maximum = KIND == Kind::max || (KIND == Kind::map && f.maximum);
  const float nothing = KIND == Kind::max ? -kInfinity : 0.f;
  const int64_t begin = int64_t(at.m0) * lists.block_q;  // of the rows, in the sequence
  const int64_t end = min(begin + int64_t(rows) * stride, int64_t(at.span.len_q()));
  const int64_t last = at.position(end - 1);
  auto fold = [&](float a, float b) { return maximum ? larger(a, b) : a + b; };
  auto store = [&](int q, int64_t column, float x) {
    f.out[(int64_t(at.head) * f.q_blocks + at.row0 + q) * f.width + column] = x;
  };
  const Element* query = rows_of<Element>(p.query, at.b, at.h, at.span.q_begin);
  const Element* key = rows_of<Element>(p.key, at.b, at.kv_head, at.span.k_begin);
  const int32_t* key_positions =
      p.key_positions ? p.key_positions + at.b * p.key_positions_batch + at.span.k_begin : nullptr;
  const float* bias =
      p.key_bias ? p.key_bias + at.b * p.key_bias_batch + at.h * p.key_bias_head + at.span.k_begin : nullptr;
  const int64_t list_row =
      f.listed ? ((lists.list_batch == 1 ? 0 : at.b) * lists.list_heads + at.h / (p.heads_q / lists.list_heads)) *
                         lists.q_blocks +
                     at.row0
               : 0;

  ScoreTile<Element> tile;
  const int64_t columns = ceil_div(f.listed ? f.width : f.key_blocks, int64_t(blocks_wide));
  for (int64_t column = blockIdx.z; column < columns; column += gridDim.z) {
    int64_t n0 = column * blocks_wide;
    bool masked = true;
    const int32_t* bits = nullptr;  // of the block, [block_q, words]
    const int words = (lists.block_k + 31) / 32;
    if (f.listed) {
      const bool partial = column < lists.partial.capacity;
      const BlockList& list = partial ? lists.partial : lists.full;
      const int64_t slot = partial ? column : column - lists.partial.capacity;
      const int64_t entry = list_row * list.capacity + slot;
      const bool used = list.counts && slot < list.counts[list_row];
      n0 = used ? list.indices[entry] : -1;
      masked = partial;
      if (n0 >= 0 && partial && lists.bits_index && lists.bits_index[entry] != -1) {
        const int64_t index = lists.bits_index[entry];
        if (index < 0 || index >= lists.bits_count) n0 = -1;
        bits = lists.bits + index * lists.block_q * words;
      }
      if (n0 < 0 || n0 * lists.block_k >= len_k) {
        if (tid < at.count) store(tid, column, 0.f);
        continue;
      }
    }
    const int64_t key0 = n0 * lists.block_k, key_end = min(key0 + int64_t(keys) * stride, int64_t(len_k));
    const int wide = int(f.listed ? 1 : min(int64_t(blocks_wide), f.key_blocks - n0));
    if (!f.listed && (key0 >= len_k || (p.causal && !p.query_positions && !p.key_positions && key0 > last))) {
      for (int pair = tid; pair < at.count * wide; pair += kThreads) {
        store(pair / wide, n0 + pair % wide, KIND == Kind::map || f.sums ? 0.f : -kInfinity);
      }
      continue;
    }
    for (int step = 0; step < row_tiles * key_tiles; ++step) {
      const int row_tile = step / key_tiles, key_tile = step % key_tiles;
      const int64_t tile_row = begin + int64_t(row_tile) * kRows * stride;
      const int64_t tile_key = key0 + int64_t(key_tile) * kKeys * stride;
      if (tid < kRows) {
        const int64_t i = tile_row + int64_t(tid) * stride;
        const bool exists = i < end;
        float lse = 0.f;
        if (KIND == Kind::map && exists) lse = f.lse[int64_t(at.head) * p.len_q + at.span.q_begin + i];
        if (KIND == Kind::antidiagonal && exists) {
          lse = f.lse[(int64_t(at.head) * f.q_blocks + at.row0) * rows_each + row_tile * kRows + tid];
        }
        int64_t low = INT_MIN, high = INT_MAX;
        if (masked) {
          const int64_t position = p.query_positions && exists
                                       ? p.query_positions[at.b * p.query_positions_batch + at.span.q_begin + i]
                                       : at.position(i);
          if (p.window_left >= 0) low = position - p.window_left;
          if (p.window_right >= 0) high = position + p.window_right;
          if (p.causal) high = min(high, position);
        }
        bounds.low[tid] = int(clamped(low, INT_MIN, INT_MAX));
        bounds.high[tid] = int(clamped(high, INT_MIN, INT_MAX));
        if (!exists || lse == -kInfinity) bounds.low[tid] = INT_MAX, bounds.high[tid] = INT_MIN;
        bounds.lse[tid] = lse;
      }
      __syncthreads();
      if constexpr (KIND == Kind::antidiagonal) {
        antidiagonal_tile(f, at, tile_row, end, tile_key, key_end, tile, dynamic_shared);
      } else {
        tile.multiply(
            1, p.head_dim, f.vectors,
            [&](int r, int) { return tile_row + r < end ? query + (tile_row + r) * p.query.row : nullptr; },
            [&](int n, int) { return tile_key + n < key_end ? key + (tile_key + n) * p.key.row : nullptr; },
            dynamic_shared);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = tile.row_of(i), low = bounds.low[r], high = bounds.high[r];
          const float base = bounds.lse[r];
#pragma unroll
          for (int j = 0; j < kKeys / 8; ++j) {
            const int n = tile.key_of(j, i);
            const int64_t at_key = tile_key + n;
            bool sees = at_key < key_end;
            if (sees) {
              const int position = key_positions ? key_positions[at_key] : int(at_key);
              sees = low <= position && position <= high;
            }
            float x = tile.c[j][i] * p.scale;
            if constexpr (KIND == Kind::map) {
              if (sees && bits) {
                const int64_t k = at_key - key0;
                sees = uint32_t(bits[(tile_row - begin + r) * words + k / 32]) >> (k % 32) & 1;
              }
              if (p.softcap > 0.f) x = p.softcap * tanh_fast(x / p.softcap);
              if (bias && sees) x += bias[at_key];
              x = exp2_fast((x - base) * kLog2e);
            }
            scores[r * kPitch + n] = sees ? x : nothing;
          }
        }
        __syncthreads();
      }
      // Along rows: the fold of each block's keys goes to the place of its number, which is behind none of its keys.
      const int keys_here = min(kKeys, keys - key_tile * kKeys);
      if (tid < kRows) {
        float* row = scores + tid * kPitch;
        const float base = bounds.lse[tid];
        const bool exists = bounds.low[tid] <= bounds.high[tid];
        for (int q = 0, n = 0; n < keys_here; ++q) {
          float x = nothing;
          for (const int stop = min(n + keys_each, keys_here); n < stop; ++n) {
            float y = row[n];
            if (KIND == Kind::antidiagonal) y = exists && y != -kInfinity ? exp2_fast((y - base) * kLog2e) : 0.f;
            x = fold(x, y);
          }
          row[q] = x;
        }
      }
      __syncthreads();
      // Down columns, of each block's rows: a warp per block where it has many rows.
      const int wide_here = key_tiles > 1 ? 1 : wide;
      const bool by_warp = rows_each >= kWarp;
      for (int pair = by_warp ? warp_of() : tid; pair < at.count * wide_here;
           pair += by_warp ? kThreads / kWarp : kThreads) {
        const int q = pair / wide_here, n = pair % wide_here;
        const int from = max(q * rows_each - row_tile * kRows, 0);
        const int to = min(int(min(int64_t(q + 1) * rows_each, int64_t(rows))) - row_tile * kRows, kRows);
        float x = nothing;
        for (int r = from + (by_warp ? lane_of() : 0); r < to; r += by_warp ? kWarp : 1)
          x = fold(x, scores[r * kPitch + n]);
        if (by_warp) {
          for (int s = 16; s > 0; s /= 2) x = fold(x, __shfl_xor_sync(kLanes, x, s));
          __syncwarp();
          if (lane_of() != 0) continue;
        }
        if (several) {
          if (step > 0) x = fold(kept[pair], x);
          kept[pair] = x;
          if (step + 1 < row_tiles * key_tiles) continue;
        }
        if constexpr (KIND == Kind::antidiagonal) {
          const int64_t first = begin + int64_t(q) * lists.block_q, stop = min(first + lists.block_q, end);
          const int64_t block = key0 + int64_t(n) * lists.block_k;
          if (f.sums) {
            // for the gradient: as they are
          } else if (block >= len_k || (p.causal && block > at.position(stop - 1))) {
            x = -kInfinity;
          } else {
            int seeing = 0;
            for (int64_t i = first; i < stop; i += stride) {
              seeing += !p.causal || at.position(min(i + stride, stop) - 1) >= 0;
            }
            x = logf(x != x ? x : fmaxf(x / float(seeing), kLeastShare));
          }
        }
        store(q, f.listed ? column : n0 + n, x);
      }
      __syncthreads();
    }
  }
}

template <class Element>
void run_fold(const BlockFold& f, Kind kind, float* lse, int multiprocessors, cudaStream_t stream) {
  const auto groups = unsigned(tiles_of(f.p.len_q, f.groups.block_q, f.p)), heads = unsigned(f.p.batch * f.p.heads_q);
  if (kind == Kind::antidiagonal)
    launch(lse_of_tile_rows<Element>, dim3(groups, heads), kThreads, kFoldBytes, stream, f, lse);
  const int64_t wide = f.listed ? 1 : std::max(1, kKeys / f.keys_per_block());
  const int64_t columns = ceil_div(f.listed ? f.width : f.key_blocks, wide);
  // Enough CTAs for the card four times over; no more, as each finds its rows anew.
  const int64_t split = ceil_div<int64_t>(8 * std::max(multiprocessors, 1), int64_t(groups) * heads);
  const dim3 grid(groups, heads, unsigned(clamped(split, 1, std::min<int64_t>(columns, 65535))));
  auto* kernel = kind == Kind::max   ? fold_blocks<Element, Kind::max>
                 : kind == Kind::map ? fold_blocks<Element, Kind::map>
                                     : fold_blocks<Element, Kind::antidiagonal>;
  launch(kernel, grid, kThreads, kFoldBytes, stream, f);
}

/// The kernel of the dtype; places are set.
void run_dtype(const BlockFold& f, Kind kind, float* lse, int multiprocessors, cudaStream_t stream) {
  switch (f.p.dtype) {
    case DType::f16: return run_fold<__half>(f, kind, lse, multiprocessors, stream);
    case DType::bf16: return run_fold<__nv_bfloat16>(f, kind, lse, multiprocessors, stream);
    default: return run_fold<float>(f, kind, lse, multiprocessors, stream);
  }
}

void run(BlockFold f, Kind kind, void* workspace, float* lse, int multiprocessors, cudaStream_t stream) {
  set_places(&f, workspace, stream);
  const int64_t count = f.p.batch * f.p.heads_q * f.q_blocks * f.width;
  if (count == 0) return;
  if (f.p.packed() || f.listed) fill(f.out, count, kind == Kind::map ? 0.f : -kInfinity, stream);
  if (f.p.len_q > 0) run_dtype(f, kind, lse, multiprocessors, stream);
}

}  // namespace

void find_tile_sums(const BlockFold& f, float* lse, int multiprocessors, cudaStream_t stream) {
  BlockFold sums = f;
  sums.sums = true;
  run_dtype(sums, Kind::antidiagonal, lse, multiprocessors, stream);
}

size_t block_scores_workspace(const BlockScores& s, const CudaContext&) {
  size_t bytes = 2 * spans_bytes(s);
  if (s.reduce == BlockReduce::antidiagonal) {
    bytes += padded_bytes(s.batch * s.heads_q * s.q_blocks * (s.lists.block_q / s.stride) * 4);
  }
  const bool means = s.reduce == BlockReduce::mean || s.q_similarity;
  return means ? std::max(bytes, block_means_bytes(s)) : bytes;
}

Status score_blocks(const BlockScores& s, const CudaContext& context) {
  if (s.reduce == BlockReduce::mean) return score_block_means(s, context);
  const auto stream = static_cast<cudaStream_t>(context.stream);
  BlockFold f;
  f.p = s;
  f.q_blocks = s.q_blocks;
  f.key_blocks = f.width = s.key_blocks;
  const bool antidiagonal = s.reduce == BlockReduce::antidiagonal;
  f.stride = antidiagonal ? s.stride : 1;
  auto* lse = reinterpret_cast<float*>(static_cast<char*>(context.workspace) + 2 * spans_bytes(s));
  f.lse = lse;
  f.out = static_cast<float*>(s.scores);
  run(f, antidiagonal ? Kind::antidiagonal : Kind::max, context.workspace, lse, context.multiprocessors, stream);
  if (s.q_similarity) {
    BlockMeans means = block_means_of(s, context.workspace, /*parts=*/false);
    find_block_means(s, &means, false, context.multiprocessors, stream);
  }
  return launched("block_scores");
}

size_t block_map_workspace(const AttentionBlockMap& m, const CudaContext&) { return 2 * spans_bytes(m); }

Status pool_attention(const AttentionBlockMap& m, const CudaContext& context) {
  BlockFold f;
  f.p = m;
  f.q_blocks = m.q_blocks;
  f.key_blocks = m.key_blocks;
  f.width = m.listed ? m.lists.slots_per_row() : m.key_blocks;
  f.listed = m.listed;
  f.maximum = m.maximum;
  f.lse = static_cast<const float*>(m.lse);
  f.out = static_cast<float*>(m.map);
  run(f, Kind::map, context.workspace, nullptr, context.multiprocessors, static_cast<cudaStream_t>(context.stream));
  return launched("attention_block_map");
}

}  // namespace sparsekit::cuda

// Means of blocks on the GPU, for the block scores by the mean (their products: cuda_block_products_sm80.cu), and
// self-similarity of blocks.
//
//   mean over pairs of scale * q_i . k_j = scale * (mean q) . (mean k)
//   a block that causality cuts: sum over i of q_i . (sum of the k_j that row i sees), a running sum of keys
//
// Where query and key blocks are of one size and lie on the diagonal, each query block has one cut block, and one CTA
// averages a key block and the query blocks of all heads that share it: every thread has 16 bytes of 8 rows, adds the
// keys up as it goes along them, and what lies in the rows of other threads comes in as (sum of own q) . (sum of
// earlier keys). So query and key are read once. Any other cut block is summed by a CTA of its own row of blocks, from
// L2.
//
// The CTAs stay, and go over the problem block by block: a thread copies its own pieces of two blocks ahead to shared
// memory (nobody else reads them: no barrier), also past the end of a key block, so that 64 KB per CTA are always on
// their way. One barrier per block, for the sums of the warps.
//
// Bound: memory; 131,072 tokens, 32 heads over 8, D = 128, bf16: 1.34 GB.
#include <algorithm>

#include "selection/cuda_block_means.cuh"
#include "selection/cuda_kernels.h"
#include "selection/cuda_score_tiles.cuh"

namespace sparsekit::cuda {
namespace {

constexpr int kThreads = 256;

/// 16 bytes of a row as fp32.
template <class Element>
struct Piece {
  static constexpr int size = 16 / int(sizeof(Element));
  uint4 bits;

  __device__ __forceinline__ void load(const Element* from, bool valid) {
    bits = valid ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
  }
  __device__ __forceinline__ void widen(float (&to)[size]) const {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) widen(words[i], to, i);
  }

 private:
  __device__ __forceinline__ static void widen(uint32_t word, float (&to)[size], int i) {
    if constexpr (sizeof(Element) == 4) {
      to[i] = __uint_as_float(word);
    } else if constexpr (std::is_same<Element, __nv_bfloat16>::value) {
      to[2 * i] = __uint_as_float(word << 16);
      to[2 * i + 1] = __uint_as_float(word & 0xffff0000u);
    } else {
      const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word));
      to[2 * i] = pair.x;
      to[2 * i + 1] = pair.y;
    }
  }
};

/// How threads share a block: `lanes` threads side by side have a row, 16 bytes each.
struct Shares {
  int lanes = 0, groups = 0;  // lanes: a power of two, at most 32
};
Shares shares_of(const AttentionProblem& p) {
  Shares shares;
  const int64_t pieces = p.head_dim * size_of(p.dtype) / 16;
  if (!in_vectors(p.query, p) || !in_vectors(p.key, p) || pieces < 1 || pieces > kWarp) return shares;
  for (shares.lanes = 1; shares.lanes < pieces;) shares.lanes *= 2;
  shares.groups = kThreads / shares.lanes;
  return shares;
}
constexpr int kRowsEach = 8;  // of a thread in the diagonal's CTAs: 32 registers of keys

// ---- means of any blocks

struct Pool {
  InputView view;
  int64_t heads = 0, blocks = 0;  // blocks of the result
  int head_dim = 0, block = 0;
  bool keys = false;  // which length of a span
  Spans spans;
  Means means;                  // [batch, heads, blocks, head_dim]
  float* similarity = nullptr;  // [batch, heads, blocks] or null
};

/// Every thread's piece of a sum into shared memory; threads of a row, side by side, make a row of it.
template <int SIZE>
__device__ __forceinline__ void put_piece(float* parts, const float (&own)[SIZE]) {
#pragma unroll
  for (int i = 0; i < SIZE; ++i) parts[int(threadIdx.x) * SIZE + i] = own[i];
  __syncthreads();
}
/// Element d of the sum of these rows.
__device__ __forceinline__ float sum_groups(const float* parts, const Shares& shares, int size, int d) {
  float x = 0.f;
  for (int g = 0; g < shares.groups; ++g) x += parts[g * shares.lanes * size + d];
  return x;
}

/// grid (blocks, heads of all batches), rows in 16-byte pieces.
template <class Element, bool SIMILARITY>
__global__ void __launch_bounds__(kThreads) pool_pieces(Pool pool, Shares shares) {
  constexpr int size = Piece<Element>::size;
  __shared__ float parts[kThreads * size];
  __shared__ CtaScratch scratch;
  Span span;
  int block;
  const bool exists = find_span(pool.spans, pool.keys, blockIdx.x, &span, &block);
  const int64_t result = int64_t(blockIdx.y) * pool.blocks + blockIdx.x;
  if (!exists) {
    if (SIMILARITY && threadIdx.x == 0) pool.similarity[result] = 0.f;
    return;
  }
  const int first = (pool.keys ? span.k_begin : span.q_begin) + block * pool.block;
  const int rows = min(pool.block, (pool.keys ? span.k_end : span.q_end) - first);
  const int lane = int(threadIdx.x) % shares.lanes, group = int(threadIdx.x) / shares.lanes;
  const bool used = lane * size < pool.head_dim;
  const Element* base =
      rows_of<Element>(pool.view, blockIdx.y / pool.heads, blockIdx.y % pool.heads, first) + lane * size;
  float sum[size] = {}, unit_sum[size] = {};
  for (int start = 0; start < rows; start += 4 * shares.groups) {
    Piece<Element> pieces[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const int r = start + u * shares.groups + group;
      pieces[u].load(base + int64_t(r) * pool.view.row, used && r < rows);
    }
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      float x[size];
      pieces[u].widen(x);
      if constexpr (SIMILARITY) {
        float norm = 0.f;
#pragma unroll
        for (int i = 0; i < size; ++i) norm = fmaf(x[i], x[i], norm);
        for (int step = 1; step < shares.lanes; step *= 2) norm += __shfl_xor_sync(kLanes, norm, step);
        const float factor = norm == 0.f ? 0.f : 1.f / sqrtf(norm);
#pragma unroll
        for (int i = 0; i < size; ++i) unit_sum[i] = fmaf(x[i], factor, unit_sum[i]);
      }
#pragma unroll
      for (int i = 0; i < size; ++i) sum[i] += x[i];
    }
  }
  put_piece(parts, sum);
  for (int d = int(threadIdx.x); d < pool.head_dim; d += kThreads) {
    pool.means.put(result * pool.head_dim + d, sum_groups(parts, shares, size, d) / float(rows));
  }
  if constexpr (SIMILARITY) {
    __syncthreads();
    put_piece(parts, unit_sum);
    float square = 0.f;
    for (int d = int(threadIdx.x); d < pool.head_dim; d += kThreads) {
      const float x = sum_groups(parts, shares, size, d);
      square = fmaf(x, x, square);
    }
    square = cta_sum<kThreads>(square, scratch);
    if (threadIdx.x == 0) pool.similarity[result] = square / (float(rows) * float(rows));
  }
}

/// The same for any head dimension and alignment: a thread per element of a row.
template <class Element>
__global__ void __launch_bounds__(kThreads) pool_elements(Pool pool) {
  __shared__ CtaScratch scratch;
  __shared__ float factors[kThreads / kWarp];
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  auto* sums = reinterpret_cast<float*>(dynamic_shared);
  float* unit_sums = sums + pool.head_dim;
  Span span;
  int block;
  const bool exists = find_span(pool.spans, pool.keys, blockIdx.x, &span, &block);
  const int64_t result = int64_t(blockIdx.y) * pool.blocks + blockIdx.x;
  if (!exists) {
    if (pool.similarity && threadIdx.x == 0) pool.similarity[result] = 0.f;
    return;
  }
  const int first = (pool.keys ? span.k_begin : span.q_begin) + block * pool.block;
  const int rows = min(pool.block, (pool.keys ? span.k_end : span.q_end) - first);
  const Element* base = rows_of<Element>(pool.view, blockIdx.y / pool.heads, blockIdx.y % pool.heads, first);
  for (int d = int(threadIdx.x); d < pool.head_dim; d += kThreads) sums[d] = unit_sums[d] = 0.f;
  constexpr int warps = kThreads / kWarp;
  for (int start = 0; start < rows; start += warps) {
    if (pool.similarity) {
      float norm = 0.f;
      const int r = start + warp_of();
      for (int d = lane_of(); r < rows && d < pool.head_dim; d += kWarp) {
        const float x = widened(base[r * pool.view.row + d]);
        norm = fmaf(x, x, norm);
      }
      for (int step = 16; step > 0; step /= 2) norm += __shfl_xor_sync(kLanes, norm, step);
      if (lane_of() == 0) factors[warp_of()] = norm == 0.f ? 0.f : 1.f / sqrtf(norm);
      __syncthreads();
    }
    for (int d = int(threadIdx.x); d < pool.head_dim; d += kThreads) {
      for (int r = start; r < min(rows, start + warps); ++r) {
        const float x = widened(base[r * pool.view.row + d]);
        sums[d] += x;
        if (pool.similarity) unit_sums[d] = fmaf(x, factors[r - start], unit_sums[d]);
      }
    }
    if (pool.similarity) __syncthreads();
  }
  float square = 0.f;
  for (int d = int(threadIdx.x); d < pool.head_dim; d += kThreads) {
    pool.means.put(result * pool.head_dim + d, sums[d] / float(rows));
    square = fmaf(unit_sums[d], unit_sums[d], square);
  }
  if (!pool.similarity) return;
  square = cta_sum<kThreads>(square, scratch);
  if (threadIdx.x == 0) pool.similarity[result] = square / (float(rows) * float(rows));
}

template <class Element>
void pool_blocks(const Pool& pool, int64_t batch, const Shares& shares, cudaStream_t stream) {
  if (pool.blocks == 0) return;
  const dim3 grid(unsigned(pool.blocks), unsigned(batch * pool.heads));
  if (shares.lanes == 0) {
    launch(pool_elements<Element>, grid, kThreads, size_t(pool.head_dim) * 8, stream, pool);
  } else if (pool.similarity) {
    launch(pool_pieces<Element, true>, grid, kThreads, 0, stream, pool, shares);
  } else {
    launch(pool_pieces<Element, false>, grid, kThreads, 0, stream, pool, shares);
  }
}

// ---- means and the diagonal at once

constexpr int kStages = 2, kWarps = kThreads / kWarp, kStageBytes = kRowsEach * kThreads * 16;

struct Diagonal {
  BlockScores p;
  BlockMeans means;
  Shares shares;
  int begin = 0, blocks = 0;  // of the key blocks that have work
  int shift = 0;              // key block n and query block n - shift meet on the diagonal
  int64_t items = 0;          // blocks * key heads of all batches
};

/// A step of a CTA: part 0 of an item is the block of keys, parts 1 .. are those of the query heads that share it.
/// Items go round the CTAs.
struct DiagonalStep {
  int64_t item;
  int part = 0;

  __device__ __forceinline__ void advance(const Diagonal& d) {
    if (++part <= int(d.p.heads_q / d.p.heads_kv)) return;
    part = 0;
    item += gridDim.x;
  }
  __device__ __forceinline__ int n(const Diagonal& d) const { return d.begin + int(item % d.blocks); }
  __device__ __forceinline__ int kv_head(const Diagonal& d) const { return int(item / d.blocks); }  // of all batches
  __device__ __forceinline__ int64_t head(const Diagonal& d) const {                                // of all batches
    return int64_t(kv_head(d)) * (d.p.heads_q / d.p.heads_kv) + part - 1;
  }
  /// Rows of the block that exist.
  __device__ __forceinline__ int rows(const Diagonal& d) const {
    const int block = d.p.lists.block_k, at = part == 0 ? n(d) : n(d) - d.shift;
    return at < 0 ? 0 : int(clamped((part == 0 ? d.p.len_k : d.p.len_q) - int64_t(at) * block, 0, block));
  }
};

/// Element `i` of every thread's piece becomes the sum over the groups of its warp up to its own.
template <int SIZE>
__device__ __forceinline__ void scan_groups(float (&x)[SIZE], int lanes) {
  for (int step = lanes; step < kWarp; step *= 2) {
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      const float other = __shfl_up_sync(kLanes, x[i], step);
      if (lane_of() >= step) x[i] += other;
    }
  }
}

/// One CTA for every place on the card: key blocks, and the query blocks of the heads that share them.
template <class Element>
__global__ void __launch_bounds__(kThreads, 2) pool_diagonal(Diagonal d) {
  constexpr int size = Piece<Element>::size;
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  auto* stages = reinterpret_cast<uint4*>(dynamic_shared);  // [kStages][kRowsEach][kThreads]: each thread its own
  auto* sums = reinterpret_cast<float*>(dynamic_shared + kStages * kStageBytes);  // [2][kWarps][width]
  __shared__ float products[2][kWarps];
  const BlockScores& p = d.p;
  const Shares shares = d.shares;
  const int lane = int(threadIdx.x) % shares.lanes, first = int(threadIdx.x) / shares.lanes * kRowsEach;
  const int width = shares.lanes * size, dim = p.head_dim, column = lane * size;
  const bool last_group = lane_of() >= kWarp - shares.lanes;  // of its warp
  const int heads_kv = int(p.heads_kv), heads_each = int(p.heads_q / p.heads_kv);

  auto load = [&](const DiagonalStep& step, int stage) {
    if (step.item < d.items) {
      const int rows = step.rows(d), b = step.kv_head(d) / heads_kv, kv_head = step.kv_head(d) % heads_kv;
      const bool keys = step.part == 0;
      const InputView& view = keys ? p.key : p.query;
      const int64_t row = rows == 0 ? 0 : int64_t(keys ? step.n(d) : step.n(d) - d.shift) * p.lists.block_k + first;
      const auto* from = rows_of<Element>(view, b, keys ? kv_head : kv_head * heads_each + step.part - 1, row) + column;
#pragma unroll
      for (int r = 0; r < kRowsEach; ++r) {
        const bool valid = column < dim && first + r < rows;
        const void* source = valid ? from + r * view.row : static_cast<const Element*>(view.data);
        copy_async_16(shared_address(stages + (stage * kRowsEach + r) * kThreads + threadIdx.x), source, valid);
      }
    }
    copy_async_commit();
  };

  DiagonalStep now, ahead;
  now.item = ahead.item = blockIdx.x;
  for (int stage = 0; stage < kStages; ++stage, ahead.advance(d)) load(ahead, stage);
  Piece<Element> key[kRowsEach];
  float before[size];  // the sum of the keys in the rows of other threads, before this one's
  for (int at = 0; now.item < d.items; ++at, now.advance(d), ahead.advance(d)) {
    const int stage = at % kStages, rows = now.rows(d);
    copy_async_wait<kStages - 1>();
    Piece<Element> piece[kRowsEach];
#pragma unroll
    for (int r = 0; r < kRowsEach; ++r) piece[r].bits = stages[(stage * kRowsEach + r) * kThreads + threadIdx.x];
    load(ahead, stage);
    float* mine = sums + at % 2 * kWarps * width;
    float sum[size] = {};
    if (now.part == 0) {
#pragma unroll
      for (int r = 0; r < kRowsEach; ++r) {
        float x[size];
        key[r] = piece[r];
        key[r].widen(x);
#pragma unroll
        for (int i = 0; i < size; ++i) sum[i] += x[i];
      }
    } else {
      float seen[size], product = 0.f;
#pragma unroll
      for (int i = 0; i < size; ++i) seen[i] = before[i];
#pragma unroll
      for (int r = 0; r < kRowsEach; ++r) {
        float q[size], k[size], here = 0.f;
        piece[r].widen(q);
        key[r].widen(k);
#pragma unroll
        for (int i = 0; i < size; ++i) {
          seen[i] += k[i];
          sum[i] += q[i];
          here = fmaf(q[i], seen[i], here);
        }
        if (first + r < rows) product += here;  // what does not exist meets no NaN
      }
      for (int step = 16; step > 0; step /= 2) product += __shfl_xor_sync(kLanes, product, step);
      if (lane_of() == 0) products[at % 2][warp_of()] = product;
    }
    scan_groups(sum, shares.lanes);
    if (last_group) {
#pragma unroll
      for (int i = 0; i < size; ++i) mine[warp_of() * width + column + i] = sum[i];
    }
    __syncthreads();  // also: all have read what the step after the next writes
    if (now.part == 0) {
#pragma unroll
      for (int i = 0; i < size; ++i) {
        before[i] = shares.lanes < kWarp ? __shfl_up_sync(kLanes, sum[i], shares.lanes) : 0.f;
        if (lane_of() < shares.lanes) before[i] = 0.f;
      }
      for (int w = 0; w < warp_of(); ++w) {
#pragma unroll
        for (int i = 0; i < size; ++i) before[i] += mine[w * width + column + i];
      }
    }
    if (rows == 0) continue;
    const Means& means = now.part == 0 ? d.means.k : d.means.q;
    const int64_t block = now.part == 0 ? int64_t(now.kv_head(d)) * d.means.k_blocks + now.n(d)
                                        : now.head(d) * p.q_blocks + now.n(d) - d.shift;
    for (int e = int(threadIdx.x); e < dim; e += kThreads) {
      float x = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) x += mine[w * width + e];
      means.put(block * dim + e, x / float(rows));
    }
    if (now.part > 0 && threadIdx.x == 0) {
      float x = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) x += products[at % 2][w];
      d.means.diagonal[block] = x;
    }
  }
  copy_async_wait<0>();
}

/// Whether each query block has one cut block, from corner to corner, that the threads of pool_diagonal hold.
bool on_diagonal(const BlockScores& p, const Shares& shares) {
  return p.causal && !p.packed() && !p.q_similarity && shares.lanes > 0 && p.lists.block_q == p.lists.block_k &&
         (p.len_k - p.len_q) % p.lists.block_k == 0 && p.lists.block_k <= shares.groups * kRowsEach;
}

template <class Element>
void find_means(const BlockScores& p, BlockMeans* means, bool diagonal, int multiprocessors, cudaStream_t stream) {
  const Shares shares = shares_of(p);
  if (diagonal && on_diagonal(p, shares)) {
    Diagonal d;
    d.p = p;
    d.means = *means;
    d.shares = shares;
    d.shift = int((p.len_k - p.len_q) / p.lists.block_k);
    d.begin = std::min(d.shift, 0);
    d.blocks = int(std::max(means->k_blocks, p.q_blocks + d.shift) - d.begin);
    d.items = d.blocks * p.batch * p.heads_kv;
    const size_t bytes = kStages * kStageBytes + 2 * kWarps * shares.lanes * Piece<Element>::size * sizeof(float);
    const int64_t ctas = std::min<int64_t>(d.items, 2 * std::max(multiprocessors, 1));
    if (ctas > 0) launch(pool_diagonal<Element>, unsigned(ctas), kThreads, bytes, stream, d);
    return;
  }
  means->diagonal = nullptr;
  Pool pool;
  pool.head_dim = p.head_dim;
  pool.spans = means->blocks;
  pool.view = p.query;
  pool.heads = p.heads_q;
  pool.blocks = p.q_blocks;
  pool.block = p.lists.block_q;
  pool.means = means->q;
  pool.similarity = static_cast<float*>(p.q_similarity);
  pool_blocks<Element>(pool, p.batch, shares, stream);
  pool.view = p.key;
  pool.heads = p.heads_kv;
  pool.blocks = means->k_blocks;
  pool.block = p.lists.block_k;
  pool.keys = true;
  pool.means = means->k;
  pool.similarity = static_cast<float*>(p.k_similarity);
  pool_blocks<Element>(pool, p.batch, shares, stream);
}

__global__ void fill_floats(float* to, int64_t count, float value) {
  for (int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; at < count; at += int64_t(gridDim.x) * blockDim.x) {
    to[at] = value;
  }
}

}  // namespace

void fill(float* to, int64_t count, float value, cudaStream_t stream) {
  if (count > 0)
    launch(fill_floats, unsigned(clamped(ceil_div<int64_t>(count, 1024), 1, 4096)), 256, 0, stream, to, count, value);
}

namespace {

int64_t q_count(const BlockScores& p) { return p.batch * p.heads_q * p.q_blocks * p.head_dim; }
int64_t k_count(const BlockScores& p) { return p.batch * p.heads_kv * p.k_blocks() * p.head_dim; }

}  // namespace

size_t block_means_bytes(const BlockScores& p) {  // parts take more than fp32
  return 2 * spans_bytes(p) + padded_bytes(q_count(p) * 6) + padded_bytes(k_count(p) * 6) +
         padded_bytes(p.batch * p.heads_q * p.q_blocks * 4);
}

BlockMeans block_means_of(const BlockScores& p, void* workspace, bool parts) {
  BlockMeans means;
  auto* memory = static_cast<char*>(workspace);
  auto take = [&](size_t bytes) {
    char* at = memory;
    memory += bytes;
    return at;
  };
  auto take_means = [&](Means* to, int64_t count) {
    void* at = take(padded_bytes(count * 6));
    to->count = count;
    to->whole = parts ? nullptr : static_cast<float*>(at);
    to->parts = parts ? static_cast<__nv_bfloat16*>(at) : nullptr;
  };
  means.k_blocks = p.k_blocks();
  means.blocks = spans_of(p, p.lists.block_q, p.lists.block_k, take(spans_bytes(p)));
  const int64_t tile = std::min<int64_t>(int64_t(p.lists.block_q) * kTileBlocks, INT32_MAX);
  means.tiles = spans_of(p, int(tile), p.lists.block_k, take(spans_bytes(p)));
  take_means(&means.q, q_count(p));
  take_means(&means.k, k_count(p));
  means.diagonal = reinterpret_cast<float*>(take(padded_bytes(p.batch * p.heads_q * p.q_blocks * 4)));
  return means;
}

void find_block_means(const BlockScores& p, BlockMeans* means, bool diagonal, int multiprocessors,
                      cudaStream_t stream) {
  list_spans_of(means->blocks, stream);
  list_spans_of(means->tiles, stream);
  switch (p.dtype) {
    case DType::f16: return find_means<__half>(p, means, diagonal, multiprocessors, stream);
    case DType::bf16: return find_means<__nv_bfloat16>(p, means, diagonal, multiprocessors, stream);
    default: return find_means<float>(p, means, diagonal, multiprocessors, stream);
  }
}

}  // namespace sparsekit::cuda

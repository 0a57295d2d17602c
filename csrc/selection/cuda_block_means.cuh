// Block scores by the mean on the GPU: what forward and backward share. The mathematics: cpu_block_means.h.
#pragma once

#include "selection/cuda_rows.cuh"
#include "selection/cuda_support.cuh"

namespace sparsekit::cuda {

/// Means of blocks, [.., head_dim], as fp32 or as the sums of three bf16 numbers, the greatest first: [3, ..,
/// head_dim]. One of the two is null.
struct Means {
  float* whole = nullptr;
  __nv_bfloat16* parts = nullptr;
  int64_t count = 0;

  __device__ __forceinline__ void put(int64_t at, float mean) const {
    if (whole) whole[at] = mean;
    if (!parts) return;
#pragma unroll
    for (int part = 0; part < 3; ++part) {
      const __nv_bfloat16 here = __float2bfloat16_rn(mean);
      parts[part * count + at] = here;
      mean = fabsf(widened(here)) < __builtin_huge_valf() ? mean - widened(here) : 0.f;
    }
  }
};

/// The workspace of a call: tables of sequences, means of blocks.
struct BlockMeans {
  Spans blocks;               // in blocks of block_q, block_k
  Spans tiles;                // in tiles of kTileBlocks blocks of queries
  Means q, k;                 // [batch, heads_q, q_blocks], [batch, heads_kv, k_blocks], packed over all sequences
  float* diagonal = nullptr;  // [batch, heads_q, q_blocks]: sums over the pairs of the one block that causality cuts,
                              // or null where that is not one block per row, from corner to corner
  int64_t k_blocks = 0;
};
constexpr int kTileBlocks = 128;

constexpr float kLeastShare = 1.17549435e-38f;  // least_share of implementations.h

/// to[0 .. count) = value.
void fill(float* to, int64_t count, float value, cudaStream_t stream);

size_t block_means_bytes(const BlockScores& p);
/// Places of the workspace; `parts`: the means as parts.
BlockMeans block_means_of(const BlockScores& p, void* workspace, bool parts);
/// Fills them: means of all blocks, similarities and, with `diagonal`, the products of the diagonal.
void find_block_means(const BlockScores& p, BlockMeans* means, bool diagonal, int multiprocessors, cudaStream_t stream);

/// Block m of queries and n of keys of a sequence.
struct BlockPair {
  int rows, keys;      // that exist
  int64_t first_seen;  // keys of n that the first row of m sees; one more with each row. Without causality all

  __device__ __forceinline__ BlockPair(const BlockScores& p, const Span& span, int m, int n) {
    const int64_t first_row = int64_t(m) * p.lists.block_q, first_key = int64_t(n) * p.lists.block_k;
    rows = int(min(int64_t(p.lists.block_q), span.len_q() - first_row));
    keys = int(min(int64_t(p.lists.block_k), span.len_k() - first_key));
    first_seen = p.causal ? first_row + span.len_k() - span.len_q() - first_key + 1 : INT32_MAX;
  }
  __device__ __forceinline__ bool whole() const { return first_seen >= keys; }
  __device__ __forceinline__ bool seen() const { return first_seen + rows - 1 > 0; }
  /// Pairs that see each other: the sum over rows i of clamp(first_seen + i, 0, keys).
  __device__ __forceinline__ float pairs() const {
    if (whole()) return float(int64_t(rows) * keys);
    const int64_t begin = clamped(1 - first_seen, 0, rows), end = clamped(keys - first_seen, 0, rows);
    return float(first_seen * (end - begin) + (begin + end - 1) * (end - begin) / 2 + (rows - end) * keys);
  }
};

/// Key blocks [0, whole) are seen whole by every row of block m, [whole, seen) by some or in part.
struct SeenBlocks {
  int whole, seen;

  __device__ __forceinline__ SeenBlocks(const BlockScores& p, const Span& span, int m) {
    const int64_t block_k = p.lists.block_k, first_row = int64_t(m) * p.lists.block_q;
    const int64_t last_row = min(first_row + p.lists.block_q, int64_t(span.len_q())) - 1;
    const int64_t shift = span.len_k() - span.len_q(), blocks = (span.len_k() + block_k - 1) / block_k;
    if (!p.causal || first_row + shift >= span.len_k() - 1) {
      whole = seen = int(blocks);
      return;
    }
    whole = int(clamped(first_row + shift + 1, 0, span.len_k()) / block_k);
    seen = int((clamped(last_row + shift + 1, 0, span.len_k()) + block_k - 1) / block_k);
  }
};

}  // namespace sparsekit::cuda

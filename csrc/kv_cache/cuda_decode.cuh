// What the decode kernels share: the problem on the device, its cut into splits, what a split leaves behind.
//
// The grid is cut by shape: `splits` CTAs per (sequence, key head, block of query rows). How many tokens each of them
// takes follows from the head's length, which only the device knows: results are bitwise repeatable, and a short
// sequence is spread as well as a long one. A split leaves its state (acc, largest, total; scores in units of log2) in
// the workspace, and cuda_decode_merge.cu merges the states of a row in order.
#pragma once

#include "kv_cache/cuda_format.cuh"

namespace sparsekit::cuda {

/// A plain cache, or none (key null).
struct Plain {
  const void *key, *value;
  int64_t pages, pages_per_head;
  int32_t page_size;
  int64_t key_page, key_head, key_token, value_page, value_head, value_token;
  const int32_t *lengths, *block_table;

  __device__ __forceinline__ int length(int64_t b) const {
    const int64_t capacity = pages > 0 ? pages_per_head * page_size : 0;
    return int(min(max(int64_t(lengths[b]), int64_t(0)), min(capacity, int64_t(0x7fffffff))));
  }
  /// Page of a sequence's token, or -1.
  __device__ __forceinline__ int64_t page(int64_t b, int64_t i) const {
    if (!block_table) return b < pages ? b : -1;
    const int64_t number = block_table[b * pages_per_head + i];
    return number < pages ? number : -1;
  }
};

struct Decode {
  Cache cache;
  Plain plain;
  DType dtype, kept;  // of query and out; of full-precision keys and values
  int64_t batch, heads_q, heads_kv, len_q;
  int32_t head_dim, value_dim, rows, group;  // rows: query rows of a key head; group: query heads of it
  InputView query;
  float scale, softcap;
  const float* sinks;
  const float* key_bias;
  int64_t bias_batch, bias_head, bias_row, bias_length;
  OutputView out;
  float *lse, *scores;
  int64_t scores_length;
  // The cut, and the states: of split s of head (b, h), row r: acc [value_dim], (largest, total).
  int32_t splits, slots;  // slots: splits, and more where other kernels add states
  float* acc;             // [batch, heads_kv, slots, rows, value_dim]
  float2* states;         // [batch, heads_kv, slots, rows]

  __host__ __device__ __forceinline__ bool packed() const { return plain.key == nullptr; }
  __device__ __forceinline__ int64_t state(int64_t b, int64_t h, int slot, int row) const {
    return ((b * heads_kv + h) * slots + slot) * rows + row;
  }
  __device__ __forceinline__ int64_t query_head(int64_t h, int row) const { return h * group + row / len_q; }
  /// Keys that the row sees: those before this one.
  __device__ __forceinline__ int limit(int length, int row) const { return length - int(len_q) + 1 + row % int(len_q); }
  __device__ __forceinline__ int64_t query_row(int64_t b, int64_t h, int row) const {
    return b * query.batch + query_head(h, row) * query.head + row % len_q * query.row;
  }
  __device__ __forceinline__ const float* bias(int64_t b, int64_t h, int row) const {
    return key_bias ? key_bias + b * bias_batch + query_head(h, row) * bias_head + row % len_q * bias_row : nullptr;
  }
  __device__ __forceinline__ float* scores_of(int64_t b, int64_t h, int row) const {
    return scores ? scores + ((b * heads_q + query_head(h, row)) * len_q + row % len_q) * scores_length : nullptr;
  }
};

/// Chunks [first, last) of `chunks` that split `split` takes: equal shares, rounded up to `least`.
struct Share {
  int first, last;
};
__device__ __forceinline__ Share share_of(int chunks, int split, int splits, int least) {
  const int each = max((chunks + splits - 1) / splits, least);
  const int64_t first = min(int64_t(split) * each, int64_t(chunks));
  return {int(first), int(min(first + each, int64_t(chunks)))};
}

}  // namespace sparsekit::cuda

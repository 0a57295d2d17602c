// Between the driver of decode attention (decode.cpp) and its kernels (reference.cpp, cpu_*.cpp).
//
// The tokens of a head are cut into chunks of up to 128: of the sinks, of the quantized part, of the ring or of a plain
// cache's pages. A *split* is a run of chunks that one thread walks with an online softmax; the splits of a head are
// merged afterwards. Both cuts follow from lengths alone, so results do not depend on the number of threads.
#pragma once

#include "sparsekit/kv_cache.h"

namespace sparsekit {

constexpr int32_t chunk_tokens = 128;
constexpr int32_t chunk_blocks = chunk_tokens / kv_block;
constexpr int32_t split_chunks =
    16;  // 2,048 tokens: 16 splits for one head of 32K, and 128 times the cost of its merge

/// Rows of a chunk in full precision: evenly spaced where they are, so that no pointer is written and read per row
/// (with softmax a seventh of the time of a bf16 decode), else a pointer each.
struct ChunkRows {
  const char* first = nullptr;  // null: not evenly spaced
  int64_t stride = 0;           // bytes
  const void* rows[chunk_tokens];

  const void* operator[](int32_t t) const { return first ? first + t * stride : rows[t]; }
};

/// Up to 128 tokens: rows in full precision, or blocks of codes.
struct DecodeChunk {
  int64_t first = 0;  // the token's number in its head
  int32_t count = 0;
  bool quantized = false;
  ChunkRows key, value;
  const uint8_t* key_codes[chunk_blocks];  // blocks past count are null
  const uint8_t* value_codes[chunk_blocks];
  const uint16_t* key_scales[chunk_blocks];  // of the group that the block is in; or of the block
  const uint16_t* key_minima[chunk_blocks];
  const uint16_t* value_scales[chunk_blocks];
  const uint16_t* value_minima[chunk_blocks];
};

/// One split: what a kernel gets, and what it leaves in acc, largest, total.
struct DecodeSplit {
  const DecodeAttention* problem;
  int64_t batch, head;  // head: of the cache
  int64_t first_chunk, last_chunk;
  int64_t length;      // tokens of this head
  int32_t rows;        // query rows: (query heads of this key head) * len_q; row r is head r / len_q, query r % len_q
  const float* query;  // [rows][head_dim], not scaled
  float* scratch;      // DecodeKernel::scratch floats, aligned to 64 bytes
  // The state over the split's keys. Scores are in units of log2: weight 2^(x - largest).
  float* acc;      // [rows][value_dim]
  float* largest;  // [rows], -inf: no key
  float* total;    // [rows]

  int64_t query_head(int32_t row) const { return head * (problem->heads_q / problem->heads_kv) + row / problem->len_q; }
  /// Keys that the row sees: those before this one.
  int64_t limit(int32_t row) const { return length - problem->len_q + 1 + row % problem->len_q; }
  /// Bias of the row by token, or null.
  const float* bias(int32_t row) const {
    const DecodeAttention& p = *problem;
    if (!p.key_bias) return nullptr;
    return p.key_bias + batch * p.bias_batch + query_head(row) * p.bias_head + row % p.len_q * p.bias_row;
  }
  float* scores(int32_t row) const {
    const DecodeAttention& p = *problem;
    if (!p.scores) return nullptr;
    return p.scores + ((batch * p.heads_q + query_head(row)) * p.len_q + row % p.len_q) * p.scores_length;
  }
};

/// Fills chunk number `index` of a head.
void decode_chunk(const DecodeAttention& problem, int64_t batch, int64_t head, int64_t index, DecodeChunk* chunk);

struct DecodeKernel {
  const char* name;
  const char* (*refuses)(const DecodeAttention& problem);
  int64_t (*scratch)(const DecodeAttention& problem);  // floats
  void (*run)(const DecodeSplit& split);
};

extern const DecodeKernel decode_reference;
extern const DecodeKernel decode_portable;
#ifdef SPARSEKIT_X86
extern const DecodeKernel decode_avx2;
extern const DecodeKernel decode_avx512;
extern const DecodeKernel decode_avx512_bf16;
#endif

}  // namespace sparsekit

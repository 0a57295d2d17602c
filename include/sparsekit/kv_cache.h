// Low-bit key/value caches: the packed format, quantization, append and removal, decode attention. The torch-free C++
// API. docs/kv_cache.md draws the layout.
//
// VALUES. A group of elements shares one fp16 scale and, where the format is asymmetric, one fp16 minimum:
//   integers, b bits, asymmetric: x ~ scale * code + minimum          scale = (max - min) / (2^b - 1)
//   integers, b bits, symmetric:  x ~ scale * (code - 2^(b-1))        scale = max|x| / (2^(b-1) - 1)
//   fp8 e4m3:                     x ~ scale * e4m3(code)              scale = max|x| / 448
// Keys are grouped per channel (`group_size` neighbouring tokens of one channel: KIVI, arXiv 2402.02750, section 3) or
// per token (`group_size` neighbouring channels of one token, the last group shorter where dim is no multiple); values
// always per token.  |x - x'| <= scale / 2 + (2^b - 1) (scale 2^-11 + 2^-25) + |minimum| 2^-11 + 2^-25 for integers:
// half a step, and what rounding scale and minimum to fp16 costs. A constant group is exact up to fp16. Finite values
// beyond +-65504 saturate there. A group that holds NaN or an infinity gets a NaN scale: it comes back as NaN as a
// whole, so that the damage shows, and reaches no other group.
//
// CODES. 32 tokens of one head make a *block* of 4 * dim * b bytes: one plane of b bits, or for 3 bits a plane of the
// low 2 bits and behind it a plane of the high bit. A plane is a matrix of 32-bit little-endian words; the word in row
// r and column c holds the 32 / b elements whose inner index is r * 32 / b + 4 j + i, in bits [8 i + b j, 8 i + b j +
// b):
//   layout `key`:   inner = channel, column = token:    [dim * b / 32][32] words
//   layout `value`: inner = token,   column = channel:  [b][dim] words
// So (word >> b j) & mask gives four bytes that are four neighbours of the inner, summed index: one lane of `vpdpbusd`
// with 16 tokens (channels) in the lanes and no sum across them; a 16-byte load of a GPU thread holds 4 tokens x 32 / b
// channels of a key (4 channels x 32 / b tokens of a value), which is the B operand of `mma.m16n8k16` up to the order
// of the inner index, and one `lop3` per pair of codes turns it into fp16. A warp reads 512 contiguous bytes.
//
// SCALES (and minima, the same shape) of a page:  per channel [page_size / group_size][dim];
//                                                 per token   [page_size / 32][ceil(dim / group_size)][32].
#pragma once

#include "sparsekit/parallel.h"
#include "sparsekit/status.h"
#include "sparsekit/types.h"

namespace sparsekit {

struct CudaContext;  // sparsekit/attention.h

constexpr int32_t kv_block = 32;  // tokens of one block of codes
constexpr int32_t kv_fp8 = -8;    // as a number of bits: 8 bits, fp8 e4m3

/// How one of the two tensors of a cache is packed.
struct KvPacking {
  int32_t bits = 4;         // 8, 4, 3, 2 or kv_fp8
  int32_t group_size = 64;  // 32, 64, 128
  int32_t dim = 0;          // a multiple of 16; of 32 for 3 bits
  bool per_channel = false;
  bool symmetric = false;  // fp8 always is
  bool value_layout = false;

  int32_t width() const { return bits == kv_fp8 ? 8 : bits; }
  bool has_minima() const { return bits != kv_fp8 && !symmetric; }
  int64_t block_bytes() const { return int64_t(4) * dim * width(); }
  int32_t groups_per_token() const { return (dim + group_size - 1) / group_size; }
  /// Tokens that are quantized together.
  int32_t unit() const { return per_channel ? group_size : kv_block; }
  /// Scales of `tokens` tokens, a multiple of unit().
  int64_t scales(int64_t tokens) const { return per_channel ? tokens / group_size * dim : tokens * groups_per_token(); }
};

/// Quantizes `x` [batch, heads, tokens, dim], and back. Tokens are padded to whole blocks and groups; what is padded
/// takes no part in scales, has code 0 and is not read back.
struct KvQuantize {
  KvPacking packing;
  DType dtype = DType::f32;  // of x
  int64_t batch = 0, heads = 0, tokens = 0;
  InputView x;
  uint8_t* codes = nullptr;    // [batch, heads, ceil(tokens / 32), block_bytes]
  uint16_t* scales = nullptr;  // fp16; per channel [batch, heads, ceil(tokens / group_size), dim], else
                               // [batch, heads, ceil(tokens / 32), groups_per_token, 32]
  uint16_t* minima = nullptr;  // the same, or null where the packing has none
};
struct KvDequantize {
  KvPacking packing;
  DType dtype = DType::f32;  // of x
  int64_t batch = 0, heads = 0, tokens = 0;
  const uint8_t* codes = nullptr;
  const uint16_t* scales = nullptr;
  const uint16_t* minima = nullptr;
  OutputView x;
};

/// A cache of one layer. The tokens of sequence b and key head h are, in this order: `sinks` first tokens in full
/// precision, whole units of quantized tokens in pages, the newest tokens in full precision in a ring. At least
/// `window` of the newest tokens are in full precision; when the ring holds window + unit() tokens, its oldest unit()
/// are quantized.
struct KvCache {
  KvPacking key, value;
  DType dtype = DType::bf16;  // of the full-precision part
  int64_t batch = 0, heads = 0;
  int64_t pages = 0;           // pages of the pool
  int64_t pages_per_head = 0;  // of each sequence (and head): length of its row of the block table
  int32_t page_size = 128;     // a multiple of 32 and, per-channel keys, of group_size
  int32_t sinks = 0, window = 0;

  uint8_t* key_codes = nullptr;  // [pages, page_heads, page_size / 32, block_bytes]
  uint8_t* value_codes = nullptr;
  uint16_t* key_scales = nullptr;  // [pages, page_heads, scales(page_size)]; minima alike, or null
  uint16_t* key_minima = nullptr;
  uint16_t* value_scales = nullptr;
  uint16_t* value_minima = nullptr;
  void* key_window =
      nullptr;  // [batch, heads, sinks + window + unit, key.dim]: sinks, then the ring: of the tokens that
  void* value_window = nullptr;  // are no sinks, number i stands in slot i % (window + unit)
  int32_t* lengths = nullptr;    // [batch, heads, 3]: sinks, quantized, in the ring
  /// Page numbers [batch, table_heads, pages_per_head]; null: page i of sequence b is b * pages_per_head + i. With
  /// table_heads == 1 a page holds all heads (page_heads == heads); with table_heads == heads it holds one.
  const int32_t* block_table = nullptr;
  int64_t table_heads = 1;

  int32_t unit() const { return key.unit() > value.unit() ? key.unit() : value.unit(); }
  int32_t ring() const { return window + unit(); }
  int64_t page_heads() const { return block_table && table_heads > 1 ? 1 : heads; }
  int64_t capacity() const { return pages_per_head * page_size; }  // quantized tokens of one sequence and head
};

/// Appends `key` and `value` [batch, heads, tokens, dim] of the cache's dtype: of sequence b the first counts[b] tokens
/// (all where counts is null, none where it is negative). An append that does not fit changes nothing and is an error.
struct KvAppend {
  KvCache cache;
  int64_t tokens = 0;
  InputView key, value;
  const int32_t* counts = nullptr;  // [batch]
};

/// Keeps the first min(length, limits[b]) tokens of every head of sequence b.
struct KvCrop {
  KvCache cache;
  const int32_t* limits = nullptr;  // [batch]
};

/// Keeps the tokens `keep` [batch, keep_heads, count], indices from 0 in ascending order, -1 at the end: nothing.
/// Tokens that are quantized per token, and per-channel groups whose tokens all come from one group, keep their codes
/// exactly; other groups are quantized again.
struct KvCompact {
  KvCache cache;
  const int32_t* keep = nullptr;
  int64_t keep_heads = 1;  // 1 or heads
  int64_t count = 0;
};

/// A cache in full precision that this library did not make, paged or not.
struct PlainCache {
  DType dtype = DType::bf16;
  int64_t pages = 0, pages_per_head = 0;
  int32_t page_size = 0;
  const void* key = nullptr;    // element (page, head, token, d) at page * page_stride + head * head_stride + token *
  const void* value = nullptr;  // token_stride + d: NHD, HND and contiguous [batch, heads, tokens, dim] alike
  int64_t key_page = 0, key_head = 0, key_token = 0;
  int64_t value_page = 0, value_head = 0, value_token = 0;
  const int32_t* lengths = nullptr;      // [batch]
  const int32_t* block_table = nullptr;  // [batch, pages_per_head]; null: page b of sequence b, pages_per_head == 1
};

/// Attention of the newest `len_q` tokens (their keys are in the cache already) over a cache:
///   score[i, j] = softcap(scale * q_i . k_j) + key_bias[i, j],  j <= length - len_q + i
/// and out, lse as in attention.h. Work is split over the sequence by lengths alone: bitwise the same on any number of
/// threads.
struct DecodeAttention {
  const KvCache* cache = nullptr;  // one of the two
  const PlainCache* plain = nullptr;
  DType dtype = DType::bf16;  // of query and out
  int64_t batch = 0, heads_q = 0, heads_kv = 0, len_q = 0;
  int32_t head_dim = 0, value_dim = 0;
  InputView query;  // [batch, heads_q, len_q, head_dim]
  float scale = 1.f, softcap = 0.f;
  const float* sinks = nullptr;     // [heads_q]: one extra logit, as in attention.h
  const float* key_bias = nullptr;  // [batch|1, heads_q|1, len_q|1, bias_length], strides below (0: broadcast);
  int64_t bias_batch = 0, bias_head = 0, bias_row = 0;  // tokens past bias_length have none
  int64_t bias_length = 0;
  OutputView out;           // [batch, heads_q, len_q, value_dim]
  float* lse = nullptr;     // [batch, heads_q, len_q]
  float* scores = nullptr;  // null, or [batch, heads_q, len_q, scores_length]: -inf where a row sees no key
  int64_t scores_length = 0;
};

Status kv_quantize(const KvQuantize& arguments, const ParallelFor& parallel);
Status kv_dequantize(const KvDequantize& arguments, const ParallelFor& parallel);
Status kv_append(const KvAppend& arguments, const ParallelFor& parallel);
Status kv_crop(const KvCrop& arguments, const ParallelFor& parallel);
Status kv_compact(const KvCompact& arguments, const ParallelFor& parallel);
Status decode_attention(const DecodeAttention& arguments, const ParallelFor& parallel);

/// Checks shapes and sizes; then, reading CPU memory, lengths and block table, and names the first bad entry.
Status kv_check(const KvPacking& packing);
Status kv_check(const KvCache& cache);
Status kv_check_contents(const KvCache& cache);

/// What each implementation says to a decode problem, best first; reason null: it would run.
struct DecodePlan {
  static constexpr int capacity = 8;
  struct Entry {
    const char* name;
    const char* reason;
  } entries[capacity];
  int count = 0;
};
DecodePlan decode_plan(const DecodeAttention& problem);

/// The same on CUDA, on the context's stream, without a host sync. What tensors hold is not checked: lengths are
/// clamped, tokens on pages out of range take no part; a head whose append does not fit, or has a page out of range,
/// stays as it was; entries of `keep` that are out of range or not ascending are skipped. `workspace` of the context
/// holds what *_workspace says. float64 is refused.
Status kv_quantize(const KvQuantize& arguments, const CudaContext& context);
Status kv_dequantize(const KvDequantize& arguments, const CudaContext& context);
Status kv_append(const KvAppend& arguments, const CudaContext& context);
Status kv_crop(const KvCrop& arguments, const CudaContext& context);
Status kv_compact(const KvCompact& arguments, const CudaContext& context);
Status decode_attention(const DecodeAttention& arguments, const CudaContext& context);
size_t kv_compact_workspace(const KvCompact& arguments);
size_t decode_attention_workspace(const DecodeAttention& arguments, const CudaContext& context);
DecodePlan decode_plan(const DecodeAttention& problem, const CudaContext& context);

}  // namespace sparsekit

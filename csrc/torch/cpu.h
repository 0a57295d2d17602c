// How a filled struct runs on the CPU: on torch's thread pool.
#pragma once

#include "sparsekit/attention.h"
#include "sparsekit/kv_cache.h"
#include "sparsekit/selection.h"
#include "torch/tensors.h"

namespace sparsekit {

struct Cpu {
  static void run(const AttentionForward& p, const Tensor&) { require(attention_forward(p, torch_parallel())); }
  static void run(const AttentionBackward& p, const Tensor&) { require(attention_backward(p, torch_parallel())); }
  static void run(const AttentionMerge& m, const Tensor&) { require(attention_merge(m, torch_parallel())); }
  static void run(const TransposeBlockLists& t, const Tensor&) { require(transpose_block_lists(t, torch_parallel())); }
  static void run(const BlockListsFromBool& b, const Tensor&) { require(block_lists_from_bool(b, torch_parallel())); }
  static void run(const KvQuantize& q, const Tensor&) { require(kv_quantize(q, torch_parallel())); }
  static void run(const KvDequantize& q, const Tensor&) { require(kv_dequantize(q, torch_parallel())); }
  static void run(const KvAppend& a, const Tensor&) { require(kv_append(a, torch_parallel())); }
  static void run(const KvCrop& a, const Tensor&) { require(kv_crop(a, torch_parallel())); }
  static void run(const KvCompact& a, const Tensor&) { require(kv_compact(a, torch_parallel())); }
  static void run(const DecodeAttention& d, const Tensor&) { require(decode_attention(d, torch_parallel())); }
};

}  // namespace sparsekit

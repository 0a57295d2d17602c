// The ops of stripe-sparse attention, for any backend (see attention.h for what `Backend` is).
#pragma once

#include "torch/attention.h"

namespace sparsekit {

/// Columns and optional block lists, in the order of the schema (csrc/torch/library.cpp).
#define SPARSEKIT_STRIPE_PARAMETERS \
  Tensor col_indices, Tensor col_counts, int64_t group_size, int64_t sink, int64_t local
#define SPARSEKIT_OPTIONAL_LIST_PARAMETERS                                                            \
  OptionalTensor kv_num_blocks, OptionalTensor kv_indices, OptionalTensor full_kv_num_blocks,         \
      OptionalTensor full_kv_indices, OptionalTensor partial_bits, OptionalTensor partial_bits_index, \
      std::vector<int64_t> block_size

class StripeTensors : public AttentionTensors {
 public:
  void set_stripes(SPARSEKIT_STRIPE_PARAMETERS) {
    require_dims(col_counts, 3, "col_counts");
    require_dims(col_indices, 4, "col_indices");
    for (int64_t d = 0; d < 3; ++d) require_size(col_indices, d, col_counts.size(d), "col_indices");
    if (col_indices.size(3) > INT32_MAX) fail("col_indices has too many entries a group");
    if (group_size <= 0 || group_size > INT32_MAX) {
      fail("group_size is %lld; supported: a positive number of query rows", (long long)group_size);
    }
    StripeLists& stripes = problem.stripes;
    stripes.counts = keep_ints(col_counts, "col_counts");
    stripes.indices = keep_ints(col_indices, "col_indices");
    stripes.capacity = int32_t(col_indices.size(3));
    stripes.group_size = int32_t(group_size);
    stripes.list_batch = col_counts.size(0);
    stripes.list_heads = col_counts.size(1);
    stripes.groups = col_counts.size(2);
    stripes.sink = sink;
    stripes.local = local;
  }

  void set_optional_lists(SPARSEKIT_OPTIONAL_LIST_PARAMETERS) {
    if (kv_num_blocks.has_value() != kv_indices.has_value()) {
      fail("kv_num_blocks and kv_indices: one is missing; supported: both or none");
    }
    if (kv_num_blocks) {
      return set_lists(*kv_num_blocks, *kv_indices, full_kv_num_blocks, full_kv_indices, partial_bits,
                       partial_bits_index, block_size);
    }
    if (full_kv_num_blocks || full_kv_indices || partial_bits || partial_bits_index) {
      fail("kv_num_blocks, kv_indices: missing beside other lists; supported: an empty list, or no lists at all");
    }
    if (block_size.size() != 2 || block_size[0] <= 0 || block_size[1] <= 0) {
      fail("block_size: two positive numbers are supported, (query, key)");
    }
    BlockLists& lists = problem.lists;
    lists.block_q = int32_t(block_size[0]);
    lists.block_k = int32_t(block_size[1]);
    lists.q_blocks = (problem.len_q + lists.block_q - 1) / lists.block_q;
  }
};

template <class Backend>
struct StripeOps : AttentionOps<Backend> {
  using typename AttentionOps<Backend>::Outputs;
  using typename AttentionOps<Backend>::Gradients;

  static Outputs forward(Tensor query, Tensor key, Tensor value, SPARSEKIT_STRIPE_PARAMETERS,
                         SPARSEKIT_OPTIONAL_LIST_PARAMETERS, SPARSEKIT_OPTION_PARAMETERS) {
    StripeTensors tensors;
    tensors.set_qkv(query, key, value, scale);
    require_padded(query);
    tensors.set_stripes(col_indices, col_counts, group_size, sink, local);
    tensors.set_optional_lists(kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices, partial_bits,
                               partial_bits_index, block_size);
    tensors.set_options(causal, window, softcap, key_bias, sinks, query_positions, key_positions);
    return AttentionOps<Backend>::run_forward(tensors);
  }

  /// The CPU walks forward's own lists; `transpose_*` is for backends that walk the blocks from the keys.
  static Gradients backward(Tensor grad_out, OptionalTensor grad_lse, Tensor query, Tensor key, Tensor value,
                            Tensor out, Tensor lse, SPARSEKIT_STRIPE_PARAMETERS, SPARSEKIT_OPTIONAL_LIST_PARAMETERS,
                            SPARSEKIT_OPTION_PARAMETERS, bool key_bias_grad, bool deterministic) {
    StripeTensors tensors;
    tensors.set_qkv(query, key, value, scale);
    require_padded(query);
    tensors.set_stripes(col_indices, col_counts, group_size, sink, local);
    tensors.set_optional_lists(kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices, partial_bits,
                               partial_bits_index, block_size);
    tensors.set_options(causal, window, softcap, key_bias, sinks, query_positions, key_positions);
    return AttentionOps<Backend>::run_backward(tensors, {}, grad_out, grad_lse, key, value, out, lse, key_bias_grad,
                                               deterministic);
  }

 private:
  static void require_padded(const Tensor& query) {
    if (query.dim() != 4) fail("query has %lld dimensions; supported: 4, [B, Hq, Sq, D]", (long long)query.dim());
  }
};

#define SPARSEKIT_REGISTER_STRIPES(m, Backend)                          \
  m.impl("stripe_sparse_attn", TORCH_BOX(StripeOps<Backend>::forward)); \
  m.impl("stripe_sparse_attn_backward", TORCH_BOX(StripeOps<Backend>::backward))

}  // namespace sparsekit

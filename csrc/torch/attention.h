// The attention ops, for any backend: check the tensors, fill the structs of include/sparsekit/attention.h, call.
//
// `Backend` (in attention.cpp and attention_cuda.cpp) says how a filled struct runs:
//   static void run(const AttentionForward&, const Tensor& query);
// and the same for AttentionBackward, AttentionMerge and TransposeBlockLists. It raises a call's error.
#pragma once

#include "sparsekit/attention.h"
#include "torch/selection.h"
#include "torch/tensors.h"

namespace sparsekit {

/// The options of forward and backward, in the order of the schema (csrc/torch/library.cpp).
#define SPARSEKIT_OPTION_PARAMETERS                                                                               \
  std::optional<double> scale, bool causal, std::vector<int64_t> window, double softcap, OptionalTensor key_bias, \
      OptionalTensor sinks, OptionalTensor query_positions, OptionalTensor key_positions,                         \
      OptionalTensor transpose_offsets, OptionalTensor transpose_slots

/// Checked tensors of an attention call, kept alive while the problem points into them.
class AttentionTensors : public BlockListTensors {
 public:
  bool has_sinks = false;  // problem.sinks cannot tell: the address of an empty tensor is null

  void set_qkv(const Tensor& query, const Tensor& key, const Tensor& value, std::optional<double> scale);
  void set_options(bool causal, const std::vector<int64_t>& window, double softcap, const OptionalTensor& key_bias,
                   const OptionalTensor& sinks, const OptionalTensor& query_positions,
                   const OptionalTensor& key_positions);
  /// The caller's transposed lists, checked; built where it gave none.
  template <class Backend>
  BlockTranspose transpose(const OptionalTensor& offsets, const OptionalTensor& slots) {
    if (offsets.has_value() != slots.has_value()) {
      fail("transpose_offsets and transpose_slots: one is missing; supported: both or none");
    }
    if (offsets) return given_transpose(*offsets, *slots);
    auto [built_offsets, built_slots] = build_transpose<Backend>(problem, anchor);
    return {keep<int32_t>(built_offsets), keep<int32_t>(built_slots)};
  }

 private:
  BlockTranspose given_transpose(const Tensor& offsets, const Tensor& slots);
  int64_t set_positions(const Tensor& positions, int64_t length, const char* name, const int32_t** data);
};

/// What the ops of one backend do; registered in attention.cpp and attention_cuda.cpp.
template <class Backend>
struct AttentionOps {
  using Outputs = std::tuple<Tensor, Tensor>;
  using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

  static Outputs forward(Tensor query, Tensor key, Tensor value, SPARSEKIT_LIST_PARAMETERS,
                         SPARSEKIT_OPTION_PARAMETERS) {
    AttentionTensors tensors;
    tensors.set_qkv(query, key, value, scale);
    tensors.set_lists(kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices, partial_bits, partial_bits_index,
                      block_size);
    tensors.set_options(causal, window, softcap, key_bias, sinks, query_positions, key_positions);
    return run_forward(tensors);
  }

  static Outputs forward_varlen(Tensor query, Tensor key, Tensor value, SPARSEKIT_LIST_PARAMETERS,
                                SPARSEKIT_PACKED_PARAMETERS, SPARSEKIT_OPTION_PARAMETERS) {
    AttentionTensors tensors;
    tensors.set_qkv(query, key, value, scale);
    tensors.set_packed(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k);
    tensors.set_lists(kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices, partial_bits, partial_bits_index,
                      block_size);
    tensors.set_options(causal, window, softcap, key_bias, sinks, query_positions, key_positions);
    return run_forward(tensors);
  }

  static Gradients backward(Tensor grad_out, OptionalTensor grad_lse, Tensor query, Tensor key, Tensor value,
                            Tensor out, Tensor lse, SPARSEKIT_LIST_PARAMETERS, SPARSEKIT_OPTION_PARAMETERS,
                            bool key_bias_grad, bool deterministic) {
    AttentionTensors tensors;
    tensors.set_qkv(query, key, value, scale);
    tensors.set_lists(kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices, partial_bits, partial_bits_index,
                      block_size);
    tensors.set_options(causal, window, softcap, key_bias, sinks, query_positions, key_positions);
    BlockTranspose transpose = tensors.transpose<Backend>(transpose_offsets, transpose_slots);
    return run_backward(tensors, transpose, grad_out, grad_lse, key, value, out, lse, key_bias_grad, deterministic);
  }

  static Gradients backward_varlen(Tensor grad_out, OptionalTensor grad_lse, Tensor query, Tensor key, Tensor value,
                                   Tensor out, Tensor lse, SPARSEKIT_LIST_PARAMETERS, SPARSEKIT_PACKED_PARAMETERS,
                                   SPARSEKIT_OPTION_PARAMETERS, bool key_bias_grad, bool deterministic) {
    AttentionTensors tensors;
    tensors.set_qkv(query, key, value, scale);
    tensors.set_packed(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k);
    tensors.set_lists(kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices, partial_bits, partial_bits_index,
                      block_size);
    tensors.set_options(causal, window, softcap, key_bias, sinks, query_positions, key_positions);
    BlockTranspose transpose = tensors.transpose<Backend>(transpose_offsets, transpose_slots);
    return run_backward(tensors, transpose, grad_out, grad_lse, key, value, out, lse, key_bias_grad, deterministic);
  }

  static Outputs merge(std::vector<Tensor> outs, std::vector<Tensor> lses) {
    if (outs.empty() || outs.size() != lses.size()) {
      fail("outs and lses have %zu and %zu tensors; supported: the same number, at least one", outs.size(),
           lses.size());
    }
    AttentionMerge merge;
    std::vector<InputView> views;
    std::vector<const float*> lse_data;
    std::vector<Tensor> kept;
    const Tensor& first = outs[0];
    require_dims(first, 4, "outs[0]");
    for (size_t s = 0; s < outs.size(); ++s) {
      require_dims(outs[s], 4, "outs");
      require_dims(lses[s], 3, "lses");
      if (outs[s].scalar_type() != first.scalar_type()) fail("outs: tensors differ in dtype; supported: one dtype");
      for (int64_t d = 0; d < 4; ++d) require_size(outs[s], d, first.size(d), "outs");
      for (int64_t d = 0; d < 3; ++d) require_size(lses[s], d, first.size(d), "lses");
      require_same_device(outs[s], first, "outs");
      require_same_device(lses[s], first, "lses");
      kept.push_back(aligned(outs[s]));
      views.push_back(heads_view<InputView>(kept.back()));
      kept.push_back(contiguous_of(lses[s], ScalarType::Float, "lses"));
      lse_data.push_back(static_cast<const float*>(kept.back().data_ptr()));
    }
    Tensor out = empty_in_order_of(first, sizes_of(first));
    Tensor lse = empty_on(first, {first.size(0), first.size(1), first.size(2)}, ScalarType::Float);
    merge.dtype = to_dtype(first.scalar_type(), "outs");
    merge.count = int64_t(outs.size());
    merge.batch = first.size(0);
    merge.heads = first.size(1);
    merge.rows = first.size(2);
    merge.value_dim = int32_t(first.size(3));
    merge.outs = views.data();
    merge.lses = lse_data.data();
    merge.out = heads_view<OutputView>(out);
    merge.lse = static_cast<float*>(lse.data_ptr());
    if (merge.batch * merge.heads * merge.rows > 0) Backend::run(merge, first);
    return {out, lse};
  }

 protected:
  static std::vector<int64_t> sizes_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

  /// lse of a query: float32 [batch, heads, rows] ([heads, rows] when packed); float64 for float64 tensors.
  static std::vector<int64_t> lse_sizes(const Tensor& query) {
    if (query.dim() == 3) return {query.size(1), query.size(0)};
    return {query.size(0), query.size(1), query.size(2)};
  }

  static Outputs run_forward(AttentionTensors& tensors) {
    const Tensor& query = tensors.anchor;
    AttentionForward p;
    static_cast<AttentionProblem&>(p) = tensors.problem;
    std::vector<int64_t> sizes = sizes_of(query);
    sizes.back() = p.value_dim;
    bool f64 = p.dtype == DType::f64;
    Tensor out = empty_in_order_of(query, sizes);
    Tensor lse = empty_on(query, lse_sizes(query), f64 ? ScalarType::Double : ScalarType::Float);
    p.out = heads_view<OutputView>(out);
    p.lse = f64 ? nullptr : static_cast<float*>(lse.data_ptr());
    p.lse_f64 = f64 ? static_cast<double*>(lse.data_ptr()) : nullptr;
    Backend::run(p, query);
    return {out, lse};
  }

  static Gradients run_backward(AttentionTensors& tensors, BlockTranspose transpose, const Tensor& grad_out,
                                const OptionalTensor& grad_lse, const Tensor& key, const Tensor& value,
                                const Tensor& out, const Tensor& lse, bool key_bias_grad, bool deterministic) {
    const Tensor& query = tensors.anchor;
    AttentionBackward p;
    static_cast<AttentionProblem&>(p) = tensors.problem;
    p.transpose = transpose;
    p.deterministic = deterministic;
    Tensor out_used = aligned(out), grad_used = aligned(grad_out);
    p.out = heads_view<InputView>(out_used);
    p.grad_out = heads_view<InputView>(grad_used);
    for (const Tensor* tensor : {&out, &grad_out}) {
      require_dims(*tensor, query.dim(), "out, grad_out");
      for (int64_t d = 0; d + 1 < query.dim(); ++d) require_size(*tensor, d, query.size(d), "out, grad_out");
      require_size(*tensor, query.dim() - 1, p.value_dim, "out, grad_out");
      if (tensor->scalar_type() != query.scalar_type()) fail("out, grad_out differ from query in dtype");
    }
    bool f64 = p.dtype == DType::f64;
    ScalarType lse_type = f64 ? ScalarType::Double : ScalarType::Float;
    if (lse.numel() != p.batch * p.heads_q * p.len_q || (grad_lse && grad_lse->numel() != lse.numel())) {
      fail("lse, grad_lse have the wrong size; supported: one number for each query row and head");
    }
    Tensor lse_used = contiguous_of(lse, lse_type, "lse");
    Tensor grad_lse_used = grad_lse ? contiguous_of(*grad_lse, lse_type, "grad_lse") : lse_used;
    if (f64) {
      p.grad_lse_f64 = grad_lse ? static_cast<const double*>(grad_lse_used.data_ptr()) : nullptr;
    } else {
      p.lse = static_cast<const float*>(lse_used.data_ptr());
      p.grad_lse = grad_lse ? static_cast<const float*>(grad_lse_used.data_ptr()) : nullptr;
    }
    Tensor grad_query = empty_in_order_of(query, sizes_of(query));
    Tensor grad_key = empty_in_order_of(key, sizes_of(key));
    Tensor grad_value = empty_in_order_of(value, sizes_of(value));
    std::vector<int64_t> none = {0};
    Tensor grad_key_bias =
        empty_on(query, key_bias_grad ? std::vector<int64_t>{p.batch, p.heads_q, p.len_k} : none, ScalarType::Float);
    Tensor grad_sinks =
        empty_on(query, tensors.has_sinks ? std::vector<int64_t>{p.batch, p.heads_q} : none, ScalarType::Float);
    p.grad_query = heads_view<OutputView>(grad_query);
    p.grad_key = heads_view<OutputView>(grad_key);
    p.grad_value = heads_view<OutputView>(grad_value);
    p.grad_key_bias = key_bias_grad ? static_cast<float*>(grad_key_bias.data_ptr()) : nullptr;
    p.grad_sinks = p.sinks ? static_cast<float*>(grad_sinks.data_ptr()) : nullptr;
    Backend::run(p, query);
    return {grad_query, grad_key, grad_value, grad_key_bias, grad_sinks};
  }
};

/// Registers the ops of a backend under its dispatch key.
#define SPARSEKIT_REGISTER_ATTENTION(m, Backend)                                                  \
  m.impl("block_sparse_attn", TORCH_BOX(AttentionOps<Backend>::forward));                         \
  m.impl("block_sparse_attn_backward", TORCH_BOX(AttentionOps<Backend>::backward));               \
  m.impl("block_sparse_attn_varlen", TORCH_BOX(AttentionOps<Backend>::forward_varlen));           \
  m.impl("block_sparse_attn_varlen_backward", TORCH_BOX(AttentionOps<Backend>::backward_varlen)); \
  m.impl("merge_attention_states", TORCH_BOX(AttentionOps<Backend>::merge))

}  // namespace sparsekit

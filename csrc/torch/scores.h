// The ops that score blocks, columns and rows, for any backend (see attention.h for what `Backend` is).
#pragma once

#include "sparsekit/selection.h"
#include "torch/attention.h"

namespace sparsekit {

template <class Backend>
struct ScoreOps {
  static std::tuple<Tensor, Tensor, Tensor> block_scores(Tensor query, Tensor key, std::vector<int64_t> block_size,
                                                         int64_t reduce, bool causal, std::optional<double> scale,
                                                         int64_t stride, OptionalTensor cu_seqlens_q,
                                                         OptionalTensor cu_seqlens_k, int64_t max_seqlen_k,
                                                         bool self_similarity) {
    AttentionTensors tensors;
    BlockScores s = block_problem(tensors, query, key, block_size, reduce, causal, scale, stride, cu_seqlens_q,
                                  cu_seqlens_k, max_seqlen_k);
    ScalarType type = result_type(s);
    Tensor scores = empty_on(query, {s.batch, s.heads_q, s.q_blocks, s.key_blocks}, type);
    std::vector<int64_t> none = {0}, of_query = {s.batch, s.heads_q, s.q_blocks};
    Tensor q_similarity = empty_on(query, self_similarity ? of_query : none, type);
    Tensor k_similarity =
        empty_on(query, self_similarity ? std::vector<int64_t>{s.batch, s.heads_kv, s.k_blocks()} : none, type);
    s.scores = scores.data_ptr();
    s.q_similarity = self_similarity ? q_similarity.data_ptr() : nullptr;
    s.k_similarity = self_similarity ? k_similarity.data_ptr() : nullptr;
    if (s.batch * s.heads_q > 0) Backend::run(s, query);
    return {scores, q_similarity, k_similarity};
  }

  static std::tuple<Tensor, Tensor> block_scores_backward(Tensor grad_scores, Tensor query, Tensor key,
                                                          std::vector<int64_t> block_size, int64_t reduce, bool causal,
                                                          std::optional<double> scale, int64_t stride,
                                                          OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
                                                          int64_t max_seqlen_k) {
    AttentionTensors tensors;
    BlockScoresBackward s;
    static_cast<BlockScores&>(s) = block_problem(tensors, query, key, block_size, reduce, causal, scale, stride,
                                                 cu_seqlens_q, cu_seqlens_k, max_seqlen_k);
    require_same_device(grad_scores, query, "grad_scores");
    require_dims(grad_scores, 4, "grad_scores");
    int64_t dim = 0;
    for (int64_t size : {s.batch, s.heads_q, s.q_blocks, s.key_blocks}) {
      require_size(grad_scores, dim++, size, "grad_scores");
    }
    Tensor grad = contiguous_of(grad_scores, result_type(s), "grad_scores");
    Tensor grad_query = empty_in_order_of(query, {query.sizes().begin(), query.sizes().end()});
    Tensor grad_key = empty_in_order_of(key, {key.sizes().begin(), key.sizes().end()});
    s.grad_scores = grad.data_ptr();
    s.grad_query = heads_view<OutputView>(grad_query);
    s.grad_key = heads_view<OutputView>(grad_key);
    if (s.batch * s.heads_q > 0) Backend::run(s, query);
    return {grad_query, grad_key};
  }

  static std::tuple<Tensor, Tensor> column_scores(Tensor probe_query, Tensor key, Tensor probe_positions, bool causal,
                                                  std::optional<double> scale, OptionalTensor cu_seqlens_q,
                                                  OptionalTensor cu_seqlens_k) {
    AttentionTensors tensors;
    ColumnScores s;
    set_problem(tensors, probe_query, key, scale, causal, {-1, -1}, 0, std::nullopt, probe_positions, std::nullopt,
                cu_seqlens_q, cu_seqlens_k, key.size(probe_query.dim() == 3 ? 0 : 2));
    static_cast<AttentionProblem&>(s) = tensors.problem;
    Tensor columns = empty_on(probe_query, per_key(s, probe_query), result_type(s));
    Tensor diagonals = empty_on(probe_query, per_key(s, probe_query), result_type(s));
    s.columns = columns.data_ptr();
    s.diagonals = diagonals.data_ptr();
    if (columns.numel() > 0) Backend::run(s, probe_query);
    return {columns, diagonals};
  }

  static Tensor row_scores(Tensor query, Tensor key, Tensor lse, OptionalTensor rows, int64_t reduce, bool causal,
                           std::optional<double> scale, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k) {
    AttentionTensors tensors;
    RowScores s;
    set_problem(tensors, query, key, scale, causal, {-1, -1}, 0, std::nullopt, std::nullopt, std::nullopt, cu_seqlens_q,
                cu_seqlens_k, key.size(query.dim() == 3 ? 0 : 2));
    static_cast<AttentionProblem&>(s) = tensors.problem;
    s.lse = lse_of(tensors, lse);
    s.maximum = is_max(reduce);
    if (rows) {
      require_dims(*rows, 2, "rows");
      if (rows->size(0) != 1) require_size(*rows, 0, s.batch, "rows");
      require_same_device(*rows, query, "rows");
      s.rows = tensors.template keep<int32_t>(contiguous_of(*rows, ScalarType::Int, "rows"));
      s.rows_count = rows->size(1);
      s.rows_batch = rows->size(0) == 1 ? 0 : rows->size(1);
      static const int32_t none = -1;
      if (!s.rows) s.rows = &none;  // an empty tensor has no address
    }
    Tensor scores = empty_on(query, per_key(s, query), result_type(s));
    s.scores = scores.data_ptr();
    if (scores.numel() > 0) Backend::run(s, query);
    return scores;
  }

  static Tensor attention_block_map(Tensor query, Tensor key, Tensor lse, OptionalTensor kv_num_blocks,
                                    OptionalTensor kv_indices, OptionalTensor full_kv_num_blocks,
                                    OptionalTensor full_kv_indices, OptionalTensor partial_bits,
                                    OptionalTensor partial_bits_index, std::vector<int64_t> block_size, int64_t reduce,
                                    std::optional<double> scale, bool causal, std::vector<int64_t> window,
                                    double softcap, OptionalTensor key_bias, OptionalTensor query_positions,
                                    OptionalTensor key_positions, OptionalTensor cu_seqlens_q,
                                    OptionalTensor cu_seqlens_k, int64_t max_seqlen_k) {
    AttentionTensors tensors;
    AttentionBlockMap s;
    int64_t longest = query.dim() == 3 && max_seqlen_k > 0 ? max_seqlen_k : key.size(query.dim() == 3 ? 0 : 2);
    set_problem(tensors, query, key, scale, causal, window, softcap, key_bias, query_positions, key_positions,
                cu_seqlens_q, cu_seqlens_k, longest);
    s.listed = kv_num_blocks.has_value();
    if (kv_num_blocks.has_value() != kv_indices.has_value()) {
      fail("kv_num_blocks and kv_indices: one is missing; supported: both or none");
    }
    if (s.listed) {
      tensors.set_lists(*kv_num_blocks, *kv_indices, full_kv_num_blocks, full_kv_indices, partial_bits,
                        partial_bits_index, block_size);
    } else {
      set_block_size(tensors.problem, block_size);
    }
    static_cast<AttentionProblem&>(s) = tensors.problem;
    s.lse = lse_of(tensors, lse);
    s.maximum = is_max(reduce);
    set_grid(s, &s.q_blocks, &s.key_blocks, longest);
    if (s.listed) s.q_blocks = s.lists.q_blocks;
    int64_t width = s.listed ? s.lists.slots_per_row() : s.key_blocks;
    Tensor map = empty_on(query, {s.batch, s.heads_q, s.q_blocks, width}, result_type(s));
    s.map = map.data_ptr();
    if (map.numel() > 0) Backend::run(s, query);
    return map;
  }

 private:
  static ScalarType result_type(const AttentionProblem& p) {
    return p.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
  }

  static bool is_max(int64_t reduce) {
    if (reduce != 0 && reduce != 1) fail("reduce is %lld; supported: 0 (sum), 1 (max)", (long long)reduce);
    return reduce == 1;
  }

  static std::vector<int64_t> per_key(const AttentionProblem& p, const Tensor& query) {
    if (query.dim() == 3) return {p.heads_q, p.len_k};
    return {p.batch, p.heads_q, p.len_k};
  }

  static void set_block_size(AttentionProblem& p, const std::vector<int64_t>& block_size) {
    if (block_size.size() != 2) fail("block_size has %zu numbers; supported: 2, (query, key)", block_size.size());
    for (int64_t size : block_size) {
      if (size <= 0 || size > INT32_MAX) fail("block_size holds %lld; supported: 1 to 2^31 - 1", (long long)size);
    }
    p.lists.block_q = int32_t(block_size[0]);
    p.lists.block_k = int32_t(block_size[1]);
  }

  static void set_grid(const AttentionProblem& p, int64_t* q_blocks, int64_t* key_blocks, int64_t longest_k) {
    int64_t block_q = p.lists.block_q, block_k = p.lists.block_k;
    *q_blocks = p.packed() ? p.len_q / block_q + p.sequences : (p.len_q + block_q - 1) / block_q;
    *key_blocks = (longest_k + block_k - 1) / block_k;
  }

  static void set_problem(AttentionTensors& tensors, const Tensor& query, const Tensor& key,
                          std::optional<double> scale, bool causal, const std::vector<int64_t>& window, double softcap,
                          const OptionalTensor& key_bias, const OptionalTensor& query_positions,
                          const OptionalTensor& key_positions, const OptionalTensor& cu_seqlens_q,
                          const OptionalTensor& cu_seqlens_k, int64_t longest_k) {
    tensors.set_qkv(query, key, key, scale);
    if (cu_seqlens_q.has_value() != cu_seqlens_k.has_value() || cu_seqlens_q.has_value() != (query.dim() == 3)) {
      fail("query has %lld dimensions; supported: 4, or packed 3 with cu_seqlens_q and cu_seqlens_k",
           (long long)query.dim());
    }
    if (cu_seqlens_q) tensors.set_packed(*cu_seqlens_q, *cu_seqlens_k, tensors.problem.len_q, longest_k);
    tensors.set_options(causal, window, softcap, key_bias, std::nullopt, query_positions, key_positions);
  }

  static BlockScores block_problem(AttentionTensors& tensors, const Tensor& query, const Tensor& key,
                                   const std::vector<int64_t>& block_size, int64_t reduce, bool causal,
                                   std::optional<double> scale, int64_t stride, const OptionalTensor& cu_seqlens_q,
                                   const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_k) {
    int64_t longest = query.dim() == 3 && max_seqlen_k > 0 ? max_seqlen_k : key.size(query.dim() == 3 ? 0 : 2);
    set_problem(tensors, query, key, scale, causal, {-1, -1}, 0, std::nullopt, std::nullopt, std::nullopt, cu_seqlens_q,
                cu_seqlens_k, longest);
    set_block_size(tensors.problem, block_size);
    BlockScores s;
    static_cast<AttentionProblem&>(s) = tensors.problem;
    if (reduce < 0 || reduce > 2) {
      fail("reduce is %lld; supported: 0 (mean), 1 (max), 2 (antidiagonal)", (long long)reduce);
    }
    s.reduce = reduce == 0 ? BlockReduce::mean : reduce == 1 ? BlockReduce::max : BlockReduce::antidiagonal;
    s.stride = int32_t(stride < 0 || stride > INT32_MAX ? 0 : stride);
    set_grid(s, &s.q_blocks, &s.key_blocks, longest);
    return s;
  }

  static const void* lse_of(AttentionTensors& tensors, const Tensor& lse) {
    const AttentionProblem& p = tensors.problem;
    bool packed = p.packed();
    require_dims(lse, packed ? 2 : 3, "lse");
    require_same_device(lse, tensors.anchor, "lse");
    if (!packed) require_size(lse, 0, p.batch, "lse");
    require_size(lse, packed ? 0 : 1, p.heads_q, "lse");
    require_size(lse, packed ? 1 : 2, p.len_q, "lse");
    if (lse.scalar_type() != result_type(p)) {
      fail("lse has the wrong dtype; supported: float32, float64 where query is");
    }
    return tensors.template keep<void*>(torch::stable::contiguous(lse));
  }
};

#define SPARSEKIT_REGISTER_SCORES(m, Backend)                                           \
  m.impl("block_scores", TORCH_BOX(ScoreOps<Backend>::block_scores));                   \
  m.impl("block_scores_backward", TORCH_BOX(ScoreOps<Backend>::block_scores_backward)); \
  m.impl("column_scores", TORCH_BOX(ScoreOps<Backend>::column_scores));                 \
  m.impl("row_scores", TORCH_BOX(ScoreOps<Backend>::row_scores));                       \
  m.impl("attention_block_map", TORCH_BOX(ScoreOps<Backend>::attention_block_map))

}  // namespace sparsekit

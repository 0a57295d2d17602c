// Checks the tensors of an attention call and points the problem at them. In both libraries.
#include <cmath>

#include "torch/attention.h"

namespace sparsekit {

void AttentionTensors::set_qkv(const Tensor& q, const Tensor& key, const Tensor& value, std::optional<double> scale) {
  if (q.dim() != 4 && q.dim() != 3) {
    fail("query has %lld dimensions; supported: 4, [batch, heads, rows, dim], or packed 3, [rows, heads, dim]",
         (long long)q.dim());
  }
  Tensor query = aligned(q);
  anchor = query;
  bool packed = q.dim() == 3;
  int64_t rows = packed ? 0 : 2, heads = 1, dim = q.dim() - 1;
  require_dims(key, q.dim(), "key");
  require_dims(value, q.dim(), "value");
  if (key.scalar_type() != q.scalar_type() || value.scalar_type() != q.scalar_type()) {
    fail("query is %s, key %s, value %s; supported: one dtype for all three", name(to_dtype(q.scalar_type(), "query")),
         name(to_dtype(key.scalar_type(), "key")), name(to_dtype(value.scalar_type(), "value")));
  }
  require_same_device(key, q, "key");
  require_same_device(value, q, "value");
  if (!packed) {
    require_size(key, 0, q.size(0), "key");
    require_size(value, 0, q.size(0), "value");
  }
  require_size(key, dim, q.size(dim), "key");
  require_size(value, rows, key.size(rows), "value");
  require_size(value, heads, key.size(heads), "value");

  problem.dtype = to_dtype(q.scalar_type(), "query");
  problem.batch = packed ? 1 : q.size(0);
  problem.heads_q = q.size(heads);
  problem.heads_kv = key.size(heads);
  problem.len_q = q.size(rows);
  problem.len_k = key.size(rows);
  problem.head_dim = int32_t(q.size(dim));
  problem.value_dim = int32_t(value.size(dim));
  Tensor key_used = aligned(key), value_used = aligned(value);
  keep<void*>(key_used);
  keep<void*>(value_used);
  problem.query = heads_view<InputView>(query);
  problem.key = heads_view<InputView>(key_used);
  problem.value = heads_view<InputView>(value_used);
  problem.scale = scale ? float(*scale) : 1.f / std::sqrt(float(problem.head_dim));
}

int64_t AttentionTensors::set_positions(const Tensor& positions, int64_t length, const char* name,
                                        const int32_t** data) {
  require_dims(positions, 2, name);
  require_size(positions, 1, length, name);
  if (positions.size(0) != 1) require_size(positions, 0, problem.batch, name);
  *data = keep_ints(positions, name);
  return positions.size(0) == 1 ? 0 : length;
}

void AttentionTensors::set_options(bool causal, const std::vector<int64_t>& window, double softcap,
                                   const OptionalTensor& key_bias, const OptionalTensor& sinks,
                                   const OptionalTensor& query_positions, const OptionalTensor& key_positions) {
  if (window.size() != 2) fail("window has %zu numbers; supported: 2, (left, right)", window.size());
  problem.causal = causal;
  problem.window_left = window[0];
  problem.window_right = window[1];
  problem.softcap = float(softcap);
  if (key_bias) {
    require_dims(*key_bias, 3, "key_bias");
    require_same_device(*key_bias, anchor, "key_bias");
    int64_t batch = key_bias->size(0), heads = key_bias->size(1);
    if (batch != 1) require_size(*key_bias, 0, problem.batch, "key_bias");
    if (heads != 1) require_size(*key_bias, 1, problem.heads_q, "key_bias");
    require_size(*key_bias, 2, problem.len_k, "key_bias");
    problem.key_bias = keep<float>(contiguous_of(*key_bias, ScalarType::Float, "key_bias"));
    problem.key_bias_batch = batch == 1 ? 0 : heads * problem.len_k;
    problem.key_bias_head = heads == 1 ? 0 : problem.len_k;
  }
  if (sinks) {
    require_dims(*sinks, 1, "sinks");
    require_size(*sinks, 0, problem.heads_q, "sinks");
    require_same_device(*sinks, anchor, "sinks");
    problem.sinks = keep<float>(contiguous_of(*sinks, ScalarType::Float, "sinks"));
    has_sinks = true;
  }
  if (query_positions) {
    problem.query_positions_batch =
        set_positions(*query_positions, problem.len_q, "query_positions", &problem.query_positions);
  }
  if (key_positions) {
    problem.key_positions_batch = set_positions(*key_positions, problem.len_k, "key_positions", &problem.key_positions);
  }
}

BlockTranspose AttentionTensors::given_transpose(const Tensor& offsets, const Tensor& slots) {
  const BlockLists& lists = problem.lists;
  require_dims(offsets, 3, "transpose_offsets");
  require_dims(slots, 3, "transpose_slots");
  for (const Tensor* tensor : {&offsets, &slots}) {
    require_size(*tensor, 0, lists.list_batch, "transpose_offsets, transpose_slots");
    require_size(*tensor, 1, lists.list_heads, "transpose_offsets, transpose_slots");
  }
  require_size(offsets, 2, problem.k_blocks() + 1, "transpose_offsets");
  require_size(slots, 2, lists.q_blocks * lists.slots_per_row(), "transpose_slots");
  return {keep_ints(offsets, "transpose_offsets"), keep_ints(slots, "transpose_slots")};
}

}  // namespace sparsekit

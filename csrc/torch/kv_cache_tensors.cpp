// Checks the tensors of a cache and of a decode call. In both libraries.
#include "torch/kv_cache.h"

namespace sparsekit {

KvCache cache_of(SPARSEKIT_CACHE_PARAMETERS) {
  if (format.size() != 8) fail("format has %zu numbers; supported: 8", format.size());
  require_dims(key_codes, 4, "key_codes");
  require_dims(key_window, 4, "key_window");
  require_dims(value_window, 4, "value_window");
  require_dims(lengths, 3, "lengths");
  KvCache c;
  c.key.bits = int32_t(format[0]);
  c.value.bits = int32_t(format[1]);
  c.key.group_size = c.value.group_size = int32_t(format[2]);
  c.key.per_channel = format[3] != 0;
  c.key.symmetric = c.value.symmetric = format[4] != 0;
  c.page_size = int32_t(format[5]);
  c.sinks = int32_t(format[6]);
  c.window = int32_t(format[7]);
  c.value.value_layout = true;
  c.batch = key_window.size(0);
  c.heads = key_window.size(1);
  c.key.dim = int32_t(key_window.size(3));
  c.value.dim = int32_t(value_window.size(3));
  c.dtype = to_dtype(key_window.scalar_type(), "key_window");
  c.pages = key_codes.size(0);
  if (block_table) {
    require_dims(*block_table, 3, "block_table");
    require_size(*block_table, 0, c.batch, "block_table");
    require_cache_tensor(*block_table, ScalarType::Int, key_window, "block_table");
    c.table_heads = block_table->size(1);
    c.pages_per_head = block_table->size(2);
    static const int32_t empty = 0;  // the address of an empty tensor is null, and null means: no table
    c.block_table = block_table->numel() ? static_cast<const int32_t*>(block_table->data_ptr()) : &empty;
  } else {
    c.pages_per_head = c.batch > 0 ? c.pages / c.batch : 0;
  }
  require(kv_check(c));
  int64_t heads = c.pages * c.page_heads();
  for (const auto& [p, codes, scales, minima, window, names] :
       {std::tuple{&c.key, &key_codes, &key_scales, &key_minima, &key_window,
                   "key_codes\0key_scales\0key_minima\0key_window"},
        std::tuple{&c.value, &value_codes, &value_scales, &value_minima, &value_window,
                   "value_codes\0value_scales\0value_minima\0value_window"}}) {
    const char* codes_name = names;
    const char* scales_name = codes_name + __builtin_strlen(codes_name) + 1;
    const char* minima_name = scales_name + __builtin_strlen(scales_name) + 1;
    const char* window_name = minima_name + __builtin_strlen(minima_name) + 1;
    require_cache_tensor(*codes, ScalarType::Byte, key_window, codes_name);
    require_cache_tensor(*scales, ScalarType::Half, key_window, scales_name);
    require_cache_tensor(*minima, ScalarType::Half, key_window, minima_name);
    require_cache_tensor(*window, key_window.scalar_type(), key_window, window_name);
    require_numel(*codes, heads * (c.page_size / kv_block) * p->block_bytes(), codes_name);
    require_numel(*scales, heads * p->scales(c.page_size), scales_name);
    require_numel(*minima, p->has_minima() ? heads * p->scales(c.page_size) : 0, minima_name);
    require_numel(*window, c.batch * c.heads * (c.sinks + c.ring()) * p->dim, window_name);
  }
  require_cache_tensor(lengths, ScalarType::Int, key_window, "lengths");
  require_numel(lengths, c.batch * c.heads * 3, "lengths");
  c.key_codes = static_cast<uint8_t*>(key_codes.data_ptr());
  c.key_scales = static_cast<uint16_t*>(key_scales.data_ptr());
  c.key_minima = c.key.has_minima() ? static_cast<uint16_t*>(key_minima.data_ptr()) : nullptr;
  c.value_codes = static_cast<uint8_t*>(value_codes.data_ptr());
  c.value_scales = static_cast<uint16_t*>(value_scales.data_ptr());
  c.value_minima = c.value.has_minima() ? static_cast<uint16_t*>(value_minima.data_ptr()) : nullptr;
  c.key_window = key_window.data_ptr();
  c.value_window = value_window.data_ptr();
  c.lengths = static_cast<int32_t*>(lengths.data_ptr());
  return c;
}

void DecodeTensors::set(const Tensor& q, int64_t batch, int64_t heads_kv, int64_t head_dim, int64_t value_dim,
                        SPARSEKIT_DECODE_PARAMETERS) {
  require_dims(q, 4, "query");
  require_size(q, 0, batch, "query");
  require_size(q, 3, head_dim, "query");
  if (q.size(2) < 1 || q.size(2) > 16) fail("query has %lld rows; supported: 1 to 16", (long long)q.size(2));
  query = aligned(q);
  DecodeAttention& p = problem;
  p.dtype = to_dtype(q.scalar_type(), "query");
  p.batch = batch;
  p.heads_q = q.size(1);
  p.heads_kv = heads_kv;
  p.len_q = q.size(2);
  p.head_dim = int32_t(head_dim);
  p.value_dim = int32_t(value_dim);
  p.query = heads_view<InputView>(query);
  p.scale = scale ? float(*scale) : 1.f / std::sqrt(float(head_dim));
  p.softcap = float(softcap);
  if (sinks) {
    require_dims(*sinks, 1, "sinks");
    require_size(*sinks, 0, p.heads_q, "sinks");
    require_same_device(*sinks, q, "sinks");
    this->sinks = contiguous_of(*sinks, ScalarType::Float, "sinks");
    p.sinks = static_cast<const float*>(this->sinks.data_ptr());
  }
  if (key_bias) {
    require_dims(*key_bias, 4, "key_bias");
    require_same_device(*key_bias, q, "key_bias");
    int64_t sizes[3] = {batch, p.heads_q, p.len_q};
    int64_t* strides[3] = {&p.bias_batch, &p.bias_head, &p.bias_row};
    this->key_bias = contiguous_of(*key_bias, ScalarType::Float, "key_bias");
    for (int64_t d = 0; d < 3; ++d) {
      if (key_bias->size(d) == 1) continue;
      require_size(*key_bias, d, sizes[d], "key_bias");
      *strides[d] = this->key_bias.stride(d);
    }
    p.bias_length = key_bias->size(3);
    p.key_bias = p.bias_length ? static_cast<const float*>(this->key_bias.data_ptr()) : nullptr;
  }
  if (scores_length < 0) fail("scores_length is %lld; supported: from 0", (long long)scores_length);
  out = empty_in_order_of(query, {batch, p.heads_q, p.len_q, value_dim});
  lse = empty_on(query, {batch, p.heads_q, p.len_q}, ScalarType::Float);
  std::vector<int64_t> score_sizes = {batch, p.heads_q, p.len_q, scores_length}, none = {0};
  scores = empty_on(query, scores_length ? score_sizes : none, ScalarType::Float);
  p.out = heads_view<OutputView>(out);
  p.lse = static_cast<float*>(lse.data_ptr());
  p.scores = scores_length ? static_cast<float*>(scores.data_ptr()) : nullptr;
  p.scores_length = scores_length;
}

}  // namespace sparsekit

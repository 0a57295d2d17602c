// The cache ops, for any backend (see attention.h for what `Backend` is).
#pragma once

#include <cmath>
#include <tuple>

#include "sparsekit/kv_cache.h"
#include "torch/tensors.h"

namespace sparsekit {

/// The tensors of a cache, in the order of the schemas.
#define SPARSEKIT_CACHE_PARAMETERS                                                                             \
  Tensor key_codes, Tensor key_scales, Tensor key_minima, Tensor value_codes, Tensor value_scales,             \
      Tensor value_minima, Tensor key_window, Tensor value_window, Tensor lengths, OptionalTensor block_table, \
      std::vector<int64_t> format
#define SPARSEKIT_CACHE_ARGUMENTS                                                                                \
  key_codes, key_scales, key_minima, value_codes, value_scales, value_minima, key_window, value_window, lengths, \
      block_table, format

static inline void require_cache_tensor(const Tensor& tensor, ScalarType type, const Tensor& window, const char* name) {
  require_same_device(tensor, window, name);
  if (tensor.scalar_type() != type) {
    fail("%s has the wrong dtype; supported: %s", name,
         type == ScalarType::Byte   ? "uint8"
         : type == ScalarType::Half ? "float16"
                                    : "int32");
  }
  if (!tensor.is_contiguous()) fail("%s is not contiguous; supported: contiguous tensors", name);
}

static inline void require_numel(const Tensor& tensor, int64_t count, const char* name) {
  if (tensor.numel() != count) {
    fail("%s has %lld elements; the format needs %lld", name, (long long)tensor.numel(), (long long)count);
  }
}

/// A cache's tensors, checked, as the plain struct. The tensors must outlive it.
KvCache cache_of(SPARSEKIT_CACHE_PARAMETERS);

/// Options that both forms of decode attention share.
#define SPARSEKIT_DECODE_PARAMETERS \
  std::optional<double> scale, double softcap, OptionalTensor sinks, OptionalTensor key_bias, int64_t scores_length
#define SPARSEKIT_DECODE_ARGUMENTS scale, softcap, sinks, key_bias, scores_length

/// A decode problem but for its cache, and the tensors that it points into.
struct DecodeTensors {
  DecodeAttention problem;
  Tensor query, out, lse, scores, sinks, key_bias;

  void set(const Tensor& q, int64_t batch, int64_t heads_kv, int64_t head_dim, int64_t value_dim,
           SPARSEKIT_DECODE_PARAMETERS);
};

template <class Backend>
struct KvOps {
  using Triple = std::tuple<Tensor, Tensor, Tensor>;

  static KvPacking packing_of(int64_t bits, int64_t group_size, int64_t dim, bool per_channel, bool symmetric,
                              bool value_layout) {
    KvPacking p;
    p.bits = int32_t(bits);
    p.group_size = int32_t(group_size);
    p.dim = int32_t(dim);
    p.per_channel = per_channel;
    p.symmetric = symmetric;
    p.value_layout = value_layout;
    require(kv_check(p));
    return p;
  }

  static std::vector<int64_t> scale_sizes(const KvPacking& p, int64_t batch, int64_t heads, int64_t tokens) {
    if (p.per_channel) return {batch, heads, (tokens + p.group_size - 1) / p.group_size, p.dim};
    return {batch, heads, (tokens + kv_block - 1) / kv_block, p.groups_per_token(), kv_block};
  }

  static Triple quantize(Tensor x, int64_t bits, int64_t group_size, bool per_channel, bool symmetric,
                         bool value_layout) {
    require_dims(x, 4, "x");
    KvQuantize q;
    q.packing = packing_of(bits, group_size, x.size(3), per_channel, symmetric, value_layout);
    q.dtype = to_dtype(x.scalar_type(), "x");
    q.batch = x.size(0);
    q.heads = x.size(1);
    q.tokens = x.size(2);
    Tensor used = aligned(x);
    q.x = heads_view<InputView>(used);
    int64_t blocks = (q.tokens + kv_block - 1) / kv_block;
    Tensor codes = empty_on(x, {q.batch, q.heads, blocks, q.packing.block_bytes()}, ScalarType::Byte);
    std::vector<int64_t> sizes = scale_sizes(q.packing, q.batch, q.heads, q.tokens), none = {0};
    Tensor scales = empty_on(x, sizes, ScalarType::Half);
    Tensor minima = empty_on(x, q.packing.has_minima() ? sizes : none, ScalarType::Half);
    q.codes = static_cast<uint8_t*>(codes.data_ptr());
    q.scales = static_cast<uint16_t*>(scales.data_ptr());
    q.minima = q.packing.has_minima() ? static_cast<uint16_t*>(minima.data_ptr()) : nullptr;
    if (codes.numel() > 0) Backend::run(q, x);
    return {codes, scales, minima};
  }

  static Tensor dequantize(Tensor codes, Tensor scales, Tensor minima, int64_t length, int64_t dim, ScalarType dtype,
                           int64_t bits, int64_t group_size, bool per_channel, bool symmetric, bool value_layout) {
    require_dims(codes, 4, "codes");
    KvDequantize q;
    q.packing = packing_of(bits, group_size, dim, per_channel, symmetric, value_layout);
    q.dtype = to_dtype(dtype, "dtype");
    q.batch = codes.size(0);
    q.heads = codes.size(1);
    q.tokens = length;
    if (length < 0) fail("length is %lld; supported: from 0", (long long)length);
    require_size(codes, 2, (length + kv_block - 1) / kv_block, "codes");
    require_size(codes, 3, q.packing.block_bytes(), "codes");
    require_cache_tensor(codes, ScalarType::Byte, codes, "codes");
    require_cache_tensor(scales, ScalarType::Half, codes, "scales");
    require_cache_tensor(minima, ScalarType::Half, codes, "minima");
    std::vector<int64_t> sizes = scale_sizes(q.packing, q.batch, q.heads, length);
    int64_t count = 1;
    for (int64_t size : sizes) count *= size;
    require_numel(scales, count, "scales");
    require_numel(minima, q.packing.has_minima() ? count : 0, "minima");
    Tensor x = empty_on(codes, {q.batch, q.heads, length, dim}, dtype);
    q.codes = static_cast<const uint8_t*>(codes.data_ptr());
    q.scales = static_cast<const uint16_t*>(scales.data_ptr());
    q.minima = q.packing.has_minima() ? static_cast<const uint16_t*>(minima.data_ptr()) : nullptr;
    q.x = heads_view<OutputView>(x);
    if (x.numel() > 0) Backend::run(q, codes);
    return x;
  }

  static void append(SPARSEKIT_CACHE_PARAMETERS, Tensor key, Tensor value, OptionalTensor counts) {
    KvAppend a;
    a.cache = cache_of(SPARSEKIT_CACHE_ARGUMENTS);
    require_dims(key, 4, "key");
    require_dims(value, 4, "value");
    a.tokens = key.size(2);
    for (const auto& [tensor, name, dim] :
         {std::tuple{&key, "key", a.cache.key.dim}, std::tuple{&value, "value", a.cache.value.dim}}) {
      require_size(*tensor, 0, a.cache.batch, name);
      require_size(*tensor, 1, a.cache.heads, name);
      require_size(*tensor, 2, a.tokens, name);
      require_size(*tensor, 3, dim, name);
      require_same_device(*tensor, key_window, name);
      if (tensor->scalar_type() != key_window.scalar_type()) fail("%s: another dtype than the cache's window", name);
    }
    Tensor key_used = aligned(key), value_used = aligned(value);
    a.key = heads_view<InputView>(key_used);
    a.value = heads_view<InputView>(value_used);
    Tensor kept;
    if (counts) {
      require_numel(*counts, a.cache.batch, "counts");
      require_same_device(*counts, key_window, "counts");
      kept = contiguous_of(*counts, ScalarType::Int, "counts");
      a.counts = static_cast<const int32_t*>(kept.data_ptr());
    }
    if (a.tokens > 0 && a.cache.batch * a.cache.heads > 0) Backend::run(a, key_window);
  }

  static void crop(SPARSEKIT_CACHE_PARAMETERS, Tensor limits) {
    KvCrop a;
    a.cache = cache_of(SPARSEKIT_CACHE_ARGUMENTS);
    require_numel(limits, a.cache.batch, "limits");
    require_same_device(limits, key_window, "limits");
    Tensor kept = contiguous_of(limits, ScalarType::Int, "limits");
    a.limits = static_cast<const int32_t*>(kept.data_ptr());
    if (a.cache.batch * a.cache.heads > 0) Backend::run(a, key_window);
  }

  static void compact(SPARSEKIT_CACHE_PARAMETERS, Tensor keep) {
    KvCompact a;
    a.cache = cache_of(SPARSEKIT_CACHE_ARGUMENTS);
    require_dims(keep, 3, "keep");
    require_same_device(keep, key_window, "keep");
    require_size(keep, 0, a.cache.batch, "keep");
    if (keep.size(1) != 1) require_size(keep, 1, a.cache.heads, "keep");
    Tensor kept = contiguous_of(keep, ScalarType::Int, "keep");
    a.keep = static_cast<const int32_t*>(kept.data_ptr());
    a.keep_heads = keep.size(1);
    a.count = keep.size(2);
    if (a.cache.batch * a.cache.heads > 0) Backend::run(a, key_window);
  }

  static Triple decode(Tensor query, SPARSEKIT_CACHE_PARAMETERS, SPARSEKIT_DECODE_PARAMETERS) {
    KvCache cache = cache_of(SPARSEKIT_CACHE_ARGUMENTS);
    require_same_device(key_window, query, "the cache");
    DecodeTensors tensors;
    tensors.set(query, cache.batch, cache.heads, cache.key.dim, cache.value.dim, SPARSEKIT_DECODE_ARGUMENTS);
    tensors.problem.cache = &cache;
    if (tensors.lse.numel() > 0) Backend::run(tensors.problem, query);
    return {tensors.out, tensors.lse, tensors.scores};
  }

  static Triple decode_plain(Tensor query, Tensor key, Tensor value, Tensor lengths, OptionalTensor block_table,
                             bool tokens_first, SPARSEKIT_DECODE_PARAMETERS) {
    require_dims(key, 4, "key");
    require_dims(value, 4, "value");
    int64_t token = tokens_first ? 1 : 2, head = tokens_first ? 2 : 1;
    for (int64_t d = 0; d < 3; ++d) require_size(value, d, key.size(d), "value");
    for (const auto& [tensor, name] : {std::tuple{&key, "key"}, std::tuple{&value, "value"}}) {
      require_same_device(*tensor, query, name);
      if (tensor->scalar_type() != key.scalar_type()) fail("value: another dtype than key; supported: one dtype");
      if (tensor->size(3) > 1 && tensor->stride(3) != 1) {
        fail("%s: stride %lld in the last dimension; supported: 1 (a cache is never copied)", name,
             (long long)tensor->stride(3));
      }
    }
    PlainCache cache;
    cache.dtype = to_dtype(key.scalar_type(), "key");
    cache.pages = key.size(0);
    cache.page_size = int32_t(key.size(token));
    cache.key = key.data_ptr();
    cache.value = value.data_ptr();
    cache.key_page = key.stride(0);
    cache.key_head = key.stride(head);
    cache.key_token = key.stride(token);
    cache.value_page = value.stride(0);
    cache.value_head = value.stride(head);
    cache.value_token = value.stride(token);
    int64_t batch = query.dim() == 4 ? query.size(0) : 0;
    Tensor table, used = contiguous_of(lengths, ScalarType::Int, "lengths");
    require_numel(lengths, batch, "lengths");
    require_same_device(lengths, query, "lengths");
    cache.lengths = static_cast<const int32_t*>(used.data_ptr());
    cache.pages_per_head = 1;
    if (block_table) {
      require_dims(*block_table, 2, "block_table");
      require_size(*block_table, 0, batch, "block_table");
      require_same_device(*block_table, query, "block_table");
      table = contiguous_of(*block_table, ScalarType::Int, "block_table");
      cache.block_table = static_cast<const int32_t*>(table.data_ptr());
      cache.pages_per_head = table.size(1);
    } else {
      require_size(key, 0, batch, "key (without a block_table)");
    }
    DecodeTensors tensors;
    tensors.set(query, batch, key.size(head), key.size(3), value.size(3), SPARSEKIT_DECODE_ARGUMENTS);
    tensors.problem.plain = &cache;
    if (tensors.lse.numel() > 0) Backend::run(tensors.problem, query);
    return {tensors.out, tensors.lse, tensors.scores};
  }
};

#define SPARSEKIT_REGISTER_KV_CACHE(m, Backend)                   \
  m.impl("quantize_kv", TORCH_BOX(KvOps<Backend>::quantize));     \
  m.impl("dequantize_kv", TORCH_BOX(KvOps<Backend>::dequantize)); \
  m.impl("kv_cache_append", TORCH_BOX(KvOps<Backend>::append));   \
  m.impl("kv_cache_crop", TORCH_BOX(KvOps<Backend>::crop));       \
  m.impl("kv_cache_compact", TORCH_BOX(KvOps<Backend>::compact)); \
  m.impl("decode_attention", TORCH_BOX(KvOps<Backend>::decode));  \
  m.impl("decode_attention_plain", TORCH_BOX(KvOps<Backend>::decode_plain))

}  // namespace sparsekit

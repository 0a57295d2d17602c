// The token ops that move no payload through an index: matching, and compaction of a cache in place.
#pragma once

#include <tuple>

#include "torch/tokens_tensors.h"

namespace sparsekit {

template <class Backend>
struct TokenMatchOps {
  using Match = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

  static Match bipartite_match(Tensor metric, int64_t r, OptionalTensor ragged_r, int64_t protect,
                               OptionalTensor counts) {
    require_dims(metric, 3, "metric");
    if (r < 0) fail("r is %lld; supported: 0 and more", (long long)r);
    if (protect < 0) fail("protect is %lld; supported: 0 and more", (long long)protect);
    const int64_t samples = metric.size(0), tokens = metric.size(1);
    TokenTensors kept(metric);
    Tensor rows = kept.keep(metric.size(2) == 0 || metric.stride(2) == 1 ? metric : torch::stable::contiguous(metric));
    MatchTokens match;
    match.dtype = to_dtype(metric.scalar_type(), "metric");
    match.metric.data = rows.data_ptr();
    match.metric.batch = rows.stride(0);
    match.metric.row = rows.stride(1);
    match.samples = samples;
    match.tokens = tokens;
    match.dim = metric.size(2);
    match.protect = protect;
    const int64_t most = tokens > protect ? (tokens - protect) / 2 : 0;
    match.r = r < most ? r : most;
    if (ragged_r) {
      require_dims(*ragged_r, 1, "r");
      require_size(*ragged_r, 0, samples, "r");
      require_same_device(*ragged_r, metric, "r");
      match.ragged_r_wide = ragged_r->scalar_type() == ScalarType::Long;
      if (!match.ragged_r_wide && ragged_r->scalar_type() != ScalarType::Int) {
        fail("r has the wrong dtype; supported: an int, or an int32 or int64 tensor [B]");
      }
      match.ragged_r = kept.keep(torch::stable::contiguous(*ragged_r)).data_ptr();
    }
    if (counts) {
      require_dims(*counts, 1, "counts");
      require_size(*counts, 0, samples, "counts");
      match.counts = kept.ints(*counts, "counts");
    }
    const bool ragged = ragged_r || counts;
    match.pair_capacity = ragged ? tokens / 2 : match.r;
    match.kept_capacity = ragged ? tokens : tokens - match.r;
    Tensor source = ints_on(metric, {samples, match.pair_capacity}, &match.source);
    Tensor destination = ints_on(metric, {samples, match.pair_capacity}, &match.destination);
    Tensor kept_tokens = ints_on(metric, {samples, match.kept_capacity}, &match.kept);
    Tensor row = ints_on(metric, {samples, tokens}, &match.row);
    Tensor new_counts = ints_on(metric, {samples}, &match.new_counts);
    Backend::run(match, metric);
    return {source, destination, kept_tokens, row, new_counts};
  }

  static Tensor ints_on(const Tensor& like, const std::vector<int64_t>& sizes, int32_t** data) {
    Tensor tensor = empty_on(like, sizes, ScalarType::Int);
    *data = static_cast<int32_t*>(tensor.data_ptr());
    return tensor;
  }

  /// [B, H, T, D], paged [pages, H, page_size, D]; with tokens_first [B, T, H, D], [pages, page_size, H, D].
  static void compact_kv(std::vector<Tensor> cache_tensors, Tensor keep_index, OptionalTensor block_table,
                         OptionalTensor lengths, bool tokens_first) {
    if (cache_tensors.empty()) fail("cache_tensors: none is given; supported: one and more");
    const int64_t head_dim = tokens_first ? 2 : 1, row_dim = 3 - head_dim;
    TokenTensors kept(keep_index);
    CompactRows compact;
    compact.samples = keep_index.size(0);
    const Tensor& first = cache_tensors[0];
    require_dims(first, 4, "cache_tensors");
    compact.heads = first.size(head_dim);
    if (keep_index.dim() != 2 && keep_index.dim() != 3) {
      fail("keep_index has %lld dimensions; supported: 2 or 3, [B, K] or [B, H, K]", (long long)keep_index.dim());
    }
    if (keep_index.dim() == 3) {
      require_size(keep_index, 1, compact.heads, "keep_index");
      compact.keep_heads = compact.heads;
    }
    compact.keep.wide = keep_index.scalar_type() == ScalarType::Long;
    if (!compact.keep.wide && keep_index.scalar_type() != ScalarType::Int) {
      fail("keep_index has the wrong dtype; supported: int32, int64");
    }
    compact.keep.rows = keep_index.size(keep_index.dim() - 1);
    compact.keep.data = kept.keep(torch::stable::contiguous(keep_index)).data_ptr();
    compact.capacity = first.size(row_dim);
    if (block_table) {
      require_dims(*block_table, 2, "block_table");
      require_size(*block_table, 0, compact.samples, "block_table");
      compact.block_table = kept.ints(*block_table, "block_table");
      compact.table_pages = block_table->size(1);
      compact.pages = first.size(0);
      compact.page_size = first.size(row_dim);
      compact.capacity = compact.table_pages * compact.page_size;
    } else {
      require_size(first, 0, compact.samples, "cache_tensors");
    }
    std::vector<CompactRows::Cache> caches;
    for (const Tensor& tensor : cache_tensors) {
      require_dims(tensor, 4, "cache_tensors");
      for (int64_t d = 0; d < 3; ++d) require_size(tensor, d, first.size(d), "cache_tensors");
      require_same_device(tensor, keep_index, "cache_tensors");
      to_dtype(tensor.scalar_type(), "cache_tensors");
      if (tensor.size(3) > 1 && tensor.stride(3) != 1) {
        fail("cache_tensors: the last stride is %lld; supported: 1, as the cache is changed in place",
             (long long)tensor.stride(3));
      }
      int64_t element = tensor.element_size();
      caches.push_back({tensor.data_ptr(), tensor.stride(0) * element, tensor.stride(head_dim) * element,
                        tensor.stride(row_dim) * element, tensor.size(3) * element});
    }
    // One list for all heads, whose rows lie side by side: one long row.
    bool side_by_side = compact.keep_heads == 1;
    for (const auto& cache : caches) side_by_side &= cache.head == cache.row_bytes;
    if (side_by_side) {
      for (auto& cache : caches) cache.row_bytes *= compact.heads;
      compact.heads = compact.heads > 0 ? 1 : 0;
    }
    if (lengths) {
      if (lengths->scalar_type() != ScalarType::Int || !lengths->is_contiguous()) {
        fail("lengths: found another dtype or a gap between elements; supported: contiguous int32, changed in place");
      }
      require_dims(*lengths, keep_index.dim() - 1, "lengths");
      for (int64_t d = 0; d < lengths->dim(); ++d) require_size(*lengths, d, keep_index.size(d), "lengths");
      require_same_device(*lengths, keep_index, "lengths");
      compact.lengths = static_cast<int32_t*>(lengths->data_ptr());
    }
    compact.caches = caches.data();
    compact.tensors = int64_t(caches.size());
    Backend::run(compact, keep_index);
  }
};

#define SPARSEKIT_REGISTER_TOKEN_MATCH(m, Backend)                               \
  m.impl("bipartite_match", TORCH_BOX(TokenMatchOps<Backend>::bipartite_match)); \
  m.impl("compact_kv", TORCH_BOX(TokenMatchOps<Backend>::compact_kv))

}  // namespace sparsekit

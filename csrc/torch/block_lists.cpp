// See block_lists.h. In both libraries.
#include "torch/block_lists.h"

namespace sparsekit {

void BlockListTensors::set_list(BlockList* list, const Tensor& counts, const Tensor& indices, const char* counts_name,
                                const char* indices_name) {
  require_dims(counts, 3, counts_name);
  require_dims(indices, 4, indices_name);
  for (int64_t d = 0; d < 3; ++d) require_size(indices, d, counts.size(d), indices_name);
  if (indices.size(3) > INT32_MAX) fail("%s has too many entries a row", indices_name);
  list->counts = keep_ints(counts, counts_name);
  list->indices = keep_ints(indices, indices_name);
  list->capacity = int32_t(indices.size(3));
}

void BlockListTensors::set_lists(SPARSEKIT_LIST_PARAMETERS) {
  BlockLists& lists = problem.lists;
  if (block_size.size() != 2) fail("block_size has %zu numbers; supported: 2, (query, key)", block_size.size());
  lists.block_q = int32_t(block_size[0]);
  lists.block_k = int32_t(block_size[1]);
  set_list(&lists.partial, kv_num_blocks, kv_indices, "kv_num_blocks", "kv_indices");
  lists.list_batch = kv_num_blocks.size(0);
  lists.list_heads = kv_num_blocks.size(1);
  lists.q_blocks = kv_num_blocks.size(2);
  if (full_kv_num_blocks.has_value() != full_kv_indices.has_value()) {
    fail("full_kv_num_blocks and full_kv_indices: one is missing; supported: both or none");
  }
  if (full_kv_num_blocks) {
    for (int64_t d = 0; d < 3; ++d) {
      require_size(*full_kv_num_blocks, d, kv_num_blocks.size(d), "full_kv_num_blocks");
    }
    set_list(&lists.full, *full_kv_num_blocks, *full_kv_indices, "full_kv_num_blocks", "full_kv_indices");
  }
  if (partial_bits.has_value() != partial_bits_index.has_value()) {
    fail("partial_bits and partial_bits_index: one is missing; supported: both or none");
  }
  if (partial_bits) {
    require_dims(*partial_bits, 3, "partial_bits");
    require_size(*partial_bits, 1, lists.block_q, "partial_bits");
    require_size(*partial_bits, 2, lists.bits_words(), "partial_bits");
    require_dims(*partial_bits_index, 4, "partial_bits_index");
    for (int64_t d = 0; d < 4; ++d) require_size(*partial_bits_index, d, kv_indices.size(d), "partial_bits_index");
    lists.bits = keep_ints(*partial_bits, "partial_bits");
    lists.bits_index = keep_ints(*partial_bits_index, "partial_bits_index");
    lists.bits_count = partial_bits->size(0);
  }
}

void BlockListTensors::set_packed(SPARSEKIT_PACKED_PARAMETERS) {
  require_dims(cu_seqlens_q, 1, "cu_seqlens_q");
  require_dims(cu_seqlens_k, 1, "cu_seqlens_k");
  if (cu_seqlens_q.size(0) < 1) fail("cu_seqlens_q is empty; supported: one number more than sequences");
  require_size(cu_seqlens_k, 0, cu_seqlens_q.size(0), "cu_seqlens_k");
  problem.cu_seqlens_q = keep_ints(cu_seqlens_q, "cu_seqlens_q");
  problem.cu_seqlens_k = keep_ints(cu_seqlens_k, "cu_seqlens_k");
  problem.sequences = cu_seqlens_q.size(0) - 1;
  problem.max_len_q = max_seqlen_q;
  problem.max_len_k = max_seqlen_k;
}

void BlockListTensors::set_lengths(int64_t len_k, const OptionalTensor& cu_seqlens_q,
                                   const OptionalTensor& cu_seqlens_k) {
  problem.batch = problem.lists.list_batch;
  problem.heads_q = problem.heads_kv = problem.lists.list_heads;
  problem.head_dim = problem.value_dim = 1;
  problem.len_q = problem.lists.q_blocks * problem.lists.block_q;
  problem.len_k = len_k;
  if (cu_seqlens_q.has_value() != cu_seqlens_k.has_value()) {
    fail("cu_seqlens_q and cu_seqlens_k: one is missing; supported: both or none");
  }
  if (cu_seqlens_q) set_packed(*cu_seqlens_q, *cu_seqlens_k, problem.len_q, problem.len_k);
}

}  // namespace sparsekit

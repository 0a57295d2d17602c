// The block-list ops, for any backend (see attention.h for what `Backend` is).
#pragma once

#include <utility>

#include "sparsekit/selection.h"
#include "torch/block_lists.h"

namespace sparsekit {

/// The transposed lists of a problem, on the device of `like`: (offsets, slots), see BlockTranspose.
template <class Backend>
std::pair<Tensor, Tensor> build_transpose(const AttentionProblem& problem, const Tensor& like) {
  const BlockLists& lists = problem.lists;
  int64_t slots_per_head = lists.q_blocks * lists.slots_per_row();
  Tensor offsets = empty_on(like, {lists.list_batch, lists.list_heads, problem.k_blocks() + 1}, ScalarType::Int);
  Tensor slots = empty_on(like, {lists.list_batch, lists.list_heads, slots_per_head}, ScalarType::Int);
  TransposeBlockLists transpose;
  transpose.problem = problem;
  transpose.offsets = static_cast<int32_t*>(offsets.data_ptr());
  transpose.slots = static_cast<int32_t*>(slots.data_ptr());
  if (lists.list_batch * lists.list_heads > 0) Backend::run(transpose, like);
  return {offsets, slots};
}

template <class Backend>
struct SelectionOps {
  using Pair = std::tuple<Tensor, Tensor>;

  static Pair block_lists_from_bool(Tensor block_map, int64_t capacity) {
    require_dims(block_map, 4, "block_map");
    if (capacity < 0 || capacity > INT32_MAX) {
      fail("capacity is %lld; supported: 0 to 2^31 - 1", (long long)capacity);
    }
    Tensor map = contiguous_of(block_map, ScalarType::Bool, "block_map");
    std::vector<int64_t> sizes = {map.size(0), map.size(1), map.size(2)};
    Tensor counts = empty_on(map, sizes, ScalarType::Int);
    sizes.push_back(capacity);
    Tensor indices = empty_on(map, sizes, ScalarType::Int);
    BlockListsFromBool lists;
    lists.map = static_cast<const bool*>(map.data_ptr());
    lists.rows = counts.numel();
    lists.columns = map.size(3);
    lists.capacity = capacity;
    lists.counts = static_cast<int32_t*>(counts.data_ptr());
    lists.indices = static_cast<int32_t*>(indices.data_ptr());
    if (lists.rows > 0) Backend::run(lists, map);
    return {counts, indices};
  }

  static Pair transpose_block_lists(Tensor kv_num_blocks, Tensor kv_indices, OptionalTensor full_kv_num_blocks,
                                    OptionalTensor full_kv_indices, std::vector<int64_t> block_size, int64_t len_k,
                                    OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k) {
    BlockListTensors tensors;
    tensors.anchor = kv_num_blocks;
    tensors.set_lists(kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices, std::nullopt, std::nullopt,
                      block_size);
    tensors.set_lengths(len_k, cu_seqlens_q, cu_seqlens_k);
    return build_transpose<Backend>(tensors.problem, kv_num_blocks);
  }
};

#define SPARSEKIT_REGISTER_SELECTION(m, Backend)                                            \
  m.impl("block_lists_from_bool", TORCH_BOX(SelectionOps<Backend>::block_lists_from_bool)); \
  m.impl("transpose_block_lists", TORCH_BOX(SelectionOps<Backend>::transpose_block_lists))

}  // namespace sparsekit

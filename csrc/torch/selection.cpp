// The block-list ops on the CPU.
#include "torch/selection.h"

#include "torch/cpu.h"

namespace sparsekit {
namespace {

void check_block_lists(SPARSEKIT_LIST_PARAMETERS, int64_t len_k, OptionalTensor cu_seqlens_q,
                       OptionalTensor cu_seqlens_k, bool duplicates) {
  BlockListTensors tensors;
  tensors.anchor = kv_num_blocks;
  tensors.set_lists(kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices, partial_bits, partial_bits_index,
                    block_size);
  tensors.set_lengths(len_k, cu_seqlens_q, cu_seqlens_k);
  require(attention_check(tensors.problem));
  require(attention_check_lists(tensors.problem, duplicates));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CPU, m) {
  SPARSEKIT_REGISTER_SELECTION(m, Cpu);
  m.impl("check_block_lists", TORCH_BOX(check_block_lists));
}

}  // namespace sparsekit

// Checks the tensors of block lists and packed batches and points an AttentionProblem at them.
#pragma once

#include "sparsekit/attention.h"
#include "torch/tensors.h"

namespace sparsekit {

/// The lists and the packed batch, in the order of the schema (csrc/torch/library.cpp).
#define SPARSEKIT_LIST_PARAMETERS                                                                             \
  Tensor kv_num_blocks, Tensor kv_indices, OptionalTensor full_kv_num_blocks, OptionalTensor full_kv_indices, \
      OptionalTensor partial_bits, OptionalTensor partial_bits_index, std::vector<int64_t> block_size
#define SPARSEKIT_PACKED_PARAMETERS Tensor cu_seqlens_q, Tensor cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k

/// Checked tensors, kept alive while the problem points into them.
class BlockListTensors {
 public:
  AttentionProblem problem;
  Tensor anchor;  // the tensor on whose device all others must be: query, or the lists themselves

  void set_lists(SPARSEKIT_LIST_PARAMETERS);
  void set_packed(SPARSEKIT_PACKED_PARAMETERS);

  /// The lengths of lists that come without a query: as many rows as the lists cover, `len_k` keys.
  void set_lengths(int64_t len_k, const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k);

  /// Keeps a tensor alive and gives its data.
  template <class T>
  const T* keep(const Tensor& tensor) {
    kept_.push_back(tensor);
    return static_cast<const T*>(tensor.data_ptr());
  }

 protected:
  const int32_t* keep_ints(const Tensor& tensor, const char* name) {
    require_same_device(tensor, anchor, name);
    return keep<int32_t>(contiguous_of(tensor, ScalarType::Int, name));
  }

 private:
  void set_list(BlockList* list, const Tensor& counts, const Tensor& indices, const char* counts_name,
                const char* indices_name);

  std::vector<Tensor> kept_;
};

}  // namespace sparsekit

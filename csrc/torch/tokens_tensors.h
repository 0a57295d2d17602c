// Tensors as tensors of tokens, checked and kept alive while a struct points into them.
#pragma once

#include <deque>
#include <string>

#include "sparsekit/tokens.h"
#include "torch/tensors.h"

namespace sparsekit {

/// Whether the token dimension of a list of tensors follows a batch dimension, or is packed.
enum class Side { padded, packed };

class TokenTensors {
 public:
  explicit TokenTensors(Tensor anchor) : anchor_(std::move(anchor)) {}

  /// The rows of `tensors`, which must agree, and their views. `name` is what errors call them; `dims` count a batch
  /// dimension, which packed tensors lack.
  void add(const std::vector<Tensor>& tensors, const std::vector<int64_t>& dims, const OptionalTensor& cu_seqlens,
           const char* name, TokenRows* rows, std::vector<TokenTensor>* views);

  /// New contiguous tensors like `tensors`, with `rows` tokens of `samples` samples (packed: rows in all).
  std::vector<Tensor> make(const std::vector<Tensor>& tensors, const std::vector<int64_t>& dims, bool from_packed,
                           const OptionalTensor& cu_seqlens, int64_t samples, int64_t rows,
                           std::vector<TokenTensor>* views);

  TokenIndex index(const Tensor& tensor, int64_t dims_most);
  const int32_t* ints(const Tensor& tensor, const char* name);
  Tensor keep(Tensor tensor) {
    kept_.push_back(std::move(tensor));
    return kept_.back();
  }

 private:
  TokenTensor view(const Tensor& tensor, int64_t dim, bool packed, const char* name, size_t number);

  Tensor anchor_;
  std::deque<Tensor> kept_;
};

TokenType to_token_type(ScalarType type);

}  // namespace sparsekit

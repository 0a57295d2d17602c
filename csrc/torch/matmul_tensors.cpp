// See matmul.h. In both libraries.
#include "torch/matmul.h"

namespace sparsekit {

IndexArray BlockSparseTensors::indices(const Tensor& tensor, int64_t count, const Tensor& like, const char* name) {
  require_dims(tensor, 1, name);
  require_size(tensor, 0, count, name);
  require_same_device(tensor, like, name);
  const ScalarType type = tensor.scalar_type();
  if (type != ScalarType::Int && type != ScalarType::Long) {
    fail("%s has the wrong dtype; supported: int32, int64", name);
  }
  return {keep(torch::stable::contiguous(tensor)).data_ptr(), type == ScalarType::Long};
}

void BlockSparseTensors::set_pattern(const Tensor& crow, const Tensor& col_indices, int64_t rows, int64_t cols,
                                     int64_t block_rows, int64_t block_cols, const Tensor& like) {
  if (block_rows < 1 || block_rows > 1024 || block_cols < 1 || block_cols > 1024) {
    fail("values has blocks of %lld x %lld; supported: 1 to 1024 each", (long long)block_rows, (long long)block_cols);
  }
  if (rows < 0 || cols < 0) {
    fail("weight has shape [%lld, %lld]; supported: 0 and more", (long long)rows, (long long)cols);
  }
  require_dims(crow, 1, "crow_indices");
  require_dims(col_indices, 1, "col_indices");
  pattern.rows = rows;
  pattern.cols = cols;
  pattern.block_rows = int32_t(block_rows);
  pattern.block_cols = int32_t(block_cols);
  pattern.nnz = col_indices.size(0);
  pattern.crow = indices(crow, pattern.row_blocks() + 1, like, "crow_indices");
  pattern.col = indices(col_indices, pattern.nnz, like, "col_indices");
  if (crow.scalar_type() != col_indices.scalar_type()) {
    fail("crow_indices and col_indices differ in dtype; supported: both int32 or both int64");
  }
  col = col_indices;
}

void BlockSparseTensors::set_weight(const Tensor& values_tensor, const Tensor& crow, const Tensor& col_indices,
                                    int64_t rows, int64_t cols, const OptionalTensor& scales_tensor,
                                    const Tensor& input) {
  require_dims(values_tensor, 3, "values");
  require_same_device(values_tensor, input, "values");
  set_pattern(crow, col_indices, rows, cols, values_tensor.size(1), values_tensor.size(2), input);
  require_size(values_tensor, 0, pattern.nnz, "values");
  const ScalarType type = values_tensor.scalar_type();
  if (scales_tensor.has_value() != (type == ScalarType::Char)) {
    fail("scales and the dtype of values do not fit; supported: int8 values with scales [rows], others without");
  }
  if (scales_tensor) {
    require_dims(*scales_tensor, 1, "scales");
    require_size(*scales_tensor, 0, rows, "scales");
    require_same_device(*scales_tensor, input, "scales");
    scales = static_cast<const float*>(keep(contiguous_of(*scales_tensor, ScalarType::Float, "scales")).data_ptr());
    // An empty tensor may have no address, and null means none.
    if (scales == nullptr) scales = reinterpret_cast<const float*>(&pattern);
  } else if (type != input.scalar_type()) {
    fail("values has another dtype than input; supported: input's dtype, or int8 with scales");
  }
  values = keep(torch::stable::contiguous(values_tensor)).data_ptr();
}

void BlockSparseTensors::set_transpose(const Tensor& ccol, const Tensor& row, const Tensor& entries,
                                       const Tensor& like) {
  transpose.ccol = indices(ccol, pattern.col_blocks() + 1, like, "ccol_indices");
  transpose.row = indices(row, pattern.nnz, like, "row_indices");
  transpose.entry = indices(entries, pattern.nnz, like, "entries");
}

Activation to_activation(int64_t number) {
  if (number < 0 || number > int64_t(Activation::silu)) {
    fail("activation is %lld; supported: 0 none, 1 relu, 2 gelu, 3 gelu with tanh, 4 silu", (long long)number);
  }
  return Activation(number);
}

Tensor tokens_of(const Tensor& input, int64_t* tokens, int64_t* token_stride, int64_t* feature_stride) {
  const int64_t dims = input.dim(), features = input.size(dims - 1);
  *tokens = 1;
  for (int64_t d = 0; d + 1 < dims; ++d) *tokens *= input.size(d);
  *feature_stride = 1;
  // A matrix of either order, or rows that follow each other with one stride.
  if (dims == 2) {
    Tensor matrix = matrix_of(input);
    *token_stride = matrix.stride(0);
    *feature_stride = matrix.stride(1);
    return matrix;
  }
  bool regular = features <= 1 || input.stride(dims - 1) == 1;
  int64_t expected = -1;
  for (int64_t d = dims - 2; d >= 0; --d) {
    if (input.size(d) == 1) continue;
    if (expected < 0) *token_stride = input.stride(d);
    regular &= expected < 0 || input.stride(d) == expected;
    expected = input.stride(d) * input.size(d);
  }
  if (expected < 0) *token_stride = features;
  if (regular) return input;
  *token_stride = features;
  return torch::stable::contiguous(input);
}

Tensor matrix_of(const Tensor& matrix) {
  const int64_t last = matrix.dim() - 1;
  const bool usable = matrix.stride(last) == 1 || matrix.stride(last - 1) == 1;
  return usable ? matrix : torch::stable::contiguous(matrix);
}

}  // namespace sparsekit

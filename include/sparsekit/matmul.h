// Products with block-sparse weights. The torch-free C++ API.
//
// A weight W [rows, cols] is stored in the tensors of torch.sparse_bsr: block row i holds the blocks crow[i] to
// crow[i + 1], block p stands at block column col[p], its R x C values at values[p]. Columns of a row may stand in any
// order; a block that is listed twice counts twice. rows and cols need not be multiples of R and C: what a block holds
// beyond them is padding and reaches nothing.
//
// Other layouts are the same with other blocks: 1 x 16 and 4 x 1 vectors, and n:m:g, where g consecutive rows keep the
// same n of every m columns (g x 1 blocks, as many in each row).
#pragma once

#include <cstddef>

#include "sparsekit/parallel.h"
#include "sparsekit/status.h"
#include "sparsekit/types.h"

namespace sparsekit {

/// int32 or int64 numbers, as torch.sparse_bsr gives them.
struct IndexArray {
  const void* data = nullptr;
  bool wide = false;  // int64

  int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

struct BlockSparsePattern {
  int64_t rows = 0, cols = 0, nnz = 0;     // nnz: blocks
  int32_t block_rows = 0, block_cols = 0;  // R, C: 1 to 1024
  IndexArray crow;                         // [ceil(rows / R) + 1]
  IndexArray col;                          // [nnz]

  int64_t row_blocks() const { return (rows + block_rows - 1) / block_rows; }
  int64_t col_blocks() const { return (cols + block_cols - 1) / block_cols; }
};

/// The pattern seen from its columns: block column j holds the blocks `entry[ccol[j]]` to `entry[ccol[j + 1] - 1]`,
/// which stand in the block rows `row[...]`, ascending. Values stay where they are.
struct BlockSparseTranspose {
  IndexArray ccol;   // [ceil(cols / C) + 1]
  IndexArray row;    // [nnz]
  IndexArray entry;  // [nnz]: places in col and values
};

/// y [tokens, features]; one of the strides is 1.
template <class Pointer>
struct TokensView {
  Pointer data = nullptr;
  int64_t token = 0, feature = 0;  // strides in elements
};

enum class Activation : int32_t { none, relu, gelu, gelu_tanh, silu };

/// The other half of a gated MLP, see BlockSparseProduct: a weight of the same shape.
struct BlockSparseGate {
  BlockSparsePattern pattern;
  const void* values = nullptr;
};

/// y = factor * activation(x W^T + bias), or with `transposed` x W in place of x W^T.
///
/// int8 weights (`scales` given): row n of W is scales[n] * values. Then x W^T rounds x per token to 8 bits: with
/// s_t = max_k |x_tk|, q_tk = round(x_tk * 127 / s_t) (to nearest even, in fp32), y_tn = s_t / 127 * scales[n] * sum_k
/// q_tk w_nk: integer sums. A token with a NaN or Inf gives NaN. x W stays in fp32: it is the gradient of that.
struct BlockSparseProduct {
  BlockSparsePattern pattern;
  const void* values = nullptr;   // [nnz, R, C] of `dtype`; int8 where `scales` are given
  const float* scales = nullptr;  // [rows]
  bool transposed = false;
  BlockSparseTranspose transpose;  // where `transposed`
  DType dtype = DType::f32;        // of input, output, bias, factor
  int64_t tokens = 0;
  TokensView<const void*> input;  // [tokens, cols]; transposed: [tokens, rows]
  TokensView<void*> output;       // [tokens, rows]; transposed: [tokens, cols]
  const void* bias = nullptr;     // [features of the output]
  Activation activation = Activation::none;
  TokensView<const void*> factor;  // as output, which it may be

  bool tf32 = false;  // CUDA, fp32: one TF32 product in place of three that are accurate to fp32

  // CUDA only. With a gate G: y = activation(x G^T) * (x W^T), the former rounded to the dtype; no bias, no factor.
  const BlockSparseGate* gate = nullptr;
  // The input comes from the product launched just before on the same stream, the weight from earlier: the kernel may
  // begin to read the weight while that product ends.
  bool follows = false;
};

/// values[p] = the block p of a b, a [rows, inner], b [inner, cols]: a sampled dense-dense product.
struct BlockSddmm {
  BlockSparsePattern pattern;
  DType dtype = DType::f32;
  int64_t inner = 0;
  const void* a = nullptr;
  const void* b = nullptr;
  int64_t a_row = 0, a_inner = 0, b_inner = 0, b_col = 0;  // strides in elements; one of each pair is 1
  void* values = nullptr;                                  // [nnz, R, C]; 0 in padding
  bool tf32 = false;                                       // as in BlockSparseProduct
};

/// Counting sort of the blocks by column. Outputs are int32 or int64, as `pattern.col`.
struct TransposeBlockSparse {
  BlockSparsePattern pattern;
  void* ccol = nullptr;   // [col_blocks + 1]
  void* row = nullptr;    // [nnz]
  void* entry = nullptr;  // [nnz]
};

/// Shapes, and the contents of the index tensors (CPU memory): the first bad entry is named.
Status block_sparse_check(const BlockSparsePattern& pattern);
Status block_sparse_check_transpose(const BlockSparsePattern& pattern, const BlockSparseTranspose& transpose);

Status block_sparse_product(const BlockSparseProduct& arguments, const ParallelFor& parallel);
Status block_sddmm(const BlockSddmm& arguments, const ParallelFor& parallel);
Status transpose_block_sparse(const TransposeBlockSparse& arguments, const ParallelFor& parallel);

/// What each CPU implementation says to a product (its tensors are not read), best first: `reason` is null where it
/// would run.
struct MatmulPlan {
  static constexpr int capacity = 8;
  struct Entry {
    const char* name;
    const char* reason;
  } entries[capacity];
  int count = 0;
};
MatmulPlan block_sparse_plan(const BlockSparseProduct& arguments);

// ---- CUDA: every pointer is device memory. An index out of range is skipped, an offset clamped to [0, nnz]; nothing
// is read out of bounds, and the blocks of a row whose offsets are wrong may be left out.

struct CudaContext;  // sparsekit/attention.h

/// Bytes of scratch that a call wants in its context.
size_t block_sparse_product_workspace(const BlockSparseProduct& arguments, const CudaContext& context);
size_t block_sddmm_workspace(const BlockSddmm& arguments, const CudaContext& context);
size_t transpose_block_sparse_workspace(const TransposeBlockSparse& arguments);

Status block_sparse_product(const BlockSparseProduct& arguments, const CudaContext& context);
/// Whether any implementation takes the product: a gate, else in two passes, is not taken by all.
bool block_sparse_product_takes(const BlockSparseProduct& arguments, const CudaContext& context);
Status block_sddmm(const BlockSddmm& arguments, const CudaContext& context);
Status transpose_block_sparse(const TransposeBlockSparse& arguments, const CudaContext& context);
MatmulPlan block_sparse_plan(const BlockSparseProduct& arguments, const CudaContext& context);

}  // namespace sparsekit

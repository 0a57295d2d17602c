// The block-sparse products, for any backend (see attention.h for what `Backend` is).
#pragma once

#include <utility>

#include "sparsekit/matmul.h"
#include "torch/tensors.h"

namespace sparsekit {

/// A weight's tensors, checked and kept alive while a pattern points into them.
class BlockSparseTensors {
 public:
  BlockSparsePattern pattern;
  const void* values = nullptr;
  const float* scales = nullptr;
  BlockSparseTranspose transpose;
  OptionalTensor col;  // col_indices

  /// The pattern; `like` is the tensor whose device counts.
  void set_pattern(const Tensor& crow, const Tensor& col, int64_t rows, int64_t cols, int64_t block_rows,
                   int64_t block_cols, const Tensor& like);
  /// The weight of a product with `input`.
  void set_weight(const Tensor& values, const Tensor& crow, const Tensor& col, int64_t rows, int64_t cols,
                  const OptionalTensor& scales, const Tensor& input);
  void set_transpose(const Tensor& ccol, const Tensor& row, const Tensor& entries, const Tensor& like);

  Tensor keep(const Tensor& tensor) {
    kept_.push_back(tensor);
    return tensor;
  }

 private:
  IndexArray indices(const Tensor& tensor, int64_t count, const Tensor& like, const char* name);

  std::vector<Tensor> kept_;
};

Activation to_activation(int64_t number);

/// `[..., features]` as [tokens, features]: in place where one token stride reaches all, else one copy.
Tensor tokens_of(const Tensor& input, int64_t* tokens, int64_t* token_stride, int64_t* feature_stride);

/// A matrix whose last two dimensions have a stride of 1 between them: in place, else one copy.
Tensor matrix_of(const Tensor& matrix);

template <class Backend>
struct MatmulOps {
  using Triple = std::tuple<Tensor, Tensor, Tensor>;

  static Triple transpose_block_sparse(Tensor crow_indices, Tensor col_indices, int64_t col_blocks) {
    require_dims(crow_indices, 1, "crow_indices");
    BlockSparseTensors tensors;
    tensors.set_pattern(crow_indices, col_indices, crow_indices.size(0) - 1, col_blocks, 1, 1, crow_indices);
    return build_transpose(tensors, col_indices);
  }

  static Tensor linear(Tensor input, Tensor values, OptionalTensor bias, Tensor crow_indices, Tensor col_indices,
                       int64_t features, bool transposed, int64_t activation, OptionalTensor scales,
                       OptionalTensor ccol_indices, OptionalTensor row_indices, OptionalTensor entries, bool tf32) {
    if (input.dim() < 1) fail("input has no dimension; supported: [..., features]");
    const int64_t inner = input.size(input.dim() - 1);
    BlockSparseTensors tensors;
    tensors.set_weight(values, crow_indices, col_indices, transposed ? inner : features, transposed ? features : inner,
                       scales, input);
    BlockSparseProduct product = start(&tensors, transposed, ccol_indices, row_indices, entries, input);
    product.activation = to_activation(activation);
    product.tf32 = tf32;
    if (bias) product.bias = bias_of(&tensors, *bias, features, input);
    Tensor flat = tensors.keep(tokens_of(input, &product.tokens, &product.input.token, &product.input.feature));
    product.input.data = flat.data_ptr();
    Tensor output = empty_on(input, output_sizes(input, features), input.scalar_type());
    product.output = {output.data_ptr(), features, 1};
    if (output.numel() > 0) Backend::run(product, input);
    return output;
  }

  static Tensor mm(Tensor dense, Tensor values, Tensor crow_indices, Tensor col_indices, int64_t features,
                   bool transposed, OptionalTensor scales, OptionalTensor ccol_indices, OptionalTensor row_indices,
                   OptionalTensor entries, bool tf32) {
    const int64_t dims = dense.dim();
    if (dims < 2) fail("dense has %lld dimensions; supported: 2 and more, [..., features, columns]", (long long)dims);
    const int64_t inner = dense.size(dims - 2), columns = dense.size(dims - 1);
    BlockSparseTensors tensors;
    tensors.set_weight(values, crow_indices, col_indices, transposed ? inner : features, transposed ? features : inner,
                       scales, dense);
    BlockSparseProduct product = start(&tensors, transposed, ccol_indices, row_indices, entries, dense);
    product.tf32 = tf32;
    std::vector<int64_t> sizes;
    int64_t batches = 1;
    for (int64_t d = 0; d < dims; ++d) {
      sizes.push_back(d == dims - 2 ? features : dense.size(d));
      if (d < dims - 2) batches *= dense.size(d);
    }
    Tensor output = empty_on(dense, sizes, dense.scalar_type());
    if (output.numel() == 0) return output;
    Tensor matrix = tensors.keep(dims == 2 ? matrix_of(dense) : torch::stable::contiguous(dense));
    product.tokens = columns;
    product.input.token = matrix.stride(dims - 1);
    product.input.feature = matrix.stride(dims - 2);
    const int64_t element = dense.element_size();
    for (int64_t b = 0; b < batches; ++b) {
      product.input.data = static_cast<const char*>(matrix.data_ptr()) + b * inner * columns * element;
      product.output = {static_cast<char*>(output.data_ptr()) + b * features * columns * element, 1, columns};
      Backend::run(product, dense);
    }
    return output;
  }

  static Tensor sddmm(Tensor a, Tensor b, Tensor crow_indices, Tensor col_indices, std::vector<int64_t> block_size,
                      bool tf32) {
    require_dims(a, 2, "a");
    require_dims(b, 2, "b");
    require_size(b, 0, a.size(1), "b");
    require_same_device(b, a, "b");
    if (b.scalar_type() != a.scalar_type()) fail("b has another dtype than a; supported: one dtype");
    if (block_size.size() != 2) fail("block_size has %zu numbers; supported: 2, (rows, columns)", block_size.size());
    BlockSparseTensors tensors;
    tensors.set_pattern(crow_indices, col_indices, a.size(0), b.size(1), block_size[0], block_size[1], a);
    Tensor left = tensors.keep(matrix_of(a)), right = tensors.keep(matrix_of(b));
    BlockSddmm sddmm;
    sddmm.pattern = tensors.pattern;
    sddmm.dtype = to_dtype(a.scalar_type(), "a");
    sddmm.inner = a.size(1);
    sddmm.tf32 = tf32;
    sddmm.a = left.data_ptr();
    sddmm.b = right.data_ptr();
    sddmm.a_row = left.stride(0), sddmm.a_inner = left.stride(1);
    sddmm.b_inner = right.stride(0), sddmm.b_col = right.stride(1);
    Tensor values = empty_on(a, {tensors.pattern.nnz, block_size[0], block_size[1]}, a.scalar_type());
    sddmm.values = values.data_ptr();
    Backend::run(sddmm, a);
    return values;
  }

  static Tensor mlp(Tensor input, OptionalTensor gate_values, Tensor up_values, Tensor down_values,
                    OptionalTensor gate_crow_indices, OptionalTensor gate_col_indices, Tensor up_crow_indices,
                    Tensor up_col_indices, Tensor down_crow_indices, Tensor down_col_indices, int64_t hidden_features,
                    int64_t features, int64_t activation, OptionalTensor gate_scales, OptionalTensor up_scales,
                    OptionalTensor down_scales, bool tf32) {
    if (input.dim() < 1) fail("input has no dimension; supported: [..., features]");
    const int64_t inner = input.size(input.dim() - 1);
    const bool gated = gate_values.has_value();
    if (gated != gate_crow_indices.has_value() || gated != gate_col_indices.has_value()) {
      fail("gate_values, gate_crow_indices, gate_col_indices: some are missing; supported: all or none");
    }
    BlockSparseTensors gate, up, down;
    if (gated) {
      gate.set_weight(*gate_values, *gate_crow_indices, *gate_col_indices, hidden_features, inner, gate_scales, input);
    }
    up.set_weight(up_values, up_crow_indices, up_col_indices, hidden_features, inner, up_scales, input);
    down.set_weight(down_values, down_crow_indices, down_col_indices, features, hidden_features, down_scales, input);
    TokensView<const void*> x;
    int64_t tokens;
    Tensor flat = up.keep(tokens_of(input, &tokens, &x.token, &x.feature));
    x.data = flat.data_ptr();
    Tensor hidden = empty_on(input, {tokens, hidden_features}, input.scalar_type());
    Tensor output = empty_on(input, output_sizes(input, features), input.scalar_type());
    if (output.numel() == 0) return output;
    TokensView<void*> h = {hidden.data_ptr(), hidden_features, 1};
    TokensView<const void*> as_input = {hidden.data_ptr(), hidden_features, 1};
    const BlockSparseGate other = {gate.pattern, gate.values};
    BlockSparseProduct both = part(up, input, tokens, x, h, to_activation(activation), {}, tf32);
    both.gate = gated ? &other : nullptr;
    if (!gated || (!gate.scales && fuses(both, input))) {
      run_part(both, input);
    } else {
      // The first product leaves its activation where the second finds it as its factor: two passes over `hidden`.
      run_part(part(gate, input, tokens, x, h, to_activation(activation), {}, tf32), input);
      run_part(part(up, input, tokens, x, h, Activation::none, as_input, tf32), input);
    }
    BlockSparseProduct last =
        part(down, input, tokens, as_input, {output.data_ptr(), features, 1}, Activation::none, {}, tf32);
    last.follows = hidden.numel() > 0;
    run_part(last, input);
    return output;
  }

 private:
  static Triple build_transpose(const BlockSparseTensors& tensors, const Tensor& like) {
    const BlockSparsePattern& p = tensors.pattern;
    const ScalarType type = like.scalar_type();
    Tensor ccol = empty_on(like, {p.col_blocks() + 1}, type), row = empty_on(like, {p.nnz}, type);
    Tensor entries = empty_on(like, {p.nnz}, type);
    TransposeBlockSparse transpose;
    transpose.pattern = p;
    transpose.ccol = ccol.data_ptr(), transpose.row = row.data_ptr(), transpose.entry = entries.data_ptr();
    Backend::run(transpose, like);
    return {ccol, row, entries};
  }

  static BlockSparseProduct start(BlockSparseTensors* tensors, bool transposed, const OptionalTensor& ccol,
                                  const OptionalTensor& row, const OptionalTensor& entries, const Tensor& input) {
    BlockSparseProduct product;
    product.pattern = tensors->pattern;
    product.values = tensors->values;
    product.scales = tensors->scales;
    product.dtype = to_dtype(input.scalar_type(), "input");
    product.transposed = transposed;
    if (!transposed) return product;
    if (ccol.has_value() != row.has_value() || ccol.has_value() != entries.has_value()) {
      fail("ccol_indices, row_indices, entries: some are missing; supported: all or none");
    }
    if (ccol) {
      tensors->set_transpose(*ccol, *row, *entries, input);
    } else {
      auto [built_ccol, built_row, built_entries] = build_transpose(*tensors, *tensors->col);
      tensors->set_transpose(built_ccol, built_row, built_entries, input);
    }
    product.transpose = tensors->transpose;
    return product;
  }

  static BlockSparseProduct part(const BlockSparseTensors& weight, const Tensor& input, int64_t tokens,
                                 TokensView<const void*> x, TokensView<void*> y, Activation activation,
                                 TokensView<const void*> factor, bool tf32) {
    BlockSparseProduct product;
    product.pattern = weight.pattern;
    product.values = weight.values;
    product.scales = weight.scales;
    product.dtype = to_dtype(input.scalar_type(), "input");
    product.tokens = tokens;
    product.input = x;
    product.output = y;
    product.activation = activation;
    product.factor = factor;
    product.tf32 = tf32;
    return product;
  }
  static void run_part(const BlockSparseProduct& product, const Tensor& input) {
    if (product.tokens > 0 && product.pattern.rows > 0) Backend::run(product, input);
  }

  /// Whether the backend has one pass for a product with a gate.
  static bool fuses(const BlockSparseProduct& product, const Tensor& input) {
    return fuses<Backend>(product, input, 0);
  }
  template <class B>
  static auto fuses(const BlockSparseProduct& product, const Tensor& input, int) -> decltype(B::fuses(product, input)) {
    return B::fuses(product, input);
  }
  template <class B>
  static bool fuses(const BlockSparseProduct&, const Tensor&, long) {
    return false;
  }

  static const void* bias_of(BlockSparseTensors* tensors, const Tensor& bias, int64_t features, const Tensor& input) {
    require_dims(bias, 1, "bias");
    require_size(bias, 0, features, "bias");
    require_same_device(bias, input, "bias");
    if (bias.scalar_type() != input.scalar_type()) fail("bias has another dtype than input; supported: input's dtype");
    return tensors->keep(torch::stable::contiguous(bias)).data_ptr();
  }

  static std::vector<int64_t> output_sizes(const Tensor& input, int64_t features) {
    std::vector<int64_t> sizes;
    for (int64_t d = 0; d + 1 < input.dim(); ++d) sizes.push_back(input.size(d));
    sizes.push_back(features);
    return sizes;
  }
};

#define SPARSEKIT_REGISTER_MATMUL(m, Backend)                           \
  m.impl("block_sparse_linear", TORCH_BOX(MatmulOps<Backend>::linear)); \
  m.impl("block_sparse_mm", TORCH_BOX(MatmulOps<Backend>::mm));         \
  m.impl("block_sddmm", TORCH_BOX(MatmulOps<Backend>::sddmm));          \
  m.impl("block_sparse_mlp", TORCH_BOX(MatmulOps<Backend>::mlp));       \
  m.impl("transpose_block_sparse", TORCH_BOX(MatmulOps<Backend>::transpose_block_sparse))

}  // namespace sparsekit

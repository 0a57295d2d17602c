// The block-sparse products on CUDA.
#include <string>

#include "torch/cuda.h"
#include "torch/matmul.h"

namespace sparsekit {
namespace {

struct MatmulCuda {
  static void run(const BlockSparseProduct& p, const Tensor& input) {
    CudaCall call(input);
    require(block_sparse_product(p, call.with_workspace(block_sparse_product_workspace(p, call.context))));
  }
  static bool fuses(const BlockSparseProduct& p, const Tensor& input) {
    return block_sparse_product_takes(p, CudaCall(input).context);
  }
  static void run(const BlockSddmm& s, const Tensor& a) {
    CudaCall call(a);
    require(block_sddmm(s, call.with_workspace(block_sddmm_workspace(s, call.context))));
  }
  static void run(const TransposeBlockSparse& t, const Tensor& indices) {
    CudaCall call(indices);
    require(transpose_block_sparse(t, call.with_workspace(transpose_block_sparse_workspace(t))));
  }
};

std::string matmul_plan_cuda(ScalarType dtype, std::vector<int64_t> block_size, int64_t tokens, bool transposed) {
  if (block_size.size() != 2) fail("block_size has %zu numbers; supported: 2, (rows, columns)", block_size.size());
  CudaContext context;
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_device_index(&device));
  cuda_device_properties(device, &context.compute_capability, &context.multiprocessors);
  BlockSparseProduct product;  // contiguous and aligned
  product.dtype = to_dtype(dtype, "dtype");
  product.pattern.block_rows = int32_t(block_size[0]);
  product.pattern.block_cols = int32_t(block_size[1]);
  product.tokens = tokens;
  product.transposed = transposed;
  product.input.feature = product.output.feature = 1;
  return plan_text(block_sparse_plan(product, context));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CUDA, m) { SPARSEKIT_REGISTER_MATMUL(m, MatmulCuda); }

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CompositeExplicitAutograd, m) {
  m.impl("matmul_plan_cuda", TORCH_BOX(matmul_plan_cuda));
}

}  // namespace sparsekit

// The block-sparse products on the CPU.
#include "torch/matmul.h"

#include <string>

#include "torch/cpu.h"

namespace sparsekit {
namespace {

void check_block_sparse(Tensor crow_indices, Tensor col_indices, int64_t col_blocks) {
  require_dims(crow_indices, 1, "crow_indices");
  BlockSparseTensors tensors;
  tensors.set_pattern(crow_indices, col_indices, crow_indices.size(0) - 1, col_blocks, 1, 1, crow_indices);
  require(block_sparse_check(tensors.pattern));
}

std::string matmul_plan_cpu(ScalarType dtype, std::vector<int64_t> block_size) {
  if (block_size.size() != 2) fail("block_size has %zu numbers; supported: 2, (rows, columns)", block_size.size());
  BlockSparseProduct product;
  product.dtype = to_dtype(dtype, "dtype");
  product.pattern.block_rows = int32_t(block_size[0]);
  product.pattern.block_cols = int32_t(block_size[1]);
  return plan_text(block_sparse_plan(product));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CPU, m) {
  SPARSEKIT_REGISTER_MATMUL(m, Cpu);
  m.impl("check_block_sparse", TORCH_BOX(check_block_sparse));
}

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CompositeExplicitAutograd, m) {
  m.impl("matmul_plan_cpu", TORCH_BOX(matmul_plan_cpu));
}

}  // namespace sparsekit

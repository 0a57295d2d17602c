// The block-sparse products of one instruction set: included by cpu_<isa>.cpp after its Simd.
#pragma once

#include "matmul/cpu_few_tokens.h"
#include "matmul/cpu_int8_columns.h"
#include "matmul/cpu_product.h"
#include "matmul/cpu_sddmm.h"

namespace sparsekit {
namespace {

const char* refuses(DType dtype, const BlockSparsePattern& pattern) {
  if (dtype == DType::f64) return "float64 is taken by the reference only";
  if (pattern.nnz > INT32_MAX) return "more than 2^31 - 1 blocks";
  return nullptr;
}

/// Chooses how operands meet: the rest of a product is the same.
static Status product(const BlockSparseProduct& p, const ParallelFor& parallel) {
  if (p.tokens == 0 || (p.transposed ? p.pattern.cols : p.pattern.rows) == 0) return {};
  if (p.tokens <= most_few_tokens && !p.transposed && !p.scales) return run_few(p, parallel);
#ifdef SPARSEKIT_INT8_PRODUCT
  if (p.scales && !p.transposed && p.pattern.cols <= int8_longest) {
    if (p.pattern.block_cols % Int8Product::pair == 0) return run_product<Int8Product, false>(p, parallel);
    if (p.pattern.block_cols == 1) return run_columns(p, parallel);
  }
#endif
#ifdef SPARSEKIT_BF16_PRODUCT
  // Pairs are neighbours along the inner dimension of a block.
  if (p.dtype == DType::bf16 && !p.scales &&
      (p.transposed ? p.pattern.block_rows : p.pattern.block_cols) % Bf16Product::pair == 0)
    return run_product<Bf16Product>(p, parallel);
#endif
  return run_product<FloatProduct>(p, parallel);
}

}  // namespace
}  // namespace sparsekit

// The block-sparse products of one instruction set: included by cpu_<isa>.cpp after its Simd.
#pragma once

#include "matmul/cpu_product.h"
#include "matmul/cpu_sddmm.h"

namespace sparsekit {
namespace {

const char* refuses(DType dtype, const BlockSparsePattern& pattern) {
  if (dtype == DType::f64) return "float64 is taken by the reference only";
  if (pattern.nnz > INT32_MAX) return "more than 2^31 - 1 blocks";
  return nullptr;
}

}  // namespace
}  // namespace sparsekit

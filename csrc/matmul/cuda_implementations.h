// The CUDA implementations of the block-sparse products; dispatch_cuda.cpp lists them best first.
#pragma once

#include "sparsekit/attention.h"
#include "sparsekit/matmul.h"

namespace sparsekit {

struct CudaMatmul {
  const char* name;
  /// Why it does not take this product (a static string), or null if it does.
  const char* (*refuses)(const BlockSparseProduct& product, const CudaContext& context);
  size_t (*workspace)(const BlockSparseProduct& product, const CudaContext& context);
  Status (*product)(const BlockSparseProduct& product, const CudaContext& context);
  /// The same of sampled products; null: it has none.
  const char* (*refuses_sddmm)(const BlockSddmm& sddmm, const CudaContext& context);
  size_t (*workspace_sddmm)(const BlockSddmm& sddmm, const CudaContext& context);
  Status (*sddmm)(const BlockSddmm& sddmm, const CudaContext& context);
};

extern const CudaMatmul matmul_cuda_few_tokens;    // cuda_few_tokens_sm80.cu: 1 to 16 tokens
extern const CudaMatmul matmul_cuda_sm90;          // cuda_sm90.cu: Hopper, 16 bits, blocks of multiples of 64
extern const CudaMatmul matmul_cuda_small_blocks;  // cuda_small_blocks_sm90.cu: Hopper, 16 bits, sides of 16 and 32
extern const CudaMatmul matmul_cuda_sm80;          // cuda_sm80.cu: every problem

}  // namespace sparsekit

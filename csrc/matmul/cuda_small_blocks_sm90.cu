// The host side of cuda_small_blocks_sm90.cuh, and its entry in the table of implementations.
#include "matmul/cuda_small_blocks_sm90.cuh"

#include <algorithm>

#include "matmul/cuda_implementations.h"

namespace sparsekit {
namespace {

using namespace sparsekit::cuda;

/// x [tokens, inner] in boxes of 32 columns x 128 tokens with the 64-byte swizzle.
Status make_map(CUtensorMap* map, const BlockSparseProduct& p, int64_t inner) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t code =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return code == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  if (!encode) {
    return error(Status::Kind::failed, "the NVIDIA driver has no cuTensorMapEncodeTiled; needed: driver 525 or newer");
  }
  const cuuint64_t row = cuuint64_t(std::max<int64_t>(p.input.token, 8)) * 2;
  const cuuint64_t extents[4] = {cuuint64_t(inner), cuuint64_t(p.tokens), 1, 1}, strides[3] = {row, row, row};
  const cuuint32_t box[4] = {kSmallChunk, kSmallTokens, 1, 1}, steps[4] = {1, 1, 1, 1};
  const CUresult code =
      encode(map, p.dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
             const_cast<void*>(p.input.data), extents, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (code == CUDA_SUCCESS) return {};
  return error(Status::Kind::failed, "cuTensorMapEncodeTiled failed with error %d for [%lld, %lld], stride %lld",
               int(code), (long long)p.tokens, (long long)inner, (long long)p.input.token);
}

const char* refuses(const BlockSparseProduct& p, const CudaContext& context) {
  const BlockSparsePattern& w = p.pattern;
  auto small = [](int size) { return size == 16 || size == 32; };
  if (context.compute_capability != 90) return "needs a GPU of compute capability 9.0 (Hopper)";
  if (p.dtype != DType::bf16 && p.dtype != DType::f16) return "dtype: supported are float16, bfloat16";
  if (p.scales) return "int8 weights run on the CPU only";
  if (!small(w.block_rows) || !small(w.block_cols)) return "values: supported are blocks with sides of 16 and 32";
  if (p.gate) return "a gate is not in this implementation";
  if (p.tokens <= 64 || p.tokens > int64_t(1) << 30) return "tokens: supported are more than 64";
  if (p.input.feature != 1 || (reinterpret_cast<uintptr_t>(p.input.data) | uintptr_t(p.input.token * 2)) % 16 ||
      reinterpret_cast<uintptr_t>(p.values) % 16) {
    return "input, values: supported are contiguous features, addresses and strides that are multiples of 16 bytes";
  }
  const int64_t panels = std::max(w.rows, w.cols) / kSmallFeatures + 1;
  if (std::max(w.rows, w.cols) > int64_t(1) << 30 || w.nnz > int64_t(1) << 29 ||
      (p.tokens / kSmallTokens + 1) * panels > int64_t(1) << 30) {
    return "weight: supported are below 2^29 blocks";
  }
  // Fewer tiles than every other multiprocessor can have are better off narrower.
  const int64_t features = p.transposed ? w.cols : w.rows;
  const int64_t tiles =
      (p.tokens + kSmallTokens - 1) / kSmallTokens * ((features + kSmallFeatures - 1) / kSmallFeatures);
  if (features > 0 && 2 * tiles < context.multiprocessors) {
    return "tokens: supported are tiles of 128 x 256 features for every other multiprocessor";
  }
  SharedMemory card;
  if (!shared_memory_of_device(&card).ok()) return "the device's shared memory is unknown";
  if (small_blocks_shared_bytes(small_blocks_of(product_call(p))) > card.per_block - 1024) {
    return "weight: supported are up to about 100,000 columns";
  }
  return nullptr;
}

size_t workspace(const BlockSparseProduct& p, const CudaContext&) {
  return small_blocks_bytes(small_blocks_of(product_call(p)), p.pattern.nnz);
}

struct SmallKernel {
  void (*kernel)(SmallCall);
  int threads;
};
template <class Element>
SmallKernel kernel_of(int tiles) {
  if (tiles == 1) return {small_blocks_kernel<Element, 1>, SmallShape<1>::kThreads};
  return {small_blocks_kernel<Element, 2>, SmallShape<2>::kThreads};
}

Status product(const BlockSparseProduct& p, const CudaContext& context) {
  SmallCall arguments{};
  ProductCall& call = arguments.call;
  call = product_call(p);
  arguments.blocks = small_blocks_of(call);
  const size_t bytes = small_blocks_bytes(arguments.blocks, p.pattern.nnz);
  if (context.workspace_bytes < bytes) {
    return error(Status::Kind::invalid_argument, "workspace is %zu bytes; needed: %zu", context.workspace_bytes, bytes);
  }
  Status status = make_map(&arguments.x, p, call.inner);
  if (status.ok()) status = make_small_blocks(&arguments.blocks, call, context.workspace, context.stream);
  if (!status.ok()) return status;
  call.token_tiles = (p.tokens + kSmallTokens - 1) / kSmallTokens;
  arguments.tiles = int32_t(call.token_tiles * arguments.blocks.panels);
  const Output& out = call.out;
  arguments.plain = out.vectors && out.output.feature == 1 && out.features % 8 == 0 && !out.bias && !out.factor.data &&
                    out.activation == Activation::none;
  const SmallKernel kernel = p.dtype == DType::bf16 ? kernel_of<__nv_bfloat16>(arguments.blocks.tiles)
                                                    : kernel_of<__half>(arguments.blocks.tiles);
  const cudaError_t code = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel.kernel),
                                                cudaFuncAttributeMaxDynamicSharedMemorySize, kSmallSharedBytes);
  if (code != cudaSuccess) return status_of(code, "setting the product's shared memory");
  const unsigned ctas = unsigned(std::min<int64_t>(arguments.tiles, context.multiprocessors));
  kernel.kernel<<<ctas, unsigned(kernel.threads), kSmallSharedBytes, static_cast<cudaStream_t>(context.stream)>>>(
      arguments);
  return status_of(cudaGetLastError(), "launching the block-sparse product");
}

}  // namespace

const CudaMatmul matmul_cuda_small_blocks = {"small_blocks", refuses, workspace, product, nullptr, nullptr, nullptr};

}  // namespace sparsekit

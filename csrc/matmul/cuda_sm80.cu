// The host side of the mma.sync kernels, and their entry in the table of implementations: which kernel, and the launch.
#include <algorithm>

#include "common/cuda/launch.h"
#include "matmul/cuda_implementations.h"
#include "matmul/cuda_panels_sm80.cuh"
#include "matmul/cuda_product_sm80.cuh"
#include "matmul/cuda_sddmm_panels_sm80.cuh"
#include "matmul/cuda_sddmm_sm80.cuh"

namespace sparsekit {
namespace {

using namespace sparsekit::cuda;

uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

const char* refuses_pattern(const BlockSparsePattern& p, DType dtype) {
  if (dtype == DType::f64) return "float64 runs on the CPU only; supported: float32, float16, bfloat16";
  if (p.rows > INT32_MAX || p.cols > INT32_MAX) return "weight: supported are up to 2^31 - 1 rows and columns";
  return nullptr;
}

const char* refuses(const BlockSparseProduct& p, const CudaContext&) {
  if (p.gate) return "a gate is not in this implementation";
  if (p.scales) return "int8 weights run on the CPU only; supported: float32, float16, bfloat16";
  return refuses_pattern(p.pattern, p.dtype);
}
const char* refuses_sddmm(const BlockSddmm& s, const CudaContext&) { return refuses_pattern(s.pattern, s.dtype); }

bool aligned(const BlockSparseProduct& p) {
  const BlockSparsePattern& w = p.pattern;
  const int chunk = int(16 / size_of(p.dtype));
  return w.block_cols % chunk == 0 && (!p.transposed || w.block_rows % chunk == 0) && address(p.values) % 16 == 0 &&
         address(p.input.data) % 16 == 0 && (p.input.feature != 1 ? p.input.feature : p.input.token) % chunk == 0;
}

/// Whether at least one of `of` blocks is stored.
bool denser_than_one_in(int64_t of, const BlockSparsePattern& w) {
  return w.nnz * of >= w.row_blocks() * w.col_blocks();
}

/// Whether block rows share x (cuda_panels_sm80.cuh): small blocks, enough of them to share it (H200, TFLOP/s in panels
/// and by themselves: 16 x 16 at 5 / 20 / 50 % 22, 50, 70 and 24, 42, 49; 32 x 32: 33, 74, 118 and 49, 86, 100), enough
/// tokens for the merging of lists to pay and for a tile on every other multiprocessor.
bool takes_panels(const BlockSparseProduct& p, const CudaContext& context) {
  auto small = [](int size) { return size == 16 || size == 32; };
  if (p.dtype == DType::f32 || p.input.feature != 1 || !aligned(p)) return false;
  if (!small(p.pattern.block_rows) || !small(p.pattern.block_cols) || p.pattern.nnz > INT32_MAX) return false;
  const ProductCall call = product_call(p);
  if (!denser_than_one_in(call.list_size == 16 ? 10 : 3, p.pattern)) return false;
  const Panels panels = panels_of_product(call);
  SharedMemory card;
  if (!shared_memory_of_device(&card).ok() || card.per_block < kPanelSharedBytes + 4096) return false;
  const int64_t tiles = (p.tokens + kPanelTokens - 1) / kPanelTokens * panels.panels;
  return p.tokens >= 2 * kPanelTokens && 2 * tiles >= context.multiprocessors &&
         panels_shared_bytes(panels) <= card.per_block - 1024;
}

size_t workspace(const BlockSparseProduct& p, const CudaContext& context) {
  return takes_panels(p, context) ? panels_bytes(panels_of_product(product_call(p)), p.pattern.nnz) : 0;
}

Status product_of_panels(const BlockSparseProduct& p, const CudaContext& context) {
  ProductCall call = product_call(p);
  Panels panels = panels_of_product(call);
  if (context.workspace_bytes < panels_bytes(panels, p.pattern.nnz)) {
    return error(Status::Kind::invalid_argument, "workspace is %zu bytes; needed: %zu", context.workspace_bytes,
                 panels_bytes(panels, p.pattern.nnz));
  }
  Status status = make_panels(&panels, call, context.workspace, context.stream);
  if (!status.ok()) return status;
  call.lists = panels.panels;
  call.token_tiles = (p.tokens + kPanelTokens - 1) / kPanelTokens;
  const int64_t ctas = call.token_tiles * panels.panels;
  if (ctas > INT32_MAX) {
    return error(Status::Kind::unsupported, "block-sparse product of %lld tokens: supported are 2^31 - 1 tiles",
                 (long long)p.tokens);
  }
  const PanelKernel kernel = p.dtype == DType::bf16 ? panel_kernel_bf16(call.list_size, call.inner_size, p.transposed)
                                                    : panel_kernel_f16(call.list_size, call.inner_size, p.transposed);
  const cudaError_t code = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                cudaFuncAttributeMaxDynamicSharedMemorySize, kPanelSharedBytes);
  if (code != cudaSuccess) return status_of(code, "setting the product's shared memory");
  kernel<<<unsigned(ctas), kPanelThreads, kPanelSharedBytes, static_cast<cudaStream_t>(context.stream)>>>(call, panels);
  return status_of(cudaGetLastError(), "launching the block-sparse product");
}

ProductKernel choose(const BlockSparseProduct& p, const ProductChoice& choice) {
  if (p.dtype == DType::bf16) return product_kernel_bf16(choice);
  return p.dtype == DType::f16 ? product_kernel_f16(choice) : product_kernel_f32(choice);
}

Status product(const BlockSparseProduct& p, const CudaContext& context) {
  if (takes_panels(p, context)) return product_of_panels(p, context);
  ProductCall call = product_call(p);
  ProductChoice choice;
  choice.xt = p.input.feature != 1;
  choice.wt = p.transposed;
  choice.aligned = aligned(p);
  choice.few = p.tokens <= 32;
  choice.features = call.list_size;
  ProductKernel kernel = choose(p, choice);
  // Few tiles leave multiprocessors idle: then narrower ones.
  auto tiles = [&] {
    call.parts = (call.list_size + kernel.bn - 1) / kernel.bn;
    call.token_tiles = (p.tokens + kernel.bm - 1) / kernel.bm;
    return call.token_tiles * call.lists * call.parts;
  };
  while (tiles() < context.multiprocessors && choice.features > 32) {
    choice.features /= 2;
    kernel = choose(p, choice);
  }
  const int64_t ctas = tiles();
  if (ctas > INT32_MAX) {
    return error(Status::Kind::unsupported, "block-sparse product of %lld tokens: supported are 2^31 - 1 tiles",
                 (long long)p.tokens);
  }
  const cudaError_t code = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel.kernel),
                                                cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes);
  if (code != cudaSuccess) return status_of(code, "setting the product's shared memory");
  kernel.kernel<<<unsigned(ctas), unsigned(kernel.threads), size_t(kernel.shared_bytes),
                  static_cast<cudaStream_t>(context.stream)>>>(call);
  return status_of(cudaGetLastError(), "launching the block-sparse product");
}

ProductCall call_of(const BlockSddmm& s) {
  BlockSparseProduct product;
  product.pattern = s.pattern;
  product.dtype = s.dtype;
  return product_call(product);
}

Panels panels_of_sddmm(const BlockSddmm& s) { return panels_of(call_of(s), kSampledWindow, kSampledSlots); }

/// Whether blocks of many rows and columns share a and b (cuda_sddmm_panels_sm80.cuh): blocks of 16, enough of them in
/// 256 rows x 512 columns (below a tenth, loading both for few blocks costs more than it shares), and a loop that is
/// long enough for the merging of lists to pay. At 20 % 70 TFLOP/s on an H200, block rows by themselves 58.
bool takes_panels(const BlockSddmm& s) {
  const BlockSparsePattern& w = s.pattern;
  if (s.dtype == DType::f32 || w.block_rows != 16 || w.block_cols != 16 || w.nnz > INT32_MAX) return false;
  if (s.a_row != 1 || s.b_col != 1 || s.a_inner % 8 || s.b_inner % 8 || s.inner < 256) return false;
  if ((address(s.a) | address(s.b)) % 16 || address(s.values) % 4) return false;
  SharedMemory card;
  if (!shared_memory_of_device(&card).ok() || card.per_block < kSampledSharedBytes + 4096) return false;
  return denser_than_one_in(10, w) && panels_shared_bytes(panels_of_sddmm(s)) <= card.per_block - 1024;
}

size_t workspace_sddmm(const BlockSddmm& s, const CudaContext&) {
  return takes_panels(s) ? panels_bytes(panels_of_sddmm(s), s.pattern.nnz) : 0;
}

Status sddmm_of_panels(const BlockSddmm& s, const CudaContext& context) {
  const BlockSparsePattern& w = s.pattern;
  Panels panels = panels_of_sddmm(s);
  if (context.workspace_bytes < panels_bytes(panels, w.nnz)) {
    return error(Status::Kind::invalid_argument, "workspace is %zu bytes; needed: %zu", context.workspace_bytes,
                 panels_bytes(panels, w.nnz));
  }
  const cudaStream_t stream = static_cast<cudaStream_t>(context.stream);
  // Blocks whose column is out of range are in no list.
  cudaMemsetAsync(s.values, 0, size_t(w.nnz * w.block_rows * w.block_cols * size_of(s.dtype)), stream);
  Status status = make_panels(&panels, call_of(s), context.workspace, context.stream);
  if (!status.ok()) return status;
  if (panels.most_steps > INT32_MAX) return error(Status::Kind::unsupported, "block_sddmm: more than 2^31 - 1 tiles");
  const SampledKernel kernel = sampled_kernel_of(s.dtype);
  const cudaError_t code = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                cudaFuncAttributeMaxDynamicSharedMemorySize, kSampledSharedBytes);
  if (code != cudaSuccess) return status_of(code, "setting block_sddmm's shared memory");
  kernel<<<unsigned(panels.most_steps), kSampledThreads, kSampledSharedBytes, stream>>>(s, panels);
  return status_of(cudaGetLastError(), "launching block_sddmm");
}

Status sddmm(const BlockSddmm& s, const CudaContext& context) {
  if (takes_panels(s)) return sddmm_of_panels(s, context);
  const BlockSparsePattern& w = s.pattern;
  const int chunk = int(16 / size_of(s.dtype));
  SddmmChoice choice;
  choice.at = s.a_inner != 1;
  choice.bt = s.b_col == 1;
  choice.aligned = address(s.a) % 16 == 0 && address(s.b) % 16 == 0 && (choice.at ? s.a_inner : s.a_row) % chunk == 0 &&
                   (choice.bt ? s.b_inner : s.b_col) % chunk == 0 && (!choice.at || w.block_rows % chunk == 0) &&
                   (!choice.bt || w.block_cols % chunk == 0);
  choice.rows = w.block_rows;
  const SddmmKernel kernel = s.dtype == DType::bf16  ? sddmm_kernel_bf16(choice)
                             : s.dtype == DType::f16 ? sddmm_kernel_f16(choice)
                                                     : sddmm_kernel_f32(choice);
  const int64_t tiles = first_tile(w.nnz, w.row_blocks(), w.block_cols, kernel.bn);
  if (tiles > INT32_MAX || s.inner > int64_t(INT32_MAX) * 16) {
    return error(Status::Kind::unsupported, "block_sddmm of %lld blocks: supported are 2^31 - 1 tiles",
                 (long long)w.nnz);
  }
  const cudaError_t code = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel.kernel),
                                                cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes);
  if (code != cudaSuccess) return status_of(code, "setting block_sddmm's shared memory");
  const dim3 grid(unsigned(tiles), unsigned((w.block_rows + kernel.bm - 1) / kernel.bm));
  kernel.kernel<<<grid, unsigned(kernel.threads), size_t(kernel.shared_bytes),
                  static_cast<cudaStream_t>(context.stream)>>>(s);
  return status_of(cudaGetLastError(), "launching block_sddmm");
}

}  // namespace

const CudaMatmul matmul_cuda_sm80 = {"sm80", refuses, workspace, product, refuses_sddmm, workspace_sddmm, sddmm};

}  // namespace sparsekit

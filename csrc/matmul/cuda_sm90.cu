// The host side of the Hopper kernels, and their entry in the table of implementations: which problems they take, the
// tensor maps, and the launch.
#include <algorithm>

#include "common/cuda/launch.h"
#include "common/cuda/tensor_map.h"
#include "matmul/cuda_implementations.h"
#include "matmul/cuda_product_sm90.cuh"
#include "matmul/cuda_sddmm_sm90.cuh"

namespace sparsekit {
namespace {

using namespace sparsekit::cuda;

constexpr int64_t kMostRows = int64_t(1) << 30;  // coordinates are 32 bits, kNowhere is -2^30
constexpr int64_t kFewTokens = 64;               // at most these leave most of a tile of 256 empty

bool aligned(const void* data, int64_t stride) {
  return (reinterpret_cast<uintptr_t>(data) | uintptr_t(2 * stride)) % 16 == 0;
}

const char* refuses_pattern(const BlockSparsePattern& w, DType dtype, const CudaContext& context) {
  if (context.compute_capability != 90) return "needs a GPU of compute capability 9.0 (Hopper)";
  if (dtype != DType::bf16 && dtype != DType::f16) return "dtype: supported are float16, bfloat16";
  if (w.block_rows % 64 || w.block_cols % 64) return "values: supported are blocks of multiples of 64";
  if (std::max({w.rows, w.cols, w.nnz * w.block_rows}) >= kMostRows) return "weight: supported are below 2^30 rows";
  return nullptr;
}

const char* refuses(const BlockSparseProduct& p, const CudaContext& context) {
  const BlockSparsePattern& w = p.pattern;
  if (p.scales) return "int8 weights run on the CPU only";
  if (const char* reason = refuses_pattern(w, p.dtype, context)) return reason;
  if ((p.transposed ? w.rows : w.cols) % (p.transposed ? w.block_rows : w.block_cols)) {
    return "weight: supported are whole blocks along the contraction";
  }
  if (p.tokens <= kFewTokens || p.tokens >= kMostRows) return "tokens: supported are more than 64";
  if (!aligned(p.values, 0) || !aligned(p.input.data, p.input.feature == 1 ? p.input.token : p.input.feature)) {
    return "input, values: supported are addresses and strides that are multiples of 16 bytes";
  }
  const int64_t features = p.transposed ? w.cols : w.rows;
  if ((p.tokens / 256 + 1) * (features / 64 + 1) >= INT32_MAX / 4) return "tokens: supported are below 2^29 tiles";
  if (!p.gate) return nullptr;
  const BlockSparsePattern& g = p.gate->pattern;
  if (const char* reason = refuses_pattern(g, p.dtype, context)) return reason;
  const Output out = output_of(p);
  if (p.transposed || p.input.feature != 1 || p.bias || p.factor.data || !out.vectors || out.output.feature != 1) {
    return "gate: supported is x W^T with contiguous, aligned rows, without bias and factor";
  }
  if (g.block_rows != w.block_rows || g.cols % g.block_cols || !aligned(p.gate->values, 0)) {
    return "gate: supported are whole blocks with as many rows as W's";
  }
  return nullptr;
}

const char* refuses_sddmm(const BlockSddmm& s, const CudaContext& context) {
  const BlockSparsePattern& w = s.pattern;
  if (const char* reason = refuses_pattern(w, s.dtype, context)) return reason;
  if (w.rows % w.block_rows || w.cols % w.block_cols) return "pattern: supported are whole blocks";
  if (s.inner < 64 || s.inner >= kMostRows) return "a, b: supported are inner dimensions of 64 and more";
  if (!aligned(s.a, s.a_inner == 1 ? s.a_row : s.a_inner) || !aligned(s.b, s.b_col == 1 ? s.b_inner : s.b_col) ||
      !aligned(s.values, 0)) {
    return "a, b: supported are addresses and strides that are multiples of 16 bytes";
  }
  return nullptr;
}

size_t workspace(const BlockSparseProduct&, const CudaContext&) { return 0; }
size_t workspace_sddmm(const BlockSddmm&, const CudaContext&) { return 0; }

/// A matrix of `rows` rows with `columns` contiguous columns, in boxes of 64 columns x `box_rows` rows.
Status make_map(CUtensorMap* map, const void* data, int64_t rows, int64_t columns, int64_t stride, DType dtype,
                int box_rows, const void* stand_in) {
  InputView view;
  view.data = data;
  view.row = stride;
  return make_tensor_map(map, view, dtype, 1, 1, rows, columns, box_rows, stand_in);
}

template <class Kernel, class Arguments>
Status launch(const Kernel& kernel, const Arguments& arguments, dim3 grid, const CudaContext& context,
              const char* what) {
  const cudaError_t code = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel.kernel),
                                                cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes);
  if (code != cudaSuccess) return status_of(code, "setting the shared memory of a block-sparse product");
  kernel.kernel<<<grid, unsigned(kThreads90), size_t(kernel.shared_bytes), static_cast<cudaStream_t>(context.stream)>>>(
      arguments);
  return status_of(cudaGetLastError(), what);
}

Status product(const BlockSparseProduct& p, const CudaContext& context) {
  const BlockSparsePattern& w = p.pattern;
  ProductCall90 arguments{};
  ProductCall& call = arguments.call;
  call = product_call(p);
  const bool split = call.list_size % 128 == 0, tb = p.input.feature != 1;
  const int m = split ? Step<true>::kM : Step<false>::kM, n = split ? Step<true>::kN : Step<false>::kN;
  call.parts = call.list_size / m;
  call.token_tiles = (p.tokens + n - 1) / n;
  arguments.tiles = int32_t(call.token_tiles * call.lists * call.parts);

  const Output& out = call.out;
  const bool vectors = out.output.feature == 1 && out.vectors && !out.factor.data;
  const bool finished = !out.bias && out.activation == Activation::none;
  Mode mode = Mode::any;
  if (p.gate) {
    mode = Mode::gated;
  } else if (vectors && !finished && !p.transposed && !tb) {
    mode = Mode::finishing;
  }
  arguments.plain = vectors && (finished || mode != Mode::any);
  Status status =
      tb ? make_map(&arguments.x, p.input.data, call.inner, p.tokens, p.input.feature, p.dtype, 64, out.output.data)
         : make_map(&arguments.x, p.input.data, p.tokens, call.inner, p.input.token, p.dtype, 256, out.output.data);
  if (status.ok()) {
    status = make_map(&arguments.w, p.values, w.nnz * w.block_rows, w.block_cols, w.block_cols, p.dtype,
                      p.transposed ? 64 : m, out.output.data);
  }
  if (status.ok() && arguments.plain) {
    status =
        make_map(&arguments.y, out.output.data, p.tokens, out.features, out.output.token, p.dtype, 32, out.output.data);
  }
  if (status.ok() && p.gate) {
    BlockSparseProduct other = p;
    other.pattern = p.gate->pattern;
    other.values = p.gate->values;
    arguments.gate = product_call(other);
    const BlockSparsePattern& g = other.pattern;
    status = make_map(&arguments.gate_w, other.values, g.nnz * g.block_rows, g.block_cols, g.block_cols, p.dtype, m,
                      out.output.data);
  }
  if (!status.ok()) return status;
  const unsigned ctas = unsigned(std::min<int64_t>(arguments.tiles, context.multiprocessors));
  const ProductKernel90 kernel = p.dtype == DType::bf16 ? product_kernel_90_bf16(p.transposed, tb, split, mode)
                                                        : product_kernel_90_f16(p.transposed, tb, split, mode);
  return launch(kernel, arguments, dim3(ctas), context, "launching the block-sparse product");
}

Status sddmm(const BlockSddmm& s, const CudaContext& context) {
  const BlockSparsePattern& w = s.pattern;
  SddmmCall90 arguments{};
  arguments.call = s;
  const bool split = w.block_rows % 128 == 0, ta = s.a_inner != 1, tb = s.b_col == 1;
  const int m = split ? Step<true>::kM : Step<false>::kM, n = split ? Step<true>::kN : Step<false>::kN;
  Status status = ta ? make_map(&arguments.a, s.a, s.inner, w.rows, s.a_inner, s.dtype, 64, s.values)
                     : make_map(&arguments.a, s.a, w.rows, s.inner, s.a_row, s.dtype, 64, s.values);
  if (status.ok()) {
    status = tb ? make_map(&arguments.b, s.b, s.inner, w.cols, s.b_inner, s.dtype, 64, s.values)
                : make_map(&arguments.b, s.b, w.cols, s.inner, s.b_col, s.dtype, 64, s.values);
  }
  if (!status.ok()) return status;
  const dim3 grid(unsigned(first_tile(w.nnz, w.row_blocks(), w.block_cols, n)), unsigned(w.block_rows / m));
  const SddmmKernel90 kernel =
      s.dtype == DType::bf16 ? sddmm_kernel_90_bf16(ta, tb, split) : sddmm_kernel_90_f16(ta, tb, split);
  return launch(kernel, arguments, grid, context, "launching block_sddmm");
}

}  // namespace

const CudaMatmul matmul_cuda_sm90 = {"sm90", refuses, workspace, product, refuses_sddmm, workspace_sddmm, sddmm};

}  // namespace sparsekit

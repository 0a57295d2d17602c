// y = factor * act(x W^T + bias) of 1 to 16 tokens (decode): every stored weight is read once, 16 bytes at a time,
// straight into the operands of mma.sync (sm_80 and later). With a gate: act(x G^T) * (x W^T) in one pass.
//
// Weights are the A operand: a warp multiplies 16 rows of a block row (a slab) with 32 numbers of the contraction (the
// row's blocks one after the other). Which numbers an mma calls k is free as long as both operands agree: lane (g, t)
// takes the 8 numbers from 8 t on of rows g and g + 8, and of token g, as two products of 16. So nothing goes through
// shared memory but the list of columns, read at once, and the partial sums of the warps, which take turns along the
// contraction and are added in their order. Half of the warps take the gate.
//
// Bound: memory, the stored weights (x stays in L1 and L2). What it takes is loads in flight: four turns of a warp, 4
// KB, are loaded before any is multiplied, and the more warps a slab has the fewer slabs there are. In a second product
// that `follows`, weights are on their way before the first has ended (programmatic dependent launch, 9.0).
#include "common/cuda/launch.h"
#include "matmul/cuda_epilogue.cuh"
#include "matmul/cuda_implementations.h"

namespace sparsekit {
namespace {

using namespace sparsekit::cuda;

constexpr int kUnroll = 4, kMostTokens = 16;
constexpr int kColumns = 1024;  // of a list that are in shared memory at a time

struct FewTokensCall {
  BlockSparsePattern pattern[2];  // W, and the gate
  const void* values[2];
  TokensView<const void*> input;
  Output out;
  int slabs;  // of 16 rows in a block
};

/// 16 bytes that are read once, or zeros. volatile: loads stay together, before the products.
__device__ __forceinline__ uint4 load_once(const void* from, bool there) {
  uint4 v;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@p ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {%0, %1, %2, %3}, [%4];\n}\n"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(from), "r"(int(there)));
  return v;
}
/// 16 bytes of x: written by a kernel that may still run when this one begins, so not through the read-only path.
__device__ __forceinline__ uint4 load_tokens(const void* from, bool there) {
  uint4 v;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@p ld.global.v4.b32 {%0, %1, %2, %3}, [%4];\n}\n"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(from), "r"(int(there)));
  return v;
}
__device__ __forceinline__ void pin(uint4& v) { asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)); }

/// Until the kernel before has ended and its results are visible; nothing where this one was launched after its end.
__device__ __forceinline__ void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}
/// From here on the next kernel may start beside this one (which itself began after all before it).
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// GROUPS: of 8 tokens. WARPS: of a list.
template <class Element, int GROUPS, int WARPS, bool GATED>
__global__ void __launch_bounds__(32 * WARPS * (GATED ? 2 : 1)) few_tokens(const __grid_constant__ FewTokensCall call) {
  constexpr int kLists = GATED ? 2 : 1, kThreads = 32 * WARPS * kLists;
  __shared__ float partial[kLists][WARPS][16][8 * GROUPS];
  __shared__ int32_t features[kLists][kColumns];  // the first feature of each block, or -1
  const int which = int(threadIdx.x) / (32 * WARPS), thread = int(threadIdx.x) % (32 * WARPS);
  const int warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  const BlockSparsePattern& pattern = call.pattern[which];
  const int R = pattern.block_rows, C = pattern.block_cols;
  const int64_t block_row = blockIdx.x / unsigned(call.slabs);
  const int first = int(blockIdx.x % unsigned(call.slabs)) * 16;
  const Element* values = static_cast<const Element*>(call.values[which]);
  const Element* x = static_cast<const Element*>(call.input.data);
  const bool low = first + g < R, high = first + g + 8 < R;
  const int64_t col_blocks = (pattern.cols + C - 1) / C;
  const int tokens = int(call.out.tokens);

  const Extent list = list_extent(pattern.crow, block_row, pattern.nnz);
  int64_t longest = list.end - list.begin;
  if constexpr (GATED) {
    const Extent other = list_extent(call.pattern[1 - which].crow, block_row, call.pattern[1 - which].nnz);
    longest = max(longest, other.end - other.begin);
  }
  constexpr int kStride = WARPS * 32;
  const int skip = kStride / C, skip_within = kStride % C;
  float sums[GROUPS][4] = {};
  bool waited = false;
  for (int64_t begin = 0; begin < longest; begin += kColumns) {
    const int count = int(min(max(list.end - list.begin - begin, int64_t(0)), int64_t(kColumns)));
    if (begin > 0) __syncthreads();
    for (int i = thread; i < count; i += 32 * WARPS) {
      const int64_t column = index_at(pattern.col, list.begin + begin + i);
      features[which][i] = column >= 0 && column < col_blocks ? int32_t(column * C) : -1;
    }
    __syncthreads();
    // This lane's place in the contraction: block `block` of these, number `within` of it.
    int block = (warp * 32 + t * 8) / C, within = (warp * 32 + t * 8) % C;
    const Element* rows = values + ((list.begin + begin) * R + first + g) * C;
    const int turns = (count * C + kStride - 1) / kStride;
    for (int turn = 0; turn < turns; turn += kUnroll) {
      uint4 upper[kUnroll], lower[kUnroll], of_tokens[kUnroll][GROUPS];
      int32_t feature[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        feature[u] = block < count ? features[which][block] : -1;
        if (feature[u] >= 0) feature[u] += within;
        const bool valid = feature[u] >= 0 && feature[u] < pattern.cols;
        if (!valid) feature[u] = -1;
        const Element* from = rows + int64_t(block) * R * C + within;
        upper[u] = load_once(from, valid && low);
        lower[u] = load_once(from + 8 * C, valid && high);
        block += skip, within += skip_within;
        if (within >= C) within -= C, ++block;
      }
      if (!waited) wait_for_kernel_before(), let_next_kernel_start(), waited = true;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
#pragma unroll
        for (int j = 0; j < GROUPS; ++j) {
          const int token = 8 * j + g;
          of_tokens[u][j] = load_tokens(x + token * call.input.token + feature[u], feature[u] >= 0 && token < tokens);
        }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        pin(upper[u]), pin(lower[u]);
#pragma unroll
        for (int j = 0; j < GROUPS; ++j) pin(of_tokens[u][j]);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const uint32_t a0[4] = {upper[u].x, lower[u].x, upper[u].y, lower[u].y};
        const uint32_t a1[4] = {upper[u].z, lower[u].z, upper[u].w, lower[u].w};
#pragma unroll
        for (int j = 0; j < GROUPS; ++j) {
          mma_m16n8k16<Element>(sums[j], a0, of_tokens[u][j].x, of_tokens[u][j].y);
          mma_m16n8k16<Element>(sums[j], a1, of_tokens[u][j].z, of_tokens[u][j].w);
        }
      }
    }
  }
  if (!waited) wait_for_kernel_before(), let_next_kernel_start();
#pragma unroll
  for (int j = 0; j < GROUPS; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) partial[which][warp][g + e / 2 * 8][8 * j + 2 * t + e % 2] = sums[j][e];
  __syncthreads();
  for (int i = int(threadIdx.x); i < 16 * 8 * GROUPS; i += kThreads) {
    const int row = i % 16, token = i / 16;
    const int64_t feature = block_row * R + first + row;
    if (first + row >= R || feature >= call.out.features || token >= tokens) continue;
    float sum = 0.f, gate = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += partial[0][w][row][token];
    if constexpr (GATED) {
#pragma unroll
      for (int w = 0; w < WARPS; ++w) gate += partial[1][w][row][token];
      sum *= to_float(from_float<Element>(activate(call.out.activation, gate)));
    } else {
      sum = finish<Element>(call.out, sum, token, feature);
    }
    Element* to = static_cast<Element*>(call.out.output.data);
    to[token * call.out.output.token + feature * call.out.output.feature] = from_float<Element>(sum);
  }
}

const char* refuses_weight(const BlockSparsePattern& w, const void* values) {
  if (w.block_cols % 8 || w.cols % 8) return "columns of W and its blocks: supported are multiples of 8";
  if (w.cols > INT32_MAX) return "weight: supported are up to 2^31 - 1 columns";
  return reinterpret_cast<uintptr_t>(values) % 16 ? "values: supported are addresses of 16 bytes" : nullptr;
}

const char* refuses(const BlockSparseProduct& p, const CudaContext&) {
  if (p.dtype != DType::bf16 && p.dtype != DType::f16) return "dtype: supported are float16, bfloat16";
  if (p.scales) return "int8 weights run on the CPU only";
  if (p.transposed) return "transposed weights are not in this implementation";
  if (p.tokens > kMostTokens) return "tokens: supported are 1 to 16";
  if (p.gate && (p.gate->pattern.block_rows != p.pattern.block_rows || p.bias || p.factor.data)) {
    return "gate: supported are blocks of as many rows, without bias and factor";
  }
  const char* reason = refuses_weight(p.pattern, p.values);
  if (!reason && p.gate) reason = refuses_weight(p.gate->pattern, p.gate->values);
  if (reason) return reason;
  if (p.input.feature != 1) return "input: supported are contiguous features";
  if (reinterpret_cast<uintptr_t>(p.input.data) % 16 || p.input.token % 8) {
    return "input: supported are rows at multiples of 16 bytes";
  }
  return nullptr;
}

size_t workspace(const BlockSparseProduct&, const CudaContext&) { return 0; }

template <class Element, int GROUPS, int WARPS, bool GATED>
Status launch(const FewTokensCall& call, unsigned ctas, bool follows, const CudaContext& context) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(ctas);
  config.blockDim = dim3(32 * WARPS * (GATED ? 2 : 1));
  config.stream = static_cast<cudaStream_t>(context.stream);
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  config.numAttrs = follows && context.compute_capability == 90 ? 1 : 0;
  return status_of(cudaLaunchKernelEx(&config, few_tokens<Element, GROUPS, WARPS, GATED>, call),
                   "launching the block-sparse product of few tokens");
}
template <class Element, int WARPS, bool GATED>
Status launch(const FewTokensCall& call, unsigned ctas, bool follows, const CudaContext& context) {
  return call.out.tokens <= 8 ? launch<Element, 1, WARPS, GATED>(call, ctas, follows, context)
                              : launch<Element, 2, WARPS, GATED>(call, ctas, follows, context);
}
template <class Element>
Status launch(const FewTokensCall& call, unsigned ctas, bool gated, bool follows, const CudaContext& context) {
  // About 32 warps for each multiprocessor.
  const bool many = int64_t(ctas) * 8 < int64_t(context.multiprocessors) * 24;
  if (gated) {
    return many ? launch<Element, 8, true>(call, ctas, follows, context)
                : launch<Element, 4, true>(call, ctas, follows, context);
  }
  return many ? launch<Element, 16, false>(call, ctas, follows, context)
              : launch<Element, 4, false>(call, ctas, follows, context);
}

Status product(const BlockSparseProduct& p, const CudaContext& context) {
  FewTokensCall call;
  call.pattern[0] = p.pattern;
  call.values[0] = p.values;
  call.pattern[1] = p.gate ? p.gate->pattern : p.pattern;
  call.values[1] = p.gate ? p.gate->values : p.values;
  call.input = p.input;
  call.out = output_of(p);
  call.slabs = (p.pattern.block_rows + 15) / 16;
  const int64_t ctas = p.pattern.row_blocks() * call.slabs;
  if (ctas > INT32_MAX) return error(Status::Kind::unsupported, "weight has %lld rows", (long long)p.pattern.rows);
  if (p.dtype == DType::bf16) return launch<__nv_bfloat16>(call, unsigned(ctas), p.gate, p.follows, context);
  return launch<__half>(call, unsigned(ctas), p.gate, p.follows, context);
}

}  // namespace

const CudaMatmul matmul_cuda_few_tokens = {"few_tokens", refuses, workspace, product, nullptr, nullptr, nullptr};

}  // namespace sparsekit

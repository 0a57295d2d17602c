// y = factor * act(x W^T + bias) of 1 to 16 tokens (decode): every stored weight is read once, 16 bytes at a time,
// straight into the operands of mma.sync (sm_80 and later).
//
// Weights are the A operand: a warp multiplies 16 rows of a block row with 32 numbers of the contraction (the row's
// blocks one after the other). Which numbers an mma calls k is free as long as both operands agree: lane (g, t) takes
// the 8 numbers from 8 t on of rows g and g + 8, and of token g, as two products of 16. So nothing goes through shared
// memory but the partial sums of the CTA's warps, which take turns along the contraction and are added in their order.
//
// Bound: memory, the stored weights (x stays in L1 and L2).
#include "common/cuda/launch.h"
#include "matmul/cuda_epilogue.cuh"
#include "matmul/cuda_implementations.h"

namespace sparsekit {
namespace {

using namespace sparsekit::cuda;

constexpr int kWarps = 8, kUnroll = 4, kMostTokens = 16;

struct FewTokensCall {
  BlockSparsePattern pattern;
  const void* values;
  TokensView<const void*> input;
  Output out;
  int64_t col_blocks;
  int slabs;  // of 16 rows in a block
};

template <class Element, int GROUPS>  // groups of 8 tokens
__global__ void __launch_bounds__(32 * kWarps) few_tokens(const __grid_constant__ FewTokensCall call) {
  __shared__ float partial[kWarps][16][8 * GROUPS];
  const BlockSparsePattern& pattern = call.pattern;
  const int R = pattern.block_rows, C = pattern.block_cols;
  const int64_t block_row = blockIdx.x / unsigned(call.slabs);
  const int first = int(blockIdx.x % unsigned(call.slabs)) * 16;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const Extent list = list_extent(pattern.crow, block_row, pattern.nnz);
  const Element* values = static_cast<const Element*>(call.values);
  const Element* x = static_cast<const Element*>(call.input.data);
  const bool low = first + g < R, high = first + g + 8 < R;

  // This lane's place in the contraction: block `block` of the row, number `within` of it.
  const int64_t blocks = list.end - list.begin;
  int64_t block = (warp * 32 + t * 8) / C;
  int within = (warp * 32 + t * 8) % C;
  constexpr int kStride = kWarps * 32;
  const int skip = kStride / C, skip_within = kStride % C;

  float sums[GROUPS][4] = {};
  const int64_t turns = (blocks * C + kStride - 1) / kStride;
  for (int64_t turn = 0; turn < turns; turn += kUnroll) {
    uint4 upper[kUnroll], lower[kUnroll], tokens[kUnroll][GROUPS];
    int64_t weight[kUnroll], feature[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      feature[u] = -1, weight[u] = 0;
      if (block < blocks) {
        const int64_t column = index_at(pattern.col, list.begin + block);
        if (column >= 0 && column < call.col_blocks && column * C + within < pattern.cols) {
          feature[u] = column * C + within;
          weight[u] = ((list.begin + block) * R + first + g) * C + within;
        }
      }
      block += skip, within += skip_within;
      if (within >= C) within -= C, ++block;
    }
    const uint4 zero = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const bool valid = feature[u] >= 0;
      upper[u] = valid && low ? __ldcs(reinterpret_cast<const uint4*>(values + weight[u])) : zero;
      lower[u] = valid && high ? __ldcs(reinterpret_cast<const uint4*>(values + weight[u] + int64_t(8) * C)) : zero;
#pragma unroll
      for (int j = 0; j < GROUPS; ++j) {
        const int64_t token = 8 * j + g;
        const bool there = valid && token < call.out.tokens;
        tokens[u][j] = there ? __ldg(reinterpret_cast<const uint4*>(x + token * call.input.token + feature[u])) : zero;
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const uint32_t a0[4] = {upper[u].x, lower[u].x, upper[u].y, lower[u].y};
      const uint32_t a1[4] = {upper[u].z, lower[u].z, upper[u].w, lower[u].w};
#pragma unroll
      for (int j = 0; j < GROUPS; ++j) {
        mma_m16n8k16<Element>(sums[j], a0, tokens[u][j].x, tokens[u][j].y);
        mma_m16n8k16<Element>(sums[j], a1, tokens[u][j].z, tokens[u][j].w);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < GROUPS; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) partial[warp][g + e / 2 * 8][8 * j + 2 * t + e % 2] = sums[j][e];
  __syncthreads();
  for (int i = int(threadIdx.x); i < 16 * 8 * GROUPS; i += 32 * kWarps) {
    const int row = i % 16, token = i / 16;
    const int64_t feature = block_row * R + first + row;
    if (first + row >= R || feature >= call.out.features || token >= call.out.tokens) continue;
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += partial[w][row][token];
    Element* to = static_cast<Element*>(call.out.output.data);
    to[token * call.out.output.token + feature * call.out.output.feature] =
        from_float<Element>(finish<Element>(call.out, sum, token, feature));
  }
}

const char* refuses(const BlockSparseProduct& p, const CudaContext&) {
  if (p.dtype != DType::bf16 && p.dtype != DType::f16) return "dtype: supported are float16, bfloat16";
  if (p.transposed) return "transposed weights are not in this implementation";
  if (p.tokens > kMostTokens) return "tokens: supported are 1 to 16";
  if (p.pattern.block_cols % 8 || p.pattern.cols % 8)
    return "columns of W and its blocks: supported are multiples of 8";
  if (p.input.feature != 1) return "input: supported are contiguous features";
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(p.values) | reinterpret_cast<uintptr_t>(p.input.data);
  if (addresses % 16 || p.input.token % 8) return "input, values: supported are rows that are multiples of 16 bytes";
  return nullptr;
}

size_t workspace(const BlockSparseProduct&, const CudaContext&) { return 0; }

template <class Element>
void launch(const FewTokensCall& call, unsigned ctas, cudaStream_t stream) {
  if (call.out.tokens <= 8) {
    few_tokens<Element, 1><<<ctas, 32 * kWarps, 0, stream>>>(call);
  } else {
    few_tokens<Element, 2><<<ctas, 32 * kWarps, 0, stream>>>(call);
  }
}

Status product(const BlockSparseProduct& p, const CudaContext& context) {
  FewTokensCall call;
  call.pattern = p.pattern;
  call.values = p.values;
  call.input = p.input;
  call.out = output_of(p);
  call.col_blocks = p.pattern.col_blocks();
  call.slabs = (p.pattern.block_rows + 15) / 16;
  const int64_t ctas = p.pattern.row_blocks() * call.slabs;
  if (ctas > INT32_MAX) return error(Status::Kind::unsupported, "weight has %lld rows", (long long)p.pattern.rows);
  const cudaStream_t stream = static_cast<cudaStream_t>(context.stream);
  if (p.dtype == DType::bf16) {
    launch<__nv_bfloat16>(call, unsigned(ctas), stream);
  } else {
    launch<__half>(call, unsigned(ctas), stream);
  }
  return status_of(cudaGetLastError(), "launching the block-sparse product of few tokens");
}

}  // namespace

const CudaMatmul matmul_cuda_few_tokens = {"few_tokens", refuses, workspace, product, nullptr, nullptr};

}  // namespace sparsekit

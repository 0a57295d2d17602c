// The pattern of a block-sparse weight seen from its columns: a counting sort of its blocks by column.
//
// The blocks are cut into chunks, one warp each. A histogram per chunk, scans over chunks and over columns, and every
// warp places its blocks in order (lanes with the same column rank themselves by __match_any_sync): rows ascend inside
// a column, and the result is the same every time. Entries with a column or row out of range are left out; the places
// that stay empty hold -1, which the products skip.
//
// Bound: latency, five short passes; once per pattern.
#include <algorithm>

#include "common/cuda/launch.h"
#include "matmul/cuda_tiles.cuh"
#include "sparsekit/attention.h"

namespace sparsekit {
namespace {

using namespace sparsekit::cuda;

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kScanThreads = 1024, kPlaceWarps = 4;

struct TransposePlan {
  BlockSparsePattern pattern;
  int64_t row_blocks, col_blocks;
  int64_t chunks, chunk;  // their number, and blocks in each
  int32_t* histogram;     // [chunks, col_blocks]: counts, then where the chunk's blocks begin in their column
  int32_t* totals;        // [col_blocks]
};

TransposePlan plan_of(const TransposeBlockSparse& t) {
  TransposePlan plan = {};
  plan.pattern = t.pattern;
  plan.row_blocks = t.pattern.row_blocks();
  plan.col_blocks = t.pattern.col_blocks();
  // At least 128 blocks for a warp, at most 1,024 warps, and a histogram of at most 64 MB.
  const int64_t most = std::max<int64_t>(1, std::min<int64_t>(1024, (int64_t(16) << 20) / (plan.col_blocks + 1)));
  plan.chunk = std::max<int64_t>(128, (t.pattern.nnz + most - 1) / most);
  plan.chunks = (t.pattern.nnz + plan.chunk - 1) / plan.chunk;
  return plan;
}

size_t words_of(const TransposePlan& plan) { return size_t((plan.chunks + 1) * plan.col_blocks); }

/// The column of block p, or -1.
__device__ int64_t column_of(const TransposePlan& plan, int64_t p, int64_t end) {
  if (p >= end) return -1;
  const int64_t column = index_at(plan.pattern.col, p);
  return column >= 0 && column < plan.col_blocks ? column : -1;
}

/// The row whose extent holds block p, or -1.
__device__ int64_t row_of(const TransposePlan& plan, int64_t p) {
  int64_t low = 0, high = plan.row_blocks;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (index_at(plan.pattern.crow, middle) <= p ? low : high) = middle;
  }
  const Extent extent = list_extent(plan.pattern.crow, low, plan.pattern.nnz);
  return p >= extent.begin && p < extent.end ? low : -1;
}

__global__ void count_columns(TransposePlan plan) {
  const int64_t chunk = int64_t(blockIdx.x) * kPlaceWarps + threadIdx.x / 32;
  if (chunk >= plan.chunks) return;
  const int64_t end = min((chunk + 1) * plan.chunk, plan.pattern.nnz);
  for (int64_t p = chunk * plan.chunk + threadIdx.x % 32; p < end; p += 32) {
    const int64_t column = row_of(plan, p) < 0 ? -1 : column_of(plan, p, end);
    if (column >= 0) atomicAdd(&plan.histogram[chunk * plan.col_blocks + column], 1);
  }
}

__global__ void scan_chunks(TransposePlan plan) {
  const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= plan.col_blocks) return;
  int32_t sum = 0;
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    int32_t& at = plan.histogram[chunk * plan.col_blocks + column];
    const int32_t count = at;
    at = sum;
    sum += count;
  }
  plan.totals[column] = sum;
}

template <class Int>
__global__ void __launch_bounds__(kScanThreads) scan_columns(TransposePlan plan, Int* ccol) {
  __shared__ int64_t warp_sums[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  auto scan_warp = [lane](int64_t value) {
    for (int step = 1; step < 32; step *= 2) {
      const int64_t other = __shfl_up_sync(kAllLanes, value, step);
      if (lane >= step) value += other;
    }
    return value;
  };
  int64_t before = 0;
  for (int64_t first = 0; first < plan.col_blocks; first += kScanThreads) {
    const int64_t column = first + threadIdx.x;
    const int64_t own = column < plan.col_blocks ? plan.totals[column] : 0;
    int64_t inclusive = scan_warp(own);
    if (lane == 31) warp_sums[warp] = inclusive;
    __syncthreads();
    if (warp == 0) warp_sums[lane] = scan_warp(warp_sums[lane]);
    __syncthreads();
    if (warp > 0) inclusive += warp_sums[warp - 1];
    if (column < plan.col_blocks) ccol[column] = Int(before + inclusive - own);
    before += warp_sums[31];
    __syncthreads();
  }
  if (threadIdx.x == 0) ccol[plan.col_blocks] = Int(before);
}

template <class Int>
__global__ void place_blocks(TransposePlan plan, const Int* ccol, Int* row, Int* entry) {
  const int64_t chunk = int64_t(blockIdx.x) * kPlaceWarps + threadIdx.x / 32;
  if (chunk >= plan.chunks) return;
  const int lane = threadIdx.x % 32;
  int32_t* next = plan.histogram + chunk * plan.col_blocks;
  const int64_t begin = chunk * plan.chunk, end = min(begin + plan.chunk, plan.pattern.nnz);
  for (int64_t first = begin; first < end; first += 32) {
    const int64_t p = first + lane, of_row = p < end ? row_of(plan, p) : -1;
    const int64_t column = of_row < 0 ? -1 : column_of(plan, p, end);
    const unsigned same = __match_any_sync(kAllLanes, (unsigned long long)column);
    const int leader = __ffs(same) - 1;
    int32_t base = 0;
    if (column >= 0 && lane == leader) base = atomicAdd(&next[column], __popc(same));  // in order: this warp alone
    base = __shfl_sync(kAllLanes, base, leader);
    if (column >= 0) {
      const int64_t to = int64_t(ccol[column]) + base + __popc(same & ((1u << lane) - 1));
      row[to] = Int(of_row);
      entry[to] = Int(p);
    }
  }
}

template <class Int>
Status run(const TransposeBlockSparse& t, TransposePlan plan, cudaStream_t stream) {
  Int *ccol = static_cast<Int*>(t.ccol), *row = static_cast<Int*>(t.row), *entry = static_cast<Int*>(t.entry);
  const int64_t nnz = t.pattern.nnz;
  cudaMemsetAsync(ccol, 0, size_t(plan.col_blocks + 1) * sizeof(Int), stream);
  if (nnz == 0) return status_of(cudaGetLastError(), "transpose_block_sparse");
  cudaMemsetAsync(row, 0xff, size_t(nnz) * sizeof(Int), stream);
  cudaMemsetAsync(entry, 0xff, size_t(nnz) * sizeof(Int), stream);
  if (plan.row_blocks == 0 || plan.col_blocks == 0) return status_of(cudaGetLastError(), "transpose_block_sparse");
  cudaMemsetAsync(plan.histogram, 0, size_t(plan.chunks * plan.col_blocks) * sizeof(int32_t), stream);
  const unsigned groups = unsigned((plan.chunks + kPlaceWarps - 1) / kPlaceWarps);
  count_columns<<<groups, 32 * kPlaceWarps, 0, stream>>>(plan);
  scan_chunks<<<unsigned((plan.col_blocks + 127) / 128), 128, 0, stream>>>(plan);
  scan_columns<Int><<<1, kScanThreads, 0, stream>>>(plan, ccol);
  place_blocks<Int><<<groups, 32 * kPlaceWarps, 0, stream>>>(plan, ccol, row, entry);
  return status_of(cudaGetLastError(), "launching transpose_block_sparse");
}

}  // namespace

size_t transpose_block_sparse_workspace(const TransposeBlockSparse& arguments) {
  return words_of(plan_of(arguments)) * sizeof(int32_t);
}

Status transpose_block_sparse(const TransposeBlockSparse& arguments, const CudaContext& context) {
  TransposePlan plan = plan_of(arguments);
  if (arguments.pattern.nnz > INT32_MAX || plan.col_blocks > INT32_MAX) {
    return error(Status::Kind::unsupported, "transpose_block_sparse of %lld blocks: supported on CUDA are 2^31 - 1",
                 (long long)arguments.pattern.nnz);
  }
  if (context.workspace_bytes < words_of(plan) * sizeof(int32_t)) {
    return error(Status::Kind::failed, "transpose_block_sparse: workspace has %zu bytes, needs %zu",
                 context.workspace_bytes, words_of(plan) * sizeof(int32_t));
  }
  plan.histogram = static_cast<int32_t*>(context.workspace);
  plan.totals = plan.histogram + plan.chunks * plan.col_blocks;
  const cudaStream_t stream = static_cast<cudaStream_t>(context.stream);
  return arguments.pattern.col.wide ? run<int64_t>(arguments, plan, stream) : run<int32_t>(arguments, plan, stream);
}

}  // namespace sparsekit

// List rows of a packed batch: sequence s has ceil(len_s / block_q) of them, behind those of the sequences before it.
//
// One CTA: an exclusive prefix sum over the sequences, then a binary search per list row. Bound: latency, some
// microseconds; nothing comes back to the host.
#include "attention/cuda_sequences.h"

#include "attention/cuda_tiles.cuh"
#include "common/cuda/launch.h"

namespace sparsekit::cuda {
namespace {

constexpr int kThreads = 1024;

struct Bounds {
  int begin, end;
};
/// Rows of sequence `s`, clamped as SequenceWalk does on the CPU.
__device__ Bounds bounds(const int32_t* cu_seqlens, int s, int length) {
  const int begin = min(max(cu_seqlens[s], 0), length);
  return {begin, min(max(cu_seqlens[s + 1], begin), length)};
}

__global__ void __launch_bounds__(kThreads)
    find_extents(const __grid_constant__ AttentionProblem p, int4* extents, int32_t* starts) {
  __shared__ int warp_sums[kThreads / kWarpSize];
  const int thread = threadIdx.x, sequences = int(p.sequences), len_q = int(p.len_q), block = p.lists.block_q;
  const int each = (sequences + kThreads - 1) / kThreads;
  const int first = min(sequences, thread * each), last = min(sequences, first + each);
  auto blocks = [&](int s) {
    const Bounds rows = bounds(p.cu_seqlens_q, s, len_q);
    return (rows.end - rows.begin + block - 1) / block;
  };
  int sum = 0;
  for (int s = first; s < last; ++s) sum += blocks(s);
  int before = sum;
  for (int step = 1; step < kWarpSize; step *= 2) {
    const int left = __shfl_up_sync(kAllLanes, before, step);
    if (thread % kWarpSize >= step) before += left;
  }
  if (thread % kWarpSize == kWarpSize - 1) warp_sums[thread / kWarpSize] = before;
  __syncthreads();
  before -= sum;
  for (int warp = 0; warp < thread / kWarpSize; ++warp) before += warp_sums[warp];
  for (int s = first; s < last; ++s) {
    starts[s] = before;
    before += blocks(s);
  }
  if (last == sequences && first < last) starts[sequences] = before;
  __syncthreads();

  for (int row = thread; row < int(p.lists.q_blocks); row += kThreads) {
    int4 extent = {0, 0, 0, 0};
    if (sequences > 0 && row < starts[sequences]) {
      int low = 0, high = sequences;  // the last sequence that starts at or before the row: starts[low] <= row
      while (high - low > 1) {
        const int middle = (low + high) / 2;
        (starts[middle] <= row ? low : high) = middle;
      }
      const Bounds rows = bounds(p.cu_seqlens_q, low, len_q), keys = bounds(p.cu_seqlens_k, low, int(p.len_k));
      extent = {rows.begin + (row - starts[low]) * block, rows.end, keys.begin, keys.end};
    }
    extents[row] = extent;
  }
}

}  // namespace

Status list_row_extents(const AttentionProblem& p, int4* extents, int32_t* starts, void* stream) {
  find_extents<<<1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, extents, starts);
  return status_of(cudaGetLastError(), "launching the search for the list rows of packed sequences");
}

}  // namespace sparsekit::cuda

// Longest list first: a stable counting sort of the list rows by length, one CTA per group of heads.
//
// The GPU hands out CTAs in order as others finish, so long rows at the end leave most multiprocessors idle (a causal
// pattern's last rows are twice the mean). Sorting everything by length would make all heads run side by side, and
// their keys and values fall out of L2 (16 heads of 32,768 x 128 in bf16 are 256 MB; L2 holds 50): hence the groups.
// Bound: latency, about 10 us; no host sync, the same order on every run.
#include <cuda_runtime.h>

#include "attention/cuda_schedule.h"
#include "attention/cuda_tiles.cuh"
#include "common/cuda/launch.h"

namespace sparsekit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBuckets = 32;  // of list lengths: rows within 3 % of the longest count as equal

__device__ int list_length(const AttentionProblem& p, int64_t item) {
  const int m = int(item % p.lists.q_blocks), bh = int(item / p.lists.q_blocks);
  const int64_t row = list_row(p, bh / int(p.heads_q), bh % int(p.heads_q), m);
  return list_count(p.lists.partial, row) + list_count(p.lists.full, row);
}

__global__ void __launch_bounds__(kThreads)
    longest_first(const __grid_constant__ AttentionProblem p, int64_t items, int64_t items_per_group, int32_t* order) {
  // places[bucket][thread]: how many of the thread's items fall into the bucket, then where the first of them goes.
  __shared__ int places[kBuckets * kThreads];
  __shared__ int longest, warp_sums[kThreads / kWarpSize];
  const int thread = threadIdx.x;
  const int64_t group = blockIdx.x * items_per_group;
  const int64_t in_group = min(items_per_group, items - group), per_thread = (in_group + kThreads - 1) / kThreads;
  const int64_t first = group + min(in_group, thread * per_thread),
                last = group + min(in_group, (thread + 1) * per_thread);

  if (thread == 0) longest = 1;
  for (int bucket = 0; bucket < kBuckets; ++bucket) places[bucket * kThreads + thread] = 0;
  __syncthreads();
  int mine = 0;
  for (int64_t item = first; item < last; ++item) mine = max(mine, list_length(p, item));
  atomicMax(&longest, mine);
  __syncthreads();
  auto bucket_of = [&](int64_t item) {  // 0: the longest
    return kBuckets - 1 - int(int64_t(list_length(p, item)) * (kBuckets - 1) / longest);
  };
  for (int64_t item = first; item < last; ++item) ++places[bucket_of(item) * kThreads + thread];
  __syncthreads();

  // Exclusive prefix sum over (bucket, thread): each thread adds up kBuckets neighbours, warps their threads.
  int sum = 0;
  for (int i = 0; i < kBuckets; ++i) sum += places[thread * kBuckets + i];
  int before = sum;
  for (int step = 1; step < kWarpSize; step *= 2) {
    const int left = __shfl_up_sync(kAllLanes, before, step);
    if (thread % kWarpSize >= step) before += left;
  }
  if (thread % kWarpSize == kWarpSize - 1) warp_sums[thread / kWarpSize] = before;
  __syncthreads();
  before -= sum;
  for (int warp = 0; warp < thread / kWarpSize; ++warp) before += warp_sums[warp];
  for (int i = 0; i < kBuckets; ++i) {
    const int count = places[thread * kBuckets + i];
    places[thread * kBuckets + i] = before;
    before += count;
  }
  __syncthreads();
  for (int64_t item = first; item < last; ++item) {
    order[group + places[bucket_of(item) * kThreads + thread]++] = int32_t(item);
  }
}

}  // namespace

Status schedule_longest_first(const AttentionProblem& p, int32_t* order, void* stream) {
  int device = 0, l2_bytes = 0;
  cudaError_t code = cudaGetDevice(&device);
  if (code == cudaSuccess) code = cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, device);
  if (code != cudaSuccess) return status_of(code, "reading the device's L2 size");
  const int64_t kv_head_bytes = p.len_k * (int64_t(p.head_dim) + p.value_dim) * size_of(p.dtype) + 1;
  const int64_t kv_heads = l2_bytes / 2 / kv_head_bytes;
  const int64_t heads = (kv_heads > 1 ? kv_heads : 1) * (p.heads_q / p.heads_kv);
  const int64_t items = p.batch * p.heads_q * p.lists.q_blocks, items_per_group = heads * p.lists.q_blocks;
  const int64_t groups = (items + items_per_group - 1) / items_per_group;
  longest_first<<<unsigned(groups), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, items, items_per_group, order);
  return status_of(cudaGetLastError(), "launching the ordering of the block lists");
}

}  // namespace sparsekit::cuda

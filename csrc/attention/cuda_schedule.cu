// Longest list first: a stable counting sort of the list rows (forward) or the key blocks (backward) by length, one CTA
// per group of heads.
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

/// Blocks that a list row names. Items are (batch, query head, query block).
struct RowLength {
  AttentionProblem p;

  __device__ int entry(int item) const { return item; }  // what the order says
  __device__ int operator()(int item) const {
    const int m = item % int(p.lists.q_blocks), bh = item / int(p.lists.q_blocks);
    const int64_t row = list_row(p, bh / int(p.heads_q), bh % int(p.heads_q), m);
    return list_count(p.lists.partial, row) + list_count(p.lists.full, row);
  }
};

/// Query blocks of all heads of a group that name a key block. Items are (batch, key head, key block).
struct KeyBlockLength {
  AttentionProblem p;
  const int32_t* offsets;  // of BlockTranspose
  int k_blocks;

  __device__ int entry(int item) const { return item % k_blocks; }
  __device__ int operator()(int item) const {
    const int n = item % k_blocks, bh = item / k_blocks, heads = int(p.heads_q) / int(p.heads_kv);
    const int b = bh / int(p.heads_kv), first_head = bh % int(p.heads_kv) * heads;
    int length = 0;
    for (int h = first_head; h < first_head + heads; ++h) {
      const int64_t list = list_row(p, b, h, 0) / max(int64_t(1), p.lists.q_blocks);
      const int32_t* at = offsets + list * (k_blocks + 1) + n;
      length += max(0, at[1] - at[0]);
    }
    return length;
  }
};

/// Keys that a cell of a stripe plan walks.
struct CellLength {
  const CellCounts* counts;
  int tile_keys;

  __device__ int entry(int item) const { return item; }
  __device__ int operator()(int item) const { return counts[item].tiles * tile_keys + counts[item].columns; }
};

/// places[bucket][thread] is kept in this order; the gaps let threads add up 32 neighbours each without bank conflicts.
__device__ int place(int i) { return i + i / kWarpSize; }

template <class Length>
__global__ void __launch_bounds__(kThreads) longest_first(const __grid_constant__ Length length, int items,
                                                          int items_per_group, int32_t* order, int32_t* counter) {
  // places[bucket][thread]: how many of the thread's items fall into the bucket, then where the next of them goes.
  __shared__ int places[kBuckets * kThreads + kBuckets * kThreads / kWarpSize];
  __shared__ int longest, warp_sums[kThreads / kWarpSize];
  const int thread = threadIdx.x;
  const int group = blockIdx.x * items_per_group, in_group = min(items_per_group, items - group);
  const int per_thread = (in_group + kThreads - 1) / kThreads;
  const int first = group + min(in_group, thread * per_thread), last = group + min(in_group, (thread + 1) * per_thread);

  if (thread == 0) longest = 1;
  if (thread == 0 && blockIdx.x == 0 && counter) *counter = 0;
  for (int bucket = 0; bucket < kBuckets; ++bucket) places[place(bucket * kThreads + thread)] = 0;
  __syncthreads();
  int mine = 0;
  for (int item = first; item < last; ++item) mine = max(mine, length(item));
  atomicMax(&longest, mine);
  __syncthreads();
  const float scale = (kBuckets - 1.f) / longest;
  auto place_of = [&](int item) -> int& {  // in bucket 0 the longest
    const int bucket = kBuckets - 1 - min(int(length(item) * scale), kBuckets - 1);
    return places[place(bucket * kThreads + thread)];
  };
  for (int item = first; item < last; ++item) ++place_of(item);
  __syncthreads();

  // Exclusive prefix sum over (bucket, thread): each thread adds up kBuckets neighbours, warps their threads.
  int sum = 0;
  for (int i = 0; i < kBuckets; ++i) sum += places[place(thread * kBuckets + i)];
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
    int& entry = places[place(thread * kBuckets + i)];
    const int count = entry;
    entry = before;
    before += count;
  }
  __syncthreads();
  for (int item = first; item < last; ++item) order[group + place_of(item)++] = length.entry(item);
}

}  // namespace

/// Key heads whose keys and values fit half the L2 cache, at least one.
static Status heads_in_l2(const AttentionProblem& p, int64_t* heads) {
  int device = 0, l2_bytes = 0;
  cudaError_t code = cudaGetDevice(&device);
  if (code == cudaSuccess) code = cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, device);
  const int64_t kv_head_bytes = p.len_k * (int64_t(p.head_dim) + p.value_dim) * size_of(p.dtype) + 1;
  *heads = l2_bytes / 2 / kv_head_bytes > 1 ? l2_bytes / 2 / kv_head_bytes : 1;
  return status_of(code, "reading the device's L2 size");
}

Status schedule_longest_first(const AttentionProblem& p, int32_t* order, void* stream, int32_t* counter) {
  int64_t kv_heads;
  const Status status = heads_in_l2(p, &kv_heads);
  if (!status.ok()) return status;
  const int64_t items = p.batch * p.heads_q * p.lists.q_blocks;  // the caller keeps these within int32
  const int64_t group = kv_heads * (p.heads_q / p.heads_kv) * p.lists.q_blocks,
                items_per_group = group < items ? group : items;
  longest_first<<<unsigned((items + items_per_group - 1) / items_per_group), kThreads, 0,
                  static_cast<cudaStream_t>(stream)>>>(RowLength{p}, int(items), int(items_per_group), order, counter);
  return status_of(cudaGetLastError(), "launching the ordering of the block lists");
}

Status schedule_cells_longest_first(const AttentionProblem& p, const StripePlan& plan, void* stream) {
  int64_t kv_heads;
  const Status status = heads_in_l2(p, &kv_heads);
  if (!status.ok()) return status;
  const int64_t list_heads = kv_heads * plan.list_heads / p.heads_kv;
  const int64_t group = (list_heads > 1 ? list_heads : 1) * plan.cut.cells();
  const int per_group = int(group < plan.cells ? group : plan.cells);
  longest_first<<<unsigned((plan.cells + per_group - 1) / per_group), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      CellLength{plan.counts, plan.tile_keys}, plan.cells, per_group, plan.order, plan.counter);
  return status_of(cudaGetLastError(), "launching the ordering of the stripe plan");
}

Status schedule_keys_longest_first(const AttentionProblem& p, const int32_t* offsets, int32_t* order, void* stream) {
  const int k_blocks = int(p.k_blocks()), heads = int(p.batch * p.heads_kv);  // int32, as above
  longest_first<<<unsigned(heads), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      KeyBlockLength{p, offsets, k_blocks}, heads * k_blocks, k_blocks, order, nullptr);
  return status_of(cudaGetLastError(), "launching the ordering of the key blocks");
}

}  // namespace sparsekit::cuda

// Block lists seen from the keys, on the GPU. No host sync, graph-capturable.
//
// A stable counting sort of the forward slots by key block: slots of one key block ascend, bit for bit the same on
// every run. Each list head's rows are cut into `chunks`;
//   count   one histogram over the key blocks per chunk
//   scan    per key block over the chunks, then over the key blocks: where each (chunk, key block) begins
//   place   every slot behind those of its key block in the chunk's earlier rows
//
// Chunks of 32 rows, one CTA each: a word per key block in shared memory says which of the rows list it, so that a
// slot's place is a population count, and all rows are placed at once. A row that lists a block twice (the caller's
// error) shows when the words are made; that chunk is then placed in order by one warp. Lists that are too short for so
// many histograms, or with more than 12,288 key blocks, have larger chunks, of one warp each, which walks its slots in
// order, 32 at a time; lanes with the same key rank by __match_any_sync.
//
// Bound: reads every list entry twice and writes it once; 1,024 x 1,024 blocks, 32 heads, 10 %: 3.4M entries, 47 MB.
#include <cuda_runtime.h>

#include <algorithm>

#include "selection/cuda_launch.cuh"
#include "sparsekit/selection.h"

namespace sparsekit {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int64_t kMostWords = 12288;  // key blocks: 8 bytes each make 96 KB of shared memory, which every card grants

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

using cuda::launched;

// ---- transpose

struct TransposePlan {
  BlockLists lists;
  int64_t slots_per_row = 0;
  int64_t heads = 0;     // list heads of all batches
  int64_t k_blocks = 0;  // length of the transposed lists, an upper bound where packed
  int64_t chunks = 0, rows_per_chunk = 0;
  bool by_words = false;          // chunks of 32 rows
  int64_t block_begin_words = 0;  // packed: words of the two prefix arrays
  const int32_t* cu_seqlens_q = nullptr;
  const int32_t* cu_seqlens_k = nullptr;
  int64_t sequences = 0, len_q = 0, len_k = 0;

  int32_t* histogram = nullptr;  // [heads, chunks, k_blocks]
  int32_t* totals = nullptr;     // [heads, k_blocks]
  int32_t* q_begin = nullptr;    // packed: [sequences + 1] first list row of each sequence
  int32_t* k_begin = nullptr;    // packed: [sequences + 1] first key block of each sequence
  int32_t* offsets = nullptr;
  int32_t* slots = nullptr;
};

TransposePlan plan_transpose(const TransposeBlockLists& arguments, const CudaContext& context) {
  const AttentionProblem& problem = arguments.problem;
  TransposePlan plan;
  plan.lists = problem.lists;
  plan.slots_per_row = problem.lists.slots_per_row();
  plan.heads = problem.lists.list_batch * problem.lists.list_heads;
  plan.k_blocks = problem.k_blocks();
  plan.len_q = problem.len_q;
  plan.len_k = problem.len_k;
  plan.cu_seqlens_q = problem.cu_seqlens_q;
  plan.cu_seqlens_k = problem.cu_seqlens_k;
  plan.sequences = problem.packed() ? problem.sequences : 0;
  plan.offsets = arguments.offsets;
  plan.slots = arguments.slots;

  // Enough warps to hide the latency of placing (16 per multiprocessor), but no more histogram words than 4 per list
  // entry, unless that left fewer than 8 chunks.
  int64_t heads = std::max<int64_t>(plan.heads, 1), q_blocks = std::max<int64_t>(plan.lists.q_blocks, 1);
  int64_t entries = q_blocks * plan.slots_per_row;
  int64_t by_warps = ceil_div(16 * int64_t(std::max(context.multiprocessors, 1)), heads);
  int64_t by_memory = std::max<int64_t>(8, 4 * entries / std::max<int64_t>(plan.k_blocks, 1));
  int64_t chunks = std::max<int64_t>(1, std::min({by_warps, by_memory, q_blocks}));
  plan.rows_per_chunk = ceil_div(q_blocks, chunks);
  plan.by_words = plan.k_blocks <= kMostWords && plan.k_blocks <= 4 * kWarp * plan.slots_per_row;
  if (plan.by_words) plan.rows_per_chunk = kWarp;
  plan.chunks = ceil_div(q_blocks, plan.rows_per_chunk);

  auto* words = static_cast<int32_t*>(context.workspace);
  plan.histogram = words;
  plan.totals = words + plan.heads * plan.chunks * plan.k_blocks;
  plan.q_begin = plan.totals + plan.heads * plan.k_blocks;
  plan.k_begin = plan.q_begin + plan.sequences + 1;
  return plan;
}

int64_t workspace_words(const TransposePlan& plan) {
  return plan.heads * (plan.chunks + 1) * plan.k_blocks + 2 * (plan.sequences + 1);
}

// Packed: the first list row and the first key block of each sequence. One warp; lengths are clamped to the tensors.
__global__ void sequence_begins(TransposePlan plan) {
  int lane = threadIdx.x;
  int64_t rows = 0, blocks = 0;
  for (int64_t first = 0; first < plan.sequences; first += kWarp) {
    int64_t s = first + lane;
    int64_t own_rows = 0, own_blocks = 0;
    if (s < plan.sequences) {
      auto length = [s](const int32_t* cu, int64_t end) {
        int64_t begin = min(max(int64_t(cu[s]), int64_t(0)), end);
        return min(max(int64_t(cu[s + 1]), begin), end) - begin;
      };
      own_rows = (length(plan.cu_seqlens_q, plan.len_q) + plan.lists.block_q - 1) / plan.lists.block_q;
      own_blocks = (length(plan.cu_seqlens_k, plan.len_k) + plan.lists.block_k - 1) / plan.lists.block_k;
    }
    int64_t row_sum = own_rows, block_sum = own_blocks;  // inclusive scan over the lanes
    for (int step = 1; step < kWarp; step *= 2) {
      int64_t other_rows = __shfl_up_sync(kAllLanes, row_sum, step);
      int64_t other_blocks = __shfl_up_sync(kAllLanes, block_sum, step);
      if (lane >= step) row_sum += other_rows, block_sum += other_blocks;
    }
    if (s < plan.sequences) {
      plan.q_begin[s] = int32_t(min(rows + row_sum - own_rows, plan.lists.q_blocks));
      plan.k_begin[s] = int32_t(min(blocks + block_sum - own_blocks, plan.k_blocks));
    }
    rows += __shfl_sync(kAllLanes, row_sum, kWarp - 1);
    blocks += __shfl_sync(kAllLanes, block_sum, kWarp - 1);
  }
  if (lane == 0) {
    plan.q_begin[plan.sequences] = int32_t(min(rows, plan.lists.q_blocks));
    plan.k_begin[plan.sequences] = int32_t(min(blocks, plan.k_blocks));
  }
}

// The key blocks row `m` may list, as a range of block numbers: all of them, or those of its sequence where packed.
struct KeyRange {
  int32_t begin = 0, count = 0;
};

__device__ KeyRange key_range(const TransposePlan& plan, int64_t m) {
  if (plan.sequences == 0) return {0, int32_t(plan.cu_seqlens_q ? 0 : plan.k_blocks)};
  int64_t low = 0, high = plan.sequences;  // the last sequence that begins at or before m, of those with rows
  while (high - low > 1) {
    int64_t middle = (low + high) / 2;
    (plan.q_begin[middle] <= m ? low : high) = middle;
  }
  if (m >= plan.q_begin[low + 1]) return {};  // beyond the rows of the last sequence
  return {plan.k_begin[low], plan.k_begin[low + 1] - plan.k_begin[low]};
}

// Calls use(key, slot, active) for the entries of row `m` of a list head, in slot order, 32 lanes at a time. `key` is
// -1 where the lane has no valid entry; all lanes of the warp call together.
template <class Use>
__device__ void walk_row(const TransposePlan& plan, int64_t head, int64_t m, Use&& use) {
  int lane = threadIdx.x % kWarp;
  int64_t row = head * plan.lists.q_blocks + m;
  KeyRange range = key_range(plan, m);
  int64_t first_slot = m * plan.slots_per_row;
#pragma unroll 1
  for (int kind = 0; kind < 2; ++kind) {
    const BlockList& list = kind == 0 ? plan.lists.partial : plan.lists.full;
    int32_t count = list.counts ? min(list.counts[row], list.capacity) : 0;
    const int32_t* indices = list.indices + row * list.capacity;
    for (int32_t first = 0; first < count; first += kWarp) {
      int32_t entry = first + lane;
      int32_t index = entry < count ? indices[entry] : -1;
      bool valid = index >= 0 && index < range.count;
      use(valid ? range.begin + index : -1, int32_t(first_slot + entry));
    }
    first_slot += list.capacity;
  }
}

// grid (row groups, heads), one warp per row
__global__ void transpose_count(TransposePlan plan) {
  int64_t head = blockIdx.y;
  int warps = blockDim.x / kWarp;
  for (int64_t m = int64_t(blockIdx.x) * warps + threadIdx.x / kWarp; m < plan.lists.q_blocks;
       m += int64_t(gridDim.x) * warps) {
    int32_t* histogram = plan.histogram + (head * plan.chunks + m / plan.rows_per_chunk) * plan.k_blocks;
    walk_row(plan, head, m, [&](int32_t key, int32_t) {
      if (key >= 0) atomicAdd(&histogram[key], 1);
    });
  }
}

// grid (key blocks / threads, heads): exclusive scan over the chunks of one key block
__global__ void transpose_scan_chunks(TransposePlan plan) {
  int64_t head = blockIdx.y, key = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (key >= plan.k_blocks) return;
  int32_t sum = 0;
  int32_t* column = plan.histogram + head * plan.chunks * plan.k_blocks + key;
#pragma unroll 8
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    int32_t count = column[chunk * plan.k_blocks];
    column[chunk * plan.k_blocks] = sum;
    sum += count;
  }
  plan.totals[head * plan.k_blocks + key] = sum;
}

constexpr int kScanThreads = 1024;

// grid (heads): exclusive scan over the key blocks
__global__ void __launch_bounds__(kScanThreads) transpose_scan_keys(TransposePlan plan) {
  __shared__ int32_t warp_sums[kWarp];
  int64_t head = blockIdx.x;
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int32_t* totals = plan.totals + head * plan.k_blocks;
  int32_t* offsets = plan.offsets + head * (plan.k_blocks + 1);
  auto scan_warp = [lane](int32_t value) {
    for (int step = 1; step < kWarp; step *= 2) {
      int32_t other = __shfl_up_sync(kAllLanes, value, step);
      if (lane >= step) value += other;
    }
    return value;
  };
  int32_t before = 0;
  for (int64_t first = 0; first < plan.k_blocks; first += kScanThreads) {
    int64_t key = first + threadIdx.x;
    int32_t own = key < plan.k_blocks ? totals[key] : 0;
    int32_t inclusive = scan_warp(own);
    if (lane == kWarp - 1) warp_sums[warp] = inclusive;
    __syncthreads();
    if (warp == 0) warp_sums[lane] = scan_warp(warp_sums[lane]);
    __syncthreads();
    if (warp > 0) inclusive += warp_sums[warp - 1];
    if (key < plan.k_blocks) offsets[key] = before + inclusive - own;
    before += warp_sums[kWarp - 1];
    __syncthreads();
  }
  if (threadIdx.x == 0) offsets[plan.k_blocks] = before;
}

// Places one slot per lane behind what its key block has, lanes in order; `next` is this warp's alone.
__device__ void place_in_order(int32_t* next, int32_t key, int32_t slot, int32_t* slots) {
  const int lane = threadIdx.x % kWarp;
  const unsigned same = __match_any_sync(kAllLanes, key);
  const int leader = __ffs(same) - 1;
  int32_t base = 0;
  if (key >= 0 && lane == leader) base = atomicAdd(&next[key], __popc(same));
  base = __shfl_sync(kAllLanes, base, leader);
  if (key >= 0) slots[base + __popc(same & ((1u << lane) - 1))] = slot;
}

// grid (chunk groups, heads), one warp per chunk
__global__ void transpose_place(TransposePlan plan) {
  int64_t head = blockIdx.y;
  int64_t chunk = int64_t(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (chunk >= plan.chunks) return;
  int32_t* next = plan.histogram + (head * plan.chunks + chunk) * plan.k_blocks;
  const int32_t* offsets = plan.offsets + head * (plan.k_blocks + 1);
  for (int64_t key = threadIdx.x % kWarp; key < plan.k_blocks; key += kWarp) next[key] += offsets[key];
  __syncwarp();
  int32_t* slots = plan.slots + head * plan.lists.q_blocks * plan.slots_per_row;
  int64_t end = min((chunk + 1) * plan.rows_per_chunk, plan.lists.q_blocks);
  for (int64_t m = chunk * plan.rows_per_chunk; m < end; ++m) {
    walk_row(plan, head, m, [&](int32_t key, int32_t slot) { place_in_order(next, key, slot, slots); });
  }
}

// ---- chunks of 32 rows

constexpr int kWordThreads = 512;

// In shared memory: words[key] bit r: row r of the chunk lists the key block. True where a row lists one twice.
__device__ bool mark_rows(const TransposePlan& plan, int64_t head, int64_t chunk, uint32_t* words) {
  for (int64_t key = threadIdx.x; key < plan.k_blocks; key += kWordThreads) words[key] = 0;
  __syncthreads();
  bool again = false;
  for (int r = int(threadIdx.x) / kWarp; r < kWarp; r += kWordThreads / kWarp) {
    const int64_t m = chunk * kWarp + r;
    if (m >= plan.lists.q_blocks) break;
    walk_row(plan, head, m, [&](int32_t key, int32_t) {
      if (key >= 0) again |= atomicOr(&words[key], 1u << r) >> r & 1;
    });
  }
  return __syncthreads_or(again);
}

// grid (chunks, heads)
__global__ void __launch_bounds__(kWordThreads) transpose_count_words(TransposePlan plan) {
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  auto* words = reinterpret_cast<uint32_t*>(dynamic_shared);
  const int64_t head = blockIdx.y, chunk = blockIdx.x;
  int32_t* histogram = plan.histogram + (head * plan.chunks + chunk) * plan.k_blocks;
  const bool again = mark_rows(plan, head, chunk, words);
  if (again) {
    for (int64_t key = threadIdx.x; key < plan.k_blocks; key += kWordThreads) words[key] = 0;
    __syncthreads();
    for (int64_t m = chunk * kWarp + threadIdx.x / kWarp; m < min((chunk + 1) * kWarp, plan.lists.q_blocks);
         m += kWordThreads / kWarp) {
      walk_row(plan, head, m, [&](int32_t key, int32_t) {
        if (key >= 0) atomicAdd(&words[key], 1u);
      });
    }
    __syncthreads();
  }
  for (int64_t key = threadIdx.x; key < plan.k_blocks; key += kWordThreads) {
    histogram[key] = again ? int32_t(words[key]) : __popc(words[key]);
  }
}

// grid (chunks, heads)
__global__ void __launch_bounds__(kWordThreads) transpose_place_words(TransposePlan plan) {
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  auto* words = reinterpret_cast<uint32_t*>(dynamic_shared);
  auto* begins = reinterpret_cast<int32_t*>(words + plan.k_blocks);
  const int64_t head = blockIdx.y, chunk = blockIdx.x;
  const int32_t* before = plan.histogram + (head * plan.chunks + chunk) * plan.k_blocks;
  const int32_t* offsets = plan.offsets + head * (plan.k_blocks + 1);
  const int64_t capacity = plan.lists.q_blocks * plan.slots_per_row;
  int32_t* slots = plan.slots + head * capacity;
  for (int64_t key = threadIdx.x; key < plan.k_blocks; key += kWordThreads) begins[key] = offsets[key] + before[key];
  for (int64_t at = offsets[plan.k_blocks] + chunk * kWordThreads + threadIdx.x; at < capacity;
       at += plan.chunks * kWordThreads) {
    slots[at] = -1;
  }
  const bool again = mark_rows(plan, head, chunk, words);
  if (again && threadIdx.x >= kWarp) return;
  for (int r = int(threadIdx.x) / kWarp; r < kWarp; r += again ? 1 : kWordThreads / kWarp) {
    const int64_t m = chunk * kWarp + r;
    if (m >= plan.lists.q_blocks) break;
    walk_row(plan, head, m, [&](int32_t key, int32_t slot) {
      if (again) {
        place_in_order(begins, key, slot, slots);
      } else if (key >= 0) {
        slots[begins[key] + __popc(words[key] & ((1u << r) - 1))] = slot;
      }
    });
  }
}

}  // namespace

size_t transpose_block_lists_workspace(const TransposeBlockLists& arguments, const CudaContext& context) {
  return size_t(workspace_words(plan_transpose(arguments, context))) * sizeof(int32_t);
}

Status transpose_block_lists(const TransposeBlockLists& arguments, const CudaContext& context) {
  TransposePlan plan = plan_transpose(arguments, context);
  auto stream = static_cast<cudaStream_t>(context.stream);
  int64_t slots = plan.lists.q_blocks * plan.slots_per_row;
  if (slots > INT32_MAX || plan.k_blocks >= INT32_MAX) {
    return error(Status::Kind::unsupported,
                 "transpose_block_lists: a list head has %lld slots (%lld rows of %lld); slot numbers are int32, so at "
                 "most 2147483647 are supported",
                 (long long)slots, (long long)plan.lists.q_blocks, (long long)plan.slots_per_row);
  }
  if (plan.heads > 65535) {
    return error(Status::Kind::unsupported, "transpose_block_lists: %lld list heads in all batches; CUDA takes 65535",
                 (long long)plan.heads);
  }
  size_t needed = size_t(workspace_words(plan)) * sizeof(int32_t);
  if (context.workspace_bytes < needed) {
    return error(Status::Kind::failed, "transpose_block_lists: workspace has %zu bytes, needs %zu",
                 context.workspace_bytes, needed);
  }
  if (plan.heads == 0) return {};
  auto heads = unsigned(plan.heads);
  if (slots == 0 || plan.k_blocks == 0) {
    cudaMemsetAsync(plan.offsets, 0, size_t(plan.heads) * (plan.k_blocks + 1) * sizeof(int32_t), stream);
    if (slots > 0) cudaMemsetAsync(plan.slots, 0xff, size_t(plan.heads) * slots * sizeof(int32_t), stream);
    return launched("transpose_block_lists");
  }
  if (plan.sequences > 0) cuda::launch(sequence_begins, 1, kWarp, 0, stream, plan);
  constexpr int threads = 128, warps = threads / kWarp;
  const dim3 key_grid(unsigned(ceil_div(plan.k_blocks, threads)), heads), chunk_grid(unsigned(plan.chunks), heads);
  const size_t words = size_t(plan.k_blocks) * sizeof(uint32_t);
  if (plan.by_words) {
    cuda::launch(transpose_count_words, chunk_grid, kWordThreads, words, stream, plan);
  } else {
    cudaMemsetAsync(plan.slots, 0xff, size_t(plan.heads) * slots * sizeof(int32_t), stream);
    cudaMemsetAsync(plan.histogram, 0, size_t(plan.heads) * plan.chunks * plan.k_blocks * sizeof(int32_t), stream);
    auto row_groups = unsigned(std::min<int64_t>(ceil_div(plan.lists.q_blocks, warps), 1 << 20));
    cuda::launch(transpose_count, dim3(row_groups, heads), threads, 0, stream, plan);
  }
  cuda::launch(transpose_scan_chunks, key_grid, threads, 0, stream, plan);
  cuda::launch(transpose_scan_keys, heads, kScanThreads, 0, stream, plan);
  if (plan.by_words) {
    cuda::launch(transpose_place_words, chunk_grid, kWordThreads, 2 * words, stream, plan);
  } else {
    cuda::launch(transpose_place, dim3(unsigned(ceil_div(plan.chunks, warps)), heads), threads, 0, stream, plan);
  }
  return launched("transpose_block_lists");
}

}  // namespace sparsekit

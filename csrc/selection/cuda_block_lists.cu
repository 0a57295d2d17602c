// Block lists on the GPU: from a boolean map, and transposed (seen from the keys). No host sync, graph-capturable.
//
// The transpose is a stable counting sort of the forward slots by key block. Each list head's rows are cut into
// `chunks`;
//   count   one histogram over the key blocks per chunk (atomics on counts only: the result does not depend on order)
//   scan    per key block over the chunks, then over the key blocks: where each (chunk, key block) begins
//   place   one warp per chunk walks its slots in order, 32 at a time; lanes with the same key rank by __match_any_sync
// so slots of one key block ascend, bit for bit the same on every run.
// Bound: reads every list entry twice and writes it once; the chunk count is chosen so that the histograms stay within
// a few times the list itself (64K tokens, block 64, 16 heads, 10 %: 1.7M entries, 7 MB).
#include <cuda_runtime.h>

#include <algorithm>

#include "sparsekit/selection.h"

namespace sparsekit {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Status launched(const char* what) {
  cudaError_t code = cudaGetLastError();
  if (code == cudaSuccess) return {};
  return error(Status::Kind::failed, "%s: %s", what, cudaGetErrorString(code));
}

// ---- transpose

struct TransposePlan {
  BlockLists lists;
  int64_t slots_per_row = 0;
  int64_t heads = 0;     // list heads of all batches
  int64_t k_blocks = 0;  // length of the transposed lists, an upper bound where packed
  int64_t chunks = 0, rows_per_chunk = 0;
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

// grid (chunk groups, heads), one warp per chunk
__global__ void transpose_place(TransposePlan plan) {
  int64_t head = blockIdx.y;
  int64_t chunk = int64_t(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (chunk >= plan.chunks) return;
  int lane = threadIdx.x % kWarp;
  unsigned lanes_before = (1u << lane) - 1;
  int32_t* next = plan.histogram + (head * plan.chunks + chunk) * plan.k_blocks;
  const int32_t* offsets = plan.offsets + head * (plan.k_blocks + 1);
  int32_t* slots = plan.slots + head * plan.lists.q_blocks * plan.slots_per_row;
  int64_t end = min((chunk + 1) * plan.rows_per_chunk, plan.lists.q_blocks);
  for (int64_t m = chunk * plan.rows_per_chunk; m < end; ++m) {
    walk_row(plan, head, m, [&](int32_t key, int32_t slot) {
      unsigned same = __match_any_sync(kAllLanes, key);
      int leader = __ffs(same) - 1;
      int32_t base = 0;
      if (key >= 0 && lane == leader) base = atomicAdd(&next[key], __popc(same));  // in order: this warp alone
      base = __shfl_sync(kAllLanes, base, leader);
      if (key >= 0) slots[offsets[key] + base + __popc(same & lanes_before)] = slot;
    });
  }
}

// ---- from a boolean map

// One warp per row, 4 columns per lane and step.
__global__ void lists_from_bool(BlockListsFromBool arguments) {
  int lane = threadIdx.x % kWarp;
  int64_t row = int64_t(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (row >= arguments.rows) return;
  const auto* map = reinterpret_cast<const unsigned char*>(arguments.map) + row * arguments.columns;
  int32_t* indices = arguments.indices + row * arguments.capacity;
  bool words = (reinterpret_cast<uintptr_t>(map) & 3) == 0;
  int64_t count = 0;
  for (int64_t first = 0; first < arguments.columns; first += 4 * kWarp) {
    int64_t column = first + 4 * lane;
    unsigned four = 0;  // bit i: column + i is true
    if (words && column + 4 <= arguments.columns) {
      unsigned bytes = *reinterpret_cast<const unsigned*>(map + column);
      for (int i = 0; i < 4; ++i) four |= unsigned((bytes >> (8 * i) & 0xff) != 0) << i;
    } else {
      for (int i = 0; i < 4; ++i) four |= unsigned(column + i < arguments.columns && map[column + i]) << i;
    }
    int own = __popc(four), before = own;
    for (int step = 1; step < kWarp; step *= 2) {
      int other = __shfl_up_sync(kAllLanes, before, step);
      if (lane >= step) before += other;
    }
    int64_t at = count + before - own;
    for (int i = 0; i < 4; ++i) {
      if ((four >> i & 1) && at < arguments.capacity) indices[at++] = int32_t(column + i);
    }
    count += __shfl_sync(kAllLanes, before, kWarp - 1);
  }
  count = min(count, arguments.capacity);
  for (int64_t at = count + lane; at < arguments.capacity; at += kWarp) indices[at] = -1;
  if (lane == 0) arguments.counts[row] = int32_t(count);
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
  cudaMemsetAsync(plan.offsets, 0, size_t(plan.heads) * (plan.k_blocks + 1) * sizeof(int32_t), stream);
  if (slots > 0) cudaMemsetAsync(plan.slots, 0xff, size_t(plan.heads) * slots * sizeof(int32_t), stream);
  if (slots == 0 || plan.k_blocks == 0) return launched("transpose_block_lists");

  cudaMemsetAsync(plan.histogram, 0, size_t(plan.heads) * plan.chunks * plan.k_blocks * sizeof(int32_t), stream);
  if (plan.sequences > 0) sequence_begins<<<1, kWarp, 0, stream>>>(plan);
  constexpr int threads = 128, warps = threads / kWarp;
  auto row_groups = unsigned(std::min<int64_t>(ceil_div(plan.lists.q_blocks, warps), 1 << 20));
  transpose_count<<<dim3(row_groups, heads), threads, 0, stream>>>(plan);
  transpose_scan_chunks<<<dim3(unsigned(ceil_div(plan.k_blocks, threads)), heads), threads, 0, stream>>>(plan);
  transpose_scan_keys<<<heads, kScanThreads, 0, stream>>>(plan);
  transpose_place<<<dim3(unsigned(ceil_div(plan.chunks, warps)), heads), threads, 0, stream>>>(plan);
  return launched("transpose_block_lists");
}

Status block_lists_from_bool(const BlockListsFromBool& arguments, const CudaContext& context) {
  if (arguments.columns > INT32_MAX) {
    return error(Status::Kind::unsupported, "block_lists_from_bool: block_map has %lld columns; indices are int32",
                 (long long)arguments.columns);
  }
  if (arguments.rows == 0) return {};
  constexpr int threads = 128, warps = threads / kWarp;
  if (ceil_div(arguments.rows, warps) > INT32_MAX) {
    return error(Status::Kind::unsupported, "block_lists_from_bool: block_map has %lld rows",
                 (long long)arguments.rows);
  }
  lists_from_bool<<<unsigned(ceil_div(arguments.rows, warps)), threads, 0, static_cast<cudaStream_t>(context.stream)>>>(
      arguments);
  return launched("block_lists_from_bool");
}

}  // namespace sparsekit

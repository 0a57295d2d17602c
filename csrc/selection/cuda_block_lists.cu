// Block lists seen from the keys, on the GPU. No host sync, graph-capturable.
//
// A stable counting sort of the forward slots by key block: slots of one key block ascend, bit for bit the same on
// every run. Each list head's rows are cut into `chunks`;
//   count   one histogram over the key blocks per chunk
//   scan    per key block over the chunks, then over the key blocks: where each (chunk, key block) begins
//   place   every slot behind those of its key block in the chunk's earlier rows
//
// Chunks of 32 to 256 rows, one CTA each, two launches: words in shared memory say which rows list a key block, a bit
// each, so that a slot's place is a population count, and all rows are placed at once; in shared memory, from where the
// slots of a key block go out together (a store per slot would be a sector of 32 bytes per slot). A CTA scans by
// itself: it reads the histograms of all chunks of its head. A row that lists a block twice (the caller's error) shows
// when the words are made; that chunk is then placed in order by one warp. Lists that are too short for so many
// histograms, or with too many key blocks for shared memory, have larger chunks, of one warp each, which walks its
// slots in order, 32 at a time; lanes with the same key rank by __match_any_sync.
//
// Bound: reads every list entry twice (again from L2) and writes it once; 1,024 x 1,024 blocks, 32 heads, 10 %: 3.4M
// entries, 34 MB.
#include <cuda_runtime.h>

#include <algorithm>

#include "selection/cuda_support.cuh"

namespace sparsekit {
namespace {

using cuda::ceil_div;
using cuda::kWarp;
using cuda::launched;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int64_t kMostBytes = 96 * 1024;  // of shared memory, which every card grants

// ---- transpose

struct TransposePlan {
  BlockLists lists;
  int64_t slots_per_row = 0;
  int64_t heads = 0;     // list heads of all batches
  int64_t k_blocks = 0;  // length of the transposed lists, an upper bound where packed
  int64_t chunks = 0, rows_per_chunk = 0;
  bool by_words = false;          // chunks of some 32 rows, in shared memory
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

/// Shared memory of a CTA that places `rows` rows: words and two numbers per key block, and the slots.
int64_t bytes_by_words(const TransposePlan& plan, int64_t rows) {
  return (rows / kWarp + 2) * plan.k_blocks * 4 + rows * plan.slots_per_row * 2;
}

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
  int64_t by_warps = ceil_div<int64_t>(16 * int64_t(std::max(context.multiprocessors, 1)), heads);
  int64_t by_memory = std::max<int64_t>(8, 4 * entries / std::max<int64_t>(plan.k_blocks, 1));
  int64_t chunks = std::max<int64_t>(1, std::min({by_warps, by_memory, q_blocks}));
  plan.rows_per_chunk = ceil_div(q_blocks, chunks);
  plan.by_words = plan.k_blocks <= 4 * kWarp * plan.slots_per_row && bytes_by_words(plan, kWarp) <= kMostBytes;
  if (plan.by_words) {
    int64_t rows = kWarp;  // more, as long as there is work for all and room for two CTAs
    while (rows < q_blocks && heads * ceil_div(q_blocks, 2 * rows) * 2 >= 3 * context.multiprocessors &&
           bytes_by_words(plan, 2 * rows) <= kMostBytes * 2 / 3) {
      rows *= 2;
    }
    plan.rows_per_chunk = rows;
  }
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

// ---- chunks in shared memory

constexpr int kWordThreads = 512, kWordWarps = kWordThreads / kWarp;

// Calls use(key, row of the chunk, slot of the row) for all valid entries of a chunk, in any order: a warp has 4 rows
// at once, a lane 4 entries of each, so that the loads of 512 entries are under way together.
template <class Use>
__device__ void walk_chunk(const TransposePlan& plan, int64_t head, int64_t chunk, Use&& use) {
  constexpr int kBatch = 4;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t first_row = chunk * plan.rows_per_chunk;
  const int rows = int(min(plan.rows_per_chunk, plan.lists.q_blocks - first_row));
  for (int r = warp * kBatch; r < rows; r += kWordWarps * kBatch) {
    const int64_t row = head * plan.lists.q_blocks + first_row + r;
    KeyRange ranges[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) ranges[i] = key_range(plan, first_row + min(r + i, rows - 1));
#pragma unroll 1
    for (int kind = 0; kind < 2; ++kind) {
      const BlockList& list = kind == 0 ? plan.lists.partial : plan.lists.full;
      if (!list.counts) continue;
      const int first_slot = kind == 0 ? 0 : plan.lists.partial.capacity;
      const int32_t* indices = list.indices + row * list.capacity;
      const bool aligned = list.capacity % 4 == 0 && reinterpret_cast<uintptr_t>(list.indices) % 16 == 0;
      int32_t counts[kBatch], most = 0;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) counts[i] = r + i < rows ? list.counts[row + i] : 0;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) most = max(most, counts[i] = min(counts[i], list.capacity));
      for (int32_t first = 0; first < most; first += 4 * kWarp) {
        const int32_t entry = first + 4 * lane;
        int4 found[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int32_t* from = indices + int64_t(i) * list.capacity + entry;
          const int left = counts[i] - entry;
          if (aligned) {
            found[i] = left > 0 ? *reinterpret_cast<const int4*>(from) : make_int4(-1, -1, -1, -1);
          } else {
            found[i] = make_int4(left > 0 ? from[0] : -1, left > 1 ? from[1] : -1, left > 2 ? from[2] : -1,
                                 left > 3 ? from[3] : -1);
          }
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int32_t four[4] = {found[i].x, found[i].y, found[i].z, found[i].w};
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (entry + e < counts[i] && four[e] >= 0 && four[e] < ranges[i].count) {
              use(ranges[i].begin + four[e], r + i, first_slot + entry + e);
            }
          }
        }
      }
    }
  }
}

// grid (chunks, heads)
__global__ void __launch_bounds__(kWordThreads, 2) transpose_count_chunk(TransposePlan plan) {
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  auto* counts = reinterpret_cast<int32_t*>(dynamic_shared);
  const int64_t head = blockIdx.y, chunk = blockIdx.x;
  for (int64_t key = threadIdx.x; key < plan.k_blocks; key += kWordThreads) counts[key] = 0;
  __syncthreads();
  walk_chunk(plan, head, chunk, [&](int32_t key, int, int) { atomicAdd(&counts[key], 1); });
  __syncthreads();
  int32_t* histogram = plan.histogram + (head * plan.chunks + chunk) * plan.k_blocks;
  for (int64_t key = threadIdx.x; key < plan.k_blocks; key += kWordThreads) histogram[key] = counts[key];
}

// grid (chunks, heads)
__global__ void __launch_bounds__(kWordThreads, 2) transpose_place_chunk(TransposePlan plan) {
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  __shared__ cuda::CtaScratch scratch;
  const int k_blocks = int(plan.k_blocks), groups = int(plan.rows_per_chunk / kWarp), tid = int(threadIdx.x);
  auto* words = reinterpret_cast<uint32_t*>(dynamic_shared);  // [groups][k_blocks]: bit r: row r of the group
  auto* begins = reinterpret_cast<int32_t*>(words + groups * k_blocks);  // of the chunk's slots of a key, in `slots`
  auto* starts = begins + k_blocks;                                      // the same in `staged`
  auto* staged = reinterpret_cast<uint16_t*>(starts + k_blocks);         // slots from the chunk's first row on, sorted
  const int64_t head = blockIdx.y, chunk = blockIdx.x;
  const int64_t capacity = plan.lists.q_blocks * plan.slots_per_row,
                first_slot = chunk * plan.rows_per_chunk * plan.slots_per_row;
  const int32_t* histogram = plan.histogram + head * plan.chunks * k_blocks;
  int32_t* offsets = plan.offsets + head * (plan.k_blocks + 1);
  int32_t* slots = plan.slots + head * capacity;

  for (int i = tid; i < groups * k_blocks; i += kWordThreads) words[i] = 0;
  uint64_t before = 0;  // entries of earlier keys: of the head in the upper half, of the chunk in the lower
  for (int first = 0; first < k_blocks; first += kWordThreads) {
    const int key = first + tid;
    int32_t total = 0, earlier = 0, own = 0;
    if (key < k_blocks) {
#pragma unroll 8
      for (int c = 0; c < plan.chunks; ++c) {
        const int32_t count = histogram[int64_t(c) * k_blocks + key];
        total += count;
        earlier += c < chunk ? count : 0;
        own = c == chunk ? count : own;
      }
    }
    uint64_t all;
    const uint64_t at =
        before + cuda::cta_scan<kWordThreads>(uint64_t(uint32_t(total)) << 32 | uint32_t(own), scratch, &all);
    before += all;
    if (key < k_blocks) {
      begins[key] = int32_t(at >> 32) + earlier;
      starts[key] = int32_t(uint32_t(at));
      if (chunk == 0) offsets[key] = int32_t(at >> 32);
    }
  }
  const int64_t total = int64_t(before >> 32);
  if (chunk == 0 && tid == 0) offsets[k_blocks] = int32_t(total);
  for (int64_t at = total + chunk * kWordThreads + tid; at < capacity; at += plan.chunks * kWordThreads) slots[at] = -1;
  __syncthreads();

  bool again = false;
  walk_chunk(plan, head, chunk, [&](int32_t key, int r, int) {
    again |= atomicOr(&words[r / kWarp * k_blocks + key], 1u << r % kWarp) >> r % kWarp & 1;
  });
  if (__syncthreads_or(again)) {  // a row lists a block twice: in order, by one warp
    if (tid >= kWarp) return;
    const int64_t end = min((chunk + 1) * plan.rows_per_chunk, plan.lists.q_blocks);
    for (int64_t m = chunk * plan.rows_per_chunk; m < end; ++m) {
      walk_row(plan, head, m, [&](int32_t key, int32_t slot) { place_in_order(begins, key, slot, slots); });
    }
    return;
  }
  walk_chunk(plan, head, chunk, [&](int32_t key, int r, int slot) {
    int at = starts[key] + __popc(words[r / kWarp * k_blocks + key] & ((1u << r % kWarp) - 1));
    for (int group = 0; group < r / kWarp; ++group) at += __popc(words[group * k_blocks + key]);
    staged[at] = uint16_t(r * int(plan.slots_per_row) + slot);
  });
  __syncthreads();
  const int32_t count = int32_t(uint32_t(before));
  constexpr int kLanesEach = 8;
  for (int key = tid / kLanesEach; key < k_blocks; key += kWordThreads / kLanesEach) {
    const int start = starts[key], end = key + 1 < k_blocks ? starts[key + 1] : count;
    int32_t* to = slots + begins[key] - start;
    for (int at = start + tid % kLanesEach; at < end; at += kLanesEach) to[at] = int32_t(first_slot) + staged[at];
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
  if (plan.by_words) {
    const dim3 grid(unsigned(plan.chunks), heads);
    cuda::launch(transpose_count_chunk, grid, kWordThreads, size_t(plan.k_blocks) * 4, stream, plan);
    cuda::launch(transpose_place_chunk, grid, kWordThreads, size_t(bytes_by_words(plan, plan.rows_per_chunk)), stream,
                 plan);
  } else {
    cudaMemsetAsync(plan.slots, 0xff, size_t(plan.heads) * slots * sizeof(int32_t), stream);
    cudaMemsetAsync(plan.histogram, 0, size_t(plan.heads) * plan.chunks * plan.k_blocks * sizeof(int32_t), stream);
    const auto groups = [&](int64_t count, int64_t each) { return dim3(unsigned(ceil_div(count, each)), heads); };
    auto row_groups = unsigned(std::min<int64_t>(ceil_div<int64_t>(plan.lists.q_blocks, warps), 1 << 20));
    cuda::launch(transpose_count, dim3(row_groups, heads), threads, 0, stream, plan);
    cuda::launch(transpose_scan_chunks, groups(plan.k_blocks, threads), threads, 0, stream, plan);
    cuda::launch(transpose_scan_keys, heads, kScanThreads, 0, stream, plan);
    cuda::launch(transpose_place, groups(plan.chunks, warps), threads, 0, stream, plan);
  }
  return launched("transpose_block_lists");
}

}  // namespace sparsekit

// The plan of stripe-sparse attention (cuda_stripes.h), made on the device: one CTA per cell.
//
// A bitmap over the keys in shared memory takes the columns of the cell's group, in any order and twice if they are
// listed twice, and the sink keys. Listed blocks become tiles; where bits or a window may hide a block's keys, its tile
// takes the bitmap's bits along. What is left outside the blocks is written out, ascending, with the local keys
// between. Keys beyond 262,144 are taken in chunks of as many. A list that ascends and has nothing beside it is copied.
//
// Bound: latency of shared-memory atomics and the lists' memory traffic. 16 heads of 32,768 tokens at 10 %: 13 million
// columns read once and written once. Nothing is read on the host; the same plan on every run.
#include <cuda_runtime.h>

#include <algorithm>

#include "attention/cuda_schedule.h"
#include "attention/cuda_stripes.h"
#include "attention/cuda_tiles.cuh"
#include "common/cuda/launch.h"

namespace sparsekit::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarpSize;
constexpr int kChunkWords = 8192;                 // of 32 keys: 64 KB for two bitmaps
constexpr size_t kPlanBytes = size_t(256) << 20;  // unless one cell needs more

struct PlanArguments {
  AttentionProblem p;
  StripePlan plan;
  int words;  // of a chunk's bitmap, a multiple of 4 (128 keys)
};

/// The positions of a cell's rows. Local keys: (least - local, most]; those in (most - local, least] every row sees.
struct CellPositions {
  int64_t least, most;
};

/// Exclusive prefix sum over the threads of a CTA; `*total` gets the sum. `scratch` holds kWarps ints and is free again
/// after the next barrier.
__device__ int prefix_sum(int mine, int* scratch, int* total) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  int before = mine;
  for (int step = 1; step < kWarpSize; step *= 2) {
    const int left = __shfl_up_sync(kAllLanes, before, step);
    if (lane >= step) before += left;
  }
  __syncthreads();
  if (lane == kWarpSize - 1) scratch[warp] = before;
  __syncthreads();
  before -= mine;
  *total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += scratch[w];
    *total += scratch[w];
  }
  return before;
}

/// Bits of keys first .. first + 31 whose number lies in [low, high].
__device__ uint32_t key_range_word(int64_t low, int64_t high, int64_t first) {
  low = max(low - first, int64_t(0));
  high = min(high - first, int64_t(31));
  if (low > high) return 0;
  return (~0u << int(low)) & (~0u >> (31 - int(high)));
}

class CellPlanner {
 public:
  __device__ CellPlanner(const PlanArguments& arguments, uint32_t* shared, int* scratch)
      : p_(arguments.p),
        plan_(arguments.plan),
        words_(arguments.words),
        columns_(shared),
        band_(shared + arguments.words),
        covered_(shared + 2 * arguments.words),
        scratch_(scratch) {}

  __device__ void run() {
    const int cell = blockIdx.x, number = plan_.first_cell + cell, per_head = plan_.cut.cells();
    const int list_head = number / per_head % plan_.list_heads;
    b_ = number / per_head / plan_.list_heads;
    h_ = list_head * (int(p_.heads_q) / plan_.list_heads);
    rows_ = plan_.cut.cell(number % per_head);
    tiles_ = plan_.tiles + int64_t(cell) * plan_.tile_capacity;
    entries_ = plan_.columns + cell * plan_.column_capacity;
    if (rows_.first < rows_.end) {
      find_positions();
    }
    if (rows_.first < rows_.end && !copy_ascending()) {
      const int64_t chunk = int64_t(words_) * 32;
      for (int64_t first = 0; first < p_.len_k; first += chunk) {
        begin_ = first;
        end_ = min(first + chunk, p_.len_k);
        mark_sink();
        __syncthreads();
        mark_columns();
        __syncthreads();
        if (plan_.cut.block) {
          add_blocks(p_.lists.partial, true);
          add_blocks(p_.lists.full, false);
        }
        __syncthreads();
        add_columns();
        __syncthreads();
      }
    }
    column_count_ = int(min(int64_t(column_count_), plan_.column_capacity));
    // The last tile of columns is read whole.
    const int padded = (column_count_ + plan_.tile_keys - 1) / plan_.tile_keys * plan_.tile_keys;
    for (int i = column_count_ + int(threadIdx.x); i < padded; i += kThreads) entries_[i] = -1;
    if (threadIdx.x == 0) plan_.counts[cell] = {tile_count_, column_count_};
  }

 private:
  __device__ int64_t query_position(int row) const {
    return p_.query_positions ? p_.query_positions[b_ * p_.query_positions_batch + row] : row + p_.len_k - p_.len_q;
  }
  __device__ int64_t key_position(int64_t key) const {
    return p_.key_positions ? p_.key_positions[b_ * p_.key_positions_batch + key] : key;
  }

  __device__ void find_positions() {
    least_ = query_position(rows_.first);
    most_ = query_position(rows_.end - 1);
    if (!p_.query_positions) return;
    for (int row = rows_.first + int(threadIdx.x); row < rows_.end; row += kThreads) {
      least_ = min(least_, query_position(row));
      most_ = max(most_, query_position(row));
    }
    int least = int(least_), most = int(most_);
    for (int step = 1; step < kWarpSize; step *= 2) {
      least = min(least, __shfl_xor_sync(kAllLanes, least, step));
      most = max(most, __shfl_xor_sync(kAllLanes, most, step));
    }
    if (threadIdx.x % kWarpSize == 0) {
      scratch_[threadIdx.x / kWarpSize] = least;
      scratch_[kWarps + threadIdx.x / kWarpSize] = most;
    }
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) {
      least = min(least, scratch_[w]);
      most = max(most, scratch_[kWarps + w]);
    }
    __syncthreads();
    least_ = least;
    most_ = most;
  }

  /// Causality hides a key at `position` from every row.
  __device__ bool hidden(int64_t position) const { return p_.causal && position > most_; }

  __device__ void mark_sink() {
    const int64_t sink = p_.stripes.sink;
    for (int w = threadIdx.x; w < words_; w += kThreads) {
      const int64_t first = begin_ + int64_t(w) * 32;
      uint32_t bits = 0;
      if (sink > 0 && !p_.key_positions) {
        const int64_t last = min(sink, p_.len_k) - 1;
        bits = key_range_word(0, p_.causal ? min(last, most_) : last, first);
      } else if (sink > 0) {
        for (int i = 0; i < 32 && first + i < end_; ++i) {
          const int64_t at = key_position(first + i);
          if (at < sink && !hidden(at)) bits |= 1u << i;
        }
      }
      columns_[w] = bits;
      if (w < (words_ + 63) / 64) covered_[w] = 0;  // a bit for 64 keys
    }
  }

  static constexpr int kBatch = 8;  // loads of a thread that are under way together

  /// The columns of the cell's group.
  __device__ const int32_t* column_list(int* count) const {
    const StripeLists& stripes = p_.stripes;
    const int list_head = h_ / (int(p_.heads_q) / int(stripes.list_heads));
    const int64_t row =
        (int64_t(stripes.list_batch == 1 ? 0 : b_) * stripes.list_heads + list_head) * stripes.groups + rows_.group;
    *count = min(max(stripes.counts[row], 0), stripes.capacity);
    return stripes.indices + row * stripes.capacity;
  }

  /// A list of rows that exist, ascending, with nothing beside it, is its own plan: copied, while it is checked. False:
  /// it is none, and what was written counts for nothing.
  __device__ bool copy_ascending() {
    if (plan_.cut.block || p_.stripes.sink > 0 || p_.stripes.local > 0 || (p_.causal && p_.key_positions)) return false;
    int count, seen = 0;
    const int32_t* list = column_list(&count);
    bool ascends = true;
    for (int first = threadIdx.x; first - int(threadIdx.x) < count; first += kBatch * kThreads) {
      int keys[kBatch], before[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int slot = first + i * kThreads;
        keys[i] = slot < count ? list[slot] : INT_MAX;
        before[i] = slot > 0 && slot < count && threadIdx.x % kWarpSize == 0 ? list[slot - 1] : -1;
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int slot = first + i * kThreads, left = __shfl_up_sync(kAllLanes, keys[i], 1);
        if (slot >= count) continue;
        ascends &= keys[i] > (threadIdx.x % kWarpSize ? left : before[i]) && keys[i] < p_.len_k;
        if (hidden(keys[i])) continue;
        ++seen;
        if (slot < plan_.column_capacity) entries_[slot] = keys[i];
      }
    }
    if (!__syncthreads_and(ascends)) return false;
    prefix_sum(seen, scratch_, &column_count_);
    return true;
  }

  __device__ void mark_columns() {
    int count;
    const int32_t* list = column_list(&count);
    for (int first = threadIdx.x; first < count; first += kBatch * kThreads) {
      int keys[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int slot = first + i * kThreads;
        keys[i] = slot < count ? list[slot] : -1;
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (keys[i] < begin_ || keys[i] >= end_ || hidden(key_position(keys[i]))) continue;
        const int at = int(keys[i] - begin_);
        atomicOr(&columns_[at / 32], 1u << (at % 32));
      }
    }
  }

  /// The tiles of the list's blocks in this chunk, in the order of the list.
  __device__ void add_blocks(const BlockList& list, bool partial) {
    const int64_t row = list_row(p_, b_, h_, rows_.first / p_.lists.block_q);
    const int count = list_count(list, row);
    const int tiles_a_block = p_.lists.block_k / plan_.tile_keys;
    for (int first = 0; first < count; first += kThreads) {
      const int slot = first + threadIdx.x;
      int64_t start = -1;
      int bits = -1, found = 0;
      if (slot < count) {
        const int block = list.indices[row * list.capacity + slot];
        start = int64_t(block) * p_.lists.block_k;
        if (partial) bits = bits_of_slot(p_.lists, row, slot);
        if (block < 0 || start < begin_ || start >= end_ || bits == INT_MIN) start = -1;
      }
      if (start >= 0) {
        for (int64_t key = start; key < start + p_.lists.block_k; key += 64) {
          const int at = int(key - begin_) / 64;
          atomicOr(&covered_[at / 32], 1u << (at % 32));
        }
        BlockTile tile;
        for (int i = 0; i < tiles_a_block; ++i) found += block_tile(start, i, partial, bits, &tile);
      }
      int total;
      int to = tile_count_ + prefix_sum(found, scratch_, &total);
      for (int i = 0; i < tiles_a_block && found > 0; ++i) {
        BlockTile tile;
        if (block_tile(start, i, partial, bits, &tile) && to < plan_.tile_capacity) tiles_[to++] = tile;
      }
      tile_count_ += total;
    }
  }

  /// Tile `number` of a block; false where no row sees any of its keys.
  __device__ bool block_tile(int64_t block_start, int number, bool partial, int bits, BlockTile* tile) const {
    const int keys = plan_.tile_keys;
    const int64_t start = block_start + number * keys, last = start + keys - 1;
    if (start >= p_.len_k) return false;
    *tile = {int(start), last < p_.len_k ? BlockTile::whole : BlockTile::tail, {0, 0, 0, 0}};
    bool columns = false;
    if (!partial) return true;
    tile->mask = bits;
    const bool windowed = p_.window_left >= 0 || p_.window_right >= 0;
    if (bits >= 0 || windowed) {  // else it shows all that columns, sink and band could
      const int at = int(start - begin_);
      for (int w = 0; w * 32 < keys; ++w) {
        const uint32_t word = columns_[at / 32 + w] >> (at % 32);
        tile->columns[w] = keys < 32 ? word & 0xffff : word;
        columns |= tile->columns[w] != 0;
      }
    }
    if (p_.query_positions || p_.key_positions) return true;
    const KeyRange first_row = key_range(p_, b_, rows_.first), last_row = key_range(p_, b_, rows_.end - 1);
    const bool local = p_.stripes.local > 0 && start <= most_ && last > least_ - p_.stripes.local;
    if ((start > last_row.high || last < first_row.low) && !columns && !local) return false;
    if (bits < 0 && last < p_.len_k && last <= first_row.high && start >= last_row.low) tile->mask = BlockTile::whole;
    return true;
  }

  /// Appends what no block covers. Plain entries first take the place of their bits, marked ones go beside them.
  __device__ void add_columns() {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int words = int((end_ - begin_ + 31) / 32);
    const int per_warp = (words + kWarps - 1) / kWarps;
    const int from = min(words, warp * per_warp), to = min(words, from + per_warp);
    const int64_t local = p_.stripes.local;
    int mine = 0;
    for (int w = from + lane; w < to; w += kWarpSize) {
      const int64_t first = begin_ + int64_t(w) * 32;
      uint32_t seen = 0, always = 0;  // as local keys: by some row, by all
      if (local > 0 && !p_.key_positions) {
        const uint32_t inside = key_range_word(0, p_.len_k - 1, first);
        seen = inside & key_range_word(least_ - local + 1, most_, first);
        always = inside & key_range_word(most_ - local + 1, least_, first);
      } else if (local > 0) {
        for (int i = 0; i < 32 && first + i < end_; ++i) {
          const int64_t at = key_position(first + i);
          if (at > least_ - local && at <= most_) seen |= 1u << i;
          if (at > most_ - local && at <= least_) always |= 1u << i;
        }
      }
      const bool covered = covered_[w / 64] >> (w / 2 % 32) & 1;
      const uint32_t plain = covered ? 0 : columns_[w] | always;
      const uint32_t marked = covered ? 0 : seen & ~plain;
      columns_[w] = plain;
      band_[w] = marked;
      mine += __popc(plain | marked);
    }
    for (int step = 1; step < kWarpSize; step *= 2) mine += __shfl_xor_sync(kAllLanes, mine, step);
    if (lane == 0) scratch_[warp] = mine;
    __syncthreads();
    int at = column_count_;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) at += scratch_[w];
      column_count_ += scratch_[w];
    }
    const int capacity = int(plan_.column_capacity);
    for (int w = from; w < to; w += kWarpSize) {  // a word per lane
      const uint32_t plain = w + lane < to ? columns_[w + lane] : 0;
      const uint32_t all = plain | (w + lane < to ? band_[w + lane] : 0);
      const int count = __popc(all);
      int place = count;
      for (int step = 1; step < kWarpSize; step *= 2) {
        const int left = __shfl_up_sync(kAllLanes, place, step);
        if (lane >= step) place += left;
      }
      const int total = __shfl_sync(kAllLanes, place, kWarpSize - 1);
      place += at - count;
      const int first = int(begin_) + (w + lane) * 32;
      for (uint32_t left = all; left && place < capacity; left &= left - 1) {
        const int i = __ffs(left) - 1;
        entries_[place++] = plain >> i & 1 ? first + i : (first + i) | INT_MIN;
      }
      at += total;
    }
    __syncthreads();
  }

  const AttentionProblem& p_;
  const StripePlan& plan_;
  const int words_;
  uint32_t *columns_, *band_, *covered_;
  int* scratch_;
  BlockTile* tiles_;
  int32_t* entries_;
  UnitRows rows_;
  int b_, h_;
  int64_t least_ = 0, most_ = 0, begin_ = 0, end_ = 0;
  int tile_count_ = 0, column_count_ = 0;
};

__global__ void __launch_bounds__(kThreads, 5) plan_cells(const __grid_constant__ PlanArguments arguments) {
  extern __shared__ uint32_t shared[];
  __shared__ int scratch[2 * kWarps];
  CellPlanner(arguments, shared, scratch).run();
}

int64_t cell_bytes(const StripePlan& plan) {
  return int64_t(plan.tile_capacity) * int64_t(sizeof(BlockTile)) + plan.column_capacity * int64_t(sizeof(int32_t)) +
         int64_t(sizeof(CellCounts)) + int64_t(sizeof(int32_t));
}

}  // namespace

StripeCut stripe_cut(const AttentionProblem& p, int rows) {
  auto up = [](int64_t n, int64_t d) { return int((n + d - 1) / d); };
  const int64_t len_q = std::max<int64_t>(p.len_q, 1);
  StripeCut cut;
  cut.len_q = int(p.len_q);
  cut.rows = rows;
  cut.group = int(std::min<int64_t>(p.stripes.group_size, len_q));
  if (p.lists.slots_per_row() > 0) {
    cut.block = p.lists.block_q;
    cut.groups_a_block = cut.group % cut.block == 0   ? 1
                         : cut.block % cut.group == 0 ? cut.block / cut.group
                                                      : (cut.block - 1) / cut.group + 2;
    cut.regions = up(p.len_q, cut.block) * cut.groups_a_block;
    cut.parts = up(std::min(cut.block, cut.group), rows);
  } else {
    cut.regions = up(p.len_q, cut.group);
    cut.parts = up(cut.group, rows);
  }
  cut.cell_is_unit = p.stripes.local > 0 || cut.parts == 1;
  return cut;
}

StripePlan stripe_plan(const AttentionProblem& p, int rows, int tile_keys) {
  const StripeLists& stripes = p.stripes;
  StripePlan plan;
  plan.cut = stripe_cut(p, rows);
  plan.tile_keys = tile_keys;
  const bool blocks = plan.cut.block > 0;
  const bool batch = (stripes.list_batch > 1) || (blocks && p.lists.list_batch > 1) ||
                     (p.query_positions && p.query_positions_batch != 0) ||
                     (p.key_positions && p.key_positions_batch != 0);
  plan.list_batch = batch ? int(p.batch) : 1;
  plan.list_heads = int(std::max(stripes.list_heads, blocks ? p.lists.list_heads : 1));
  if (blocks) plan.tile_capacity = int(p.lists.slots_per_row() * (p.lists.block_k / tile_keys));
  int64_t columns = stripes.capacity;
  if (stripes.sink > 0) columns += p.key_positions ? p.len_k : std::min(stripes.sink, p.len_k);
  const int64_t cell_rows = plan.cut.cell_is_unit ? rows : plan.cut.group;
  if (stripes.local > 0) {
    columns += p.key_positions || p.query_positions ? p.len_k : std::min(stripes.local, p.len_k) + cell_rows;
  }
  columns = std::min(columns, p.len_k);
  plan.column_capacity = (columns + 127) / 128 * 128;
  return plan;
}

int stripe_plan_cells_at_once(const StripePlan& plan) {
  const int64_t fit = int64_t(kPlanBytes) / cell_bytes(plan);
  return int(std::max<int64_t>(1, std::min<int64_t>(fit, plan.all_cells())));
}

size_t stripe_plan_bytes(const StripePlan& plan) {
  return size_t(cell_bytes(plan)) * size_t(stripe_plan_cells_at_once(plan)) + sizeof(int32_t);
}

void place_stripe_plan(StripePlan* plan, void* memory, int first_cell) {
  const int64_t cells = stripe_plan_cells_at_once(*plan);
  auto* at = static_cast<char*>(memory);  // the largest alignment first
  plan->tiles = reinterpret_cast<BlockTile*>(at);
  at += cells * plan->tile_capacity * int64_t(sizeof(BlockTile));
  plan->columns = reinterpret_cast<int32_t*>(at);
  at += cells * plan->column_capacity * int64_t(sizeof(int32_t));
  plan->counts = reinterpret_cast<CellCounts*>(at);
  at += cells * int64_t(sizeof(CellCounts));
  plan->order = reinterpret_cast<int32_t*>(at);
  plan->counter = plan->order + cells;
  plan->first_cell = first_cell;
  plan->cells = int(std::min<int64_t>(cells, plan->all_cells() - first_cell));
}

Status make_stripe_plan(const AttentionProblem& p, const StripePlan& plan, void* stream) {
  const int64_t words = std::min<int64_t>((p.len_k + 127) / 128 * 4, kChunkWords);
  PlanArguments arguments{p, plan, int(words)};
  const int bytes = int((2 * words + (words + 63) / 64) * 4);
  cudaError_t code = cudaFuncSetAttribute(reinterpret_cast<const void*>(plan_cells),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (code != cudaSuccess) return status_of(code, "setting the stripe plan's shared memory");
  plan_cells<<<unsigned(plan.cells), kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(arguments);
  code = cudaGetLastError();
  if (code != cudaSuccess) return status_of(code, "launching the stripe plan");
  return schedule_cells_longest_first(p, plan, stream);
}

}  // namespace sparsekit::cuda

// What forward and backward of stripe-sparse attention share on the GPU: which unit a CTA works on, the tiles of its
// plan (cuda_stripes.h) as they pass through shared memory, the gathering of their rows, and who sees whom in them.
//
// The plan holds rows of key that exist, but the column entries that pad a list do not: row 2^31 - 1, never read.
#pragma once

#include "attention/cuda_stripes.h"
#include "attention/cuda_tiles.cuh"
#include "common/cuda/shared_memory.cuh"

namespace sparsekit::cuda {

/// The unit that a CTA works on.
struct StripeUnit {
  int batch, head, kv_head;
  int cell;  // of the plan's cells in memory
  UnitRows rows;
};

/// Query heads that share a cell: members of its list head and batch entry.
SPARSEKIT_HOST_DEVICE inline int heads_of_cell(const AttentionProblem& p, const StripePlan& plan) {
  return int(p.heads_q) / plan.list_heads * (plan.list_batch == 1 ? int(p.batch) : 1);
}

/// Unit `number`, the cells in `order`, each for all its heads and parts: those follow one another, since they walk
/// the same keys.
__device__ __forceinline__ StripeUnit stripe_unit(const AttentionProblem& p, const StripePlan& plan, int number) {
  const int parts = plan.cut.parts_of_cell(), heads = heads_of_cell(p, plan);
  StripeUnit unit;
  unit.cell = plan.order[number / (parts * heads)];
  const int member = number / parts % heads, row = plan.first_cell + unit.cell;
  const int per_head = plan.cut.cells(), in_list = int(p.heads_q) / plan.list_heads;
  const int list = row / per_head;
  unit.batch = plan.list_batch == 1 ? member / in_list : list / plan.list_heads;
  unit.head = list % plan.list_heads * in_list + member % in_list;
  unit.kv_head = unit.head / (int(p.heads_q) / int(p.heads_kv));
  unit.rows = plan.cut.unit(row % per_head, number % parts);
  return unit;
}

/// The tiles of a cell as they wait in shared memory: a ring of places, each with the entries of one tile of columns or
/// with one BlockTile. Filled two tiles ahead, by cp.async.
template <int KEYS>
struct TileRing {
  static constexpr int kPlaces = 4, kBytes = kPlaces * KEYS * 4;
  static_assert(KEYS * 4 >= int(sizeof(BlockTile)) && KEYS <= 128 && KEYS % 16 == 0);

  const BlockTile* tiles;
  const int32_t* columns;
  int block_tiles, count;  // tiles of blocks; all tiles
  int32_t* places;         // shared memory

  __device__ __forceinline__ TileRing(const StripePlan& plan, int cell, int32_t* shared)
      : tiles(plan.tiles + int64_t(cell) * plan.tile_capacity),
        columns(plan.columns + cell * plan.column_capacity),
        block_tiles(plan.counts[cell].tiles),
        count(block_tiles + (plan.counts[cell].columns + KEYS - 1) / KEYS),
        places(shared) {}

  __device__ __forceinline__ int32_t* place(int number) const { return places + number % kPlaces * KEYS; }
  __device__ __forceinline__ bool of_block(int tile) const { return tile < block_tiles; }

  __device__ __forceinline__ void fill(int32_t* place, int tile) const {
    if (tile >= count || threadIdx.x >= KEYS / 4) return;
    const uint32_t to = shared_address(place) + threadIdx.x * kChunkBytes;
    if (!of_block(tile)) {
      copy_async_16(to, columns + int64_t(tile - block_tiles) * KEYS + threadIdx.x * 4, true);
    } else if (threadIdx.x < sizeof(BlockTile) / kChunkBytes) {
      copy_async_16(to, reinterpret_cast<const char*>(tiles + tile) + threadIdx.x * kChunkBytes, true);
    }
  }
};

/// Row of key that stands at `n` of a tile; at or past the end of key where there is none.
__device__ __forceinline__ int tile_row(const int32_t* place, bool of_block, int n) {
  return of_block ? place[0] + n : place[n] & kColumnRow;
}

/// How many of the ascending entries are rows below `key`. By a whole warp, 32 probes at a time.
__device__ __forceinline__ int entries_below(const int32_t* columns, int count, int key) {
  int low = 0, high = count;
  while (low < high) {
    const int step = (high - low + kWarpSize - 1) / kWarpSize, at = low + int(threadIdx.x % kWarpSize) * step;
    const int less = __popc(__ballot_sync(kAllLanes, at < high && (columns[at] & kColumnRow) < key));
    if (less == 0) break;
    high = min(high, low + less * step);
    low += (less - 1) * step + 1;
  }
  return low;
}

/// What hides keys from the rows of one unit.
struct StripeSight {
  const AttentionProblem& p;
  int batch;
  int least;  // without positions: the first row's

  __device__ __forceinline__ StripeSight(const AttentionProblem& problem, int b, int first_row)
      : p(problem), batch(b), least(first_row + int(problem.len_k) - int(problem.len_q)) {}

  __device__ __forceinline__ bool positions() const { return p.query_positions || p.key_positions; }

  /// Of a row, or of the last one for rows past it.
  __device__ __forceinline__ int64_t position(int row) const {
    row = min(row, int(p.len_q) - 1);
    return p.query_positions ? p.query_positions[batch * p.query_positions_batch + row]
                             : int64_t(row) + p.len_k - p.len_q;
  }

  /// Whether some row may not see some key of a tile. Asked by a whole warp, which gets one answer.
  template <int KEYS>
  __device__ __forceinline__ bool masks(const int32_t* place, bool of_block) const {
    if (of_block) return place[1] != BlockTile::whole;
    if (p.causal && positions()) return true;
    const int most = p.causal ? least : kColumnRow - 1;  // the greatest row that all see; padding is greater
    bool some = most < 0;
#pragma unroll
    for (int n = 0; n < KEYS; n += kWarpSize) {
      const int i = n + int(threadIdx.x) % kWarpSize;
      if (i < KEYS) some |= uint32_t(place[i]) > uint32_t(most);  // so are marked entries without their sign
    }
    return __any_sync(kAllLanes, some);
  }

  /// Whether no row of the unit sees this tile of columns or one after it: they ascend.
  __device__ __forceinline__ bool ends(const int32_t* place, bool of_block, int last_row) const {
    return !of_block && p.causal && !positions() && (place[0] & kColumnRow) > last_row + int(p.len_k) - int(p.len_q);
  }

  /// Which of the keys first ... first + 31 of a tile (first a multiple of 16) row `row` sees, bit by bit. Only the
  /// bits of `wanted` are right.
  __device__ __forceinline__ uint32_t word(const int32_t* place, bool of_block, int row, int first,
                                           uint32_t wanted) const {
    row = min(row, int(p.len_q) - 1);
    const int64_t at = position(row);
    const int64_t local = at - p.stripes.local;  // the band begins behind it
    const int32_t* positions = p.key_positions ? p.key_positions + batch * p.key_positions_batch : nullptr;
    if (!of_block) {
      uint32_t seen = 0;
      for (uint32_t left = wanted; left; left &= left - 1) {
        const int i = __ffs(left) - 1, entry = place[first + i], key = entry & kColumnRow;
        if (key >= p.len_k) continue;
        const int position = positions ? positions[key] : key;
        const bool sees = entry >= 0 ? !p.causal || position <= at : position <= at && position > local;
        seen |= uint32_t(sees) << i;
      }
      return seen;
    }
    const int mask = place[1], key = place[0] + first;
    const bool partial = mask >= BlockTile::masked;
    const int block_start = place[0] - place[0] % p.lists.block_k;
    uint32_t seen = visible_word(p, batch, row, key, block_start, mask, partial, wanted);
    if (!partial) return seen;
    const uint32_t columns = uint32_t(place[2 + first / 32]) >> (first % 32);
    const KeyRange before{INT_MIN, p.causal ? int(at) : INT_MAX};
    const KeyRange band{int(max(local + 1, int64_t(INT_MIN))), p.stripes.local > 0 ? int(at) : INT_MIN};
    if (!positions) {
      const KeyRange in_sequence{0, int(p.len_k) - 1};
      const uint32_t more = (columns & range_word(before, key)) | (p.stripes.local > 0 ? range_word(band, key) : 0);
      return seen | (more & range_word(in_sequence, key) & wanted);
    }
    for (uint32_t left = wanted & ~seen; left; left &= left - 1) {
      const int i = __ffs(left) - 1;
      if (key + i >= p.len_k) break;
      const int position = positions[key + i];
      if ((columns >> i & 1 && before.holds(position)) || (p.stripes.local > 0 && band.holds(position)))
        seen |= 1u << i;
    }
    return seen;
  }
};

}  // namespace sparsekit::cuda

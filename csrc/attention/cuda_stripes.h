// Stripe-sparse attention on CUDA: how the query rows are cut into units of work, and the plan that says which keys
// each unit walks. cuda_stripes_plan.cu makes the plan on the device; cuda_stripes_{forward,backward}* walk it.
//
// A unit is up to `rows` query rows of one head, of one group and, where there are blocks, of one query block: what one
// CTA works on. It walks tiles of `tile_keys` keys, every key that its rows may see in exactly one of them: first the
// tiles of its listed blocks, then its columns, gathered row by row. Sink keys and the columns proper look alike to a
// row (causality alone hides them), so the plan makes both one ascending list; local keys join it, marked where only
// the band shows them. What falls into a listed block is left to the block, whose tile carries the columns in it.
//
// Units that differ in nothing but their rows share a plan: a cell. Without band and blocks a cell is a whole group.
#pragma once

#include <climits>
#include <cstddef>
#include <cstdint>

#include "sparsekit/attention.h"

#ifdef __CUDACC__
#define SPARSEKIT_HOST_DEVICE __host__ __device__
#else
#define SPARSEKIT_HOST_DEVICE
#endif

namespace sparsekit::cuda {

/// Query rows first ... end - 1 of group `group`; none where first >= end.
struct UnitRows {
  int first, end, group;
};

/// How one head's query rows are cut: into regions (a group, or what a group and a query block have in common), and
/// these into units.
struct StripeCut {
  int len_q = 0;
  int rows = 0;            // of a unit
  int group = 0;           // rows of a group, at most len_q
  int block = 0;           // rows of a query block; 0: there are no blocks
  int groups_a_block = 1;  // regions that are counted for a query block; some may be empty
  int parts = 1;           // units of a region
  int regions = 0;
  bool cell_is_unit = false;

  SPARSEKIT_HOST_DEVICE int units() const { return regions * parts; }
  SPARSEKIT_HOST_DEVICE int cells() const { return cell_is_unit ? units() : regions; }
  SPARSEKIT_HOST_DEVICE int parts_of_cell() const { return cell_is_unit ? 1 : parts; }

  SPARSEKIT_HOST_DEVICE UnitRows region(int number) const {
    UnitRows r;
    r.group = block ? number / groups_a_block * block / group + number % groups_a_block : number;
    const int64_t begin = int64_t(r.group) * group, end = begin + group;
    int64_t first = begin, last = end < len_q ? end : len_q;
    if (block) {
      const int64_t block_first = int64_t(number / groups_a_block) * block, block_end = block_first + block;
      first = first < block_first ? block_first : first;
      last = last < block_end ? last : block_end;
    }
    r.first = int(first < len_q ? first : len_q);
    r.end = int(last);
    return r;
  }
  SPARSEKIT_HOST_DEVICE UnitRows part(UnitRows region, int number) const {
    region.first += number * rows;  // past its end: an empty unit
    region.end = region.first + rows < region.end ? region.first + rows : region.end;
    return region;
  }
  /// Rows of a cell; part `n` of them are those of its unit n.
  SPARSEKIT_HOST_DEVICE UnitRows cell(int number) const {
    return cell_is_unit ? part(region(number / parts), number % parts) : region(number);
  }
  SPARSEKIT_HOST_DEVICE UnitRows unit(int cell_number, int number) const {
    return cell_is_unit ? cell(cell_number) : part(region(cell_number), number);
  }
};

StripeCut stripe_cut(const AttentionProblem& problem, int rows);

/// A tile of a listed block as the plan stores it: its first key; what hides keys in it; and the columns and sink keys
/// among its keys, bit by bit, where bits or a window may hide them as keys of the block.
struct alignas(16) BlockTile {
  static constexpr int whole = -3;   // nothing
  static constexpr int tail = -2;    // the end of the sequence
  static constexpr int masked = -1;  // causality and window; 0 and more: also this in-block mask
  int32_t start, mask;
  uint32_t columns[4];
};

/// Entries of the columns: a row of key; with the sign bit set only the band shows it. -1 pads the last tile.
constexpr int kColumnRow = INT_MAX;

/// What a cell's list holds.
struct CellCounts {
  int32_t tiles, columns;
};

/// The plan of some cells in device memory. Cells are numbered over (list batch, list head, cell of the head).
struct StripePlan {
  StripeCut cut;
  int list_batch = 1, list_heads = 1;  // 1 or batch; 1, heads_kv or heads_q: as fine as any of the lists
  int tile_keys = 0;
  int tile_capacity = 0;          // block tiles of a cell
  int64_t column_capacity = 0;    // entries of a cell, a multiple of tile_keys
  BlockTile* tiles = nullptr;     // [cells here][tile_capacity]
  int32_t* columns = nullptr;     // [cells here][column_capacity]
  CellCounts* counts = nullptr;   // [cells here]
  int32_t* order = nullptr;       // [cells here]: longest first
  int32_t* counter = nullptr;     // set to 0, for kernels that take units as they go
  int first_cell = 0, cells = 0;  // of a round: those that the memory holds at a time

  SPARSEKIT_HOST_DEVICE int all_cells() const { return list_batch * list_heads * cut.cells(); }
};

/// The plan of a problem for units of `rows` rows and tiles of `tile_keys` keys, without memory.
StripePlan stripe_plan(const AttentionProblem& problem, int rows, int tile_keys);

/// Bytes for the plan: of all cells, or of as many at a time as fit a fixed budget.
size_t stripe_plan_bytes(const StripePlan& plan);
/// Points the plan into memory of that size (aligned to 16 bytes), for `cells` cells from `first_cell` on.
int stripe_plan_cells_at_once(const StripePlan& plan);
void place_stripe_plan(StripePlan* plan, void* memory, int first_cell);

/// Fills the plan's cells on the device, with their order.
Status make_stripe_plan(const AttentionProblem& problem, const StripePlan& plan, void* stream);

}  // namespace sparsekit::cuda

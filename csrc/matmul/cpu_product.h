// y = x W^T, or x W, for a block-sparse W: tokens in the lanes, weights broadcast in place.
//
// x is packed into panels of tokens (cpu_pack.h). An item is one panel and a few block rows of the output (about 64
// rows): its sums stay in L1, and its weights are read once for the whole panel. A thread goes through the items of a
// few panels and packs each panel when it comes to it, into memory that it uses again for the next: packing everything
// beforehand cost 1,000 page faults a call and the panels' way through L3. Where there are few panels, they are packed
// once for all threads. Blocks of an output row are taken in groups whose slabs of x stay in L1 while the rows of the
// blocks pass by, tile after tile; the group's sums are added, so that no chain of additions is longer than a group.
//
// x W walks the transposed pattern and reads blocks along their other dimension; bf16 pairs are interleaved group by
// group. Weights of other dtypes are widened group by group, too. Both cost about 1 / (tokens of a panel) of the
// product.
//
// Bound: multiply-adds for many tokens; for few the memory traffic of the weights. Register blocking and packing: Goto
// and van de Geijn, Anatomy of High-Performance Matrix Multiplication (2008).
#pragma once

#include "matmul/cpu_epilogue.h"
#include "matmul/cpu_int8.h"
#include "matmul/cpu_low_blocks.h"

namespace sparsekit {
namespace {

constexpr int64_t group_steps = 192;  // of 48 lanes: 36 KB, beside which the weights pass by in L1
constexpr int64_t item_rows = 64, low_item_rows = 256;
constexpr int64_t chunk_bytes = 32 << 10;       // of slabs that stay in L1
constexpr int64_t most_slab_bytes = 512 << 10;  // of a panel that stays in L2 beside the weights that pass by

/// Items that are left of a thread's share; a thread that is done with its own takes from the others'.
struct alignas(64) ItemRange {
  int64_t next = 0, end = 0;
};

template <class Product>
struct ProductCall {
  using Element = typename Product::Element;
  const BlockSparseProduct* p = nullptr;
  int64_t out_features = 0, in_features = 0, in_blocks = 0;
  bool chunked = false;  // an item goes through all its rows by chunks of `chunk` blocks along the inner dimension
  int64_t chunk = 0;
  int64_t out_block = 0, in_block = 0, out_blocks = 0;  // rows of a tile and inner size of a block, as walked
  IndexArray offsets;                                   // of the entries of an output block
  const int32_t* slabs = nullptr;    // block numbers along the inner dimension, in the order they are walked
  const int32_t* entries = nullptr;  // places in values; null: as they are walked
  bool staged = false;               // weights are brought to elements group by group
  int64_t depth = 0, steps = 0;      // steps of a block, of a panel
  int64_t group = 0;                 // blocks
  int64_t width = 0, panels = 0;
  int64_t item_blocks = 0, items_per_panel = 0, items = 0;
  PackCall<Product> packing;             // `to` is null where each thread packs for itself: [panels][steps][width]
  const float* token_scales = nullptr;   // [panels * width]
  const int32_t* corrections = nullptr;  // [out_features rounded up to items], see cpu_int8.h
  ItemRange* ranges = nullptr;           // a contiguous share of the items for each of `threads`
  int64_t threads = 1;
  char* own = nullptr;  // memory of the first thread; of the others `own_size` bytes on
  int64_t own_size = 0, sums_at = 0, stage_at = 0, packed_at = 0, cursors_at = 0;
};

/// Block `entry` as elements; what lies beyond the matrix along the inner dimension as 0.
template <class Product, bool down>
static void stage_block(const ProductCall<Product>& call, int64_t entry, int64_t slab, typename Product::Element* to) {
  const BlockSparseProduct& p = *call.p;
  const int64_t R = p.pattern.block_rows, C = p.pattern.block_cols, at = entry * R * C;
  const int64_t valid = smaller(call.in_block, call.in_features - slab * call.in_block);
  if constexpr (Product::pair == 1) {
    widen(p.values, at, p.scales != nullptr, p.dtype, R * C, to);
    for (int64_t r = 0; r < R; ++r)
      for (int64_t c = 0; c < C; ++c)
        if ((down ? r : c) >= valid) to[r * C + c] = 0;
  } else {
    stage_pairs<Product, down>(p.values, at, R, C, valid, to);
  }
}

/// The least number of registers for `vectors` that multiply_blocks knows.
static int usable_registers(int64_t vectors) {
  const int least = int(vectors < 1 ? 1 : vectors);
  return least <= 2 ? least : least == 3 && Simd::registers == 32 ? 3 : least <= 4 ? 4 : least <= 6 ? 6 : 8;
}

/// How many vectors of tokens a panel has: many where a block has few rows to use a loaded vector for.
static int panel_registers(int64_t rows, int64_t tokens) {
  const int most = Simd::registers == 32 ? (rows >= 8 ? 3 : rows >= 4 ? 6 : 8) : (rows >= 4 ? 2 : 4);
  return int(smaller(most, usable_registers((tokens + Simd::lanes - 1) / Simd::lanes)));
}

/// The blocks `n` to `n + blocks.count` of an output block: added to its sums.
template <class Product, bool down>
static void multiply_group(const ProductCall<Product>& call, Blocks<Product>& blocks, int64_t block, int64_t n,
                           int registers, float* out, typename Product::Element* stage) {
  const BlockSparseProduct& p = *call.p;
  const int64_t rows = smaller(call.out_block, call.out_features - block * call.out_block);
  blocks.slab = call.slabs + n;
  blocks.ahead = blocks.count;
  blocks.exist = call.chunked ? 0 : p.pattern.nnz - n;
  if (call.staged) {
    for (int64_t i = 0; i < blocks.count; ++i)
      stage_block<Product, down>(call, call.entries ? call.entries[n + i] : n + i, call.slabs[n + i],
                                 stage + i * blocks.block_size);
    blocks.weights = stage;
  } else {
    blocks.entries = call.entries ? call.entries + n : nullptr;
    blocks.weights =
        static_cast<const typename Product::Element*>(p.values) + (call.entries ? 0 : n * blocks.block_size);
  }
  blocks.next_entries = call.entries ? call.entries + n : nullptr;
  blocks.next_weights = static_cast<const char*>(p.values) + (call.entries ? 0 : n * blocks.next_bytes);
  multiply_blocks<Product, down>(blocks, registers, rows, out, call.width, n > call.offsets[block]);
}

template <class Product, bool down>
static void multiply_item(ProductCall<Product>& call, int64_t item, const typename Product::Element* packed,
                          float* sums, int64_t* cursors, typename Product::Element* stage) {
  const BlockSparseProduct& p = *call.p;
  const int64_t panel = item / call.items_per_panel;
  const int64_t tokens = smaller(call.width, p.tokens - panel * call.width);
  const int registers = usable_registers((tokens + Simd::lanes - 1) / Simd::lanes);  // fewer in the last panel
  const int64_t first_block = item % call.items_per_panel * call.item_blocks;
  const int64_t last_block = smaller(first_block + call.item_blocks, call.out_blocks);
  Epilogue e;
  e.p = &p;
  e.token_scales = call.token_scales;
  e.feature = first_block * call.out_block;
  e.features = smaller(last_block * call.out_block, call.out_features) - e.feature;
  e.token = panel * call.width;
  e.tokens = tokens;
  e.sums = sums;
  e.width = call.width;
  prefetch_output(e);
  if (!call.packing.to) {  // the panel that this thread packs next: reading it from memory took 5 % of a bf16 product
    const int64_t part = item % call.items_per_panel;
    prefetch_source(call.packing.source, (panel + 1) * call.width, call.width, part, part + 1, call.items_per_panel);
  }
  Blocks<Product> blocks;
  blocks.block_size = int64_t(p.pattern.block_rows) * p.pattern.block_cols / Product::pair;
  blocks.weight_stride = down ? p.pattern.block_cols : p.pattern.block_cols / Product::pair;
  blocks.next_bytes = int64_t(p.pattern.block_rows) * p.pattern.block_cols *
                      (p.scales                ? 1
                       : p.dtype == DType::f32 ? 4
                                               : 2);
  blocks.slabs = packed;
  blocks.slab_size = call.depth * call.width;
  blocks.slab_stride = call.width;
  blocks.depth = call.depth;
  blocks.prefetch_slabs = call.steps * call.width * 4 > most_slab_bytes;
  for (int64_t block = first_block; block < last_block; ++block) {
    cursors[block - first_block] = call.offsets[block];
    if (call.offsets[block] == call.offsets[block + 1])
      memset(sums + (block - first_block) * call.out_block * call.width, 0,
             size_t(call.out_block * call.width) * sizeof(float));
  }
  // Rows of the last block may be beyond the matrix: their weights are numbers all the same, and stay where they are.
  const bool low = call.chunked && !call.staged && has_low(call.out_block, registers);
  LowChunk<Product> part;
  if (low) {
    part.p = &p, part.offsets = &call.offsets, part.slabs = call.slabs, part.entries = call.entries;
    part.packed = packed, part.first = first_block, part.last = last_block, part.group = call.group;
    part.depth = call.depth, part.width = call.width, part.weight_stride = blocks.weight_stride;
    part.cursors = cursors, part.sums = sums;
  }
  for (int64_t chunk_end = call.chunk;; chunk_end += call.chunk) {
    if (low) {
      const auto slab = [&](int64_t number) {
        return reinterpret_cast<const char*>(packed + smaller(number, call.in_blocks) * blocks.slab_size);
      };
      part.chunk_end = chunk_end;
      part.ahead = slab(chunk_end), part.ahead_end = slab(chunk_end + call.chunk);
      multiply_low<Product, down>(part, call.out_block);
      if (chunk_end >= call.in_blocks) break;
      continue;
    }
    for (int64_t block = first_block; block < last_block; ++block) {
      int64_t& n = cursors[block - first_block];
      const int64_t last = call.offsets[block + 1];
      while (n < last && (!call.chunked || call.slabs[n] < chunk_end)) {
        blocks.count = 1;
        const int64_t most = smaller(call.group, last - n);
        if (call.chunked) {
          while (blocks.count < most && call.slabs[n + blocks.count] < chunk_end) ++blocks.count;
        } else {
          blocks.count =
              (last - n) / ((last - n + call.group - 1) / call.group);  // groups of one size, as far as possible
        }
        multiply_group<Product, down>(call, blocks, block, n, registers,
                                      sums + (block - first_block) * call.out_block * call.width, stage);
        n += blocks.count;
      }
    }
    if (!call.chunked || chunk_end >= call.in_blocks) break;
  }
  Sums<Product>::to_float(sums, call.corrections ? call.corrections + e.feature : nullptr, e.features, call.width);
  finish(e);
}

template <class Product, bool down>
static void product_worker(int64_t first, int64_t last, void* context) {
  using Element = typename Product::Element;
  ProductCall<Product>& call = *static_cast<ProductCall<Product>*>(context);
  const int64_t panel_size = call.steps * call.width;
  for (int64_t i = first; i < last; ++i) {
    char* memory = call.own + i * call.own_size;
    Element* own = reinterpret_cast<Element*>(memory + call.packed_at);
    int64_t own_panel = -1;
    for (int64_t n = 0; n < call.threads; ++n) {
      ItemRange& range = call.ranges[(i + n) % call.threads];
      for (;;) {
        const int64_t item = __atomic_fetch_add(&range.next, 1, __ATOMIC_RELAXED);
        if (item >= range.end) break;
        const int64_t panel = item / call.items_per_panel;
        if (!call.packing.to && panel != own_panel) {
          pack_panel<Product>(call.packing.source, panel * call.width, call.width, 0, call.steps, own, call.width);
          own_panel = panel;
        }
        multiply_item<Product, down>(call, item, call.packing.to ? call.packing.to + panel * panel_size : own,
                                     reinterpret_cast<float*>(memory + call.sums_at),
                                     reinterpret_cast<int64_t*>(memory + call.cursors_at),
                                     reinterpret_cast<Element*>(memory + call.stage_at));
      }
    }
  }
  stream_fence();
}

/// int32 numbers of an index array: in place, or copied to `spare`.
static const int32_t* narrow(const IndexArray& numbers, int64_t count, char* spare) {
  if (!numbers.wide) return static_cast<const int32_t*>(numbers.data);
  int32_t* to = reinterpret_cast<int32_t*>(spare);
  for (int64_t i = 0; i < count; ++i) to[i] = int32_t(numbers[i]);
  return to;
}

/// Whether the numbers of every row ascend.
static bool ascending(const IndexArray& offsets, int64_t rows, const int32_t* numbers) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t n = offsets[i] + 1; n < offsets[i + 1]; ++n)
      if (numbers[n] < numbers[n - 1]) return false;
  return true;
}

template <class Product, bool down>
static Status run_product(const BlockSparseProduct& p, const ParallelFor& parallel) {
  const BlockSparsePattern& w = p.pattern;
  ProductCall<Product> call;
  call.p = &p;
  call.out_features = down ? w.cols : w.rows;
  call.in_features = down ? w.rows : w.cols;
  call.out_block = down ? w.block_cols : w.block_rows;
  call.in_block = down ? w.block_rows : w.block_cols;
  call.out_blocks = down ? w.col_blocks() : w.row_blocks();
  call.offsets = down ? p.transpose.ccol : w.crow;
  call.depth = (call.in_block + Product::pair - 1) / Product::pair;
  call.steps = (call.in_features + call.in_block - 1) / call.in_block * call.depth;
  call.staged = call.in_features % call.in_block != 0 ||
                (Product::pair == 1 ? p.dtype != DType::f32 || p.scales != nullptr : down);
  call.width = panel_registers(call.out_block, p.tokens) * Simd::lanes;
  call.panels = (p.tokens + call.width - 1) / call.width;
  call.group = larger(1, smaller(longest_chain<Product>, group_steps * 48 / call.width) / call.depth);
  call.in_blocks = (call.in_features + call.in_block - 1) / call.in_block;
  // Blocks that one tile covers use a slab once: then rows share slabs only by going through them together.
  const bool low = call.out_block <= tile_rows(call.width / Simd::lanes);
  call.item_blocks = larger(1, (low ? low_item_rows : item_rows) / call.out_block);
  call.items_per_panel = (call.out_blocks + call.item_blocks - 1) / call.item_blocks;
  call.items = call.panels * call.items_per_panel;

  Scratch scratch, own;
  const IndexArray& numbers = down ? p.transpose.row : w.col;
  const bool rounds = p.scales && !down;
  const int64_t tokens = call.panels * call.width;
  call.threads = smaller(larger(1, parallel.threads), call.items);
  const bool pack_once = call.panels < 2 * call.threads;
  const int64_t sum_rows = round_up(call.item_blocks * call.out_block, 2 * Simd::lanes);
  call.sums_at = own.reserve(sum_rows * call.width * int64_t(sizeof(float)));
  // Whole vectors are stored: the last may end behind the last block.
  call.stage_at = own.reserve(call.staged ? call.group * call.out_block * call.in_block * 4 + 64 : 0);
  call.packed_at = own.reserve(pack_once ? 0 : call.steps * call.width * 4);
  call.cursors_at = own.reserve(call.item_blocks * 8);
  call.own_size = own.size;
  const int64_t own_at = scratch.reserve(call.threads * own.size);
  const int64_t packed_at = scratch.reserve(pack_once ? tokens * call.steps * 4 : 0);
  const int64_t ranges_at = scratch.reserve(call.threads * int64_t(sizeof(ItemRange)));
  const int64_t slabs_at = scratch.reserve(numbers.wide ? w.nnz * 4 : 0);
  const int64_t entries_at = scratch.reserve(down && p.transpose.entry.wide ? w.nnz * 4 : 0);
  const int64_t scales_at = scratch.reserve(rounds ? tokens * 4 : 0);
  const int64_t rounding_at = scratch.reserve(rounds ? tokens * 4 : 0);
  const int64_t corrections_at = scratch.reserve(Product::pair == 4 ? call.out_features * 4 : 0);
  if (!scratch.allocate()) return error(Status::Kind::failed, "block-sparse product: out of memory");
  call.own = scratch.data + own_at;
  call.ranges = reinterpret_cast<ItemRange*>(scratch.data + ranges_at);
  for (int64_t i = 0; i < call.threads; ++i)
    call.ranges[i] = {i * call.items / call.threads, (i + 1) * call.items / call.threads};
  call.slabs = narrow(numbers, w.nnz, scratch.data + slabs_at);
  call.chunk = larger(1, chunk_bytes / (call.depth * call.width * 4));
  call.chunked = low && call.chunk < call.in_blocks && ascending(call.offsets, call.out_blocks, call.slabs);
  if (down) call.entries = narrow(p.transpose.entry, w.nnz, scratch.data + entries_at);

  PackCall<Product>& packing = call.packing;
  packing.source.data = p.input.data;
  packing.source.dtype = p.dtype;
  packing.source.lanes = p.tokens;
  packing.source.inner = call.in_features;
  packing.source.lane_stride = p.input.token;
  packing.source.inner_stride = p.input.feature;
  packing.source.inner_factor = down ? p.scales : nullptr;
  if (pack_once) packing.to = reinterpret_cast<typename Product::Element*>(scratch.data + packed_at);
  packing.panel_lanes = packing.width = call.width;
  packing.steps = call.steps;
  if (rounds) {
    float* scales = reinterpret_cast<float*>(scratch.data + scales_at);
    float* rounding = reinterpret_cast<float*>(scratch.data + rounding_at);
    find_token_scales(p, tokens, scales, rounding, parallel);
    call.token_scales = scales;
    packing.source.rounding = rounding;
  }
  if (Product::pair == 4) {
    int32_t* corrections = reinterpret_cast<int32_t*>(scratch.data + corrections_at);
    find_corrections(p, corrections, parallel);
    call.corrections = corrections;
  }
  if (pack_once) pack(&packing, parallel);
  parallel(0, call.threads, 1, product_worker<Product, down>, &call);
  scratch.release();
  return {};
}

template <class Product>
static Status run_product(const BlockSparseProduct& p, const ParallelFor& parallel) {
  return p.transposed ? run_product<Product, true>(p, parallel) : run_product<Product, false>(p, parallel);
}

}  // namespace
}  // namespace sparsekit

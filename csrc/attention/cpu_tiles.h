// What forward and backward share on the CPU: query tiles, the keys that a tile sees of a block, and sorted list
// entries.
//
// A tile holds queries in its lanes (Simd::lanes times 1 to 4 of them), all of one query block. Keys come in segments:
// at most `segment_keys` consecutive keys of one block, starting at a multiple of 32 inside it (bit masks are words of
// 32 keys) and padded to a multiple of 16. Scores stand transposed, [keys][lanes of the tile].
#pragma once

#include <cstdlib>
#include <cstring>

#include "attention/sequences.h"

namespace sparsekit {
namespace {

constexpr int segment_keys = 128;
constexpr int score_chain = 128;  // steps of q.k summed in one go: one chain over 256 dims has twice the error of SDPA
constexpr int tile_registers = Simd::registers == 32 ? 4 : 2;  // vectors of queries in a tile, at most
constexpr int tile_lanes = tile_registers * Simd::lanes;       // queries in a tile, at most

SPARSEKIT_INLINE int64_t round_up(int64_t a, int64_t to) { return (a + to - 1) / to * to; }
SPARSEKIT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
SPARSEKIT_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
SPARSEKIT_INLINE int32_t to_int32(int64_t a) { return int32_t(clamp(a, INT32_MIN, INT32_MAX)); }

/// Scratch memory of one call or thread, carved from one allocation: first reserve() everything, then allocate().
struct Arena {
  char* data = nullptr;
  int64_t size = 0;

  int64_t reserve(int64_t bytes) {
    int64_t at = size;
    size += round_up(bytes, 64);
    return at;
  }
  bool allocate() { return posix_memalign(reinterpret_cast<void**>(&data), 64, size_t(size) + 64) == 0; }
  void release() { free(data); }
};

/// Row number of query block `m` (counted over all sequences) in the lists; what BlockLists::row says.
SPARSEKIT_INLINE int64_t list_row(const AttentionProblem& p, int64_t b, int64_t h, int64_t m) {
  const BlockLists& lists = p.lists;
  int64_t list_head = h / (p.heads_q / lists.list_heads);
  return ((lists.list_batch == 1 ? 0 : b) * lists.list_heads + list_head) * lists.q_blocks + m;
}

SPARSEKIT_INLINE int32_t list_count(const BlockList& list, int64_t row) {
  return list.counts ? int32_t(clamp(list.counts[row], 0, list.capacity)) : 0;
}

/// Queries in the lanes, and the key positions `low` to `high` that each sees where causality and window apply.
struct QueryTile {
  int rows = 0;       // lanes that hold a query; the others hold zeros and their results are dropped
  int queries = 0;    // of one head: lane i holds query i % queries of head i / queries
  int registers = 0;  // vectors of lanes in use: ceil(rows / Simd::lanes)
  int block_row = 0;  // place of the first query inside its query block
  int64_t query = 0;  // its row in the tensors
  alignas(64) int32_t low[tile_lanes];
  alignas(64) int32_t high[tile_lanes];
  int32_t least_low, most_low, least_high, most_high;  // over the queries

  int width() const { return registers * Simd::lanes; }
};

/// `queries` queries from row `query` on, of `heads` heads.
static void set_tile(const AttentionProblem& p, const Sequence& sequence, int64_t b, int64_t query, int queries,
                     QueryTile* tile, int heads = 1) {
  tile->rows = queries * heads;
  tile->queries = queries;
  tile->registers = int(ceil_div(tile->rows, Simd::lanes));
  tile->block_row = int((query - sequence.q_begin) % p.lists.block_q);
  tile->query = query;
  tile->least_low = tile->least_high = INT32_MAX;
  tile->most_low = tile->most_high = INT32_MIN;
  for (int i = 0; i < tile->width(); ++i) {
    int64_t row = query + i % queries;
    int64_t at = p.query_positions ? p.query_positions[b * p.query_positions_batch + row]
                                   : row - sequence.q_begin + sequence.len_k() - sequence.len_q();
    int64_t low = INT32_MIN, high = INT32_MAX;
    if (p.causal) high = at;
    if (p.window_left >= 0) low = at - smaller(p.window_left, UINT32_MAX);
    if (p.window_right >= 0) high = smaller(high, at + smaller(p.window_right, UINT32_MAX));
    tile->low[i] = to_int32(low);
    tile->high[i] = to_int32(high);
    tile->least_low = int32_t(smaller(tile->least_low, tile->low[i]));
    tile->most_low = int32_t(larger(tile->most_low, tile->low[i]));
    tile->least_high = int32_t(smaller(tile->least_high, tile->high[i]));
    tile->most_high = int32_t(larger(tile->most_high, tile->high[i]));
  }
}

/// Consecutive keys of one block that exist.
struct KeySegment {
  int64_t key = 0;       // row of the first in the key tensor
  int count = 0;         // keys
  int padded = 0;        // rounded up to a multiple of 16, or of 32
  int block_column = 0;  // place of the first inside its block, a multiple of 32
  int32_t position = 0;  // of the first; the others follow, unless `positions` is given
  const int32_t* positions = nullptr;
  int32_t least = 0, most = 0;  // position

  int32_t position_of(int n) const { return positions ? positions[n] : position + n; }
};

/// Segment number `part` of key block `block` of a sequence, padded to a multiple of `padding`. count <= 0: it lies
/// past the sequence's end.
static KeySegment key_segment(const AttentionProblem& p, const Sequence& sequence, int64_t b, int64_t block, int part,
                              int padding = 16) {
  KeySegment segment;
  segment.block_column = part * segment_keys;
  int64_t first = block * p.lists.block_k + segment.block_column;
  int64_t in_block = smaller(segment_keys, p.lists.block_k - segment.block_column);
  segment.key = sequence.k_begin + first;
  segment.count = int(smaller(in_block, sequence.len_k() - first));
  segment.padded = int(round_up(segment.count, padding));
  segment.position = to_int32(first);
  segment.least = segment.position;
  segment.most = segment.position + segment.count - 1;
  if (p.key_positions) {
    segment.positions = p.key_positions + b * p.key_positions_batch + segment.key;
    segment.least = INT32_MAX;
    segment.most = INT32_MIN;
    for (int n = 0; n < segment.count; ++n) {
      segment.least = int32_t(smaller(segment.least, segment.positions[n]));
      segment.most = int32_t(larger(segment.most, segment.positions[n]));
    }
  }
  return segment;
}

enum class Visible { none, some, all };

/// Which pairs of a tile and a segment causality, window and bits leave. Made per (tile, segment, list entry).
struct PairMask {
  const QueryTile* tile;
  const KeySegment* segment;
  bool by_position = false;
  bool by_bits = false;
  alignas(64) uint32_t words[segment_keys / 32][tile_lanes];

  /// `masked`: the entry is of the partial list. `bits_index`: of the entry, -1 for none.
  Visible set(const AttentionProblem& p, const QueryTile& t, const KeySegment& s, bool masked, int32_t bits_index) {
    tile = &t;
    segment = &s;
    by_position = by_bits = false;
    if (!masked) return Visible::all;
    if (p.causal || p.window_left >= 0 || p.window_right >= 0) {
      if (s.least > t.most_high || s.most < t.least_low) return Visible::none;
      by_position = s.most > t.least_high || s.least < t.most_low;
    }
    if (bits_index >= 0) {
      by_bits = true;
      int64_t stride = (p.lists.block_k + 31) / 32;
      const int32_t* row =
          p.lists.bits + (int64_t(bits_index) * p.lists.block_q + t.block_row) * stride + s.block_column / 32;
      for (int w = 0; w < (s.count + 31) / 32; ++w) {
        for (int i = 0; i < t.width(); ++i) words[w][i] = i < t.rows ? uint32_t(row[i % t.queries * stride + w]) : 0;
      }
    }
    return by_position || by_bits ? Visible::some : Visible::all;
  }

  /// Lanes of vector `j` of the tile that see key `n` of the segment. Only after Visible::some.
  SPARSEKIT_INLINE Simd::Mask lanes(const PairMask& m, int j, int n) {
    Simd::Mask seen{};
    if (m.by_position) {
      Simd::Int at = Simd::set_int(m.segment->position_of(n));
      seen = Simd::both(Simd::at_most(Simd::load_int(m.tile->low + j * Simd::lanes), at),
                        Simd::at_most(at, Simd::load_int(m.tile->high + j * Simd::lanes)));
      if (!m.by_bits) return seen;
    }
    Simd::Mask set = Simd::bit_set(Simd::load_int(m.words[n / 32] + j * Simd::lanes), n % 32);
    return m.by_position ? Simd::both(seen, set) : set;
  }
};

/// Something to put in order: ascending `key`, stable.
struct Ranked {
  uint64_t key;
  int32_t value;
};

/// Merge sort of runs that already ascend: lists mostly do, so this is mostly one pass of comparisons. `spare` holds as
/// many.
[[maybe_unused]] static void sort(Ranked* items, Ranked* spare, int64_t count) {
  Ranked* from = items;
  Ranked* to = spare;
  for (int64_t runs = 2; runs > 1;) {
    runs = 0;
    for (int64_t first = 0; first < count; ++runs) {
      int64_t middle = first + 1;
      while (middle < count && from[middle - 1].key <= from[middle].key) ++middle;
      int64_t last = middle < count ? middle + 1 : middle;
      while (last < count && from[last - 1].key <= from[last].key) ++last;
      if (first == 0 && last == middle) {  // one run: in order
        if (from != items) memcpy(items, from, size_t(count) * sizeof(Ranked));
        return;
      }
      int64_t a = first, b = middle;
      for (int64_t at = first; at < last; ++at)
        to[at] = a < middle && (b == last || from[a].key <= from[b].key) ? from[a++] : from[b++];
      first = last;
    }
    Ranked* other = from;
    from = to;
    to = other;
  }
  if (from != items) memcpy(items, from, size_t(count) * sizeof(Ranked));
}

}  // namespace
}  // namespace sparsekit

// Folds over the blocks of a row of query blocks: the largest score of each (block_scores by max) and the pooled
// attention map, of all blocks or of those listed. Include after simd_<isa>.h. An item is one query block of one head.
#pragma once

#include "selection/cpu_score_tiles.h"

namespace sparsekit {
namespace {

/// Query blocks of all sequences.
static int64_t query_block_rows(const AttentionProblem& p, const SequenceTable& table) {
  if (table.count == 0) return 0;
  const Sequence& last = table.sequences[table.count - 1];
  return last.list_row + ceil_div(last.len_q(), p.lists.block_q);
}

struct BlockMaxCall {
  const BlockScores* p;
  SequenceTable table;
  int64_t rows;
};

template <class Product, DType dtype>
struct BlockMax {
  const BlockMaxCall& call;
  Arena arena;
  ScoreTiles<Product, dtype> tiles;

  explicit BlockMax(const BlockMaxCall& c) : call(c), tiles(*c.p, &arena) { arena.allocate(); }
  bool ready() const { return arena.data != nullptr; }
  void release() { arena.release(); }

  void run(int64_t number) {
    const BlockScores& p = *call.p;
    const BlockItem item(p, call.table, call.rows, number);
    const Sequence& sequence = call.table.sequences[item.s];
    float* out = static_cast<float*>(p.scores) +
                 ((item.b * p.heads_q + item.h) * p.q_blocks + sequence.list_row + item.m) * p.key_blocks;
    const int64_t first = sequence.q_begin + item.m * p.lists.block_q;
    const int64_t last = smaller(first + p.lists.block_q, sequence.q_end);
    for (int64_t query = first; query < last; query += tile_lanes) {
      tiles.set_queries(sequence, item.b, item.h, query, int(smaller(last - query, tile_lanes)));
      for (int64_t n = 0; n * p.lists.block_k < sequence.len_k(); ++n) {
        for (int part = 0; part * segment_keys < p.lists.block_k; ++part) {
          KeySegment keys = key_segment(p, sequence, item.b, n, part);
          if (keys.count <= 0) break;
          tiles.set_keys(item.b, item.h, keys);
          with_registers(tiles.tile.registers, [&](auto registers) { fold<decltype(registers)::value>(out + n); });
        }
      }
    }
  }

 private:
  template <int registers>
  void fold(float* out) {
    if (!tiles.template multiply<registers>()) return;
    for (int j = 0; j < registers; ++j) {
      Simd::Float most = Simd::set(-__builtin_inff());
      for (int n = 0; n < tiles.keys(); ++n) {
        most = max_or_nan(most, Simd::load(tiles.scores() + (n * registers + j) * Simd::lanes));
      }
      float here = lanes_max(most, tiles.tile.rows - j * Simd::lanes);
      // From units of log2, or from q.k, to scores.
      if (here != -__builtin_inff()) *out = max_or_nan(*out, here * tiles.unit * ln_2);
    }
  }
};

struct BlockMapCall {
  const AttentionBlockMap* p;
  SequenceTable table;
  int64_t rows;
};

template <class Product, DType dtype>
struct BlockMap {
  const BlockMapCall& call;
  Arena arena;
  ScoreTiles<Product, dtype> tiles;
  alignas(64) float lse[tile_lanes];

  explicit BlockMap(const BlockMapCall& c) : call(c), tiles(*c.p, &arena) { arena.allocate(); }
  bool ready() const { return arena.data != nullptr; }
  void release() { arena.release(); }

  void run(int64_t number) {
    const AttentionBlockMap& p = *call.p;
    const BlockItem item(p, call.table, call.rows, number);
    const Sequence& sequence = call.table.sequences[item.s];
    const int64_t row = sequence.list_row + item.m, head = item.b * p.heads_q + item.h;
    const int64_t width = p.listed ? p.lists.slots_per_row() : p.key_blocks;
    float* out = static_cast<float*>(p.map) + (head * p.q_blocks + row) * width;
    const int64_t first = sequence.q_begin + item.m * p.lists.block_q;
    const int64_t last = smaller(first + p.lists.block_q, sequence.q_end);
    for (int64_t query = first; query < last; query += tile_lanes) {
      tiles.set_queries(sequence, item.b, item.h, query, int(smaller(last - query, tile_lanes)));
      const float* rows = static_cast<const float*>(p.lse) + head * p.len_q + query;
      tiles.load_lse([=](int i) { return rows[i]; }, lse);
      if (!p.listed) {
        for (int64_t n = 0; n * p.lists.block_k < sequence.len_k(); ++n) block(sequence, item, n, true, -1, out + n);
        continue;
      }
      const int64_t list_row = p.lists.row(item.b, item.h, row, p.heads_q);
      each_entry(sequence, item, p.lists.partial, list_row, out);
      each_entry(sequence, item, p.lists.full, list_row, out);
    }
  }

 private:
  void each_entry(const Sequence& sequence, const BlockItem& item, const BlockList& list, int64_t list_row,
                  float* out) {
    const AttentionBlockMap& p = *call.p;
    const bool partial = &list == &p.lists.partial;
    for (int64_t s = 0; s < list_count(list, list_row); ++s) {
      const int64_t entry = list_row * list.capacity + s;
      const int32_t n = list.indices[entry];
      if (n < 0 || n * int64_t(p.lists.block_k) >= sequence.len_k()) continue;
      const int32_t bits = partial && p.lists.bits_index ? p.lists.bits_index[entry] : -1;
      block(sequence, item, n, partial, bits, out + (partial ? s : p.lists.partial.capacity + s));
    }
  }

  void block(const Sequence& sequence, const BlockItem& item, int64_t n, bool masked, int32_t bits, float* out) {
    const AttentionBlockMap& p = *call.p;
    for (int part = 0; part * segment_keys < p.lists.block_k; ++part) {
      KeySegment keys = key_segment(p, sequence, item.b, n, part);
      if (keys.count <= 0) return;
      tiles.set_keys(item.b, item.h, keys);
      with_registers(tiles.tile.registers,
                     [&](auto registers) { fold<decltype(registers)::value>(masked, bits, out); });
    }
  }

  template <int registers>
  void fold(bool masked, int32_t bits, float* out) {
    if (!tiles.template multiply<registers>(masked, bits)) return;
    const Simd::Float unit = Simd::set(tiles.unit);
    for (int j = 0; j < registers; ++j) {
      const Simd::Float base = Simd::load(lse + j * Simd::lanes);
      Simd::Float sum = Simd::zero(), most = Simd::zero();
      for (int n = 0; n < tiles.keys(); ++n) {
        Simd::Float weight = share(Simd::load(tiles.scores() + (n * registers + j) * Simd::lanes), unit, base);
        sum = Simd::add(sum, weight);
        most = max_or_nan(most, weight);
      }
      if (call.p->maximum) {
        *out = max_or_nan(*out, lanes_max(most, tiles.tile.rows - j * Simd::lanes));
      } else {
        *out += Simd::sum(sum);
      }
    }
  }
};

static void fill(void* to, int64_t count, float value) {
  for (int64_t at = 0; at < count; ++at) static_cast<float*>(to)[at] = value;
}

template <class Product, DType dtype>
static Status block_max(const BlockScores& p, const ParallelFor& parallel) {
  BlockMaxCall call{&p, {}, 0};
  if (!call.table.set(p)) return error(Status::Kind::failed, "out of memory");
  call.rows = query_block_rows(p, call.table);
  fill(p.scores, p.batch * p.heads_q * p.q_blocks * p.key_blocks, -__builtin_inff());
  Status status = run_items<BlockMax<Product, dtype>>(call, p.batch * p.heads_q * call.rows, parallel);
  call.table.release();
  return status;
}

template <class Product, DType dtype>
static Status block_map(const AttentionBlockMap& p, const ParallelFor& parallel) {
  BlockMapCall call{&p, {}, 0};
  if (!call.table.set(p)) return error(Status::Kind::failed, "out of memory");
  call.rows = query_block_rows(p, call.table);
  fill(p.map, p.batch * p.heads_q * p.q_blocks * (p.listed ? p.lists.slots_per_row() : p.key_blocks), 0);
  Status status = run_items<BlockMap<Product, dtype>>(call, p.batch * p.heads_q * call.rows, parallel);
  call.table.release();
  return status;
}

}  // namespace
}  // namespace sparsekit

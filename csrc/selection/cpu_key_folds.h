// Folds over keys: attention that rows pay to each key (row_scores), and that probe rows pay to each key and along each
// diagonal (column_scores). Include after simd_<isa>.h.
//
// row_scores: an item is 512 keys of one head; it goes over the rows in order, so that every sum has one order.
// column_scores: an item is one head of one batch entry. A tile of probe rows goes over the keys twice, once for its
// lse and once for the shares. Rows that follow each other in position, as they mostly do, add a key's shares to
// neighbouring diagonals as a vector.
#pragma once

#include "selection/cpu_score_tiles.h"

namespace sparsekit {
namespace {

constexpr int64_t item_keys = 4 * segment_keys;

struct RowScoresCall {
  RowScores p;  // with blocks of item_keys keys
  SequenceTable table;
  int64_t* first_item = nullptr;  // of each sequence, [count + 1]
};

template <class Product, DType dtype>
struct RowFold {
  const RowScoresCall& call;
  Arena arena;
  ScoreTiles<Product, dtype> tiles;
  int64_t sums_, rows_;
  alignas(64) float lse[tile_lanes];

  explicit RowFold(const RowScoresCall& c) : call(c), tiles(c.p, &arena) {
    sums_ = arena.reserve(item_keys * Simd::lanes * 4);
    rows_ = arena.reserve(c.p.rows_count * 4);
    arena.allocate();
  }
  bool ready() const { return arena.data != nullptr; }
  void release() { arena.release(); }

  void run(int64_t number) {
    const RowScores& p = call.p;
    const int64_t items = call.first_item[call.table.count], head = number / items, at = number % items;
    const int64_t b = head / p.heads_q, h = head % p.heads_q;
    int64_t s = 0;
    while (call.first_item[s + 1] <= at) ++s;
    const Sequence& sequence = call.table.sequences[s];
    const int64_t block = at - call.first_item[s];
    float* sums = reinterpret_cast<float*>(arena.data + sums_);
    for (int64_t i = 0; i < item_keys * Simd::lanes; ++i) sums[i] = 0;
    const float* row_lse = static_cast<const float*>(p.lse) + head * p.len_q;
    if (p.rows) {
      int32_t* rows = reinterpret_cast<int32_t*>(arena.data + rows_);
      int64_t count = 0;  // of this sequence; empty slots are none
      for (int64_t r = 0; r < p.rows_count; ++r) {
        int32_t row = p.rows[b * p.rows_batch + r];
        if (row >= sequence.q_begin && row < sequence.q_end) rows[count++] = row;
      }
      for (int64_t r = 0; r < count; r += tile_lanes) {
        tiles.set_queries(sequence, b, h, rows + r, int(smaller(count - r, tile_lanes)));
        tiles.load_lse([=](int i) { return row_lse[rows[r + i]]; }, lse);
        add_tile(sequence, b, h, block, sums);
      }
    } else {
      for (int64_t row = sequence.q_begin; row < sequence.q_end; row += tile_lanes) {
        tiles.set_queries(sequence, b, h, row, int(smaller(sequence.q_end - row, tile_lanes)));
        tiles.load_lse([=](int i) { return row_lse[row + i]; }, lse);
        add_tile(sequence, b, h, block, sums);
      }
    }
    const int64_t first = sequence.k_begin + block * item_keys;
    float* out = static_cast<float*>(p.scores) + head * p.len_k + first;
    for (int64_t n = 0; n < smaller(item_keys, sequence.k_end - first); ++n) {
      Simd::Float sum = Simd::load(sums + n * Simd::lanes);
      out[n] = p.maximum ? lanes_max(sum, Simd::lanes) : Simd::sum(sum);
    }
  }

 private:
  void add_tile(const Sequence& sequence, int64_t b, int64_t h, int64_t block, float* sums) {
    for (int part = 0; part * segment_keys < item_keys; ++part) {
      KeySegment keys = key_segment(call.p, sequence, b, block, part);
      if (keys.count <= 0) return;
      tiles.set_keys(b, h, keys);
      float* to = sums + part * segment_keys * Simd::lanes;
      with_registers(tiles.tile.registers, [&](auto registers) { fold<decltype(registers)::value>(to); });
    }
  }

  template <int registers>
  void fold(float* sums) {
    if (!tiles.template multiply<registers>()) return;
    const Simd::Float unit = Simd::set(tiles.unit);
    Simd::Float base[registers];
    for (int j = 0; j < registers; ++j) base[j] = Simd::load(lse + j * Simd::lanes);
    for (int n = 0; n < tiles.keys(); ++n) {
      Simd::Float sum = Simd::load(sums + n * Simd::lanes);
#pragma GCC unroll 4
      for (int j = 0; j < registers; ++j) {
        Simd::Float weight = share(Simd::load(tiles.scores() + (n * registers + j) * Simd::lanes), unit, base[j]);
        sum = call.p.maximum ? max_or_nan(sum, weight) : Simd::add(sum, weight);
      }
      Simd::store(sums + n * Simd::lanes, sum);
    }
  }
};

struct ColumnScoresCall {
  ColumnScores p;  // with blocks of item_keys keys
  SequenceTable table;
};

template <class Product, DType dtype>
struct ColumnFold {
  const ColumnScoresCall& call;
  Arena arena;
  ScoreTiles<Product, dtype> tiles;
  int64_t diagonals_ = 0;
  alignas(64) float highest[tile_lanes], total[tile_lanes], lse[tile_lanes];
  bool consecutive = false;

  explicit ColumnFold(const ColumnScoresCall& c) : call(c), tiles(c.p, &arena) {
    diagonals_ = arena.reserve((c.p.len_k + 2 * tile_lanes) * 4);
    arena.allocate();
  }
  bool ready() const { return arena.data != nullptr; }
  void release() { arena.release(); }

  void run(int64_t head) {
    const ColumnScores& p = call.p;
    const int64_t b = head / p.heads_q, h = head % p.heads_q;
    for (int64_t s = 0; s < call.table.count; ++s) {
      const Sequence& sequence = call.table.sequences[s];
      float* columns = static_cast<float*>(p.columns) + head * p.len_k + sequence.k_begin;
      // Diagonal o at [tile_lanes + o]: what lies before 0 or past the last is written, and dropped.
      float* diagonals = reinterpret_cast<float*>(arena.data + diagonals_);
      for (int64_t o = 0; o < sequence.len_k() + 2 * tile_lanes; ++o) diagonals[o] = 0;
      for (int64_t row = sequence.q_begin; row < sequence.q_end; row += tile_lanes) {
        const int count = int(smaller(sequence.q_end - row, tile_lanes));
        tiles.set_queries(sequence, b, h, row, count);
        const int32_t* positions = p.query_positions + b * p.query_positions_batch + row;
        consecutive = true;
        for (int i = 1; i < count; ++i) consecutive &= int64_t(positions[i]) == int64_t(positions[0]) + i;
        for (int i = 0; i < tile_lanes; ++i) highest[i] = -__builtin_inff(), total[i] = 0;
        sweep(sequence, b, h, positions, false, columns, diagonals);
        for (int i = 0; i < tiles.tile.width(); ++i) {
          bool sees = i < count && highest[i] != -__builtin_inff();
          lse[i] = sees ? highest[i] : __builtin_inff();
          total[i] = sees ? 1.f / total[i] : 0.f;
        }
        sweep(sequence, b, h, positions, true, columns, diagonals);
      }
      float* out = static_cast<float*>(p.diagonals) + head * p.len_k + sequence.k_begin;
      for (int64_t o = 0; o < sequence.len_k(); ++o) out[o] = diagonals[tile_lanes + o];
    }
  }

 private:
  void sweep(const Sequence& sequence, int64_t b, int64_t h, const int32_t* positions, bool second, float* columns,
             float* diagonals) {
    for (int64_t n = 0; n * item_keys < sequence.len_k(); ++n) {
      for (int part = 0; part * segment_keys < item_keys; ++part) {
        KeySegment keys = key_segment(call.p, sequence, b, n, part);
        if (keys.count <= 0) break;
        tiles.set_keys(b, h, keys);
        with_registers(tiles.tile.registers, [&](auto registers) {
          constexpr int vectors = decltype(registers)::value;
          if (!tiles.template multiply<vectors>()) return;
          if (!second) {
            add_totals<vectors>();
          } else {
            const int64_t first = keys.key - sequence.k_begin;
            add_shares<vectors>(first, positions, columns + first, diagonals, sequence.len_k());
          }
        });
      }
    }
  }

  /// Online: the maximum of each lane, and the sum of 2^(score - maximum).
  template <int registers>
  void add_totals() {
    const Simd::Float unit = Simd::set(tiles.unit), nothing = Simd::set(-__builtin_inff());
    for (int j = 0; j < registers; ++j) {
      const float* column = tiles.scores() + j * Simd::lanes;
      Simd::Float old = Simd::load(highest + j * Simd::lanes), most = nothing;
      for (int n = 0; n < tiles.keys(); ++n) most = max_or_nan(most, Simd::load(column + n * registers * Simd::lanes));
      Simd::Float now = max_or_nan(old, Simd::mul(most, unit));
      Simd::Float base = Simd::select(Simd::equal(now, nothing), Simd::zero(), now), sum = Simd::zero();
      for (int n = 0; n < tiles.keys(); ++n) {
        sum = Simd::add(sum, share(Simd::load(column + n * registers * Simd::lanes), unit, base));
      }
      Simd::Float kept = Simd::mul(Simd::load(total + j * Simd::lanes), exp2<5>(Simd::sub(old, base)));
      Simd::store(total + j * Simd::lanes, Simd::add(kept, sum));
      Simd::store(highest + j * Simd::lanes, now);
    }
  }

  template <int registers>
  void add_shares(int64_t first, const int32_t* positions, float* columns, float* diagonals, int64_t len_k) {
    const Simd::Float unit = Simd::set(tiles.unit);
    for (int n = 0; n < tiles.keys(); ++n) {
      float* row = tiles.scores() + n * registers * Simd::lanes;
      Simd::Float sum = Simd::zero();
#pragma GCC unroll 4
      for (int j = 0; j < registers; ++j) {
        Simd::Float weight = share(Simd::load(row + j * Simd::lanes), unit, Simd::load(lse + j * Simd::lanes));
        weight = Simd::mul(weight, Simd::load(total + j * Simd::lanes));
        sum = Simd::add(sum, weight);
        Simd::store(row + j * Simd::lanes, weight);
      }
      columns[n] += Simd::sum(sum);
      const int64_t o = int64_t(positions[0]) - (first + n);  // of lane 0; that of lane i is o + i
      const int width = registers * Simd::lanes;
      if (consecutive && o >= -tile_lanes && o + width <= len_k + tile_lanes) {
        float* to = diagonals + tile_lanes + o;
        for (int j = 0; j < registers; ++j, to += Simd::lanes) {
          Simd::store(to, Simd::add(Simd::load(to), Simd::load(row + j * Simd::lanes)));
        }
        continue;
      }
      for (int i = 0; i < tiles.tile.rows; ++i) {
        const int64_t at = int64_t(positions[i]) - (first + n);
        if (at >= 0 && at < len_k) diagonals[tile_lanes + at] += row[i];
      }
    }
  }
};

static void set_key_items(AttentionProblem* p) {
  p->lists = {};
  p->lists.block_q = 1;
  p->lists.block_k = int32_t(item_keys);
}

static void fill_keys(void* to, const AttentionProblem& p) {
  for (int64_t at = 0; at < p.batch * p.heads_q * p.len_k; ++at) static_cast<float*>(to)[at] = 0;
}

template <class Product, DType dtype>
static Status row_fold(const RowScores& p, const ParallelFor& parallel) {
  RowScoresCall call{p, {}, nullptr};
  set_key_items(&call.p);
  Arena arena;
  if (!call.table.set(p)) return error(Status::Kind::failed, "out of memory");
  int64_t items_at = arena.reserve((call.table.count + 1) * 8);
  if (!arena.allocate()) {
    call.table.release();
    return error(Status::Kind::failed, "out of memory");
  }
  call.first_item = reinterpret_cast<int64_t*>(arena.data + items_at);
  call.first_item[0] = 0;
  for (int64_t s = 0; s < call.table.count; ++s) {
    call.first_item[s + 1] = call.first_item[s] + ceil_div(call.table.sequences[s].len_k(), item_keys);
  }
  fill_keys(p.scores, p);
  Status status =
      run_items<RowFold<Product, dtype>>(call, p.batch * p.heads_q * call.first_item[call.table.count], parallel);
  arena.release();
  call.table.release();
  return status;
}

template <class Product, DType dtype>
static Status column_fold(const ColumnScores& p, const ParallelFor& parallel) {
  ColumnScoresCall call{p, {}};
  set_key_items(&call.p);
  if (!call.table.set(p)) return error(Status::Kind::failed, "out of memory");
  fill_keys(p.columns, p);
  fill_keys(p.diagonals, p);
  Status status = run_items<ColumnFold<Product, dtype>>(call, p.batch * p.heads_q, parallel);
  call.table.release();
  return status;
}

}  // namespace
}  // namespace sparsekit

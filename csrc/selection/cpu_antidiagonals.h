// Block scores by XAttention's antidiagonals. Include after simd_<isa>.h.
//
// The sum over the antidiagonal of a stride x stride tile is one product of rows that are `stride` tokens long: query
// rows from last to first beside key rows from first to last. Both are copied so (what a ragged tile lacks is zero),
// and then scores of tiles are scores of attention with head_dim * stride. A tile that causality cuts takes the front
// of both rows: recomputed one by one, they are two of a row. A row's scores are kept until its softmax is summed over
// blocks.
//
// Bound: multiply-adds, 1 / stride of q.k's. Source: XAttention (arXiv 2503.16428), algorithm 1.
#pragma once

#include "selection/cpu_score_tiles.h"

namespace sparsekit {
namespace {

struct AntidiagonalCall {
  const BlockScores* p;
  SequenceTable table;                                         // of tokens
  AttentionProblem strided;                                    // rows of tiles as queries, columns of tiles as keys
  Sequence* tiles = nullptr;                                   // the sequences of `strided`
  int64_t* first_item = nullptr;                               // of each sequence, [count + 1]
  int64_t longest = 0;                                         // columns of tiles of a sequence, padded
  int64_t item_blocks = 1, block_rows = 0, block_columns = 0;  // in tiles

  // Copied, not made: a default constructor of a shared struct would be an inline function (see README.md of the
  // layer).
  explicit AntidiagonalCall(const BlockScores& scores) : p(&scores), strided(scores) {}
};

/// Copies the tokens of tile rows: reversed from the last one (queries) or from the first one on (keys).
template <DType dtype, bool reversed>
static void copy_tiles(const AntidiagonalCall& call, int64_t head) {
  const BlockScores& p = *call.p;
  const int64_t size = dtype == DType::f32 ? 4 : 2, heads = reversed ? p.heads_q : p.heads_kv;
  const int64_t b = head / heads, h = head % heads, row_bytes = p.head_dim * size, stride = p.stride;
  const InputView& from = reversed ? p.query : p.key;
  const InputView& to = reversed ? call.strided.query : call.strided.key;
  for (int64_t s = 0; s < call.table.count; ++s) {
    const Sequence &tokens = call.table.sequences[s], &tiles = call.tiles[s];
    const int64_t begin = reversed ? tokens.q_begin : tokens.k_begin, end = reversed ? tokens.q_end : tokens.k_end;
    char* out = const_cast<char*>(row_of<dtype>(to, b, h, reversed ? tiles.q_begin : tiles.k_begin));
    for (int64_t first = begin; first < end; first += stride, out += stride * row_bytes) {
      const int64_t count = smaller(stride, end - first);
      for (int64_t t = 0; t < stride; ++t) {
        const int64_t token = reversed ? first + count - 1 - t : first + t;
        if (t < count) {
          memcpy(out + t * row_bytes, row_of<dtype>(from, b, h, token), size_t(row_bytes));
        } else {
          memset(out + t * row_bytes, 0, size_t(row_bytes));
        }
      }
    }
  }
}

template <class Product, DType dtype>
struct AntidiagonalFold {
  const AntidiagonalCall& call;
  Arena arena;
  ScoreTiles<Product, dtype> tiles;
  int64_t weights_, sums_;

  explicit AntidiagonalFold(const AntidiagonalCall& c) : call(c), tiles(c.strided, &arena) {
    weights_ = arena.reserve(c.longest * tile_lanes * 4);
    sums_ = arena.reserve(c.item_blocks * c.p->key_blocks * 4);
    arena.allocate();
  }
  bool ready() const { return arena.data != nullptr; }
  void release() { arena.release(); }

  void run(int64_t number) {
    const BlockScores& p = *call.p;
    const int64_t items = call.first_item[call.table.count], head = number / items, at = number % items;
    const int64_t b = head / p.heads_q, h = head % p.heads_q;
    int64_t s = 0;
    while (call.first_item[s + 1] <= at) ++s;
    const Sequence &tokens = call.table.sequences[s], &sequence = call.tiles[s];
    const int64_t first = (at - call.first_item[s]) * call.item_blocks;
    const int64_t last = smaller(first + call.item_blocks, ceil_div(tokens.len_q(), p.lists.block_q));
    float* sums = reinterpret_cast<float*>(arena.data + sums_);
    for (int64_t i = 0; i < (last - first) * p.key_blocks; ++i) sums[i] = 0;
    int32_t seeing[tile_lanes] = {};  // rows of tiles that see a key, of each block
    const int64_t end = smaller(last * call.block_rows, sequence.len_q());
    for (int64_t row = first * call.block_rows; row < end; row += tile_lanes) {
      tiles.set_queries(sequence, b, h, sequence.q_begin + row, int(smaller(end - row, tile_lanes)));
      with_registers(tiles.tile.registers, [&](auto registers) {
        add_tile<decltype(registers)::value>(tokens, sequence, b, h, row, first, sums, seeing);
      });
    }
    for (int64_t m = first; m < last; ++m) {
      const int64_t list_row = (b * p.heads_q + h) * p.q_blocks + tokens.list_row + m;
      float* out = static_cast<float*>(p.scores) + list_row * p.key_blocks;
      const int64_t last_token = smaller((m + 1) * p.lists.block_q, tokens.len_q()) - 1;
      const int64_t keys = visible_keys(tokens, last_token);
      for (int64_t n = 0; n * p.lists.block_k < keys; ++n) {
        float share = sums[(m - first) * p.key_blocks + n] / float(seeing[m - first]);
        out[n] = __builtin_logf(share < least_share ? least_share : share);
      }
    }
  }

 private:
  int64_t visible_keys(const Sequence& tokens, int64_t token) const {
    if (!call.p->causal) return tokens.len_k();
    return clamp(token + tokens.len_k() - tokens.len_q() + 1, 0, tokens.len_k());
  }

  template <int registers>
  void add_tile(const Sequence& tokens, const Sequence& sequence, int64_t b, int64_t h, int64_t first_row,
                int64_t first_block, float* sums, int32_t* seeing) {
    const BlockScores& p = *call.p;
    constexpr int width = registers * Simd::lanes;
    const int64_t stride = p.stride;
    float* weights = reinterpret_cast<float*>(arena.data + weights_);
    alignas(64) float unit[tile_lanes] = {};
    int64_t last_token[tile_lanes], rows_of_tile[tile_lanes], columns = 0;
    for (int i = 0; i < tiles.tile.rows; ++i) {
      const int64_t begin = (first_row + i) * stride, end = smaller(begin + stride, tokens.len_q());
      last_token[i] = end - 1;
      rows_of_tile[i] = end - begin;
      unit[i] = p.scale * log2_e / float(end - begin);
      columns = larger(columns, ceil_div(visible_keys(tokens, end - 1), stride));
    }
    for (int64_t c = 0; c < columns; c += segment_keys) {
      KeySegment keys = key_segment(call.strided, sequence, b, c / segment_keys, 0);
      tiles.set_keys(b, h, keys);
      tiles.template multiply<registers>();
      for (int n = 0; n < keys.count; ++n) {
        for (int j = 0; j < registers; ++j) {
          const float* score = tiles.scores() + n * width + j * Simd::lanes;
          Simd::store(weights + (c + n) * width + j * Simd::lanes,
                      Simd::mul(Simd::load(score), Simd::load(unit + j * Simd::lanes)));
        }
      }
    }
    // Tiles whose antidiagonal is not all there: at the diagonal, and of the last key rows.
    for (int i = 0; i < width; ++i) {
      if (i >= tiles.tile.rows) continue;
      const int64_t position = last_token[i] + tokens.len_k() - tokens.len_q();
      int64_t whole = (tokens.len_k() - rows_of_tile[i]) / stride + 1;  // columns with all pairs
      if (tokens.len_k() < rows_of_tile[i]) whole = 0;
      if (p.causal) {  // the last pair, (last - t, j + t) with t = rows - 1, is seen
        const int64_t room = position - 2 * (rows_of_tile[i] - 1);
        whole = room < 0 ? 0 : smaller(whole, room / stride + 1);
      }
      for (int64_t c = whole; c < columns; ++c) {
        int64_t pairs = smaller(rows_of_tile[i], tokens.len_k() - c * stride);
        if (p.causal) pairs = c * stride > position ? 0 : smaller(pairs, (position - c * stride) / 2 + 1);
        weights[c * width + i] = pairs > 0 ? mean_of(sequence, b, h, first_row + i, c, pairs) : -__builtin_inff();
      }
    }
    softmax_rows<registers>(weights, columns);
    for (int i = 0; i < tiles.tile.rows; ++i) {
      seeing[(first_row + i) / call.block_rows - first_block] += visible_keys(tokens, last_token[i]) > 0;
    }
    for (int64_t n = 0; n * call.block_columns < columns; ++n) {
      const int64_t last = smaller((n + 1) * call.block_columns, columns);
      for (int j = 0; j < registers; ++j) {
        Simd::Float sum = Simd::zero();
        for (int64_t c = n * call.block_columns; c < last; ++c) {
          sum = Simd::add(sum, Simd::load(weights + c * width + j * Simd::lanes));
        }
        alignas(64) float lanes[Simd::lanes];
        Simd::store(lanes, sum);
        for (int i = 0; i < Simd::lanes && j * Simd::lanes + i < tiles.tile.rows; ++i) {
          const int64_t block = (first_row + j * Simd::lanes + i) / call.block_rows - first_block;
          sums[block * p.key_blocks + n] += lanes[i];
        }
      }
    }
  }

  /// Mean of the first `pairs` products of an antidiagonal, in units of log2.
  float mean_of(const Sequence& sequence, int64_t b, int64_t h, int64_t row, int64_t column, int64_t pairs) const {
    const BlockScores& p = *call.p;
    const char* query = row_of<dtype>(call.strided.query, b, h, sequence.q_begin + row);
    const char* key = row_of<dtype>(call.strided.key, b, h / (p.heads_q / p.heads_kv), sequence.k_begin + column);
    Simd::Float sum = Simd::zero();
    const int64_t count = pairs * p.head_dim;
    for (int64_t at = 0; at < count; at += Simd::lanes) {
      const int left = int(smaller(count - at, Simd::lanes));
      sum = Simd::fma(load_row<dtype>(query, at, left), load_row<dtype>(key, at, left), sum);
    }
    return Simd::sum(sum) * p.scale * log2_e / float(pairs);
  }

  /// Softmax down the columns [columns][lanes]; lanes that see nothing become 0.
  template <int registers>
  static void softmax_rows(float* weights, int64_t columns) {
    constexpr int width = registers * Simd::lanes;
    const Simd::Float nothing = Simd::set(-__builtin_inff());
    for (int j = 0; j < registers; ++j) {
      float* column = weights + j * Simd::lanes;
      Simd::Float most = nothing, sum = Simd::zero();
      for (int64_t c = 0; c < columns; ++c) most = max_or_nan(most, Simd::load(column + c * width));
      const Simd::Float base = Simd::select(Simd::equal(most, nothing), Simd::zero(), most);
      for (int64_t c = 0; c < columns; ++c) {
        Simd::Float weight = exp2<5>(Simd::sub(Simd::load(column + c * width), base));
        Simd::store(column + c * width, weight);
        sum = Simd::add(sum, weight);
      }
      const Simd::Float empty = Simd::zero();
      const Simd::Float scale = Simd::select(Simd::equal(sum, empty), empty, Simd::div(Simd::set(1.f), sum));
      for (int64_t c = 0; c < columns; ++c) {
        Simd::store(column + c * width, Simd::mul(Simd::load(column + c * width), scale));
      }
    }
  }
};

template <DType dtype>
static void copy_heads(int64_t first, int64_t last, void* context) {
  const AntidiagonalCall& call = *static_cast<const AntidiagonalCall*>(context);
  const int64_t queries = call.p->batch * call.p->heads_q;
  for (int64_t at = first; at < last; ++at) {
    at < queries ? copy_tiles<dtype, true>(call, at) : copy_tiles<dtype, false>(call, at - queries);
  }
}

template <class Product, DType dtype>
static Status block_antidiagonals(const BlockScores& p, const ParallelFor& parallel) {
  AntidiagonalCall call(p);
  if (!call.table.set(p)) return error(Status::Kind::failed, "out of memory");
  const int64_t count = call.table.count, size = dtype == DType::f32 ? 4 : 2;
  call.block_rows = p.lists.block_q / p.stride;
  call.block_columns = p.lists.block_k / p.stride;
  call.item_blocks = larger(1, tile_lanes / call.block_rows);
  Arena arena;
  const int64_t tiles_at = arena.reserve((count + 1) * int64_t(sizeof(Sequence)));
  const int64_t items_at = arena.reserve((count + 1) * 8);
  int64_t rows = 0, columns = 0;
  for (int64_t s = 0; s < count; ++s) {
    rows += ceil_div(call.table.sequences[s].len_q(), p.stride);
    columns += ceil_div(call.table.sequences[s].len_k(), p.stride);
  }
  AttentionProblem& strided = call.strided;
  strided.head_dim = p.head_dim * p.stride;
  const int64_t row = strided.head_dim;
  const int64_t query_at = arena.reserve(p.batch * p.heads_q * rows * row * size + 64);
  const int64_t key_at = arena.reserve(p.batch * p.heads_kv * columns * row * size + 64);
  if (!arena.allocate()) {
    call.table.release();
    return error(Status::Kind::failed, "out of memory for query and key in tiles of the stride");
  }
  strided.query = {arena.data + query_at, p.heads_q * rows * row, rows * row, row};
  strided.key = {arena.data + key_at, p.heads_kv * columns * row, columns * row, row};
  strided.causal = false;
  strided.scale = 1;
  strided.len_q = rows;
  strided.len_k = columns;
  strided.lists.block_q = 1;
  strided.lists.block_k = segment_keys;
  call.tiles = reinterpret_cast<Sequence*>(arena.data + tiles_at);
  call.first_item = reinterpret_cast<int64_t*>(arena.data + items_at);
  call.first_item[0] = rows = columns = 0;
  for (int64_t s = 0; s < count; ++s) {
    const Sequence& tokens = call.table.sequences[s];
    Sequence tiles;
    tiles.q_begin = rows;
    tiles.k_begin = columns;
    tiles.q_end = rows += ceil_div(tokens.len_q(), p.stride);
    tiles.k_end = columns += ceil_div(tokens.len_k(), p.stride);
    call.tiles[s] = tiles;
    call.longest = larger(call.longest, tiles.len_k() + 16);
    call.first_item[s + 1] = call.first_item[s] + ceil_div(ceil_div(tokens.len_q(), p.lists.block_q), call.item_blocks);
  }
  const int64_t size_of_scores = p.batch * p.heads_q * p.q_blocks * p.key_blocks;
  for (int64_t at = 0; at < size_of_scores; ++at) static_cast<float*>(p.scores)[at] = -__builtin_inff();
  parallel(0, p.batch * (p.heads_q + p.heads_kv), 1, copy_heads<dtype>, &call);
  Status status =
      run_items<AntidiagonalFold<Product, dtype>>(call, p.batch * p.heads_q * call.first_item[count], parallel);
  arena.release();
  call.table.release();
  return status;
}

}  // namespace
}  // namespace sparsekit

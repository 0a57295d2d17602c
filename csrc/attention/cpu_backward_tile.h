// A query tile of backward: its packed operands, and its scores against the keys of a segment.
#pragma once

#include <math.h>

#include "attention/cpu_backward_pack.h"

namespace sparsekit {
namespace {
namespace gradients {

constexpr int tile_queries = 128;  // P and dS of a tile and 128 keys stay in L2
constexpr int tile_panels = tile_queries / tile_lanes;
// Units of log 2 as forward's, with the same rounding: what large scores lose by it is lost by lse, too.
constexpr float log2_of_e = 1.4426950408889634f;

/// Hands out aligned pieces of one piece of memory; without memory, counts how much they need.
struct Carver {
  char* memory = nullptr;
  int64_t size = 0;
  template <class T>
  T* take(int64_t count) {
    int64_t at = size;
    size += round_up(count * int64_t(sizeof(T)), 64);
    return memory ? reinterpret_cast<T*>(memory + at) : nullptr;
  }
};

/// Sizes of packed operands: steps are elements of rows, vectors cover a row with lanes.
struct TileShape {
  int query_steps = 0, value_steps = 0, query_vectors = 0, value_vectors = 0;
  int rows = 0;  // of a tile, at most tile_queries
};
template <class Product>
TileShape tile_shape(const AttentionProblem& p, int rows) {
  return {int(ceil_div(p.head_dim, Product::pair)), int(ceil_div(p.value_dim, Product::pair)),
          int(ceil_div(p.head_dim, lanes)), int(ceil_div(p.value_dim, lanes)), rows};
}

/// `Mask` tells per panel of queries which keys are seen.
template <class Product, class Mask>
struct PackedTile {
  using Element = typename Product::Element;
  Element *query_lanes, *grad_lanes;       // queries in the lanes
  Element *query_rows, *grad_rows;         // head dimension in the lanes
  float *lse, *lse_rest, *weight, *delta;  // [tile_queries]; lse in units of log 2
  float* grad_query;                       // [tile_queries][lanes of head_dim], not yet scaled
  Mask* masks;                             // [tile_panels]
};

template <class Product, class Mask>
PackedTile<Product, Mask> carve_tile(const TileShape& shape, Carver* memory) {
  using Element = typename Product::Element;
  PackedTile<Product, Mask> t;
  t.query_lanes = memory->take<Element>(int64_t(shape.query_steps) * shape.rows);
  t.grad_lanes = memory->take<Element>(int64_t(shape.value_steps) * shape.rows);
  t.query_rows = memory->take<Element>(int64_t(shape.rows / Product::pair) * shape.query_vectors * lanes);
  t.grad_rows = memory->take<Element>(int64_t(shape.rows / Product::pair) * shape.value_vectors * lanes);
  t.lse = memory->take<float>(shape.rows);
  t.lse_rest = memory->take<float>(shape.rows);
  t.weight = memory->take<float>(shape.rows);
  t.delta = memory->take<float>(shape.rows);
  t.grad_query = memory->take<float>(int64_t(shape.rows) * shape.query_vectors * lanes);
  t.masks = memory->take<Mask>(tile_panels);
  return t;
}

/// Packs `count` rows from `first` on, all but their masks. Adds to `sink` their share of the sink's gradient.
template <class Product, DType dtype, class Mask>
void pack_query_tile(const AttentionBackward& p, const TileShape& shape, int64_t b, int64_t h, int64_t first, int count,
                     const PackedTile<Product, Mask>& tile, float* sink) {
  const int padded = int(round_up(count, 16));
  int absent[tile_queries], absent_count = 0;
  for (int i = 0; i < padded; ++i) {
    tile.lse[i] = __builtin_inff();  // exp(score - lse) = 0: a row that sees no key, or none
    tile.lse_rest[i] = tile.weight[i] = tile.delta[i] = 0;
    if (i >= count) continue;
    int64_t row = first + i, at = (b * p.heads_q + h) * p.len_q + row;
    float lse = p.lse[at];
    if (lse == -__builtin_inff()) {
      absent[absent_count++] = i;
      continue;
    }
    float out_dot = dot<dtype>(row_of<dtype>(p.grad_out, b, h, row), row_of<dtype>(p.out, b, h, row), p.value_dim);
    // exp(lse - lse') instead of exp(score - lse'): a sink far above lse would overflow exp(lse' - lse).
    float weight = 1;
    if (p.sinks) {
      weight = 1 / (1 + expf(p.sinks[h] - lse));
      *sink -= out_dot / (1 + expf(lse - p.sinks[h]));
    }
    double units = lse * 1.4426950408889634;
    tile.lse[i] = float(units);
    tile.lse_rest[i] = float(units - tile.lse[i]);
    tile.weight[i] = weight;
    tile.delta[i] = weight * out_dot - (p.grad_lse ? p.grad_lse[at] : 0.f);
  }
  Source query = {row_of<dtype>(p.query, b, h, first), p.query.row * size_of(dtype), count, p.head_dim};
  Source grad = {row_of<dtype>(p.grad_out, b, h, first), p.grad_out.row * size_of(dtype), count, p.value_dim};
  pack_lanes_are_rows<Product, dtype>(query, padded, shape.query_steps, tile.query_lanes);
  pack_lanes_are_rows<Product, dtype>(grad, padded, shape.value_steps, tile.grad_lanes);
  pack_steps_are_rows<Product, dtype>(query, padded, shape.query_vectors, tile.query_rows);
  pack_steps_are_rows<Product, dtype>(grad, padded, shape.value_vectors, tile.grad_rows);
  for (int i = 0; i < absent_count; ++i) {
    clear_lane<Product>(absent[i], padded, shape.query_steps, tile.query_lanes);
    clear_lane<Product>(absent[i], padded, shape.value_steps, tile.grad_lanes);
    clear_step<Product>(absent[i], padded, shape.query_vectors, tile.query_rows);
    clear_step<Product>(absent[i], padded, shape.value_vectors, tile.grad_rows);
  }
}

/// Where the scores of a tile and a segment go.
template <class Product>
struct ScoreScratch {
  typename Product::Element *probability, *grad_score, *grad_score_pairs;
  int64_t row_stride, pair_stride;
};
template <class Product>
ScoreScratch<Product> carve_scores(const TileShape& shape, Carver* memory) {
  using Element = typename Product::Element;
  ScoreScratch<Product> s;
  s.row_stride = shape.rows / Product::pair + 16;  // + 16: rows a power of two apart share few cache sets
  s.pair_stride = shape.rows + 16;
  s.probability = memory->take<Element>(segment_keys * s.row_stride);
  s.grad_score = memory->take<Element>(segment_keys * s.row_stride);
  s.grad_score_pairs = Product::pair == 1 ? s.grad_score : memory->take<Element>(segment_keys / 2 * s.pair_stride);
  return s;
}

/// The product of a tile of `padded` queries; the caller adds the keys.
template <class Product, class Mask>
ScoreTile<Product> score_tile_of(const AttentionProblem& p, const TileShape& shape,
                                 const PackedTile<Product, Mask>& tile, int padded,
                                 const ScoreScratch<Product>& scratch) {
  ScoreTile<Product> t;
  t.query = tile.query_lanes;
  t.grad_out = tile.grad_lanes;
  t.query_steps = shape.query_steps;
  t.value_steps = shape.value_steps;
  t.query_vectors = padded / lanes;
  t.lse = tile.lse;
  t.lse_rest = tile.lse_rest;
  t.weight = tile.weight;
  t.delta = tile.delta;
  t.scale = p.scale * log2_of_e;
  t.softcap_in = p.softcap > 0 ? p.scale / p.softcap : 0.f;
  t.softcap_out = p.softcap * log2_of_e;
  t.probability = scratch.probability;
  t.grad_score = scratch.grad_score;
  t.grad_score_pairs = scratch.grad_score_pairs;
  t.row_stride = scratch.row_stride;
  t.pair_stride = scratch.pair_stride;
  return t;
}

/// P and dS, panel by panel of the first `count` queries; see(panel) sets `mask`. False if no query sees a key.
template <class Product, class See>
bool score_panels(const ScoreTile<Product>& t, int count, const PairMask& mask, See see) {
  int done = 0;  // vectors of queries whose scores stand
  int panel = 0;
  for (int first = 0, width; first < t.query_vectors && first * lanes < count; first += width, ++panel) {
    width = panel_width(first, t.query_vectors);
    Visible visible = see(panel);
    if (visible == Visible::none) continue;
    clear_scores(t, done, first);  // panels between that see nothing
    done = first + width;
    if (visible == Visible::some) {
      score<Product, true>(t, first, width, mask);
    } else {
      score<Product, false>(t, first, width, mask);
    }
  }
  if (done > 0) clear_scores(t, done, t.query_vectors);
  return done > 0;
}

}  // namespace gradients
}  // namespace
}  // namespace sparsekit

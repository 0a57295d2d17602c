// Scores of a tile of queries and a segment of keys, masked: what the dense folds share. Include after simd_<isa>.h.
//
// The tile product, the masks and the transform are attention's (csrc/attention/cpu_forward_kernels.h): queries in the
// lanes, keys as they stand in memory, scores transposed, [keys][lanes]. A fold then goes over the scores once, while
// they are in L1, and keeps a number per block, key or diagonal in place of the output of attention.
//
// Bound: multiply-adds of q.k, 2 * D a pair; the folds that take exp2 add about 12 instructions per vector of scores.
#pragma once

#include "attention/cpu_forward_kernels.h"
#include "selection/cpu_items.h"
#include "sparsekit/selection.h"

namespace sparsekit {
namespace {

/// Calls body(Vectors<registers>) with a tile's number of vectors.
template <int count>
struct Vectors {
  static constexpr int value = count;
};

template <class Body>
SPARSEKIT_INLINE void with_registers(int registers, Body body) {
  if (registers == 1) {
    body(Vectors<1>{});
  } else if (registers == 2) {
    body(Vectors<2>{});
  } else {
    body(Vectors<tile_registers>{});
  }
}

/// Tiles have 1, 2 or tile_registers vectors: fewer instances of the product.
static void round_registers(QueryTile* tile) {
  if (tile->registers <= 2) return;
  for (int i = tile->width(); i < tile_lanes; ++i) tile->low[i] = INT32_MAX, tile->high[i] = INT32_MIN;
  tile->registers = tile_registers;
}

template <class Product, DType dtype>
class ScoreTiles {
 public:
  using Element = typename Product::Element;

  ScoreTiles(const AttentionProblem& p, Arena* arena) : p_(p), arena_(arena) {
    steps_ = ceil_div(p.head_dim, Product::pair);
    in_place_ = Rows<Product, dtype>::keys_in_place && p.head_dim % Product::pair == 0;
    transform_.needed = p.softcap > 0 || p.key_bias || !(p.scale > 0);
    transform_.scale = p.scale;
    transform_.softcap = p.softcap;
    unit = transform_.needed ? 1.f : p.scale * log2_e;
    queries_ = arena->reserve(tile_lanes * steps_ * int64_t(sizeof(Element)));
    scores_ = arena->reserve(segment_keys * tile_lanes * 4);
    keys_ = arena->reserve(in_place_ ? 0 : (segment_keys * steps_ + Simd::lanes) * int64_t(sizeof(Element)));
    bias_ = arena->reserve(p.key_bias ? segment_keys * 4 : 0);
  }

  QueryTile tile;
  float unit;  // scores times this are in units of log2
  float* scores() const { return at<float>(scores_); }

  /// Queries of one head from row `query` on.
  void set_queries(const Sequence& sequence, int64_t b, int64_t h, int64_t query, int count) {
    set_tile(p_, sequence, b, query, count, &tile);
    round_registers(&tile);
    pack_lanes<Product, dtype>(row_of<dtype>(p_.query, b, h, query), p_.query.row * element_size(), count, tile.width(),
                               p_.head_dim, at<Element>(queries_));
  }

  /// Queries of one head that stand in any rows.
  void set_queries(const Sequence& sequence, int64_t b, int64_t h, const int32_t* rows, int count) {
    tile.least_low = tile.least_high = INT32_MAX;
    tile.most_low = tile.most_high = INT32_MIN;
    QueryTile all = tile;
    for (int i = 0; i < count; ++i) {
      set_tile(p_, sequence, b, rows[i], 1, &tile);
      all.low[i] = tile.low[0];
      all.high[i] = tile.high[0];
      all.least_low = int32_t(smaller(all.least_low, tile.low[0]));
      all.most_low = int32_t(larger(all.most_low, tile.low[0]));
      all.least_high = int32_t(smaller(all.least_high, tile.high[0]));
      all.most_high = int32_t(larger(all.most_high, tile.high[0]));
    }
    tile = all;
    tile.rows = tile.queries = count;
    tile.registers = int(ceil_div(count, Simd::lanes));
    for (int i = count; i < tile_lanes; ++i) tile.low[i] = INT32_MAX, tile.high[i] = INT32_MIN;
    if (tile.registers > 2) tile.registers = tile_registers;
    pack_lanes<Product, dtype>([&](int lane) { return row_of<dtype>(p_.query, b, h, rows[lane]); }, count, tile.width(),
                               p_.head_dim, at<Element>(queries_));
  }

  /// Keys as the product reads them; packed again only where another segment was before.
  void set_keys(int64_t b, int64_t h, const KeySegment& keys) {
    const int64_t kv_head = h / (p_.heads_q / p_.heads_kv);
    const char* first = row_of<dtype>(p_.key, b, kv_head, keys.key);
    bool packed = !in_place_ && first == packed_ && keys.count == segment_.keys.count;
    segment_.keys = keys;
    segment_.key = first;
    segment_.key_stride = p_.key.row * element_size();
    if (!in_place_) {
      if (!packed) pack_rows<Product, dtype>(first, segment_.key_stride, keys.count, p_.head_dim, at<Element>(keys_));
      packed_ = first;
      segment_.key = at<char>(keys_);
      segment_.key_stride = steps_ * int64_t(sizeof(Element));
    }
    segment_.bias = nullptr;
    if (!p_.key_bias) return;
    float* bias = at<float>(bias_);
    const float* given = p_.key_bias + b * p_.key_bias_batch + h * p_.key_bias_head + keys.key;
    for (int n = 0; n < keys.count; ++n) bias[n] = given[n] * log2_e;
    segment_.bias = bias;
  }

  /// The scores of the tile and the segment; -inf where a pair is masked. False: all are, and nothing was computed.
  template <int registers>
  bool multiply(bool masked = true, int32_t bits_index = -1) {
    Visible visible = mask_.set(p_, tile, segment_.keys, masked, bits_index);
    if (visible == Visible::none) return false;
    Simd::Float most[registers];
    for (int j = 0; j < registers; ++j) most[j] = Simd::zero();
    multiply_keys<Product, registers>(segment_, at<Element>(queries_), int(steps_), scores(), most, &prefetch_);
    if (transform_.needed || visible == Visible::some) {
      mask_scores<registers>(transform_, segment_, mask_, visible == Visible::some, scores(), most);
    }
    return true;
  }

  int keys() const { return segment_.keys.count; }
  const KeySegment& segment() const { return segment_.keys; }

  /// lse in units of log2, of the rows of the tile; +inf, which makes every share 0, where a row sees nothing and in
  /// lanes without a row.
  template <class LseAt>
  void load_lse(LseAt lse_at, float* to) const {
    for (int i = 0; i < tile.width(); ++i) {
      float lse = i < tile.rows ? lse_at(i) : -__builtin_inff();
      to[i] = lse == -__builtin_inff() ? __builtin_inff() : lse * log2_e;
    }
  }

 private:
  template <class T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(arena_->data + offset);
  }
  static int64_t element_size() { return dtype == DType::f32 ? 4 : 2; }

  const AttentionProblem& p_;
  Arena* arena_;
  int64_t steps_, queries_, scores_, keys_, bias_;
  bool in_place_;
  const char* packed_ = nullptr;
  ScoreTransform transform_;
  LoadedSegment segment_;
  PairMask mask_;
  Prefetch prefetch_;
};

/// What a share exp(score - lse) of a vector of scores is.
SPARSEKIT_INLINE Simd::Float share(Simd::Float score, Simd::Float unit, Simd::Float lse) {
  return exp2<5>(Simd::fms(score, unit, lse));
}

/// The maximum that keeps a NaN.
SPARSEKIT_INLINE Simd::Float max_or_nan(Simd::Float a, Simd::Float b) {
  return Simd::select(Simd::equal(b, b), Simd::select(Simd::equal(a, a), Simd::max(a, b), a), b);
}
SPARSEKIT_INLINE float max_or_nan(float a, float b) { return b > a || b != b ? b : a; }

/// Over the lanes of rows of a tile.
SPARSEKIT_INLINE float lanes_max(Simd::Float a, int count) {
  float lanes[Simd::lanes];
  Simd::store(lanes, a);
  float most = -__builtin_inff();
  for (int i = 0; i < count && i < Simd::lanes; ++i) most = max_or_nan(most, lanes[i]);
  return most;
}

/// Query blocks counted over all sequences: item -> sequence and block.
struct BlockItem {
  int64_t b, h, s, m;

  BlockItem(const AttentionProblem& p, const SequenceTable& table, int64_t rows, int64_t item) {
    int64_t head = item / rows, row = item % rows;
    b = head / p.heads_q;
    h = head % p.heads_q;
    s = 0;
    while (s + 1 < table.count && table.sequences[s + 1].list_row <= row) ++s;
    m = row - table.sequences[s].list_row;
  }
};

}  // namespace
}  // namespace sparsekit

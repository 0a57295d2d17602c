// Stripe-sparse attention backward on the CPU: the five products of cpu_backward.h, walked from the queries.
//
//   P = exp(score - lse')   dP = dO V^T   dS = P * (dP - delta)   dV = P^T dO   dK = scale dS^T Q   dQ = scale dS K
//
// A unit of work is up to 256 query rows of one group (and query block), of all query heads that share its lists. It
// walks the segments that forward walks (StripePlan), gathers each segment's keys and values, keeps dQ for itself, and
// adds its share of dK and dV to fp32 sums of the whole head. Columns lie anywhere, so two units may add to one key:
// they do it in the order of their numbers, whatever the threads. Segments ascend by their first key, and a unit says
// up to which key it has added everything; one that is about to add waits until all units before it are past its last
// key. Units of different heads follow each other, so that with several heads nobody waits.
//
// Memory: dK and dV in fp32 of as many heads at a time as fit `sum_bytes`. Bound: multiply-adds, and the traffic of the
// sums: 2 (D + Dv) floats read and written per key and unit, against 10 D multiply-adds per key and row.
#pragma once

#include "attention/cpu_backward.h"
#include "attention/cpu_stripes_cut.h"
#include "attention/cpu_stripes_plan.h"

namespace sparsekit {
namespace {
namespace stripes {

using namespace gradients;

constexpr int64_t sum_bytes = int64_t(256) << 20;  // unless one key head needs more
constexpr int64_t unit_queries = 256;              // rows times heads, or one tile of each head

template <class Product, DType dtype>
class StripeBackward {
  using Element = typename Product::Element;
  using Tile = PackedTile<Product, StripeTile>;
  static constexpr int pair = Product::pair;
  static constexpr int64_t element_size = dtype == DType::f32 ? 4 : 2;

 public:
  StripeBackward(const AttentionBackward& problem, const ParallelFor& parallel) : p_(problem), parallel_(parallel) {}

  Status run() {
    Status status = run_rounds();
    pieces_.release();
    sums_.release();
    progress_.release();
    sink_parts_.release();
    return status;
  }

 private:
  struct Piece {
    int64_t first;
    int32_t count;
  };

  Status run_rounds() {
    if (p_.batch * p_.heads_q == 0) return {};
    sequence_.q_end = p_.len_q;
    sequence_.k_end = p_.len_k;
    const int64_t group = p_.heads_q / p_.heads_kv;
    heads_ = heads_share_lists(p_) ? group : 1;
    head_parts_ = group / heads_;
    const int64_t rows = larger(unit_queries / heads_, tile_queries);
    for_each_piece(p_, rows, [&](int64_t, int64_t) { ++piece_count_; });
    shape_ = tile_shape<Product>(p_, int(round_up(smaller(smaller(rows_together(p_), p_.len_q), tile_queries), 16)));
    tiles_per_head_ = ceil_div(smaller(smaller(rows_together(p_), p_.len_q), rows), tile_queries);
    query_dim_ = shape_.query_vectors * lanes;
    value_dim_ = shape_.value_vectors * lanes;
    const int64_t heads = p_.batch * p_.heads_kv, floats = p_.len_k * (query_dim_ + value_dim_);
    heads_at_once_ = clamp(sum_bytes / larger(4 * floats, 1), 1, heads);
    const Status no_memory = error(Status::Kind::failed, "attention backward: out of memory");
    if (!pieces_.allocate(piece_count_) || !sums_.allocate(heads_at_once_ * floats) ||
        !progress_.allocate(heads_at_once_ * units_per_head()) ||
        !sink_parts_.allocate(p_.batch * p_.heads_q * piece_count_)) {
      return no_memory;
    }
    int64_t n = 0;
    for_each_piece(p_, rows, [&](int64_t first, int64_t count) { pieces_[n++] = {first, int32_t(count)}; });
    const int64_t threads = parallel_.run && parallel_.threads > 1 ? parallel_.threads : 1;
    for (first_head_ = 0; first_head_ < heads; first_head_ += heads_at_once_) {
      round_heads_ = smaller(heads_at_once_, heads - first_head_);
      for (int64_t i = 0; i < round_heads_ * units_per_head(); ++i) progress_[i] = 0;
      parallel_(0, round_heads_ * p_.len_k, 256, clear_sums, this);
      next_unit_ = 0;
      parallel_(0, threads, 1, work, this);
      if (out_of_memory_) return no_memory;
      parallel_(0, round_heads_ * p_.len_k, 256, store_sums, this);
    }
    sum_sinks();
    return {};
  }
  int64_t units_per_head() const { return piece_count_ * head_parts_; }

  // ---- sums of dK and dV: [head of the round][key][query_dim_ + value_dim_]

  float* sums_at(int64_t round_head, int64_t key) const {
    return sums_.data + (round_head * p_.len_k + key) * (query_dim_ + value_dim_);
  }
  static void clear_sums(int64_t first, int64_t last, void* context) {
    const StripeBackward& self = *static_cast<const StripeBackward*>(context);
    const AttentionBackward& p = self.p_;
    memset(self.sums_at(0, first), 0, size_t((last - first) * (self.query_dim_ + self.value_dim_)) * sizeof(float));
    const int64_t group = p.heads_q / p.heads_kv;
    for (int64_t i = first; i < last && p.grad_key_bias; ++i) {
      const int64_t head = (self.first_head_ + i / p.len_k) * group;  // counted over the batch
      for (int64_t h = head; h < head + group; ++h) p.grad_key_bias[h * p.len_k + i % p.len_k] = 0;
    }
  }
  static void store_sums(int64_t first, int64_t last, void* context) {
    const StripeBackward& self = *static_cast<const StripeBackward*>(context);
    const AttentionBackward& p = self.p_;
    for (int64_t i = first; i < last; ++i) {
      const int64_t head = self.first_head_ + i / p.len_k, b = head / p.heads_kv, h = head % p.heads_kv;
      const float* sums = self.sums_at(0, i);
      store_scaled<dtype>(output_row(p.grad_key, b, h, i % p.len_k), sums, p.scale, p.head_dim);
      store_scaled<dtype>(output_row(p.grad_value, b, h, i % p.len_k), sums + self.query_dim_, 1, p.value_dim);
    }
  }
  static char* output_row(const OutputView& view, int64_t b, int64_t h, int64_t row) {
    return static_cast<char*>(view.data) + view.offset(b, h, row) * element_size;
  }
  void sum_sinks() const {
    for (int64_t head = 0; head < p_.batch * p_.heads_q && p_.grad_sinks; ++head) {
      double sum = 0;
      for (int64_t i = 0; i < piece_count_; ++i) sum += sink_parts_[head * piece_count_ + i];
      p_.grad_sinks[head] = float(sum);
    }
  }

  // ---- units

  /// Scratch of one thread.
  struct Worker {
    StripePlan plan;
    char *key_rows, *value_rows;   // gathered, as they stand in the tensors
    Element *key, *value;          // [keys][steps, rounded up to vectors]
    Element* key_steps;            // panels [panel][key / pair][d]
    float* bias;                   // [keys]
    float *grad_key, *grad_value;  // [keys][query_dim_], [keys][value_dim_]
    float* grad_bias;              // [heads_][keys][lanes]
    ScoreScratch<Product> scores;
    Tile* tiles;  // [heads_][tiles_per_head_]
    PairMask* mask;
  };
  void carve(Carver* memory, Worker* w) const {
    w->key_rows = memory->take<char>(segment_keys * p_.head_dim * element_size);
    w->value_rows = memory->take<char>(segment_keys * p_.value_dim * element_size);
    w->key = memory->take<Element>(segment_keys * round_up(shape_.query_steps, lanes));
    w->value = memory->take<Element>(segment_keys * round_up(shape_.value_steps, lanes));
    w->key_steps = memory->take<Element>(segment_keys / pair * query_dim_);
    w->bias = memory->take<float>(segment_keys);
    w->grad_key = memory->take<float>(segment_keys * query_dim_);
    w->grad_value = memory->take<float>(segment_keys * value_dim_);
    w->grad_bias = memory->take<float>(p_.grad_key_bias ? heads_ * segment_keys * lanes : 0);
    w->scores = carve_scores<Product>(shape_, memory);
    w->mask = memory->take<PairMask>(1);
    w->tiles = memory->take<Tile>(heads_ * tiles_per_head_);
    for (int64_t t = 0; t < heads_ * tiles_per_head_; ++t) {
      Tile tile = carve_tile<Product, StripeTile>(shape_, memory);
      if (w->tiles) w->tiles[t] = tile;
    }
  }

  static void work(int64_t first, int64_t last, void* context) {
    StripeBackward& self = *static_cast<StripeBackward*>(context);
    for (int64_t i = first; i < last; ++i) self.work_until_done();
  }
  void work_until_done() {
    Worker w;
    Carver sizes;
    carve(&sizes, &w);
    Arena arena;
    const int64_t scratch = arena.reserve(sizes.size);
    w.plan.reserve(p_, &arena);
    if (!arena.allocate()) {
      __atomic_store_n(&out_of_memory_, true, __ATOMIC_RELAXED);
      return;  // units that nobody has taken block nobody: others take them, or all have failed
    }
    Carver memory{arena.data + scratch, 0};
    carve(&memory, &w);
    w.plan.attach(p_, arena);
    const int64_t units = round_heads_ * units_per_head();
    for (int64_t unit; (unit = __atomic_fetch_add(&next_unit_, 1, __ATOMIC_RELAXED)) < units;) {
      run_unit(w, unit % round_heads_, unit / round_heads_);
    }
    arena.release();
  }

  /// Unit `number` of a key head: the last piece of the queries first, which under causality sees most.
  void run_unit(Worker& w, int64_t round_head, int64_t number) const {
    const int64_t at = first_head_ + round_head, b = at / p_.heads_kv, kv_head = at % p_.heads_kv;
    const int64_t index = piece_count_ - 1 - number / head_parts_, group = p_.heads_q / p_.heads_kv;
    const int64_t first_query_head = kv_head * group + number % head_parts_ * heads_;
    const Piece& piece = pieces_[index];
    int64_t* progress = progress_.data + round_head * units_per_head();

    w.plan.build(p_, sequence_, b, first_query_head, piece.first, piece.count);
    pack_tiles(w, b, first_query_head, index);
    int64_t finished = 0;  // units before this one that are known to be done
    for (int i = 0; i < w.plan.count(); ++i) {
      const StripeSegment& s = w.plan[i];
      __atomic_store_n(&progress[number], s.first, __ATOMIC_RELEASE);
      const StripeSegment* next = i + 1 < w.plan.count() ? &w.plan[i + 1] : nullptr;
      if (!run_segment(w, s, next, round_head, b, kv_head, first_query_head, piece.count)) continue;
      wait_for(progress, number, s.last, &finished);
      add_sums(w, s, round_head, b * p_.heads_q + first_query_head);
    }
    __atomic_store_n(&progress[number], INT64_MAX, __ATOMIC_RELEASE);
    for (int64_t h = 0; h < heads_; ++h) {
      for (int64_t i = 0; i < piece.count; ++i) {
        char* row = output_row(p_.grad_query, b, first_query_head + h, piece.first + i);
        const Tile& tile = w.tiles[h * tiles_per_head_ + i / tile_queries];
        store_scaled<dtype>(row, tile.grad_query + i % tile_queries * query_dim_, p_.scale, p_.head_dim);
      }
    }
  }

  /// Until every unit before `number` has added all it has up to key `last`.
  static void wait_for(const int64_t* progress, int64_t number, int64_t last, int64_t* finished) {
    for (int64_t unit = *finished; unit < number; ++unit) {
      int64_t reached = __atomic_load_n(&progress[unit], __ATOMIC_ACQUIRE);
      for (int spins = 0; reached <= last; ++spins) {
        if (spins > 100) sched_yield();
        reached = __atomic_load_n(&progress[unit], __ATOMIC_ACQUIRE);
      }
      if (reached == INT64_MAX && unit == *finished) ++*finished;
    }
  }

  int tile_rows(int64_t count, int64_t t) const { return int(clamp(count - t * tile_queries, 0, tile_queries)); }

  void pack_tiles(const Worker& w, int64_t b, int64_t first_head, int64_t index) const {
    const Piece& piece = pieces_[index];
    for (int64_t h = 0; h < heads_; ++h) {
      float sink = 0;
      for (int64_t t = 0; t < tiles_per_head_; ++t) {
        const int count = tile_rows(piece.count, t);
        if (count == 0) break;
        const Tile& tile = w.tiles[h * tiles_per_head_ + t];
        const int64_t first = piece.first + t * tile_queries;
        pack_query_tile<Product, dtype>(p_, shape_, b, first_head + h, first, count, tile, &sink);
        memset(tile.grad_query, 0, size_t(round_up(count, 16) * query_dim_) * sizeof(float));
        StripeTile* masks = tile.masks;
        const int vectors = int(round_up(count, 16)) / lanes;
        for (int v = 0, width; v * lanes < count; v += width, ++masks) {
          width = panel_width(v, vectors);
          set_stripe_tile(p_, sequence_, b, first + v * lanes, int(smaller(count - v * lanes, width * lanes)), masks);
        }
      }
      sink_parts_[(b * p_.heads_q + first_head + h) * piece_count_ + index] = sink;
    }
  }

  /// dQ of all tiles, and dK and dV of the segment's keys in the worker's memory; false if no query sees a key.
  bool run_segment(const Worker& w, const StripeSegment& s, const StripeSegment* next, int64_t round_head, int64_t b,
                   int64_t kv_head, int64_t first_head, int64_t rows) const {
    load_keys(w, s, b, kv_head);
    const int keys = s.keys.padded;
    bool add = false;  // dK and dV are begun
    // The sums that this segment adds to arrive while its scores are computed, the next segment's rows during the other
    // products.
    Ahead sums = rows_ahead(s, reinterpret_cast<const char*>(sums_at(round_head, 0)),
                            (query_dim_ + value_dim_) * int64_t(sizeof(float)), 24);
    Ahead next_keys, next_values;
    if (next) {
      next_keys = rows_ahead(*next, row_of<dtype>(p_.key, b, kv_head, 0), p_.key.row * element_size, 16);
      next_values = rows_ahead(*next, row_of<dtype>(p_.value, b, kv_head, 0), p_.value.row * element_size, 16);
      next_keys.row_bytes = p_.head_dim * element_size;
      next_values.row_bytes = p_.value_dim * element_size;
    }
    for (int64_t h = 0; h < heads_; ++h) {
      if (h == 0 || p_.key_bias_head != 0) load_bias(w, s, b, first_head + h);
      if (p_.grad_key_bias) memset(w.grad_bias + h * segment_keys * lanes, 0, segment_keys * lanes * sizeof(float));
      for (int64_t t = 0; t < tiles_per_head_; ++t) {
        const int count = tile_rows(rows, t), padded = int(round_up(count, 16)), steps = padded / pair;
        if (count == 0) break;
        const Tile& tile = w.tiles[h * tiles_per_head_ + t];
        ScoreTile<Product> scores = score_tile_of<Product>(p_, shape_, tile, padded, w.scores);
        scores.key = {w.key, round_up(shape_.query_steps, lanes), 1};
        scores.value = {w.value, round_up(shape_.value_steps, lanes), 1};
        scores.count = s.keys.count;
        scores.keys = keys;
        scores.bias = w.bias;
        scores.grad_bias = p_.grad_key_bias ? w.grad_bias + h * segment_keys * lanes : nullptr;
        scores.ahead = &sums;
        auto see = [&](int panel) { return see_stripe(p_, tile.masks[panel], s, w.mask); };
        if (!score_panels(scores, count, *w.mask, see)) continue;
        product<Product>({scores.probability, scores.row_stride, 1}, keys, tile.grad_rows, steps, shape_.value_vectors,
                         w.grad_value, value_dim_, add, &next_keys);
        product<Product>({scores.grad_score, scores.row_stride, 1}, keys, tile.query_rows, steps, shape_.query_vectors,
                         w.grad_key, query_dim_, add, &next_values);
        product<Product>({scores.grad_score_pairs, 1, scores.pair_stride}, padded, w.key_steps, keys / pair,
                         shape_.query_vectors, tile.grad_query, query_dim_, true, &next_values);
        add = true;
      }
    }
    return add;
  }

  /// A segment's rows of what begins at `data`, `stride` bytes apart.
  static Ahead rows_ahead(const StripeSegment& s, const char* data, int64_t stride, int lines) {
    Ahead ahead;
    ahead.lines = lines;
    ahead.first_row = data;
    ahead.row_stride = ahead.row_bytes = stride;
    ahead.rows = s.rows;
    ahead.left = s.rows ? s.keys.count : 0;  // the others stand together: the hardware sees it
    return ahead;
  }

  /// Rows of a tensor where they stand, or gathered to `to`.
  static Source gather(const InputView& view, const StripeSegment& s, int64_t b, int64_t h, int dim, char* to) {
    const int64_t bytes = dim * element_size;
    if (!s.rows) return {row_of<dtype>(view, b, h, s.keys.key), view.row * element_size, s.keys.count, dim};
    for (int n = 0; n < s.keys.count; ++n) {
      memcpy(to + n * bytes, row_of<dtype>(view, b, h, s.rows[n]), size_t(bytes));
    }
    return {to, bytes, s.keys.count, dim};
  }
  void load_keys(const Worker& w, const StripeSegment& s, int64_t b, int64_t kv_head) const {
    const Source key = gather(p_.key, s, b, kv_head, p_.head_dim, w.key_rows);
    const Source value = gather(p_.value, s, b, kv_head, p_.value_dim, w.value_rows);
    pack_left<Product, dtype>(key, s.keys.padded, round_up(shape_.query_steps, lanes), w.key);
    pack_left<Product, dtype>(value, s.keys.padded, round_up(shape_.value_steps, lanes), w.value);
    pack_steps_are_rows<Product, dtype>(key, s.keys.padded, shape_.query_vectors, w.key_steps);
  }
  void load_bias(const Worker& w, const StripeSegment& s, int64_t b, int64_t h) const {
    const float* bias = p_.key_bias ? p_.key_bias + b * p_.key_bias_batch + h * p_.key_bias_head : nullptr;
    for (int n = 0; n < s.keys.padded; ++n) {
      w.bias[n] = n >= s.keys.count ? -__builtin_inff() : bias ? bias[s.row(n)] * log2_of_e : 0.f;
    }
  }

  void add_sums(const Worker& w, const StripeSegment& s, int64_t round_head, int64_t first_query_head) const {
    for (int n = 0; n < s.keys.count; ++n) {
      float* sums = sums_at(round_head, s.row(n));
      add_to(sums, w.grad_key + n * query_dim_, query_dim_);
      add_to(sums + query_dim_, w.grad_value + n * value_dim_, value_dim_);
    }
    for (int64_t h = 0; h < heads_ && p_.grad_key_bias; ++h) {
      float* out = p_.grad_key_bias + (first_query_head + h) * p_.len_k;
      const float* parts = w.grad_bias + h * segment_keys * lanes;
      for (int n = 0; n < s.keys.count; ++n) out[s.row(n)] += Simd::sum(Simd::load(parts + n * lanes));
    }
  }
  static void add_to(float* sums, const float* parts, int64_t count) {
    for (int64_t d = 0; d < count; d += lanes)
      Simd::store(sums + d, Simd::add(Simd::load(sums + d), Simd::load(parts + d)));
  }

  const AttentionBackward& p_;
  const ParallelFor& parallel_;
  Sequence sequence_;
  TileShape shape_;
  int64_t heads_ = 1, head_parts_ = 1;  // query heads of a unit; units that a key head needs for all of them
  int64_t piece_count_ = 0, tiles_per_head_ = 1, query_dim_ = 0, value_dim_ = 0;
  int64_t heads_at_once_ = 1, first_head_ = 0, round_heads_ = 0, next_unit_ = 0;
  bool out_of_memory_ = false;
  Buffer<Piece> pieces_;
  Buffer<float> sums_;
  Buffer<int64_t> progress_;  // [head of the round][unit]: keys below are added, all that the unit has of them
  Buffer<float> sink_parts_;  // [query head][piece]: its share of the sink's gradient
};

static Status run_backward(const AttentionBackward& problem, const ParallelFor& parallel) {
  switch (problem.dtype) {
    case DType::f32: return StripeBackward<FloatProduct, DType::f32>(problem, parallel).run();
    case DType::f16: return StripeBackward<FloatProduct, DType::f16>(problem, parallel).run();
#ifdef SPARSEKIT_BF16_PRODUCT
    case DType::bf16: return StripeBackward<Bf16Product, DType::bf16>(problem, parallel).run();
#else
    case DType::bf16: return StripeBackward<FloatProduct, DType::bf16>(problem, parallel).run();
#endif
    case DType::f64: break;
  }
  return error(Status::Kind::unsupported, "query is %s; supported: float32, float16, bfloat16", name(problem.dtype));
}

}  // namespace stripes
}  // namespace
}  // namespace sparsekit

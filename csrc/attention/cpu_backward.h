// Block-sparse attention backward on the CPU, for any Simd.
//
//   P = exp(score - lse')   dP = dO V^T   dS = P * (dP - delta)   dV = P^T dO   dK = scale dS^T Q   dQ = scale dS K
//   lse' = log(exp(lse) + exp(sink)),   delta = rowsum(dO * O) - dlse * exp(lse' - lse)
//
// One pass over the pairs of key and query blocks (Dao et al., FlashAttention, algorithm 4), 5 matrix products of 2 D
// operations per score. A unit of work is one key block of one key head: it walks the transposed list for every query
// head of its group, keeps dK and dV for itself, and adds its share of dQ to the query tile in the order of the key
// blocks (cpu_backward_plan.h), so that results do not depend on the number of threads.
//
// Query tiles are packed once per call, by a first pass that also makes delta: both operands, each with queries in the
// lanes and with the head dimension in the lanes. Memory: that, and dQ in fp32, O(tokens * D), for as many heads at a
// time as fit `scratch_bytes`. Bound: multiply-adds, 5 D / pair vectors of them per 16 scores, beside about 20
// elementwise instructions. What was measured: docs/attention-performance-cpu.md.
#pragma once

#include <sched.h>

#include "attention/cpu_backward_plan.h"
#include "attention/cpu_backward_tile.h"
#include "common/cpu/scratch.h"

namespace sparsekit {
namespace {
namespace gradients {

constexpr int64_t scratch_bytes = int64_t(48) << 20;  // of query tiles, unless one key head needs more

template <class Product, DType dtype>
class Backward {
  using Element = typename Product::Element;
  static constexpr int pair = Product::pair;

 public:
  Backward(const AttentionBackward& problem, const ParallelFor& parallel) : p_(problem), parallel_(parallel) {}

  Status run() {
    Status status = run_rounds();
    plan_.release();
    give_back_scratch(scratch_);
    added_.release();
    sink_parts_.release();
    return status;
  }

 private:
  Status run_rounds() {
    const BlockLists& lists = p_.lists;
    if (p_.batch == 0 || p_.heads_q == 0) return {};
    if (!p_.transpose.offsets) {  // slots may be null: there are none where no list has room for one
      return error(Status::Kind::invalid_argument,
                   "transpose_offsets, transpose_slots: backward needs the transposed lists");
    }
    group_ = p_.heads_q / p_.heads_kv;
    tiles_per_block_ = int(ceil_div(lists.block_q, tile_queries));
    shape_ = tile_shape<Product>(p_, int(smaller(lists.block_q, tile_queries)));
    tiles_ = lists.q_blocks * tiles_per_block_;
    block_keys_ = int(round_up(smaller(lists.block_k, larger(p_.len_k, 1)), 16));

    Carver tile, worker;
    carve_tile<Product, QueryTile>(shape_, &tile);
    carve_worker(&worker);
    tile_bytes_ = tile.size;
    worker_bytes_ = worker.size;
    int64_t heads = p_.batch * p_.heads_kv;
    heads_at_once_ = clamp(scratch_bytes / larger(group_ * tiles_ * tile_bytes_, 1), 1, heads);
    int64_t threads = parallel_.run && parallel_.threads > 1 ? parallel_.threads : 1;
    int64_t tiles_bytes = heads_at_once_ * group_ * tiles_ * tile_bytes_;
    scratch_ = take_scratch(tiles_bytes + threads * worker_bytes_);
    workers_ = scratch_ + tiles_bytes;
    if (!scratch_ || !plan_.build(p_) || !added_.allocate(heads_at_once_ * group_ * tiles_) ||
        !sink_parts_.allocate(heads_at_once_ * group_ * tiles_)) {
      return error(Status::Kind::failed, "attention backward: out of memory");
    }
    clear_rows_without_sequence();
    for (first_head_ = 0; first_head_ < heads; first_head_ += heads_at_once_) {
      round_heads_ = smaller(heads_at_once_, heads - first_head_);
      parallel_(0, round_heads_ * group_ * tiles_, 1, pack_tiles, this);
      sum_sinks();
      next_unit_ = 0;
      parallel_(0, threads, 1, work, this);
    }
    return {};
  }

  /// A head of this round: `head` counts its key heads, `query_head` is the head of query.
  struct Head {
    int64_t batch, key_head, query_head;
    int64_t lists;  // (batch, head) of the lists
  };
  Head head_of(int64_t round_head, int64_t in_group) const {
    int64_t at = first_head_ + round_head, b = at / p_.heads_kv, kv = at % p_.heads_kv, q = kv * group_ + in_group;
    const BlockLists& lists = p_.lists;
    return {b, kv, q, (lists.list_batch == 1 ? 0 : b) * lists.list_heads + q / (p_.heads_q / lists.list_heads)};
  }

  static char* row_at(const OutputView& view, int64_t b, int64_t h, int64_t row) {
    return static_cast<char*>(view.data) + view.offset(b, h, row) * size_of(dtype);
  }

  // ---- query tiles

  PackedTile<Product, QueryTile> tile_at(int64_t index) const {
    Carver memory{scratch_ + index * tile_bytes_, 0};
    return carve_tile<Product, QueryTile>(shape_, &memory);
  }
  /// First row and number of rows of tile `t` of a list row.
  struct TileRows {
    int64_t first;
    int count, padded;
  };
  TileRows tile_rows(const QueryBlock& block, int t) const {
    int count = int(clamp(block.count - int64_t(t) * tile_queries, 0, tile_queries));
    return {block.first + int64_t(t) * tile_queries, count, int(round_up(count, 16))};
  }

  static void pack_tiles(int64_t first, int64_t last, void* self) {
    for (int64_t i = first; i < last; ++i) static_cast<const Backward*>(self)->pack_tile(i);
  }
  void pack_tile(int64_t index) const {
    Head head = head_of(index / tiles_ / group_, index / tiles_ % group_);
    int64_t list_row = index % tiles_ / tiles_per_block_;
    const QueryBlock& block = plan_.query_blocks[list_row];
    TileRows rows = tile_rows(block, int(index % tiles_per_block_));
    added_[index] = 0;
    sink_parts_[index] = 0;
    if (rows.count == 0) return;
    if (plan_.total(head.lists, list_row) == 0) return clear_query_rows(head, rows.first, rows.count);

    PackedTile<Product, QueryTile> tile = tile_at(index);
    pack_query_tile<Product, dtype>(p_, shape_, head.batch, head.query_head, rows.first, rows.count, tile,
                                    &sink_parts_[index]);
    set_masks(head.batch, block, rows, tile.masks);
  }
  void set_masks(int64_t b, const QueryBlock& block, const TileRows& rows, QueryTile* masks) const {
    int vectors = rows.padded / lanes;
    for (int first = 0, width; first * lanes < rows.count; first += width, ++masks) {
      width = panel_width(first, vectors);
      int count = int(smaller(rows.count - first * lanes, width * lanes));
      set_tile(p_, block.sequence, b, rows.first + first * lanes, count, masks);
    }
  }

  static Source source(const InputView& view, int64_t b, int64_t h, int64_t first, int count, int dim) {
    return {row_of<dtype>(view, b, h, first), view.row * size_of(dtype), count, dim};
  }

  void sum_sinks() const {
    if (!p_.grad_sinks) return;
    for (int64_t i = 0; i < round_heads_ * group_; ++i) {
      Head head = head_of(i / group_, i % group_);
      double sum = 0;
      for (int64_t t = 0; t < tiles_; ++t) sum += sink_parts_[i * tiles_ + t];
      p_.grad_sinks[head.batch * p_.heads_q + head.query_head] = float(sum);
    }
  }

  // ---- key blocks

  /// Scratch of one thread.
  struct Worker {
    Element *key, *value;  // [keys][steps, rounded up to vectors]
    Element* key_steps;    // per segment: panels [panel][key / pair][d]
    float* bias;           // [keys]
    float *grad_key, *grad_value;
    float* grad_bias;  // [keys][lanes]
    ScoreScratch<Product> scores;
    KeySegment* segments;
    PairMask* mask;
  };
  Worker carve_worker(Carver* memory) const {
    Worker w;
    w.key = memory->take<Element>(block_keys_ * round_up(shape_.query_steps, lanes));
    w.value = memory->take<Element>(block_keys_ * round_up(shape_.value_steps, lanes));
    w.key_steps = memory->take<Element>(int64_t(block_keys_ / pair) * shape_.query_vectors * lanes);
    w.bias = memory->take<float>(block_keys_);
    w.grad_key = memory->take<float>(int64_t(block_keys_) * shape_.query_vectors * lanes);
    w.grad_value = memory->take<float>(int64_t(block_keys_) * shape_.value_vectors * lanes);
    w.grad_bias = memory->take<float>(int64_t(block_keys_) * lanes);
    w.scores = carve_scores<Product>(shape_, memory);
    w.segments = memory->take<KeySegment>(ceil_div(block_keys_, segment_keys));
    w.mask = memory->take<PairMask>(1);
    return w;
  }

  static void work(int64_t first, int64_t, void* context) {
    Backward& self = *static_cast<Backward*>(context);
    Carver memory{self.workers_ + first * self.worker_bytes_, 0};
    Worker worker = self.carve_worker(&memory);
    int64_t units = self.plan_.key_block_count * self.round_heads_;
    // Units of one head are taken in the order of the key blocks, so a thread waits only for units that are under way.
    for (int64_t unit; (unit = __atomic_fetch_add(&self.next_unit_, 1, __ATOMIC_RELAXED)) < units;) {
      self.run_unit(worker, unit % self.round_heads_, unit / self.round_heads_);
    }
  }

  /// One key block of one key head.
  void run_unit(const Worker& w, int64_t round_head, int64_t n) const {
    const KeyBlock& block = plan_.key_blocks[n];
    int segments = int(ceil_div(block.count, segment_keys));
    bool loaded = false;
    for (int64_t g = 0; g < group_; ++g) {
      Head head = head_of(round_head, g);
      int64_t begin = plan_.begin(head.lists, n), end = plan_.begin(head.lists, n + 1);
      if (begin < end) {
        if (!loaded) load_keys(w, head, block, n, segments);
        loaded = true;
        load_bias(w, head, block);
        for (int64_t at = begin; at < end; ++at) {
          if (plan_.rank(head.lists, at) < 0) continue;
          int64_t next = at + 1 < end && plan_.rank(head.lists, at + 1) >= 0 ? at + 1 : at;
          run_entry(w, round_head * group_ + g, head, segments, at, next);
        }
      }
      if (p_.grad_key_bias) store_grad_bias(w, head, block, /*zero=*/begin == end);
    }
    Head head = head_of(round_head, 0);
    for (int i = 0; i < block.count; ++i) {
      char* grad_key = row_at(p_.grad_key, head.batch, head.key_head, block.first + i);
      char* grad_value = row_at(p_.grad_value, head.batch, head.key_head, block.first + i);
      if (loaded) {
        store_scaled<dtype>(grad_key, w.grad_key + int64_t(i) * shape_.query_vectors * lanes, p_.scale, p_.head_dim);
        store_scaled<dtype>(grad_value, w.grad_value + int64_t(i) * shape_.value_vectors * lanes, 1, p_.value_dim);
      } else {
        memset(grad_key, 0, size_t(p_.head_dim * size_of(dtype)));
        memset(grad_value, 0, size_t(p_.value_dim * size_of(dtype)));
      }
    }
  }

  void load_keys(const Worker& w, const Head& head, const KeyBlock& block, int64_t n, int segments) const {
    Source key = source(p_.key, head.batch, head.key_head, block.first, int(block.count), p_.head_dim);
    Source value = source(p_.value, head.batch, head.key_head, block.first, int(block.count), p_.value_dim);
    int padded = int(round_up(block.count, 16));
    pack_left<Product, dtype>(key, padded, round_up(shape_.query_steps, lanes), w.key);
    pack_left<Product, dtype>(value, padded, round_up(shape_.value_steps, lanes), w.value);
    for (int s = 0; s < segments; ++s) {
      KeySegment& segment = w.segments[s];
      segment = key_segment(p_, block.sequence, head.batch, n - block.sequence.k_block, s);
      Source part = source(p_.key, head.batch, head.key_head, segment.key, segment.count, p_.head_dim);
      pack_steps_are_rows<Product, dtype>(part, segment.padded, shape_.query_vectors, key_steps_at(w, s));
    }
    memset(w.grad_key, 0, size_t(padded) * shape_.query_vectors * lanes * sizeof(float));
    memset(w.grad_value, 0, size_t(padded) * shape_.value_vectors * lanes * sizeof(float));
  }
  Element* key_steps_at(const Worker& w, int segment) const {
    return w.key_steps + int64_t(segment) * (segment_keys / pair) * shape_.query_vectors * lanes;
  }

  void load_bias(const Worker& w, const Head& head, const KeyBlock& block) const {
    const float* bias =
        p_.key_bias ? p_.key_bias + head.batch * p_.key_bias_batch + head.query_head * p_.key_bias_head : nullptr;
    int padded = int(round_up(block.count, 16));
    for (int i = 0; i < padded; ++i) {
      w.bias[i] = i >= block.count ? -__builtin_inff() : bias ? bias[block.first + i] * log2_of_e : 0.f;
    }
    if (p_.grad_key_bias) memset(w.grad_bias, 0, size_t(padded) * lanes * sizeof(float));
  }
  void store_grad_bias(const Worker& w, const Head& head, const KeyBlock& block, bool zero) const {
    float* out = p_.grad_key_bias + (head.batch * p_.heads_q + head.query_head) * p_.len_k + block.first;
    for (int i = 0; i < block.count; ++i) out[i] = zero ? 0.f : Simd::sum(Simd::load(w.grad_bias + i * lanes));
  }

  /// One list entry: the tiles of its query block against the segments of the key block.
  void run_entry(const Worker& w, int64_t round_query_head, const Head& head, int segments, int64_t at,
                 int64_t next) const {
    const BlockLists& lists = p_.lists;
    int64_t slot = plan_.slot(p_.transpose, head.lists, at), list_row = slot / plan_.slots_per_row;
    int32_t in_row = int32_t(slot % plan_.slots_per_row), rank = plan_.rank(head.lists, at), bits = -1;
    bool masked = in_row < lists.partial.capacity, last = rank + 1 == plan_.total(head.lists, list_row);
    if (masked && lists.bits_index) {
      bits = lists.bits_index[(head.lists * lists.q_blocks + list_row) * lists.partial.capacity + in_row];
      if (bits >= lists.bits_count) bits = -1;
    }
    for (int t = 0; t < tiles_per_block_; ++t) {
      TileRows rows = tile_rows(plan_.query_blocks[list_row], t);
      if (rows.count == 0) break;
      int64_t index = round_query_head * tiles_ + list_row * tiles_per_block_ + t;
      PackedTile<Product, QueryTile> tile = tile_at(index);
      bool add = rank > 0, waited = false;
      // The rest of this tile arrives while scores are computed, the start of the next one during the other products.
      Ahead rest = ahead(tile.query_rows, tile.grad_query + int64_t(rows.padded) * shape_.query_vectors * lanes, 32);
      int64_t next_row = plan_.slot(p_.transpose, head.lists, next) / plan_.slots_per_row;
      bool same_block = t + 1 < tiles_per_block_ || next == at;
      int64_t next_index = same_block ? index + 1 : round_query_head * tiles_ + next_row * tiles_per_block_;
      Ahead following;
      if (next_index < round_heads_ * group_ * tiles_) {
        PackedTile<Product, QueryTile> next_tile = tile_at(next_index);
        following = ahead(next_tile.query_lanes, next_tile.query_rows, 16);
      }
      for (int s = 0; s < segments; ++s) {
        ScoreTile<Product> scores = score_tile(w, tile, rows, s);
        scores.ahead = &rest;
        if (!make_scores(scores, tile, rows, w.segments[s], w.mask, masked, bits)) continue;
        int steps = rows.padded / pair, keys = w.segments[s].padded;
        int64_t key = int64_t(s) * segment_keys, query_dim = shape_.query_vectors * lanes,
                value_dim = shape_.value_vectors * lanes;
        product<Product>({scores.probability, scores.row_stride, 1}, keys, tile.grad_rows, steps, shape_.value_vectors,
                         w.grad_value + key * value_dim, value_dim, true, &following);
        product<Product>({scores.grad_score, scores.row_stride, 1}, keys, tile.query_rows, steps, shape_.query_vectors,
                         w.grad_key + key * query_dim, query_dim, true, &following);
        if (!waited) wait_for(&added_[index], rank);
        waited = true;
        product<Product>({scores.grad_score_pairs, 1, scores.pair_stride}, rows.padded, key_steps_at(w, s), keys / pair,
                         shape_.query_vectors, tile.grad_query, query_dim, add, &following);
        add = true;
      }
      if (!waited) wait_for(&added_[index], rank);
      if (last) {
        add ? store_query_rows(head, rows, tile.grad_query) : clear_query_rows(head, rows.first, rows.count);
      } else if (!add) {
        memset(tile.grad_query, 0, size_t(rows.padded) * shape_.query_vectors * lanes * sizeof(float));
      }
      __atomic_store_n(&added_[index], rank + 1, __ATOMIC_RELEASE);
    }
  }

  static Ahead ahead(const void* first, const void* last, int lines) {
    return {static_cast<const char*>(first), static_cast<const char*>(last), lines};
  }

  static void wait_for(const int32_t* added, int32_t rank) {
    for (int spins = 0; __atomic_load_n(added, __ATOMIC_ACQUIRE) != rank; ++spins) {
      if (spins > 100) sched_yield();
    }
  }

  ScoreTile<Product> score_tile(const Worker& w, const PackedTile<Product, QueryTile>& tile, const TileRows& rows,
                                int s) const {
    const int64_t key = int64_t(s) * segment_keys;
    ScoreTile<Product> t = score_tile_of<Product>(p_, shape_, tile, rows.padded, w.scores);
    t.key = {w.key + key * round_up(shape_.query_steps, lanes), round_up(shape_.query_steps, lanes), 1};
    t.value = {w.value + key * round_up(shape_.value_steps, lanes), round_up(shape_.value_steps, lanes), 1};
    t.count = w.segments[s].count;
    t.keys = w.segments[s].padded;
    t.bias = w.bias + key;
    t.grad_bias = p_.grad_key_bias ? w.grad_bias + key * lanes : nullptr;
    return t;
  }

  /// P and dS of one tile and segment; false if no query sees a key.
  bool make_scores(const ScoreTile<Product>& t, const PackedTile<Product, QueryTile>& tile, const TileRows& rows,
                   const KeySegment& segment, PairMask* mask, bool masked, int32_t bits) const {
    return score_panels(t, rows.count, *mask,
                        [&](int panel) { return mask->set(p_, tile.masks[panel], segment, masked, bits); });
  }

  void store_query_rows(const Head& head, const TileRows& rows, const float* grad) const {
    for (int i = 0; i < rows.count; ++i) {
      store_scaled<dtype>(row_at(p_.grad_query, head.batch, head.query_head, rows.first + i),
                          grad + i * shape_.query_vectors * lanes, p_.scale, p_.head_dim);
    }
  }

  // ---- rows without gradients

  void clear_query_rows(const Head& head, int64_t first, int64_t count) const {
    for (int64_t i = first; i < first + count; ++i) {
      memset(row_at(p_.grad_query, head.batch, head.query_head, i), 0, size_t(p_.head_dim * size_of(dtype)));
    }
  }

  /// Rows of a packed batch that no sequence owns.
  void clear_rows_without_sequence() const {
    for (int64_t b = 0; b < p_.batch; ++b) {
      for (int64_t h = 0; h < p_.heads_q; ++h) {
        clear_query_rows({b, 0, h, 0}, plan_.query_rows, p_.len_q - plan_.query_rows);
        for (int64_t i = plan_.key_rows; i < p_.len_k && p_.grad_key_bias; ++i) {
          p_.grad_key_bias[(b * p_.heads_q + h) * p_.len_k + i] = 0;
        }
      }
      for (int64_t h = 0; h < p_.heads_kv; ++h) {
        for (int64_t i = plan_.key_rows; i < p_.len_k; ++i) {
          memset(row_at(p_.grad_key, b, h, i), 0, size_t(p_.head_dim * size_of(dtype)));
          memset(row_at(p_.grad_value, b, h, i), 0, size_t(p_.value_dim * size_of(dtype)));
        }
      }
    }
  }

  const AttentionBackward& p_;
  const ParallelFor& parallel_;
  Plan plan_;
  int64_t group_ = 1, tiles_ = 0, heads_at_once_ = 1, first_head_ = 0, round_heads_ = 0;
  int tiles_per_block_ = 1;
  TileShape shape_;
  int64_t block_keys_ = 0, tile_bytes_ = 0, worker_bytes_ = 0, next_unit_ = 0;
  char *scratch_ = nullptr, *workers_ = nullptr;  // query tiles of the round, then each thread's memory
  Buffer<int32_t> added_;                         // [query head of the round][tile]: entries that have added to its dQ
  Buffer<float> sink_parts_;                      // likewise: the tile's share of the sink's gradient
};

}  // namespace gradients

Status run_backward(const AttentionBackward& problem, const ParallelFor& parallel) {
  switch (problem.dtype) {
    case DType::f32: return gradients::Backward<FloatProduct, DType::f32>(problem, parallel).run();
    case DType::f16: return gradients::Backward<FloatProduct, DType::f16>(problem, parallel).run();
#ifdef SPARSEKIT_BF16_PRODUCT
    case DType::bf16: return gradients::Backward<Bf16Product, DType::bf16>(problem, parallel).run();
#else
    case DType::bf16: return gradients::Backward<FloatProduct, DType::bf16>(problem, parallel).run();
#endif
    case DType::f64: break;
  }
  return error(Status::Kind::unsupported, "query is %s; supported: float32, float16, bfloat16", name(problem.dtype));
}

}  // namespace
}  // namespace sparsekit

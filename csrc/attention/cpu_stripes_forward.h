// Stripe-sparse attention forward on the CPU: the flash attention of cpu_forward_kernels.h on gathered keys.
//
// An item is up to 256 queries (rows times heads that share lists) of one group and one query block; its segments are
// those of StripePlan. A batch of them, at most `segment_keys` keys, is made ready at a time: gathered keys are copied
// to rows and values to panels, which costs about 1/40 of using them for one tile of queries, and every tile takes them
// from L2 while the next batch's rows are prefetched one by one (a list's rows lie apart: no hardware prefetcher finds
// them). Work is cut by shape alone, so results do not depend on threads; items are handed out longest first.
//
// Bound: multiply-adds, as for blocks. Columns shared by a group of rows: AnchorAttention (stripe granularity).
#pragma once

#include "attention/cpu_forward_store.h"
#include "attention/cpu_stripes_cut.h"
#include "attention/cpu_stripes_pack.h"
#include "attention/cpu_stripes_plan.h"

namespace sparsekit {
namespace {
namespace stripes {

constexpr int item_queries = 256;
constexpr int item_lanes = 2 * item_queries;                 // tiles are more than half full, or the last of a head
constexpr int most_tiles = 3 * (item_queries / tile_lanes);  // likewise
constexpr int64_t near_rows = 1024;                          // bytes
constexpr int batch_segments = segment_keys / 16;

/// Rows first ... first + count of heads head ... head + heads, which share their keys and their lists.
struct Item {
  int64_t batch, head, first;
  int32_t count, heads;
};

struct Call {
  const AttentionForward* p;
  const Item* items;
  const Ranked* order;  // longest first
  int64_t item_count;
  int64_t next;  // the work counter
  int64_t out_of_memory;
};

struct Work {
  Item item;
  int64_t kv_head = 0;
  StripePlan plan;
};

template <class Product, DType dtype>
class Worker {
 public:
  using Element = typename Product::Element;
  using Pack = GatherLayout<Product, dtype>;

  explicit Worker(Call& call) : call_(call), p_(*call.p) {
    steps_ = ceil_div(p_.head_dim, Product::pair);
    value_dim_ = round_up(p_.value_dim, panel);
    transform_.needed = p_.softcap > 0 || p_.key_bias || !(p_.scale > 0);
    transform_.scale = p_.scale;
    transform_.softcap = p_.softcap;
    unit_ = transform_.needed ? 1.f : p_.scale * log2_e;
    sequence_.q_end = p_.len_q;
    sequence_.k_end = p_.len_k;

    queries_ = reserve<Element>(item_lanes * steps_);
    outputs_ = reserve<float>(item_lanes * value_dim_);
    scores_ = reserve<float>(segment_keys * tile_lanes);
    values_ = reserve<Element>(segment_keys / Product::pair * value_dim_);
    keys_ = reserve<Element>(segment_keys * steps_ + Simd::lanes);
    bias_ = reserve<float>(segment_keys);
    maximum_ = reserve<float>(item_lanes);
    sum_ = reserve<float>(item_lanes);
    tiles_ = reserve<StripeTile>(most_tiles);
    works_[0].plan.reserve(p_, &arena_);
    works_[1].plan.reserve(p_, &arena_);
    ready_ = arena_.allocate();
    if (!ready_) return;
    works_[0].plan.attach(p_, arena_);
    works_[1].plan.attach(p_, arena_);
  }
  void release() { arena_.release(); }
  bool ready() const { return ready_; }

  /// Works on items until none is left.
  void run() {
    for (take_next(); more_;) {
      Work* done = now_;
      now_ = next_;
      next_ = done;
      taken_ = false;
      set_tiles();
      for (int at = 0; at < now_->plan.count();) at = run_batch(at);
      if (!taken_) take_next();  // no batch was the last
      for (int t = 0; t < tile_count_; ++t) {
        store_outputs<dtype>(p_, tile(t).lanes(), now_->item.batch, now_->item.head + tile_head_[t],
                             at<float>(maximum_) + tile_lane_[t], at<float>(sum_) + tile_lane_[t],
                             at<float>(outputs_) + tile_lane_[t] * value_dim_);
      }
    }
  }

 private:
  template <class T>
  int64_t reserve(int64_t count) {
    return arena_.reserve(count * int64_t(sizeof(T)));
  }
  template <class T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(arena_.data + offset);
  }
  StripeTile& tile(int t) const { return at<StripeTile>(tiles_)[t]; }

  /// Takes an item, if there is one left, and finds out what it sees.
  void take_next() {
    taken_ = true;
    const int64_t number = __atomic_fetch_add(&call_.next, 1, __ATOMIC_RELAXED);
    more_ = number < call_.item_count;
    if (!more_) return;
    const Item& item = call_.items[call_.order[number].value];
    next_->item = item;
    next_->kv_head = item.head / (p_.heads_q / p_.heads_kv);
    next_->plan.build(p_, sequence_, item.batch, item.head, item.first, item.count);
  }

  void set_tiles() {
    const Item& item = now_->item;
    const int heads = int(clamp(tile_lanes / item.count, 1, item.heads));  // of one tile
    tile_count_ = 0;
    int64_t lane = 0;
    for (int head = 0; head < item.heads; head += heads) {
      const int together = int(smaller(heads, item.heads - head));
      for (int64_t query = item.first; query < item.first + item.count; query += tile_lanes) {
        const int queries = int(smaller(item.first + item.count - query, tile_lanes)), t = tile_count_++;
        set_stripe_tile(p_, sequence_, item.batch, query, queries, &tile(t), together);
        tile_lane_[t] = lane;
        tile_head_[t] = head;
        fresh_[t] = true;
        const QueryTile& lanes = tile(t).lanes();
        auto row_at = [&](int i) {
          return row_of<dtype>(p_.query, item.batch, item.head + head + i / queries, query + i % queries);
        };
        pack_lanes<Product, dtype>(row_at, lanes.rows, lanes.width(), p_.head_dim,
                                   at<Element>(queries_) + lane * steps_);
        for (int i = 0; i < lanes.width(); ++i) {
          at<float>(maximum_)[lane + i] = -__builtin_inff();
          at<float>(sum_)[lane + i] = 0;
        }
        lane += lanes.width();
      }
    }
  }

  /// Loads the segments from `first` on that fit and lets every tile use them.
  int run_batch(int first) {
    int last = first, keys = 0;
    for (; last < now_->plan.count() && keys + now_->plan[last].keys.padded <= segment_keys; ++last) {
      load_segment(last - first, now_->plan[last], keys);
      keys += now_->plan[last].keys.padded;
    }
    prefetch_.clear();
    if (last < now_->plan.count()) {
      announce(*now_, last);
    } else {
      announce_next_item();
    }
    int64_t steps = 0;
    for (int t = 0; t < tile_count_; ++t) {
      const int registers = tile(t).lanes().registers;
      steps += keys / tile_keys(registers) + value_dim_ / tile_rows(registers);
    }
    prefetch_.spread(steps);
    for (int t = 0; t < tile_count_; ++t) run_tile(t, first, last - first);
    return last;
  }

  /// Makes the keys and values of a segment ready, at place `used` (in keys) of the batch.
  void load_segment(int place, const StripeSegment& from, int used) {
    LoadedSegment& s = batch_[place];
    const int64_t b = now_->item.batch;
    s.keys = from.keys;
    Element* values = at<Element>(values_) + used / Product::pair * value_dim_;
    Pack::values(p_, b, now_->kv_head, from, values);
    s.values = values;
    s.rows = nullptr;
    if (Pack::keys_in_place(p_) && (!from.rows || p_.key.row * size_of(dtype) <= near_rows)) {
      s.key = row_of<dtype>(p_.key, b, now_->kv_head, from.rows ? 0 : from.keys.key);
      s.rows = from.rows;
      s.key_stride = p_.key.row * size_of(dtype);
    } else {
      Element* keys = at<Element>(keys_) + used * steps_;
      Pack::keys(p_, b, now_->kv_head, from, keys);
      s.key = reinterpret_cast<const char*>(keys);
      s.key_stride = steps_ * int64_t(sizeof(Element));
    }
    s.bias = nullptr;
    if (p_.key_bias) {
      const float* bias = p_.key_bias + b * p_.key_bias_batch + now_->item.head * p_.key_bias_head;
      float* to = at<float>(bias_) + used;
      for (int n = 0; n < from.keys.count; ++n) to[n] = scaled_bias(bias[from.row(n)]);
      s.bias = to;
    }
  }

  /// Announces the keys and values of the batch that begins with segment `first` to the kernels, which prefetch them.
  void announce(const Work& work, int first) {
    const char* key = row_of<dtype>(p_.key, work.item.batch, work.kv_head, 0);
    const char* value = row_of<dtype>(p_.value, work.item.batch, work.kv_head, 0);
    const int64_t key_stride = p_.key.row * size_of(dtype), value_stride = p_.value.row * size_of(dtype);
    const int64_t key_bytes = p_.head_dim * size_of(dtype), value_bytes = p_.value_dim * size_of(dtype);
    for (int keys = 0; first < work.plan.count(); ++first) {
      const StripeSegment& s = work.plan[first];
      keys += s.keys.padded;
      if (keys > segment_keys) return;
      if (!s.rows) {
        prefetch_.add(key + s.first * key_stride, key_stride, key_bytes, s.keys.count);
        prefetch_.add(value + s.first * value_stride, value_stride, value_bytes, s.keys.count);
        continue;
      }
      // One region for a key and its value: two rows as far apart as they are.
      for (int n = 0; n < s.keys.count; ++n) {
        const char* at = key + s.rows[n] * key_stride;
        prefetch_.add(at, value + s.rows[n] * value_stride - at, larger(key_bytes, value_bytes), 2);
      }
    }
  }

  /// In the last batch of an item: the next item's queries and first keys.
  void announce_next_item() {
    take_next();
    if (!more_) return;
    const Item& item = next_->item;
    for (int64_t h = 0; h < item.heads; ++h) {
      prefetch_.add(row_of<dtype>(p_.query, item.batch, item.head + h, item.first), p_.query.row * size_of(dtype),
                    p_.head_dim * size_of(dtype), item.count);
    }
    announce(*next_, 0);
  }

  /// One tile against a batch.
  void run_tile(int t, int first, int count) {
    switch (tile(t).lanes().registers) {
      case 1: return run_tile_of<1>(t, first, count);
      case 2: return run_tile_of<2>(t, first, count);
      case 3: return run_tile_of<tile_registers >= 3 ? 3 : 1>(t, first, count);
      default: return run_tile_of<tile_registers>(t, first, count);
    }
  }

  template <int registers>
  void run_tile_of(int t, int first, int count) {
    constexpr int width = registers * Simd::lanes;
    const LoadedSegment* seen[batch_segments];
    float* scores = at<float>(scores_);
    int segments = 0, keys = 0;
    Simd::Float most[registers];
    for (int j = 0; j < registers; ++j) most[j] = Simd::set(-__builtin_inff());
    for (int place = 0; place < count; ++place) {
      const LoadedSegment& s = batch_[place];
      const Visible visible = see_stripe(p_, tile(t), now_->plan[first + place], &mask_);
      if (visible == Visible::none) continue;
      Simd::Float raw[registers];
      for (int j = 0; j < registers; ++j) raw[j] = most[j];
      multiply_keys<Product, registers>(s, at<Element>(queries_) + tile_lane_[t] * steps_, int(steps_),
                                        scores + keys * width, raw, &prefetch_);
      if (visible == Visible::all && s.keys.count == s.keys.padded && !transform_.needed) {
        for (int j = 0; j < registers; ++j) most[j] = raw[j];
      } else {
        mask_scores<registers>(transform_, s, mask_, visible == Visible::some, scores + keys * width, most);
      }
      seen[segments++] = &s;
      keys += s.keys.padded;
    }
    if (segments == 0) return;
    Simd::Float rescale[registers];
    softmax<Product, registers>(scores, keys, unit_, most, at<float>(maximum_) + tile_lane_[t],
                                at<float>(sum_) + tile_lane_[t], rescale);
    multiply_values<Product, registers>(seen, segments, scores, int(value_dim_), rescale, fresh_[t],
                                        at<float>(outputs_) + tile_lane_[t] * value_dim_, &prefetch_);
    fresh_[t] = false;
  }

  Call& call_;
  const AttentionForward& p_;
  Sequence sequence_;
  Arena arena_;
  bool ready_ = false;
  int64_t steps_, value_dim_;
  ScoreTransform transform_;
  float unit_;
  int64_t queries_, outputs_, scores_, values_, keys_, bias_, maximum_, sum_, tiles_;

  Work works_[2];
  Work *now_ = &works_[0], *next_ = &works_[1];
  bool more_ = false, taken_ = false;  // there is a next item; it was looked for
  int tile_count_ = 0;
  int64_t tile_lane_[most_tiles];  // first lane, where its part of the scratch arrays begins
  int tile_head_[most_tiles];      // first head, counted from the item's
  bool fresh_[most_tiles];         // no outputs yet
  LoadedSegment batch_[batch_segments];
  Prefetch prefetch_;
  PairMask mask_;
};

template <class Product, DType dtype>
static void work(int64_t first, int64_t last, void* context) {
  Call& call = *static_cast<Call*>(context);
  for (int64_t i = first; i < last; ++i) {
    Worker<Product, dtype> worker(call);
    if (!worker.ready()) {
      __atomic_store_n(&call.out_of_memory, 1, __ATOMIC_RELAXED);
      return;
    }
    worker.run();
    worker.release();
  }
}

/// Cuts a problem into items; returns how many, and writes them where `items` is not null.
static int64_t cut(const AttentionForward& p, Item* items) {
  const int64_t group = heads_share_lists(p) && p.key_bias_head == 0 ? p.heads_q / p.heads_kv : 1;
  int64_t size = item_queries;
  // Fewer queries per item where there would be too few items to share out: by shape, so that results never change.
  while (size > 64 && p.batch * p.heads_q * p.len_q < 64 * size) size /= 2;
  const int64_t heads = clamp(size / smaller(smaller(rows_together(p), p.len_q), size), 1, group);
  int64_t count = 0;
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = 0; h < p.heads_q;) {
      const int64_t together = smaller(heads, (h / group + 1) * group - h);
      for_each_piece(p, size, [&](int64_t first, int64_t rows) {
        if (items) items[count] = {b, h, first, int32_t(rows), int32_t(together)};
        ++count;
      });
      h += together;
    }
  return count;
}

/// About how many keys the rows of an item see.
static int64_t keys_seen(const AttentionProblem& p, int64_t b, int64_t h, int64_t first) {
  const StripeLists& s = p.stripes;
  int64_t keys = clamp(s.counts[s.row(b, h, first / s.group_size, p.heads_q)], 0, s.capacity) + s.sink + s.local;
  if (p.lists.slots_per_row() > 0) {
    const int64_t number = list_row(p, b, h, first / p.lists.block_q);
    keys += int64_t(list_count(p.lists.partial, number) + list_count(p.lists.full, number)) * p.lists.block_k;
  }
  return smaller(keys, p.len_k);
}

template <class Product, DType dtype>
static void run_items(Call* call, const ParallelFor& parallel) {
  const int64_t threads = smaller(larger(1, parallel.threads), call->item_count);
  if (parallel.run && threads > 1) {
    parallel.run(0, threads, 1, work<Product, dtype>, call);
  } else {
    work<Product, dtype>(0, 1, call);
  }
}

static Status run_forward(const AttentionForward& p, const ParallelFor& parallel) {
  if (p.batch * p.heads_q * p.len_q == 0) return {};
  const Status no_memory = error(Status::Kind::failed, "attention forward: out of memory");
  const int64_t count = cut(p, nullptr);
  Arena arena;
  const int64_t items_at = arena.reserve(count * int64_t(sizeof(Item)));
  const int64_t order_at = arena.reserve(count * int64_t(sizeof(Ranked)));
  const int64_t spare_at = arena.reserve(count * int64_t(sizeof(Ranked)));
  if (!arena.allocate()) return no_memory;
  Item* items = reinterpret_cast<Item*>(arena.data + items_at);
  Ranked* order = reinterpret_cast<Ranked*>(arena.data + order_at);
  cut(p, items);
  for (int64_t i = 0; i < count; ++i) {
    const Item& item = items[i];
    order[i] = {~uint64_t(keys_seen(p, item.batch, item.head, item.first) * item.count * item.heads), int32_t(i)};
  }
  sort(order, reinterpret_cast<Ranked*>(arena.data + spare_at), count);
  Call call = {&p, items, order, count, 0, 0};
  switch (p.dtype) {
    case DType::f32: run_items<FloatProduct, DType::f32>(&call, parallel); break;
    case DType::f16: run_items<FloatProduct, DType::f16>(&call, parallel); break;
#ifdef SPARSEKIT_BF16_PRODUCT
    case DType::bf16: run_items<Bf16Product, DType::bf16>(&call, parallel); break;
#else
    case DType::bf16: run_items<FloatProduct, DType::bf16>(&call, parallel); break;
#endif
    case DType::f64: break;  // refused
  }
  arena.release();
  return call.out_of_memory ? no_memory : Status{};
}

}  // namespace stripes
}  // namespace
}  // namespace sparsekit

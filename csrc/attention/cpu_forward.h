// Block-sparse attention forward on the CPU: flash attention with queries in the lanes.
//
//   S^T = K Q^T;  m, l, P^T = softmax down the columns of S^T;  O^T = O^T * 2^(m_old - m) + V^T P^T
//
// Work is cut by shape alone (so results do not depend on threads): an item is up to 256 queries of one head, taken in tiles of
// up to 4 vectors. An item walks the union of its query blocks' lists in ascending order; keys and values of a block are read from
// memory once per item (V is interleaved into panels, 16-bit inputs without a product of their own are widened), then every tile
// that lists the block uses them from L2. The next blocks are prefetched meanwhile. Items are handed out longest first.
//
// Bound: multiply-adds (see cpu_forward_kernels.h). Online softmax: Milakov and Gimelshein 2018; tiling: FlashAttention-2,
// section 3, transposed so that no reduction crosses lanes.
#pragma once

#include "attention/cpu_forward_kernels.h"

namespace sparsekit {
namespace {

constexpr int item_queries = 256;    // queries that share what is read of K and V
constexpr int most_tiles = item_queries / 16 + item_queries / Simd::lanes;
constexpr int group_limit = 512;     // keys held at a time for all tiles of an item
constexpr int group_entries = group_limit / 16 * (item_queries / 16);

/// Queries first ... first + count of a sequence and head: whole query blocks, or a part of one.
struct ForwardItem {
  int64_t batch, head, sequence, first;
  int32_t count;
};

/// One block of the union, for one query block of the item.
struct ForwardEntry {
  int32_t block;
  int32_t bits;     // bits_index, -1 for none
  int32_t row;      // which query block of the item
  bool masked;      // of the partial list
};

struct ForwardCall {
  const AttentionForward* p;
  const Sequence* sequences;
  const ForwardItem* items;
  const Ranked* order;  // items, longest first
  int64_t item_count;
  int64_t most_entries;  // of one item
  int64_t next;          // the work counter
  int64_t out_of_memory;
};

/// One thread's work: its scratch memory and the item at hand.
template <class Product, DType dtype>
class ForwardWorker {
 public:
  using Element = typename Product::Element;

  explicit ForwardWorker(const ForwardCall& call) : call_(call), p_(*call.p) {
    const BlockLists& lists = p_.lists;
    steps_ = ceil_div(p_.head_dim, Product::pair);
    value_dim_ = round_up(p_.value_dim, panel);
    element_size_ = size_of(dtype);
    keys_in_place_ = Rows<Product, dtype>::keys_in_place && p_.head_dim % Product::pair == 0;
    // Blocks smaller than a segment are gathered until tiles that list few of them have enough keys for a softmax.
    group_keys_ = lists.block_k >= segment_keys || lists.block_q >= item_queries ? segment_keys : group_limit;
    transform_.needed = p_.softcap > 0 || p_.key_bias || !(p_.scale > 0);
    transform_.scale = p_.scale;
    transform_.softcap = p_.softcap;
    unit_ = transform_.needed ? 1.f : p_.scale * log2_e;

    queries_ = reserve<Element>(item_queries_padded() * steps_);
    outputs_ = reserve<float>(item_queries_padded() * value_dim_);
    scores_ = reserve<float>(segment_keys * tile_lanes);
    values_ = reserve<Element>(group_keys_ / Product::pair * value_dim_);
    keys_ = reserve<Element>(keys_in_place_ ? 0 : group_keys_ * steps_ + Simd::lanes);
    bias_ = reserve<float>(p_.key_bias ? group_keys_ : 0);
    maximum_ = reserve<float>(item_queries_padded());
    sum_ = reserve<float>(item_queries_padded());
    entries_ = reserve<ForwardEntry>(call.most_entries);
    ranked_ = reserve<Ranked>(call.most_entries);
    spare_ = reserve<Ranked>(call.most_entries);
    ready_ = arena_.allocate();
  }
  void release() { arena_.release(); }
  bool ready() const { return ready_; }

  void run(const ForwardItem& item) {
    item_ = item;
    sequence_ = call_.sequences[item.sequence];
    kv_head_ = item.head / (p_.heads_q / p_.heads_kv);
    set_tiles();
    gather_entries();
    for (int64_t at = 0; at < entry_count_;) at = run_group(at);
    for (int t = 0; t < tile_count_; ++t) store_tile(t);
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
  /// Only a sequence's last tile can have lanes without a query: blocks are multiples of 16.
  static constexpr int64_t item_queries_padded() { return item_queries + Simd::lanes; }

  static const char* row_of(const InputView& view, int64_t b, int64_t h, int64_t row) {
    return static_cast<const char*>(view.data) + (b * view.batch + h * view.head + row * view.row) * size_of(dtype);
  }

  void set_tiles() {
    tile_count_ = 0;
    int64_t lane = 0;
    int64_t block_q = p_.lists.block_q, end = item_.first + item_.count;
    for (int64_t query = item_.first; query < end;) {
      int64_t block_end = (query / block_q + 1) * block_q;
      int rows = int(smaller(smaller(block_end, end) - query, tile_lanes));
      int t = tile_count_++;
      set_tile(p_, sequence_, item_.batch, sequence_.q_begin + query, rows, &tiles_[t]);
      tile_row_[t] = int32_t(query / block_q - item_.first / block_q);
      tile_lane_[t] = lane;
      int width = tiles_[t].width();
      pack_lanes<Product, dtype>(row_of(p_.query, item_.batch, item_.head, tiles_[t].query), p_.query.row * element_size_,
                                 rows, width, p_.head_dim, at<Element>(queries_) + lane * steps_);
      for (int i = 0; i < width; ++i) {
        at<float>(maximum_)[lane + i] = -__builtin_inff();
        at<float>(sum_)[lane + i] = 0;
      }
      memset(at<float>(outputs_) + lane * value_dim_, 0, size_t(width * value_dim_) * sizeof(float));
      lane += width;
      query += rows;
    }
  }

  /// The list entries of all query blocks of the item, by key block and then by query block.
  void gather_entries() {
    entry_count_ = 0;
    if (sequence_.list_row < 0) return;  // rows of a packed batch that belong to no sequence
    int64_t block_q = p_.lists.block_q, block = item_.first / block_q;
    for (int row = 0; (block + row) * block_q < item_.first + item_.count; ++row) {
      int64_t number = list_row(p_, item_.batch, item_.head, sequence_.list_row + block + row);
      gather_list(p_.lists.partial, number, row, true);
      gather_list(p_.lists.full, number, row, false);
    }
    sort(at<Ranked>(ranked_), at<Ranked>(spare_), entry_count_);
  }

  void gather_list(const BlockList& list, int64_t number, int row, bool masked) {
    const int64_t blocks = ceil_div(sequence_.len_k(), p_.lists.block_k);
    for (int32_t slot = 0, count = list_count(list, number); slot < count; ++slot) {
      int64_t place = number * list.capacity + slot;
      int32_t block = list.indices[place];
      if (block < 0 || block >= blocks) continue;
      at<ForwardEntry>(entries_)[entry_count_] = {
          block, masked && p_.lists.bits_index ? p_.lists.bits_index[place] : -1, row, masked};
      at<Ranked>(ranked_)[entry_count_] = {uint64_t(block) << 16 | uint64_t(row), int32_t(entry_count_)};
      ++entry_count_;
    }
  }

  const ForwardEntry& entry(int64_t rank) const { return at<ForwardEntry>(entries_)[at<Ranked>(ranked_)[rank].value]; }

  /// Loads blocks from entry `first` on until the group is full and lets every tile use those it lists.
  int64_t run_group(int64_t first) {
    if (p_.lists.block_k > segment_keys) return run_large_block(first);
    int64_t last = first;
    group_size_ = 0;
    for (int64_t used = 0; last < entry_count_ && used + p_.lists.block_k <= group_keys_; used += p_.lists.block_k) {
      int32_t block = entry(last).block;
      load_segment(block, 0, used);
      for (; last < entry_count_ && entry(last).block == block && last - first < group_entries; ++last) {
        segment_of_[last - first] = group_size_ - 1;
      }
      if (last - first == group_entries) break;  // blocks that are listed twice, a caller's error
    }
    prefetch_blocks(last);
    for (int t = 0; t < tile_count_; ++t) run_tile(t, first, last);
    return last;
  }

  int64_t run_large_block(int64_t first) {
    int64_t last = first;
    int32_t block = entry(first).block;
    for (; last < entry_count_ && entry(last).block == block && last - first < group_entries; ++last) {
      segment_of_[last - first] = 0;
    }
    for (int part = 0; part * segment_keys < p_.lists.block_k; ++part) {
      group_size_ = 0;
      load_segment(block, part, 0);
      if (group_size_ == 0) break;
      prefetch_.rows = 0;
      for (int t = 0; t < tile_count_; ++t) run_tile(t, first, last);
    }
    return last;
  }

  /// Reads the keys and values of a segment to place `used` (in keys) of the group.
  void load_segment(int64_t block, int part, int64_t used) {
    LoadedSegment& s = group_[group_size_];
    s.keys = key_segment(p_, sequence_, item_.batch, block, part);
    if (s.keys.count <= 0) return;
    ++group_size_;
    const char* key = row_of(p_.key, item_.batch, kv_head_, s.keys.key);
    const char* value = row_of(p_.value, item_.batch, kv_head_, s.keys.key);
    s.key = key;
    s.key_stride = p_.key.row * element_size_;
    if (!keys_in_place_) {
      Element* packed = at<Element>(keys_) + used * steps_;
      pack_rows<Product, dtype>(key, s.key_stride, s.keys.count, p_.head_dim, packed);
      s.key = reinterpret_cast<const char*>(packed);
      s.key_stride = steps_ * int64_t(sizeof(Element));
    }
    Element* panels = at<Element>(values_) + used / Product::pair * value_dim_;
    pack_panels<Product, dtype>(value, p_.value.row * element_size_, s.keys.count, s.keys.padded, p_.value_dim, panels);
    s.values = panels;
    s.bias = nullptr;
    if (p_.key_bias) {
      const float* from = p_.key_bias + item_.batch * p_.key_bias_batch + item_.head * p_.key_bias_head + s.keys.key;
      float* bias = at<float>(bias_) + used;
      for (int n = 0; n < s.keys.count; ++n) {
        // The lowest finite bias stays finite: a row that sees only such keys weighs them evenly.
        float scaled = from[n] * log2_e;
        bias[n] = scaled < -__FLT_MAX__ && from[n] >= -__FLT_MAX__ ? -__FLT_MAX__ : scaled;
      }
      s.bias = bias;
    }
  }

  /// Announces the block of the next group's first entry to the kernels, which prefetch it row by row.
  void prefetch_blocks(int64_t next) {
    prefetch_.rows = 0;
    if (next >= entry_count_) return;
    int64_t key = int64_t(entry(next).block) * p_.lists.block_k;
    prefetch_.rows = int(smaller(p_.lists.block_k, sequence_.len_k() - key));
    prefetch_.key = row_of(p_.key, item_.batch, kv_head_, sequence_.k_begin + key);
    prefetch_.value = row_of(p_.value, item_.batch, kv_head_, sequence_.k_begin + key);
    prefetch_.key_stride = p_.key.row * element_size_;
    prefetch_.value_stride = p_.value.row * element_size_;
    prefetch_.key_bytes = p_.head_dim * element_size_;
    prefetch_.value_bytes = p_.value_dim * element_size_;
  }

  /// One tile against the group's segments that its query block lists, at most `segment_keys` keys at a time.
  void run_tile(int t, int64_t first, int64_t last) {
    switch (tiles_[t].registers) {
      case 1: return run_tile_of<1>(t, first, last);
      case 2: return run_tile_of<2>(t, first, last);
      case 3: return run_tile_of<tile_registers >= 3 ? 3 : 1>(t, first, last);
      default: return run_tile_of<tile_registers>(t, first, last);
    }
  }

  template <int registers>
  void run_tile_of(int t, int64_t first, int64_t last) {
    constexpr int width = registers * Simd::lanes;
    const QueryTile& tile = tiles_[t];
    const LoadedSegment* chunk[segment_keys / 16];
    float* scores = at<float>(scores_);
    int segments = 0, keys = 0;
    Simd::Float most[registers];
    auto flush = [&] {
      Simd::Float rescale[registers];
      softmax<Product, registers>(scores, keys, unit_, most, at<float>(maximum_) + tile_lane_[t],
                                  at<float>(sum_) + tile_lane_[t], rescale);
      multiply_values<Product, registers>(chunk, segments, scores, int(value_dim_), rescale,
                                          at<float>(outputs_) + tile_lane_[t] * value_dim_);
      segments = keys = 0;
    };
    for (int64_t rank = first; rank < last; ++rank) {
      const ForwardEntry& e = entry(rank);
      if (e.row != tile_row_[t]) continue;
      const LoadedSegment& s = group_[segment_of_[rank - first]];
      Visible visible = mask_.set(p_, tile, s.keys, e.masked, e.bits);
      if (visible == Visible::none) continue;
      if (keys + s.keys.padded > segment_keys) flush();
      if (segments == 0) {
        for (int j = 0; j < registers; ++j) most[j] = Simd::set(-__builtin_inff());
      }
      bool untouched = visible == Visible::all && s.keys.count == s.keys.padded && !transform_.needed;
      Simd::Float raw[registers];
      for (int j = 0; j < registers; ++j) raw[j] = most[j];
      multiply_keys<Product, registers>(s, at<Element>(queries_) + tile_lane_[t] * steps_, int(steps_),
                                        scores + keys * width, raw, &prefetch_);
      if (untouched) {
        for (int j = 0; j < registers; ++j) most[j] = raw[j];
      } else {
        mask_scores<registers>(transform_, s, mask_, visible == Visible::some, scores + keys * width, most);
      }
      chunk[segments++] = &s;
      keys += s.keys.padded;
    }
    if (segments > 0) flush();
  }

  /// out = O / (l + 2^(sink - m)) and lse; transposed back to rows.
  void store_tile(int t) {
    constexpr int lanes = Simd::lanes;
    const QueryTile& tile = tiles_[t];
    const int width = tile.width();
    const float* maximum = at<float>(maximum_) + tile_lane_[t];
    const float* sum = at<float>(sum_) + tile_lane_[t];
    const float* outputs = at<float>(outputs_) + tile_lane_[t] * value_dim_;
    float* lse = p_.lse + (item_.batch * p_.heads_q + item_.head) * p_.len_q + tile.query;
    alignas(64) float factor[tile_lanes] = {};
    for (int i = 0; i < tile.rows; ++i) {
      bool empty = sum[i] == 0;
      float total = sum[i];
      if (p_.sinks) total += __builtin_exp2f(p_.sinks[item_.head] * log2_e - maximum[i]);
      factor[i] = empty ? 0 : 1 / total;
      lse[i] = empty ? -__builtin_inff() : maximum[i] * ln_2 + __builtin_logf(sum[i]);
      if (maximum[i] == -__FLT_MAX__) lse[i] = maximum[i];  // a bias that load_segment kept finite
    }
    char* out = static_cast<char*>(p_.out.data) +
                (item_.batch * p_.out.batch + item_.head * p_.out.head + tile.query * p_.out.row) * element_size_;
    for (int j = 0; j < width; j += lanes) {
      const Simd::Float factors = Simd::load(factor + j);
      const Simd::Mask empty = Simd::equal(factors, Simd::zero());
      for (int64_t d = 0; d < p_.value_dim; d += lanes) {
        Simd::Int block[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
          Simd::Float value = Simd::mul(Simd::load(outputs + (d + i) * width + j), factors);
          block[i] = Simd::as_int(Simd::select(empty, Simd::zero(), value));
        }
        Simd::transpose(block);
        int count = int(smaller(p_.value_dim - d, lanes));
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
          if (j + i < tile.rows) {
            store_row<dtype>(out + (j + i) * p_.out.row * element_size_, d, count, Simd::as_float(block[i]));
          }
        }
      }
    }
  }

  const ForwardCall& call_;
  const AttentionForward& p_;
  Arena arena_;
  bool ready_ = false, keys_in_place_ = false;
  int64_t steps_, value_dim_, element_size_, group_keys_;
  ScoreTransform transform_;
  float unit_;
  int64_t queries_, outputs_, scores_, values_, keys_, bias_, maximum_, sum_, entries_, ranked_, spare_;

  ForwardItem item_;
  Sequence sequence_;
  int64_t kv_head_ = 0;
  int tile_count_ = 0;
  QueryTile tiles_[most_tiles];
  int32_t tile_row_[most_tiles];    // which query block of the item
  int64_t tile_lane_[most_tiles];   // first lane, where its part of the scratch arrays begins
  int64_t entry_count_ = 0;

  LoadedSegment group_[group_limit / 16];
  int group_size_ = 0;
  int segment_of_[group_entries];  // of the group's entries
  Prefetch prefetch_;
  PairMask mask_;
};

template <class Product, DType dtype>
static void forward_worker(int64_t first, int64_t last, void* context) {
  ForwardCall& call = *static_cast<ForwardCall*>(context);
  for (int64_t i = first; i < last; ++i) {
    ForwardWorker<Product, dtype> worker(call);
    if (!worker.ready()) {
      __atomic_store_n(&call.out_of_memory, 1, __ATOMIC_RELAXED);
      return;
    }
    for (;;) {
      int64_t next = __atomic_fetch_add(&call.next, 1, __ATOMIC_RELAXED);
      if (next >= call.item_count) break;
      worker.run(call.items[call.order[next].value]);
    }
    worker.release();
  }
}

/// Cuts a problem into items; returns how many, and writes them where `items` is not null.
static int64_t cut_forward(const AttentionForward& p, const Sequence* sequences, int64_t sequence_count,
                           ForwardItem* items) {
  int64_t block_q = p.lists.block_q, size = item_queries;
  // Fewer queries per item where there would be too few items to share out: by shape, so that results never change.
  while (size > 64 && p.batch * p.heads_q * p.len_q < 64 * size) size /= 2;
  size = block_q >= size ? block_q : size / block_q * block_q;
  int64_t count = 0;
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = 0; h < p.heads_q; ++h)
      for (int64_t s = 0; s < sequence_count; ++s)
        for (int64_t first = 0; first < sequences[s].len_q(); first += size)
          for (int64_t part = first; part < smaller(first + size, sequences[s].len_q()); part += item_queries, ++count) {
            int64_t end = smaller(smaller(part + item_queries, first + size), sequences[s].len_q());
            if (items) items[count] = {b, h, s, part, int32_t(end - part)};
          }
  return count;
}

static Status run_forward(const AttentionForward& p, const ParallelFor& parallel) {
  if (p.batch * p.heads_q * p.len_q == 0) return {};
  const Status no_memory = error(Status::Kind::failed, "attention forward: out of memory");
  Arena arena;
  // One more than there are: the rows of a packed batch behind its last sequence see no key.
  int64_t sequences_at = arena.reserve((p.packed() ? p.sequences + 1 : 1) * int64_t(sizeof(Sequence)));
  if (!arena.allocate()) return no_memory;
  Sequence* sequences = reinterpret_cast<Sequence*>(arena.data + sequences_at);
  int64_t sequence_count = 0, row = 0;
  for (SequenceWalk walk(p); walk.valid(); walk.next()) {
    sequences[sequence_count++] = walk.current;
    row = walk.current.q_end;
  }
  if (row < p.len_q) {
    Sequence rest;
    rest.q_begin = row;
    rest.q_end = p.len_q;
    rest.list_row = -1;
    sequences[sequence_count++] = rest;
  }

  int64_t count = cut_forward(p, sequences, sequence_count, nullptr);
  Arena plan;
  int64_t items_at = plan.reserve(count * int64_t(sizeof(ForwardItem)));
  int64_t order_at = plan.reserve(count * int64_t(sizeof(Ranked)));
  int64_t spare_at = plan.reserve(count * int64_t(sizeof(Ranked)));
  if (!plan.allocate()) {
    arena.release();
    return no_memory;
  }
  ForwardItem* items = reinterpret_cast<ForwardItem*>(plan.data + items_at);
  Ranked* order = reinterpret_cast<Ranked*>(plan.data + order_at);
  cut_forward(p, sequences, sequence_count, items);
  ForwardCall call = {&p, sequences, items, order, count, 0, 0, 0};
  for (int64_t i = 0; i < count; ++i) {
    const Sequence& sequence = sequences[items[i].sequence];
    int64_t entries = 0, block = items[i].first / p.lists.block_q;
    for (; sequence.list_row >= 0 && block * p.lists.block_q < items[i].first + items[i].count; ++block) {
      int64_t number = list_row(p, items[i].batch, items[i].head, sequence.list_row + block);
      entries += list_count(p.lists.partial, number) + list_count(p.lists.full, number);
    }
    call.most_entries = larger(call.most_entries, entries);
    order[i] = {~uint64_t(entries), int32_t(i)};
  }
  sort(order, reinterpret_cast<Ranked*>(plan.data + spare_at), count);

  ParallelFor::Body body = nullptr;
  switch (p.dtype) {
    case DType::f32: body = forward_worker<FloatProduct, DType::f32>; break;
    case DType::f16: body = forward_worker<FloatProduct, DType::f16>; break;
#ifdef SPARSEKIT_BF16_PRODUCT
    case DType::bf16: body = forward_worker<Bf16Product, DType::bf16>; break;
#else
    case DType::bf16: body = forward_worker<FloatProduct, DType::bf16>; break;
#endif
    case DType::f64: break;
  }
  int64_t threads = smaller(parallel.threads > 1 ? parallel.threads : 1, count);
  if (parallel.run && threads > 1) {
    parallel.run(0, threads, 1, body, &call);
  } else {
    body(0, 1, &call);
  }
  plan.release();
  arena.release();
  return call.out_of_memory ? no_memory : Status{};
}

}  // namespace
}  // namespace sparsekit

// One thread's share of the CPU forward: takes items one after the other (see cpu_forward.h), each the tiles of some
// query blocks against the union of their lists.
//
// Blocks of the union are loaded in groups that stay in L2: V interleaved into panels, 16-bit inputs without a product
// of their own widened, unless that was done beforehand for all items (KeyValueLayout). Then every tile takes what it
// lists of the group, at most `segment_keys` keys to a softmax, while the next group is prefetched.
#pragma once

#include "attention/cpu_forward_store.h"

namespace sparsekit {
namespace {

constexpr int item_queries = 256;  // queries that share what is read of K and V
constexpr int most_tiles = item_queries / 16 + item_queries / Simd::lanes;
constexpr int group_limit = 1024;  // keys of a group, at most
constexpr int group_entries = group_limit / 16 * (item_queries / 16);
constexpr int64_t group_bytes = 512 << 10;  // half of a 1 MB L2: the rest holds queries, scores and outputs

/// Queries first ... first + count of a sequence: whole query blocks, or a part of one; of `heads` heads from `head` on
/// that share their keys and their lists.
struct ForwardItem {
  int64_t batch, head, sequence, first;
  int32_t count, heads;
};

/// One block of the union, for one query block of the item.
struct ForwardEntry {
  int32_t block;
  int32_t bits;  // bits_index, -1 for none
  int32_t row;   // which query block of the item
  bool masked;   // of the partial list
};

struct ForwardCall {
  const AttentionForward* p;
  const Sequence* sequences;
  int64_t sequence_count;
  const ForwardItem* items;
  const Ranked* order;  // items, longest first
  int64_t item_count;
  int64_t most_entries;  // of one item
  int64_t next;          // the work counter: items handed out
  char* workers;         // scratch memory of each thread, ForwardWorker::scratch_bytes apart
  // Keys and values of all heads, packed by whoever uses a segment first, or null: [batch][heads_kv][packed_rows],
  // where each sequence begins at packed_row[sequence], padded to multiples of 32 rows.
  char* packed_keys;
  char* packed_values;
  uint8_t* packing;  // of each segment: enum Packing; [batch][heads_kv][k_blocks][segments of a block]
  const int64_t* packed_row;
  int64_t packed_rows;
  int64_t k_blocks;  // of all sequences
};

enum Packing : uint8_t { not_packed, in_work, packed };

/// An item and its list entries in the order in which they are walked.
struct ForwardWork {
  ForwardItem item;
  Sequence sequence;
  int64_t kv_head = 0, count = 0;
  ForwardEntry* entries = nullptr;
  Ranked* ranked = nullptr;

  const ForwardEntry& entry(int64_t rank) const { return entries[ranked[rank].value]; }
};

/// How keys and values are packed for the kernels.
template <class Product, DType dtype>
struct KeyValueLayout {
  using Element = typename Product::Element;

  static bool keys_in_place(const AttentionProblem& p) {
    return Rows<Product, dtype>::keys_in_place && p.head_dim % Product::pair == 0;
  }
  static void pack_keys(const AttentionProblem& p, int64_t b, int64_t kv_head, const KeySegment& s, Element* to) {
    pack_rows<Product, dtype>(row_of<dtype>(p.key, b, kv_head, s.key), p.key.row * size_of(dtype), s.count, p.head_dim,
                              to);
  }
  static void pack_values(const AttentionProblem& p, int64_t b, int64_t kv_head, const KeySegment& s, Element* to) {
    pack_panels<Product, dtype>(row_of<dtype>(p.value, b, kv_head, s.key), p.value.row * size_of(dtype), s.count,
                                s.padded, p.value_dim, to);
  }
  static int64_t key_bytes(const AttentionProblem& p) {
    return ceil_div(p.head_dim, Product::pair) * int64_t(sizeof(Element));
  }
  static int64_t value_bytes(const AttentionProblem& p) {
    return round_up(p.value_dim, panel) * int64_t(sizeof(Element)) / Product::pair;
  }
};

/// One thread's work: its scratch memory, the item at hand, and the next one, which it takes when it begins with the
/// last group of this one, so that its queries and first keys are on their way in time.
template <class Product, DType dtype>
class ForwardWorker {
 public:
  using Element = typename Product::Element;
  using Layout = KeyValueLayout<Product, dtype>;
  using Loops = ForwardLoops<Product>;

  /// Worker number `number` of the call.
  ForwardWorker(ForwardCall& call, int64_t number) : call_(call), p_(*call.p) {
    const BlockLists& lists = p_.lists;
    steps_ = ceil_div(p_.head_dim, Product::pair);
    parts_ = ceil_div(lists.block_k, segment_keys);
    value_dim_ = round_up(p_.value_dim, panel);
    element_size_ = size_of(dtype);
    keys_in_place_ = Layout::keys_in_place(p_);
    // Blocks smaller than a segment are gathered until tiles that list few of them have enough keys for a softmax.
    int64_t fitting =
        clamp(group_bytes / (steps_ * Product::pair + value_dim_) / (4 / Product::pair), segment_keys, group_limit);
    group_keys_ = lists.block_k >= segment_keys ? smaller(fitting, Loops::group_keys) : fitting;
    transform_.needed = p_.softcap > 0 || p_.key_bias || !(p_.scale > 0);
    transform_.scale = p_.scale;
    transform_.softcap = p_.softcap;
    unit_ = transform_.needed ? 1.f : p_.scale * log2_e;

    queries_ = reserve<Element>(item_queries_padded() * steps_);
    outputs_ = reserve<float>(item_queries_padded() * value_dim_);
    scores_ = reserve<float>(Loops::score_floats);
    values_ = reserve<Element>(group_keys_ / Product::pair * value_dim_);
    keys_ = reserve<Element>(keys_in_place_ ? 0 : group_keys_ * steps_ + Simd::lanes);
    bias_ = reserve<float>(p_.key_bias ? group_keys_ : 0);
    maximum_ = reserve<float>(item_queries_padded());
    sum_ = reserve<float>(item_queries_padded());
    const int64_t entries = reserve<ForwardEntry>(2 * call.most_entries);
    const int64_t ranked = reserve<Ranked>(2 * call.most_entries);
    spare_ = reserve<Ranked>(call.most_entries);
    arena_.data = call.workers + number * scratch_bytes();
    now_.entries = at<ForwardEntry>(entries);
    now_.ranked = at<Ranked>(ranked);
    next_.entries = now_.entries + call.most_entries;
    next_.ranked = now_.ranked + call.most_entries;
  }
  int64_t scratch_bytes() const { return arena_.size; }

  /// Works on items until none is left.
  void run() {
    for (take_next(); more_;) {
      ForwardWork done = now_;
      now_ = next_;
      next_ = done;
      taken_ = false;
      set_tiles();
      for (int64_t at = 0; at < now_.count;) at = run_group(at);
      if (!taken_) take_next();  // no group was the last
      for (int t = 0; t < tile_count_; ++t) store_tile(t);
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
  /// Only a sequence's last tile can have lanes without a query: blocks are multiples of 16.
  static constexpr int64_t item_queries_padded() { return item_queries + Simd::lanes; }

  void set_tiles() {
    tile_count_ = 0;
    int64_t lane = 0;
    int64_t block_q = p_.lists.block_q, end = now_.item.first + now_.item.count;
    for (int64_t query = now_.item.first; query < end;) {
      int64_t block_end = (query / block_q + 1) * block_q;
      const int queries = int(smaller(smaller(block_end, end) - query, tile_lanes));  // times heads: they fit
      int t = tile_count_++;
      set_tile(p_, now_.sequence, now_.item.batch, now_.sequence.q_begin + query, queries, &tiles_[t], now_.item.heads);
      tile_row_[t] = int32_t(query / block_q - now_.item.first / block_q);
      tile_lane_[t] = lane;
      int width = tiles_[t].width();
      auto row_at = [&](int i) {
        return row_of<dtype>(p_.query, now_.item.batch, now_.item.head + i / queries, tiles_[t].query + i % queries);
      };
      pack_lanes<Product, dtype>(row_at, tiles_[t].rows, width, p_.head_dim, at<Element>(queries_) + lane * steps_);
      for (int i = 0; i < width; ++i) {
        at<float>(maximum_)[lane + i] = -__builtin_inff();
        at<float>(sum_)[lane + i] = 0;
      }
      fresh_[t] = true;
      lane += width;
      query += queries;
    }
  }

  /// Takes an item, if there is one left, and gathers its list entries: by key block and then by query block.
  void take_next() {
    taken_ = true;
    const int64_t number = __atomic_fetch_add(&call_.next, 1, __ATOMIC_RELAXED);
    more_ = number < call_.item_count;
    if (!more_) return;
    next_.item = call_.items[call_.order[number].value];
    next_.sequence = call_.sequences[next_.item.sequence];
    next_.kv_head = next_.item.head / (p_.heads_q / p_.heads_kv);
    next_.count = 0;
    if (next_.sequence.list_row < 0) return;  // rows of a packed batch that belong to no sequence
    int64_t block_q = p_.lists.block_q, block = next_.item.first / block_q;
    for (int row = 0; (block + row) * block_q < next_.item.first + next_.item.count; ++row) {
      int64_t list = list_row(p_, next_.item.batch, next_.item.head, next_.sequence.list_row + block + row);
      gather_list(p_.lists.partial, list, row, true);
      gather_list(p_.lists.full, list, row, false);
    }
    sort(next_.ranked, at<Ranked>(spare_), next_.count);
  }

  void gather_list(const BlockList& list, int64_t number, int row, bool masked) {
    const int64_t blocks = ceil_div(next_.sequence.len_k(), p_.lists.block_k);
    for (int32_t slot = 0, count = list_count(list, number); slot < count; ++slot) {
      int64_t place = number * list.capacity + slot;
      int32_t block = list.indices[place];
      if (block < 0 || block >= blocks) continue;
      next_.entries[next_.count] = {block, masked && p_.lists.bits_index ? p_.lists.bits_index[place] : -1, row,
                                    masked};
      next_.ranked[next_.count] = {uint64_t(block) << 16 | uint64_t(row), int32_t(next_.count)};
      ++next_.count;
    }
  }

  /// Loads blocks from entry `first` on until the group is full and lets every tile use those it lists.
  int64_t run_group(int64_t first) {
    int64_t last = first;
    for (int part = 0; part < parts_; ++part) {
      last = first;
      group_size_ = 0;
      for (int64_t used = 0; last < now_.count && used + smaller(p_.lists.block_k, segment_keys) <= group_keys_;) {
        int32_t block = now_.entry(last).block;
        const int segment = load_segment(block, part, used);
        used += smaller(p_.lists.block_k, segment_keys);
        for (; last < now_.count && now_.entry(last).block == block && last - first < group_entries; ++last) {
          segment_of_[last - first] = segment;
        }
        if (last - first == group_entries) break;  // blocks that are listed twice, a caller's error
      }
      if (group_size_ == 0) break;  // the blocks' ends lie past the sequence's
      rank_by_row(first, last);
      prefetch_.clear();
      if (part + 1 < parts_) {
        announce(now_, first, part + 1);
      } else if (last < now_.count) {
        announce(now_, last, 0);
      } else {
        announce_next_item();
      }
      if (first == 0 && part == 0) announce_outputs();
      prefetch_.spread(register_tiles());
      for (int t = 0; t < tile_count_; ++t) run_tile(t);
    }
    return last;
  }

  /// The group's entries by query block: what each tile walks.
  void rank_by_row(int64_t first, int64_t last) {
    memset(row_end_, 0, sizeof row_end_);
    for (int64_t rank = first; rank < last; ++rank) row_end_[now_.entry(rank).row] += segment_of_[rank - first] >= 0;
    for (int row = 1; row < item_queries / 16; ++row) row_end_[row] += row_end_[row - 1];
    const int all = row_end_[item_queries / 16 - 1];
    for (int64_t rank = last; rank-- > first;) {
      const ForwardEntry& e = now_.entry(rank);
      const int segment = segment_of_[rank - first];
      if (segment >= 0) by_row_[--row_end_[e.row]] = {e.bits, int16_t(segment), e.masked};
    }
    for (int row = 0; row + 1 < item_queries / 16; ++row) row_end_[row] = row_end_[row + 1];  // begins to ends
    row_end_[item_queries / 16 - 1] = all;
  }

  /// Makes the keys and values of a segment ready, at place `used` (in keys) of the group if they are packed for it
  /// alone. Returns its number in the group; -1: it lies past the sequence's end.
  int load_segment(int64_t block, int part, int64_t used) {
    LoadedSegment& s = group_[group_size_];
    s.keys = key_segment(p_, now_.sequence, now_.item.batch, block, part, Loops::key_rows);
    if (s.keys.count <= 0) return -1;
    const bool for_all = call_.packing && pack_for_all(block, part, s.keys);
    s.key = key_row(now_, s.keys.key, for_all);
    s.key_stride = key_stride();
    if (!keys_in_place_ && !for_all) {
      Element* packed = at<Element>(keys_) + used * steps_;
      Layout::pack_keys(p_, now_.item.batch, now_.kv_head, s.keys, packed);
      s.key = reinterpret_cast<const char*>(packed);
    }
    s.values = value_row(now_, s.keys.key, for_all);
    if (!for_all) {
      Element* packed = at<Element>(values_) + used / Product::pair * value_dim_;
      Layout::pack_values(p_, now_.item.batch, now_.kv_head, s.keys, packed);
      s.values = packed;
    }
    s.bias = nullptr;
    if (p_.key_bias) {
      const float* from =
          p_.key_bias + now_.item.batch * p_.key_bias_batch + now_.item.head * p_.key_bias_head + s.keys.key;
      float* bias = at<float>(bias_) + used;
      for (int n = 0; n < s.keys.count; ++n) bias[n] = scaled_bias(from[n]);
      s.bias = bias;
    }
    return group_size_++;
  }

  /// Packs a segment for all items unless that was done. False while another thread is at it: nobody waits.
  bool pack_for_all(int64_t block, int part, const KeySegment& keys) {
    uint8_t* state = packing_of(now_, block, part);
    uint8_t found = __atomic_load_n(state, __ATOMIC_ACQUIRE);
    if (found == not_packed &&
        __atomic_compare_exchange_n(state, &found, in_work, false, __ATOMIC_ACQUIRE, __ATOMIC_ACQUIRE)) {
      if (!keys_in_place_) {
        char* to = const_cast<char*>(key_row(now_, keys.key, true));
        Layout::pack_keys(p_, now_.item.batch, now_.kv_head, keys, reinterpret_cast<Element*>(to));
      }
      char* to = const_cast<char*>(value_row(now_, keys.key, true));
      Layout::pack_values(p_, now_.item.batch, now_.kv_head, keys, reinterpret_cast<Element*>(to));
      __atomic_store_n(state, packed, __ATOMIC_RELEASE);
      return true;
    }
    return found == packed;
  }
  uint8_t* packing_of(const ForwardWork& work, int64_t block, int part) const {
    const int64_t head = work.item.batch * p_.heads_kv + work.kv_head;
    return call_.packing + (head * call_.k_blocks + work.sequence.k_block + block) * parts_ + part;
  }

  /// Where row `key` stands, packed `for_all` or in its tensor, and the bytes from one to the next.
  const char* key_row(const ForwardWork& work, int64_t key, bool for_all) const {
    if (keys_in_place_ || !for_all) return row_of<dtype>(p_.key, work.item.batch, work.kv_head, key);
    return call_.packed_keys + packed_row(work, key) * steps_ * int64_t(sizeof(Element));
  }
  int64_t key_stride() const { return keys_in_place_ ? p_.key.row * element_size_ : steps_ * int64_t(sizeof(Element)); }
  const char* value_row(const ForwardWork& work, int64_t key, bool for_all) const {
    if (!for_all) return row_of<dtype>(p_.value, work.item.batch, work.kv_head, key);
    return call_.packed_values + packed_row(work, key) / Product::pair * value_dim_ * int64_t(sizeof(Element));
  }
  int64_t packed_row(const ForwardWork& work, int64_t key) const {
    return (work.item.batch * p_.heads_kv + work.kv_head) * call_.packed_rows + call_.packed_row[work.item.sequence] +
           key - work.sequence.k_begin;
  }

  /// Announces part `part` of the blocks that are loaded from entry `rank` on to the kernels, which prefetch them.
  void announce(const ForwardWork& work, int64_t rank, int part) {
    int64_t most = larger(1, group_keys_ / smaller(p_.lists.block_k, segment_keys));
    for (int32_t block = -1; rank < work.count && most > 0; ++rank) {
      if (work.entry(rank).block == block) continue;
      block = work.entry(rank).block;
      int64_t key = int64_t(block) * p_.lists.block_k + part * segment_keys;
      int64_t rows = smaller(smaller(p_.lists.block_k, segment_keys), work.sequence.len_k() - key);
      key += work.sequence.k_begin;
      if (rows > 0) {
        const bool for_all =
            call_.packing && __atomic_load_n(packing_of(work, block, part), __ATOMIC_RELAXED) == packed;
        const bool raw_keys = keys_in_place_ || !for_all;
        const int64_t value_bytes = value_dim_ * int64_t(sizeof(Element)) / Product::pair;
        prefetch_.add(key_row(work, key, for_all), raw_keys ? p_.key.row * element_size_ : key_stride(),
                      raw_keys ? p_.head_dim * element_size_ : key_stride(), rows);
        prefetch_.add(value_row(work, key, for_all), for_all ? value_bytes : p_.value.row * element_size_,
                      for_all ? value_bytes : p_.value_dim * element_size_, rows);
      }
      --most;
    }
  }

  /// The rows that store_tile will write: bringing their lines is most of what writing costs.
  void announce_outputs() {
    const ForwardItem& item = now_.item;
    for (int64_t h = 0; h < item.heads; ++h) {
      const int64_t at = p_.out.offset(item.batch, item.head + h, now_.sequence.q_begin + item.first);
      prefetch_.add(static_cast<const char*>(p_.out.data) + at * element_size_, p_.out.row * element_size_,
                    p_.value_dim * element_size_, item.count);
    }
  }

  /// In the last group of an item: the next item's queries and first keys.
  void announce_next_item() {
    take_next();
    if (!more_) return;
    const ForwardItem& item = next_.item;
    for (int64_t h = 0; h < item.heads; ++h) {
      prefetch_.add(row_of<dtype>(p_.query, item.batch, item.head + h, next_.sequence.q_begin + item.first),
                    p_.query.row * element_size_, p_.head_dim * element_size_, item.count);
    }
    announce(next_, 0, 0);
  }

  /// Register tiles that the group will take, if none of its entries turns out to be masked altogether.
  int64_t register_tiles() const {
    int64_t tiles = 0;
    for (int t = 0; t < tile_count_; ++t) {
      const int registers = tiles_[t].registers, row = tile_row_[t];
      int64_t keys = 0;
      for (int i = row ? row_end_[row - 1] : 0; i < row_end_[row]; ++i) keys += group_[by_row_[i].segment].keys.padded;
      tiles += Loops::register_tiles(registers, keys, steps_, value_dim_);
    }
    return tiles;
  }

  /// One tile against the group's segments that its query block lists, at most `segment_keys` keys at a time.
  void run_tile(int t) {
    switch (tiles_[t].registers) {
      case 1: return run_tile_of<1>(t);
      case 2: return run_tile_of<2>(t);
      case 3: return run_tile_of<tile_registers >= 3 ? 3 : 1>(t);
      default: return run_tile_of<tile_registers>(t);
    }
  }

  template <int registers>
  void run_tile_of(int t) {
    constexpr int width = registers * Simd::lanes;
    const QueryTile& tile = tiles_[t];
    const LoadedSegment* chunk[segment_keys / 16];
    float* scores = at<float>(scores_);
    int segments = 0, keys = 0;
    Simd::Float most[registers];
    typename Loops::template Outputs<registers> outputs{at<float>(outputs_) + tile_lane_[t] * value_dim_,
                                                        int(value_dim_), fresh_[t]};
    auto flush = [&] {
      Loops::add_values(chunk, segments, scores, keys, unit_, most, at<float>(maximum_) + tile_lane_[t],
                        at<float>(sum_) + tile_lane_[t], &outputs, &prefetch_);
      segments = keys = 0;
    };
    for (int i = tile_row_[t] ? row_end_[tile_row_[t] - 1] : 0; i < row_end_[tile_row_[t]]; ++i) {
      const GroupEntry& e = by_row_[i];
      const LoadedSegment& s = group_[e.segment];
      Visible visible = mask_.set(p_, tile, s.keys, e.masked, e.bits);
      if (visible == Visible::none) continue;
      if (keys + s.keys.padded > segment_keys) flush();
      if (segments == 0) {
        for (int j = 0; j < registers; ++j) most[j] = Simd::set(-__builtin_inff());
      }
      bool untouched = visible == Visible::all && s.keys.count == s.keys.padded && !transform_.needed;
      Simd::Float raw[registers];
      for (int j = 0; j < registers; ++j) raw[j] = most[j];
      Loops::template multiply_keys<registers>(s, at<Element>(queries_) + tile_lane_[t] * steps_, int(steps_),
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
    outputs.finish(scores, &prefetch_);
    fresh_[t] = outputs.fresh;
  }

  void store_tile(int t) {
    store_outputs<dtype>(p_, tiles_[t], now_.item.batch, now_.item.head, at<float>(maximum_) + tile_lane_[t],
                         at<float>(sum_) + tile_lane_[t], at<float>(outputs_) + tile_lane_[t] * value_dim_);
  }

  ForwardCall& call_;
  const AttentionForward& p_;
  Arena arena_;
  bool keys_in_place_ = false;
  int64_t steps_, value_dim_, element_size_, group_keys_, parts_;
  ScoreTransform transform_;
  float unit_;
  int64_t queries_, outputs_, scores_, values_, keys_, bias_, maximum_, sum_, spare_;

  ForwardWork now_, next_;
  bool more_ = false, taken_ = false;  // there is a next item; it was looked for
  int tile_count_ = 0;
  QueryTile tiles_[most_tiles];
  int32_t tile_row_[most_tiles];   // which query block of the item
  int64_t tile_lane_[most_tiles];  // first lane, where its part of the scratch arrays begins
  bool fresh_[most_tiles];         // no outputs yet

  struct GroupEntry {
    int32_t bits;
    int16_t segment;
    bool masked;
  };
  LoadedSegment group_[group_limit / 16];
  int group_size_ = 0;
  int segment_of_[group_entries];     // of the group's entries
  GroupEntry by_row_[group_entries];  // those of query block r end at row_end_[r]
  int row_end_[item_queries / 16];
  Prefetch prefetch_;
  PairMask mask_;
};

}  // namespace
}  // namespace sparsekit

// Which keys the query rows of one item see, as segments of at most `segment_keys` keys: what the CPU kernels of
// stripe-sparse attention walk, forward and backward.
//
// An item's rows belong to one group and to one query block, so all of them share a list of columns and a list of
// blocks. Every key is to count once, and who yields is settled here: blocks show what they show; sink and local keys
// leave out what a block shows, columns what any of them shows. Where that holds for all rows and keys of a block the
// keys are left out of the segments; else (a block with bits or a window) the mask of the segment has it: `shadow`.
//
//   sink      position < sink,                                      and, where causal, <= p
//   local     p - local < position <= p, and position >= sink
//   columns   causal: position <= p - local (no local: p);          else: not in p - local + 1 .. p; never below sink
#pragma once

#include "attention/cpu_tiles.h"

namespace sparsekit {
namespace {

enum class KeySource : int32_t { block, sink, local, columns };
constexpr int key_sources = 4;

struct StripeSegment {
  KeySegment keys;
  const int32_t* rows = nullptr;  // gathered: the keys' rows in the key tensor, ascending; null: from keys.key on
  int64_t first = 0, last = 0;    // least and greatest row
  KeySource source = KeySource::block;
  bool masked = false;  // block: of the partial list
  int32_t bits = -1;    // block: its bits_index
  int32_t shadow = -1;  // place in the partial list of a block that holds these keys and shows some pairs, or -1
  int64_t row(int n) const { return rows ? rows[n] : keys.key + n; }
};

/// Queries of a tile with the positions that each sees of each source.
struct StripeTile {
  QueryTile of[key_sources];
  bool columns_outside = false;  // columns: the range is what a query does not see
  bool columns_all = false;      // columns: every query sees each

  const QueryTile& lanes() const { return of[0]; }
};

static void set_positions(QueryTile* tile, int lane, int64_t low, int64_t high) {
  tile->low[lane] = to_int32(low);
  tile->high[lane] = to_int32(high);
  tile->least_low = int32_t(smaller(tile->least_low, tile->low[lane]));
  tile->most_low = int32_t(larger(tile->most_low, tile->low[lane]));
  tile->least_high = int32_t(smaller(tile->least_high, tile->high[lane]));
  tile->most_high = int32_t(larger(tile->most_high, tile->high[lane]));
}

SPARSEKIT_INLINE int64_t query_position(const AttentionProblem& p, int64_t b, int64_t row) {
  return p.query_positions ? p.query_positions[b * p.query_positions_batch + row] : row + p.len_k - p.len_q;
}

/// `queries` queries from row `query` on, of `heads` heads.
static void set_stripe_tile(const AttentionProblem& p, const Sequence& sequence, int64_t b, int64_t query, int queries,
                            StripeTile* tile, int heads = 1) {
  const StripeLists& stripes = p.stripes;
  set_tile(p, sequence, b, query, queries, &tile->of[0], heads);
  tile->columns_outside = !p.causal && stripes.local > 0;
  tile->columns_all = !p.causal && stripes.local == 0;
  const int64_t above_sink = stripes.sink > 0 ? stripes.sink : INT32_MIN;
  for (int source = 1; source < key_sources; ++source) {
    QueryTile& t = tile->of[source];
    t.rows = tile->of[0].rows;
    t.queries = tile->of[0].queries;
    t.registers = tile->of[0].registers;
    t.block_row = tile->of[0].block_row;
    t.query = query;
    t.least_low = t.least_high = INT32_MAX;
    t.most_low = t.most_high = INT32_MIN;
    for (int i = 0; i < t.width(); ++i) {
      const int64_t at = query_position(p, b, query + i % queries);
      const int64_t limit = p.causal ? at : int64_t(INT32_MAX), local = at - stripes.local;
      switch (KeySource(source)) {
        case KeySource::sink: set_positions(&t, i, INT32_MIN, smaller(stripes.sink - 1, limit)); break;
        case KeySource::local: set_positions(&t, i, larger(local + 1, above_sink), at); break;
        case KeySource::columns:
          set_positions(&t, i, p.causal ? INT32_MIN : local + 1, p.causal && stripes.local > 0 ? local : at);
          break;
        case KeySource::block: break;
      }
    }
  }
}

/// Whether the block at place `slot` of the partial list shows key `row` to lane `lane`.
static bool block_shows(const AttentionProblem& p, const QueryTile& tile, int lane, int32_t slot, int64_t row,
                        int32_t position) {
  if (position < tile.low[lane] || position > tile.high[lane]) return false;
  const BlockLists& lists = p.lists;
  const int32_t bits = lists.bits_index ? lists.bits_index[slot] : -1;
  if (bits < 0) return true;
  const int64_t column = row % lists.block_k;
  const int32_t* words =
      lists.bits + (int64_t(bits) * lists.block_q + tile.block_row + lane % tile.queries) * lists.bits_words();
  return uint32_t(words[column / 32]) >> (column % 32) & 1;
}

/// Which pairs of a tile and a segment are seen; `mask` says it pair by pair after Visible::some.
static Visible see_stripe(const AttentionProblem& p, const StripeTile& tile, const StripeSegment& s, PairMask* mask) {
  if (s.source == KeySource::block) return mask->set(p, tile.of[0], s.keys, s.masked, s.bits);
  const QueryTile& t = tile.of[int(s.source)];
  const bool outside = s.source == KeySource::columns && tile.columns_outside;
  const bool all = s.source == KeySource::columns && tile.columns_all;
  const bool apart = s.keys.least > t.most_high || s.keys.most < t.least_low;
  const bool inside = s.keys.least >= t.most_low && s.keys.most <= t.least_high;
  if (!all && (outside ? inside : apart)) return Visible::none;
  const bool whole = all || (outside ? apart : inside);
  if (whole && s.shadow < 0) return Visible::all;
  mask->tile = &t;
  mask->segment = &s.keys;
  mask->by_position = !outside && s.shadow < 0;
  mask->by_bits = !mask->by_position;
  if (mask->by_position) return Visible::some;
  for (int w = 0; w * 32 < s.keys.count; ++w) {
    for (int i = 0; i < t.width(); ++i) mask->words[w][i] = 0;
    for (int n = w * 32; n < smaller(w * 32 + 32, s.keys.count); ++n) {
      const int32_t at = s.keys.position_of(n);
      for (int i = 0; i < t.width(); ++i) {
        const bool in_range = (at >= t.low[i]) & (at <= t.high[i]);
        mask->words[w][i] |= uint32_t(all | (in_range != outside)) << (n % 32);
      }
      for (int i = 0; i < t.width() && s.shadow >= 0; ++i) {
        if (block_shows(p, tile.of[0], i, s.shadow, s.row(n), at)) mask->words[w][i] &= ~(1u << n % 32);
      }
    }
  }
  return Visible::some;
}

/// The segments of one item, ascending by their first row.
class StripePlan {
 public:
  /// Carves its memory from `arena`: reserve(), and after the arena's allocate() attach().
  void reserve(const AttentionProblem& p, Arena* arena) {
    const int64_t parts = ceil_div(p.lists.block_k, segment_keys), slots = p.lists.slots_per_row();
    // Runs of band keys and of columns end at listed blocks; a run of any length adds at most one short segment.
    capacity_ = slots * parts + 2 * (ceil_div(p.len_k, segment_keys) + slots * (parts + 1) + 2) +
                ceil_div(p.stripes.capacity, segment_keys) + 2 * slots + 2;
    columns_at_ = arena->reserve(p.stripes.capacity * int64_t(sizeof(int32_t)));
    positions_at_ = arena->reserve(p.key_positions ? p.stripes.capacity * int64_t(sizeof(int32_t)) : 0);
    cover_at_ = arena->reserve(slots > 0 ? ceil_div(p.len_k, p.lists.block_k) * int64_t(sizeof(int32_t)) : 0);
    segments_at_ = arena->reserve(capacity_ * int64_t(sizeof(StripeSegment)));
    const int64_t most = larger(capacity_, p.stripes.capacity);
    ranked_at_ = arena->reserve(most * int64_t(sizeof(Ranked)));
    spare_at_ = arena->reserve(most * int64_t(sizeof(Ranked)));
  }
  void attach(const AttentionProblem& p, const Arena& arena) {
    columns_ = reinterpret_cast<int32_t*>(arena.data + columns_at_);
    positions_ = reinterpret_cast<int32_t*>(arena.data + positions_at_);
    cover_ = p.lists.slots_per_row() > 0 ? reinterpret_cast<int32_t*>(arena.data + cover_at_) : nullptr;
    segments_ = reinterpret_cast<StripeSegment*>(arena.data + segments_at_);
    ranked_ = reinterpret_cast<Ranked*>(arena.data + ranked_at_);
    spare_ = reinterpret_cast<Ranked*>(arena.data + spare_at_);
    if (cover_) {
      for (int64_t n = 0; n < ceil_div(p.len_k, p.lists.block_k); ++n) cover_[n] = uncovered;
    }
  }

  /// Rows first ... first + count of a head, of one group and one query block.
  void build(const AttentionProblem& p, const Sequence& sequence, int64_t b, int64_t h, int64_t first, int64_t count) {
    batch_ = b;
    count_ = 0;
    least_query_ = INT64_MAX;
    most_query_ = INT64_MIN;
    for (int64_t row = first; row < first + count; ++row) {
      least_query_ = smaller(least_query_, query_position(p, b, row));
      most_query_ = larger(most_query_, query_position(p, b, row));
    }
    if (cover_) add_blocks(p, sequence, h, first / p.lists.block_q);
    add_band(p);
    add_columns(p, p.stripes.row(b, h, first / p.stripes.group_size, p.heads_q));
    if (cover_) forget_blocks(p, h, first / p.lists.block_q);
    for (int i = 0; i < count_; ++i) ranked_[i] = {uint64_t(segments_[i].first), i};
    sort(ranked_, spare_, count_);
  }

  int count() const { return count_; }
  const StripeSegment& operator[](int rank) const { return segments_[ranked_[rank].value]; }

 private:
  static constexpr int32_t uncovered = -1, whole = -2;  // or a place in the partial list

  template <class Visit>
  void for_each_block(const AttentionProblem& p, const BlockList& list, int64_t h, int64_t block, Visit visit) const {
    const int64_t number = list_row(p, batch_, h, block), blocks = ceil_div(p.len_k, p.lists.block_k);
    for (int32_t slot = 0, slots = list_count(list, number); slot < slots; ++slot) {
      const int64_t place = number * list.capacity + slot;
      if (list.indices[place] >= 0 && list.indices[place] < blocks) visit(list.indices[place], place);
    }
  }

  void add_blocks(const AttentionProblem& p, const Sequence& sequence, int64_t h, int64_t block) {
    auto add = [&](int32_t n, bool masked, int32_t bits) {
      for (int part = 0; part * segment_keys < p.lists.block_k; ++part) {
        KeySegment keys = key_segment(p, sequence, batch_, n, part);
        if (keys.count <= 0) break;
        push(keys, keys.key, keys.key + keys.count - 1, KeySource::block, masked, bits);
      }
    };
    const bool windowed = p.window_left >= 0 || p.window_right >= 0;
    for_each_block(p, p.lists.partial, h, block, [&](int32_t n, int64_t place) {
      const int32_t bits = p.lists.bits_index ? p.lists.bits_index[place] : -1;
      add(n, true, bits);
      // Without bits and window it shows all that causality leaves, which is all that the others could show.
      cover_[n] = bits >= 0 || windowed ? int32_t(place) : whole;
    });
    for_each_block(p, p.lists.full, h, block, [&](int32_t n, int64_t) {
      add(n, false, -1);
      cover_[n] = whole;
    });
  }
  void forget_blocks(const AttentionProblem& p, int64_t h, int64_t block) {
    auto forget = [&](int32_t n, int64_t) { cover_[n] = uncovered; };
    for_each_block(p, p.lists.partial, h, block, forget);
    for_each_block(p, p.lists.full, h, block, forget);
  }
  int32_t cover(const AttentionProblem& p, int64_t row) const {
    return cover_ ? cover_[row / p.lists.block_k] : uncovered;
  }

  StripeSegment& push(const KeySegment& keys, int64_t first, int64_t last, KeySource source, bool masked = true,
                      int32_t bits = -1) {
    StripeSegment& s = segments_[count_++];
    s = {};
    s.keys = keys;
    s.first = first;
    s.last = last;
    s.source = source;
    s.masked = masked;
    s.bits = bits;
    return s;
  }

  /// Sink and local keys: ranges of rows, or with positions of their own all rows, of which the masks choose.
  void add_band(const AttentionProblem& p) {
    const int64_t sink = p.stripes.sink, local = p.stripes.local;
    if (sink > 0) add_range(p, 0, p.key_positions ? p.len_k : smaller(sink, p.len_k), KeySource::sink);
    if (local > 0) {
      const int64_t begin = larger(larger(least_query_ - local + 1, sink), 0), end = smaller(most_query_ + 1, p.len_k);
      p.key_positions ? add_range(p, 0, p.len_k, KeySource::local) : add_range(p, begin, end, KeySource::local);
    }
  }
  void add_range(const AttentionProblem& p, int64_t begin, int64_t end, KeySource source) {
    const int64_t block_k = cover_ ? p.lists.block_k : p.len_k;
    while (begin < end) {
      const int32_t covered = cover(p, begin);
      int64_t stop = begin;  // of the run: up to the next block that a list names
      do {
        stop = smaller((stop / block_k + 1) * block_k, end);
      } while (stop < end && covered == uncovered && cover(p, stop) == uncovered);
      for (; covered != whole && begin < stop; begin += segment_keys) {
        KeySegment keys;
        keys.key = begin;
        keys.count = int(smaller(segment_keys, stop - begin));
        keys.position = to_int32(begin);
        if (p.key_positions) keys.positions = p.key_positions + batch_ * p.key_positions_batch + begin;
        if (bound(&keys) && reaches(p, keys, source)) {
          push(keys, begin, begin + keys.count - 1, source).shadow = covered;
        }
      }
      begin = stop;
    }
  }
  /// Whether some query may see a key of the segment as `source`.
  bool reaches(const AttentionProblem& p, const KeySegment& keys, KeySource source) const {
    if (p.causal && keys.least > most_query_) return false;
    if (source == KeySource::sink) return keys.least < p.stripes.sink;
    return keys.least <= most_query_ && keys.most > least_query_ - p.stripes.local;
  }
  /// Sets padding and range of positions.
  static bool bound(KeySegment* keys) {
    keys->padded = int(round_up(keys->count, 16));
    keys->least = INT32_MAX;
    keys->most = INT32_MIN;
    for (int n = 0; n < keys->count; ++n) {
      keys->least = int32_t(smaller(keys->least, keys->position_of(n)));
      keys->most = int32_t(larger(keys->most, keys->position_of(n)));
    }
    return keys->count > 0;
  }

  void add_columns(const AttentionProblem& p, int64_t number) {
    const int total = gather_columns(p, number);
    for (int begin = 0, end; begin < total; begin = end) {
      // Columns of a block with a mask of its own keep to themselves.
      const int32_t covered = cover(p, columns_[begin]);
      for (end = begin + 1; end < total && end - begin < segment_keys && cover(p, columns_[end]) == covered;) ++end;
      KeySegment keys;
      keys.count = end - begin;
      keys.positions = (p.key_positions ? positions_ : columns_) + begin;
      bound(&keys);
      StripeSegment& s = push(keys, columns_[begin], columns_[end - 1], KeySource::columns);
      s.rows = columns_ + begin;
      s.shadow = covered;
    }
  }

  /// The list's columns that some query sees neither as a sink or local key nor through a block, ascending, each once.
  int gather_columns(const AttentionProblem& p, int64_t number) {
    const StripeLists& stripes = p.stripes;
    const int32_t* list = stripes.indices + number * stripes.capacity;
    const int32_t listed = int32_t(clamp(stripes.counts[number], 0, stripes.capacity));
    int count = 0;
    bool ascending = true;
    for (int32_t slot = 0; slot < listed; ++slot) {
      const int32_t row = list[slot];
      if (row < 0 || row >= p.len_k || cover(p, row) == whole) continue;
      const int64_t at = p.key_positions ? p.key_positions[batch_ * p.key_positions_batch + row] : row;
      if (stripes.sink > 0 && at < stripes.sink) continue;
      if (p.causal && at > most_query_) continue;
      if (at > most_query_ - stripes.local && at <= least_query_) continue;  // a local key of every query
      ascending &= count == 0 || columns_[count - 1] < row;
      columns_[count++] = row;
    }
    if (!ascending) {
      for (int i = 0; i < count; ++i) ranked_[i] = {uint64_t(columns_[i]), columns_[i]};
      sort(ranked_, spare_, count);
      int kept = 0;
      for (int i = 0; i < count; ++i) {
        if (kept == 0 || columns_[kept - 1] != ranked_[i].value) columns_[kept++] = ranked_[i].value;
      }
      count = kept;
    }
    for (int i = 0; i < count && p.key_positions; ++i) {
      positions_[i] = p.key_positions[batch_ * p.key_positions_batch + columns_[i]];
    }
    return count;
  }

  int64_t capacity_ = 0, batch_ = 0, least_query_ = 0, most_query_ = 0;
  int count_ = 0;
  int64_t columns_at_, positions_at_, cover_at_, segments_at_, ranked_at_, spare_at_;
  int32_t *columns_ = nullptr, *positions_ = nullptr, *cover_ = nullptr;
  StripeSegment* segments_ = nullptr;
  Ranked *ranked_ = nullptr, *spare_ = nullptr;
};

}  // namespace
}  // namespace sparsekit

// The choice of the best entries of rows: top-k, top-p, threshold. Include after simd_<isa>.h.
//
// Scores become integer keys (cpu_keys.h). A rule is turned into a cut: all keys above one number, and the first few of
// those equal to it. The cut is found by halving the interval of keys that it lies in: a pass counts the keys (sums the
// masses) above the middle; whenever half of the keys are out of the interval, the others are compacted; the last 32
// are sorted. At most 32 passes, whatever the scores are. A long row that keeps few entries is read once: a sample
// gives a bound that more than enough entries pass, and only those are looked at again.
//
// Bound: reading the scores where rows are long (131,072 scores: 44 us at 12 GB/s a core); about a microsecond of
// passes over L1 per row of 1,024.
#pragma once

#include <cstdlib>

#include "selection/cpu_keys.h"
#include "sparsekit/parallel.h"
#include "sparsekit/selection.h"

namespace sparsekit {
namespace {

/// What is taken: keys > key, and of those equal to it the first `ties`.
struct Cut {
  int32_t key;
  int64_t ties;
};
constexpr Cut take_nothing = {INT32_MAX, 0}, take_all = {never, 0};

constexpr int few = 32;  // sorted rather than halved

/// An interval (low, high] of keys that holds the cut, and the keys that may lie in it.
struct Interval {
  const int32_t* keys;
  const double* masses;  // or null
  int64_t count;         // of keys
  int32_t low = never, high;
  int32_t* spare;  // room for what is compacted, or null: not any more
  double* spare_masses;
  int64_t dropped = 0;      // keys above `high` that are not in `keys` any more
  double dropped_mass = 0;  // and their mass

  int32_t middle() const { return int32_t((int64_t(low) + high) >> 1); }
  bool single() const { return int64_t(high) - low == 1; }

  /// Keeps only the keys inside, if that halves them. `above`, `above_mass`: of all keys above `high`.
  void shrink(int64_t inside, int64_t above, double above_mass) {
    if (inside * 2 > count || count <= 4 * few) return;
    int64_t kept = compact<double>(keys, masses, count, low, high, spare, spare_masses);
    keys = spare;
    masses = masses ? spare_masses : nullptr;
    count = kept;
    dropped = above;
    dropped_mass = above_mass;
  }

  /// The keys inside, greatest first; there are at most `few`.
  int sorted(int32_t* to, double* to_masses) const {
    int kept = 0;
    for (int64_t at = 0; at < count; ++at) {
      int32_t key = keys[at];
      if (key <= low || key > high) continue;
      int place = kept++;
      for (; place > 0 && to[place - 1] < key; --place) {
        to[place] = to[place - 1];
        to_masses[place] = to_masses[place - 1];
      }
      to[place] = key;
      to_masses[place] = masses ? masses[at] : 0;
    }
    return kept;
  }
};

/// The cut that takes `wanted` of the keys, of which `eligible` are not `never`; none is above `highest`.
static Cut cut_by_count(const int32_t* keys, int64_t count, int64_t eligible, int32_t highest, int64_t wanted,
                        int32_t* spare) {
  if (wanted <= 0) return take_nothing;
  if (wanted >= eligible) return take_all;
  Interval interval{keys, nullptr, count, never, highest, spare, nullptr};
  int64_t above = 0, from_low = eligible;  // keys above `high`, above `low`
  while (!interval.single()) {
    int64_t inside = from_low - above;
    if (inside <= few) {
      int32_t best[few + 1];
      double unused[few + 1];
      interval.sorted(best, unused);
      int64_t last = wanted - above - 1, first = last;
      while (first > 0 && best[first - 1] == best[last]) --first;
      return {best[last], last - first + 1};
    }
    interval.shrink(inside, above, 0);
    int32_t middle = interval.middle();
    int64_t greater = interval.dropped + count_greater(interval.keys, interval.count, middle);
    if (greater == wanted) return {middle, 0};
    if (greater > wanted) {
      interval.low = middle;
      from_low = greater;
    } else {
      interval.high = middle;
      above = greater;
    }
  }
  return {interval.high, wanted - above};
}

/// The cut that takes the fewest keys whose mass is at least `wanted`, of which all together have more or as much.
static Cut cut_by_mass(const int32_t* keys, const double* masses, int64_t count, int32_t highest, double wanted,
                       int32_t* spare, double* spare_masses) {
  if (!(wanted > 0)) return take_nothing;
  Interval interval{keys, masses, count, never, highest, spare, spare_masses};
  int64_t above = 0, from_low = count;
  double above_mass = 0;
  while (!interval.single()) {
    int64_t inside = from_low - above;
    if (inside <= few) {
      int32_t best[few + 1];
      double mass[few + 1];
      int kept = interval.sorted(best, mass), last = 0;
      double sum = above_mass + mass[0];
      while (sum < wanted && last + 1 < kept) sum += mass[++last];
      int first = last;
      while (first > 0 && best[first - 1] == best[last]) --first;
      return {best[last], last - first + 1};
    }
    interval.shrink(inside, above, above_mass);
    int32_t middle = interval.middle();
    int64_t greater;
    double mass =
        interval.dropped_mass + mass_greater(interval.keys, interval.masses, interval.count, middle, &greater);
    greater += interval.dropped;
    if (mass >= wanted) {
      interval.low = middle;
      from_low = greater;
    } else {
      interval.high = middle;
      above = greater;
      above_mass = mass;
    }
  }
  // Keys equal to `high`, of equal mass: all sums are exact, the quotient is not.
  double each = 0;
  for (int64_t at = 0; at < interval.count && each == 0; ++at) {
    if (interval.keys[at] == interval.high) each = interval.masses[at];
  }
  double ties = __builtin_floor((wanted - above_mass) / each);
  while (above_mass + ties * each < wanted) ties += 1;
  while (ties > 1 && above_mass + (ties - 1) * each >= wanted) ties -= 1;
  return {interval.high, int64_t(ties)};
}

/// Scratch of one thread.
struct ChoiceScratch {
  int32_t *keys = nullptr, *spare = nullptr;
  double *masses = nullptr, *spare_masses = nullptr;
  void* memory = nullptr;

  bool allocate(int64_t entries, bool with_masses) {
    size_t room = size_t(entries + 2 * key_slack);
    room += room % 2;
    if (posix_memalign(&memory, 64, room * (with_masses ? 24 : 8))) return false;
    masses = static_cast<double*>(memory);
    spare_masses = masses + (with_masses ? room : 0);
    keys = reinterpret_cast<int32_t*>(spare_masses + (with_masses ? room : 0));
    spare = keys + room;
    return true;
  }
};

/// A row of the problem: [0, sinks_end) and [local_begin, limit) are taken first, the keys are of what lies between.
struct ChoiceRow {
  ScoreRow scores;
  int64_t number, limit, sinks_end, local_begin;
  int64_t forced = 0;  // entries of both ends that may be chosen
  int32_t highest_forced = never;

  ChoiceRow(const Choice& c, int64_t head, int64_t row) : number(head * c.rows + row) {
    int64_t element = c.dtype == DType::f32 ? 4 : 2;
    scores.scores = static_cast<const char*>(c.scores) + number * c.columns * element;
    scores.weights = c.weights ? c.weights + head * c.weights_head + row * c.weights_row : nullptr;
    scores.dtype = c.dtype;
    limit = c.columns;
    if (c.row_limit) limit = c.row_limit[number] < 0 ? 0 : c.row_limit[number] < limit ? c.row_limit[number] : limit;
    sinks_end = c.sink < limit ? c.sink : limit;
    local_begin = limit - c.local > sinks_end ? limit - c.local : sinks_end;
    for_each_forced([&](int64_t, int32_t key) {
      ++forced;
      highest_forced = key > highest_forced ? key : highest_forced;
    });
  }
  int64_t middle() const { return local_begin - sinks_end; }

  template <class Visit>
  void for_each_forced(Visit visit) const {
    for (int64_t j = 0; j < limit; j = j + 1 == sinks_end ? local_begin : j + 1) {
      if (j >= sinks_end && j < local_begin) j = local_begin;
      if (j >= limit) return;
      int32_t key = key_of(scores.at(j));
      if (key != never) visit(j, key);
    }
  }
};

/// Writes the indices of what a cut takes, ascending; returns how many. `indices`: where the keys stand, or null: they
/// follow each other from `base` on.
static int64_t emit_cut(const int32_t* keys, const int32_t* indices, int64_t count, int64_t base, Cut cut,
                        int32_t* out) {
  int64_t taken = 0, at = 0, ties = cut.ties;
#ifdef __AVX512F__
  const __m512i bound = _mm512_set1_epi32(cut.key), step = _mm512_set1_epi32(16);
  __m512i place = _mm512_add_epi32(_mm512_set1_epi32(int32_t(base)),
                                   _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  for (; at + 16 <= count; at += 16, place = _mm512_add_epi32(place, step)) {
    __m512i key = _mm512_loadu_si512(keys + at);
    // Never as `unsigned`: GCC 12 spills that with a 16-bit kmovw and reads 32 bits back (at -O1, with sanitizers).
    __mmask16 take = _mm512_cmpgt_epi32_mask(key, bound);
    if (ties > 0) {
      __mmask16 equal = _mm512_cmpeq_epi32_mask(key, bound);
      if (ties < __builtin_popcount(equal)) equal = __mmask16(_pdep_u32((1u << ties) - 1, equal));
      ties -= __builtin_popcount(equal);
      take = __mmask16(take | equal);
    }
    int number = __builtin_popcount(take);
    __m512i index = indices ? _mm512_loadu_si512(indices + at) : place;
    _mm512_mask_storeu_epi32(out + taken, Simd::first(number), _mm512_maskz_compress_epi32(take, index));
    taken += number;
  }
#endif
  for (; at < count; ++at) {
    bool take = keys[at] > cut.key;
    if (keys[at] == cut.key && ties > 0) {
      take = true;
      --ties;
    }
    if (take) out[taken++] = int32_t(indices ? indices[at] : base + at);
  }
  return taken;
}

/// Writes a row's lists: its forced entries around what the cut takes of the keys.
static void write_row(const Choice& c, const ChoiceRow& row, const int32_t* keys, const int32_t* indices, int64_t count,
                      Cut cut) {
  int32_t* out = c.indices + row.number * c.width;
  int64_t taken = 0;
  for (int64_t j = 0; j < row.sinks_end; ++j) {
    if (key_of(row.scores.at(j)) != never) out[taken++] = int32_t(j);
  }
  taken += emit_cut(keys, indices, count, row.sinks_end, cut, out + taken);
  for (int64_t j = row.local_begin; j < row.limit; ++j) {
    if (key_of(row.scores.at(j)) != never) out[taken++] = int32_t(j);
  }
  c.counts[row.number] = int32_t(taken);
  if (c.mass) {
    double mass = 0;
    for (int64_t s = 0; s < taken; ++s) mass += double(row.scores.at(out[s]));
    c.mass[row.number] = float(mass);
  }
  for (; taken < c.width; ++taken) out[taken] = -1;
}

/// min_count and width applied to a number of entries besides the forced ones.
static int64_t bounded(const Choice& c, const ChoiceRow& row, int64_t others, int64_t eligible) {
  int64_t total = row.forced + others;
  total = total < c.min_count ? c.min_count : total;
  total = total > c.width ? c.width : total;
  total -= row.forced;
  return total < eligible ? total : eligible;
}

/// top-k of a long row: one pass over the scores. False: the sample misled, or too many are wanted.
static bool choose_by_sample(const Choice& c, const ChoiceRow& row, int64_t wanted, const ChoiceScratch& scratch) {
  constexpr int64_t pieces = 128, size = pieces * Simd::lanes;
  const int64_t count = row.middle();
  if (count < 8 * size || wanted <= 0 || wanted * 8 > count) return false;
  int32_t highest = never;
  for (int64_t piece = 0; piece < pieces; ++piece) {
    int64_t first = row.sinks_end + piece * (count - Simd::lanes) / (pieces - 1);
    int32_t key = make_keys(row.scores, first, first + Simd::lanes, scratch.keys + piece * Simd::lanes);
    highest = key > highest ? key : highest;
  }
  // So many of the sample as would be `wanted` of the row, and 4 standard deviations and some more.
  double expected = double(wanted) * double(size) / double(count);
  int64_t rank = int64_t(expected + 4 * __builtin_sqrt(expected) + 8);
  int64_t eligible = count_greater(scratch.keys, size, never);
  if (rank >= eligible) return false;
  Cut bound = cut_by_count(scratch.keys, size, eligible, highest, rank, scratch.spare);
  int32_t least = bound.ties > 0 ? bound.key : bound.key + 1;
  int64_t kept = collect(row.scores, row.sinks_end, row.local_begin, least, scratch.keys, scratch.spare);
  if (kept < wanted) return false;
  highest = never;
  for (int64_t at = 0; at < kept; ++at) highest = scratch.keys[at] > highest ? scratch.keys[at] : highest;
  // Indices took the spare room: compaction goes behind the keys, of which a quarter at most is left.
  int32_t* spare = kept * 2 + 2 * key_slack <= count ? scratch.keys + kept + key_slack : nullptr;
  if (!spare) return false;
  Cut cut = cut_by_count(scratch.keys, kept, kept, highest, wanted, spare);
  write_row(c, row, scratch.keys, scratch.spare, kept, cut);
  return true;
}

static void choose_row(const Choice& c, int64_t number, const ChoiceScratch& scratch) {
  ChoiceRow row(c, number / c.rows, number % c.rows);
  const int64_t count = row.middle();
  int64_t k = 0;
  if (c.rule == ChoiceRule::top_k) {
    k = (c.row_k ? c.row_k[number] : c.k) - row.forced;
    int64_t wanted = bounded(c, row, k > 0 ? k : 0, count);
    if (choose_by_sample(c, row, wanted, scratch)) return;
  }
  int32_t highest = make_keys(row.scores, row.sinks_end, row.local_begin, scratch.keys);
  int64_t eligible = count_greater(scratch.keys, count, never);
  int64_t others = k > 0 ? k : 0;
  Cut cut = take_nothing;
  if (c.rule == ChoiceRule::threshold) {
    float threshold = c.thresholds[number];
    int32_t key = key_of(threshold);
    if (threshold == threshold) cut = {key == never ? never : key - 1, 0};
    others = threshold == threshold ? count_greater(scratch.keys, count, cut.key) : 0;
  } else if (c.rule == ChoiceRule::top_p) {
    double p = c.row_p ? double(c.row_p[number]) : c.p;
    if (p >= 1) {
      cut = {0, 0};
    } else if (highest > 0 || row.highest_forced > 0) {
      Units units(highest > row.highest_forced ? highest : row.highest_forced, c.columns);
      double forced = 0, sum = make_masses(scratch.keys, count, units, scratch.masses);
      row.for_each_forced([&](int64_t, int32_t key) { forced += units.of(key); });
      cut = cut_by_mass(scratch.keys, scratch.masses, count, highest, (p > 0 ? p : 0) * (forced + sum) - forced,
                        scratch.spare, scratch.spare_masses);
    }
    others = cut.ties + count_greater(scratch.keys, count, cut.key);
  }
  int64_t wanted = bounded(c, row, others, eligible);
  if (wanted != others || c.rule == ChoiceRule::top_k) {
    cut = cut_by_count(scratch.keys, count, eligible, highest, wanted, scratch.spare);
  }
  write_row(c, row, scratch.keys, nullptr, count, cut);
}

/// top-p over all rows of a head together: one cut; a row whose count is out of bounds gets its own.
static void choose_head(const Choice& c, int64_t head, const ChoiceScratch& scratch) {
  int64_t count = 0;
  int32_t highest = never, highest_forced = never;
  for (int64_t r = 0; r < c.rows; ++r) {
    ChoiceRow row(c, head, r);
    int32_t key = make_keys(row.scores, row.sinks_end, row.local_begin, scratch.keys + count);
    highest = key > highest ? key : highest;
    highest_forced = row.highest_forced > highest_forced ? row.highest_forced : highest_forced;
    count += row.middle();
  }
  double p = c.row_p ? double(c.row_p[head]) : c.p;
  Cut cut = take_nothing;
  if (p >= 1) {
    cut = {0, 0};
  } else if (highest > 0 || highest_forced > 0) {
    Units units(highest > highest_forced ? highest : highest_forced, c.rows * c.columns);
    double forced = 0, sum = make_masses(scratch.keys, count, units, scratch.masses);
    for (int64_t r = 0; r < c.rows; ++r) {
      ChoiceRow(c, head, r).for_each_forced([&](int64_t, int32_t key) { forced += units.of(key); });
    }
    cut = cut_by_mass(scratch.keys, scratch.masses, count, highest, (p > 0 ? p : 0) * (forced + sum) - forced,
                      scratch.spare, scratch.spare_masses);
  }
  const int32_t* keys = scratch.keys;
  for (int64_t r = 0; r < c.rows; ++r) {
    ChoiceRow row(c, head, r);
    const int64_t middle = row.middle();
    int64_t equal = count_greater(keys, middle, cut.key - (cut.key > never)) - count_greater(keys, middle, cut.key);
    Cut own = {cut.key, cut.ties < equal ? cut.ties : equal};
    cut.ties -= own.ties;
    int64_t others = own.ties + count_greater(keys, middle, cut.key);
    int64_t eligible = count_greater(keys, middle, never);
    int64_t wanted = bounded(c, row, others, eligible);
    if (wanted != others) own = cut_by_count(keys, middle, eligible, highest, wanted, scratch.spare);
    write_row(c, row, keys, nullptr, middle, own);
    keys += middle;
  }
}

struct ChoiceCall {
  const Choice& choice;
  int out_of_memory = 0;
};

static void choice_worker(int64_t first, int64_t last, void* context) {
  ChoiceCall& call = *static_cast<ChoiceCall*>(context);
  const Choice& c = call.choice;
  ChoiceScratch scratch;
  int64_t entries = c.by_head ? c.rows * c.columns : c.columns;
  if (entries < 4096) entries = 4096;  // the sample's keys
  if (!scratch.allocate(entries, c.rule == ChoiceRule::top_p)) {
    __atomic_store_n(&call.out_of_memory, 1, __ATOMIC_RELAXED);
    return;
  }
  for (int64_t at = first; at < last; ++at) c.by_head ? choose_head(c, at, scratch) : choose_row(c, at, scratch);
  free(scratch.memory);
}

static Status run_choice(const Choice& c, const ParallelFor& parallel) {
  ChoiceCall call{c};
  if (c.by_head) {
    parallel(0, c.heads, 1, choice_worker, &call);
  } else {
    int64_t grain = 16384 / (c.columns + 1) + 1;  // some microseconds of work
    parallel(0, c.heads * c.rows, grain, choice_worker, &call);
  }
  if (call.out_of_memory) return error(Status::Kind::failed, "out of memory for the keys of a row of scores");
  return {};
}

}  // namespace
}  // namespace sparsekit

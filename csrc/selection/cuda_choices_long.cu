// The choice of the best entries of rows of any length, one CTA per row; and the cuts of whole heads (top-p by head),
// one CTA per head.
//
// A cut is found digit by digit: 11, 11 and 10 bits of the keys, each pass a histogram in shared memory of those that
// share the digits found so far (counts; for top-p also masses, in two words with a carry). Counts and whole masses do
// not depend on the order of additions. Lists are written in order: each warp owns a segment of the row, counts what it
// takes, and writes from there.
//
// top-k of a long row reads it once: the keys of a sample of 4,096 give a bound that somewhat more than k entries pass
// (rank + 4 standard deviations); these are collected in shared memory, in any order, cut there, and marked in a
// bitmap, whose set bits are the list. Where the sample misleads, the row is read again as above.
//
// Bound: memory; 512 rows of 131,072 fp32 are 268 MB.
#include <cmath>

#include "selection/cuda_choices.cuh"
#include "selection/cuda_kernels.h"

namespace sparsekit::cuda {
namespace {

constexpr int kThreads = 512, kBins = 2048, kBinsEach = kBins / kThreads;
constexpr int kSample = 4096, kPieces = kSample / kWarp;

struct Histogram {
  uint32_t counts[kBins];
  uint32_t low[kBins], high[kBins];  // of masses; only where there are any
};
constexpr size_t kCountBytes = kBins * sizeof(uint32_t);

struct Shared {
  CtaScratch scratch;
  uint64_t found_above, found_mass;
  uint32_t found_digit, candidates;
  uint32_t
      segments[2][kThreads / kWarp];  // of each warp's segment: entries that are taken anyway, entries equal to the cut
};

/// A cut, how many entries are above it and their mass.
struct Found {
  Cut cut;
  int64_t others;  // that the cut takes
};

/// The cut that takes `wanted` > 0 of `count` keys (entries, or units of mass), of which all together have as much.
/// key_at(e) is the key of entry e, or kNever. `digits`: 3, or 2 for a lower bound of the cut.
template <bool BY_MASS, class KeyAt>
__device__ Found find_cut(uint64_t wanted, int64_t count, KeyAt key_at, const Units& units, int digits, Histogram& bins,
                          Shared& shared) {
  uint32_t prefix = 0;
  uint64_t above = 0, above_mass = 0;
  for (int digit = 0; digit < digits; ++digit) {
    const int shift = digit == 0 ? 21 : digit == 1 ? 10 : 0, width = digit == 2 ? 10 : 11;
    for (int i = int(threadIdx.x); i < kBins; i += kThreads) {
      bins.counts[i] = 0;
      if constexpr (BY_MASS) bins.low[i] = bins.high[i] = 0;
    }
    __syncthreads();
    for (int64_t e = threadIdx.x; e < count; e += kThreads) {
      const uint32_t key = key_at(e);
      if (key == kNever || (digit > 0 && key >> (shift + width) != prefix)) continue;
      const uint32_t bin = key >> shift & ((1u << width) - 1);
      atomicAdd(&bins.counts[bin], 1u);
      if constexpr (BY_MASS) {
        const uint64_t mass = units.of(key);
        const uint32_t low = uint32_t(mass), before = atomicAdd(&bins.low[bin], low);
        const uint32_t high = uint32_t(mass >> 32) + (before + low < before);
        if (high) atomicAdd(&bins.high[bin], high);
      }
    }
    __syncthreads();
    // Thread t has the t-th kBinsEach bins from the top.
    uint64_t own_count = 0, own_mass = 0;
    const int top = kBins - 1 - int(threadIdx.x) * kBinsEach;
    for (int i = 0; i < kBinsEach; ++i) {
      own_count += bins.counts[top - i];
      if constexpr (BY_MASS) own_mass += (uint64_t(bins.high[top - i]) << 32) + bins.low[top - i];
    }
    uint64_t total, count_before = above + cta_scan<kThreads>(own_count, shared.scratch, &total),
                    mass_before = above_mass;
    if constexpr (BY_MASS) mass_before += cta_scan<kThreads>(own_mass, shared.scratch, &total);
    const uint64_t before = BY_MASS ? mass_before : count_before, own = BY_MASS ? own_mass : own_count;
    if (before < wanted && wanted <= before + own) {  // in one thread
      int i = 0;
      for (;; ++i) {
        const uint64_t mass = BY_MASS ? (uint64_t(bins.high[top - i]) << 32) + bins.low[top - i] : 0;
        const uint64_t here = BY_MASS ? mass_before + mass : count_before + bins.counts[top - i];
        if (i == kBinsEach - 1 || wanted <= here) break;
        count_before += bins.counts[top - i];
        mass_before += mass;
      }
      shared.found_digit = uint32_t(top - i);
      shared.found_above = count_before;
      shared.found_mass = mass_before;
    }
    __syncthreads();
    prefix = prefix << width | shared.found_digit;
    above = shared.found_above;
    above_mass = shared.found_mass;
    __syncthreads();
  }
  if (digits < 3) return {{prefix << 10, 0}, 0};
  int64_t ties = int64_t(wanted - above);
  if constexpr (BY_MASS) {
    const uint64_t each = units.of(prefix);
    ties = int64_t((wanted - above_mass + each - 1) / each);
  }
  return {{prefix, ties}, int64_t(above) + ties};
}

/// What must be known of the entries before a rule is applied.
struct Totals {
  uint32_t highest = kNever, highest_forced = kNever;
  uint32_t forced = 0;
  uint64_t eligible = 0;  // not forced
};

/// visit(e, key, forced) for every entry that may be chosen.
template <class Visit>
__device__ Totals count_entries(Visit for_each, Shared& shared) {
  Totals own;
  for_each([&](uint32_t key, bool forced) {
    if (forced) {
      ++own.forced;
      own.highest_forced = max(own.highest_forced, key);
    } else {
      ++own.eligible;
      own.highest = max(own.highest, key);
    }
  });
  own.highest = cta_max<kThreads>(own.highest, shared.scratch);
  own.highest_forced = cta_max<kThreads>(own.highest_forced, shared.scratch);
  own.forced = cta_sum<kThreads>(own.forced, shared.scratch);
  own.eligible = cta_sum<kThreads>(own.eligible, shared.scratch);
  return own;
}

/// Top-p of the entries that for_each visits; key_at as in find_cut, forced entries kNever.
template <class Visit, class KeyAt>
__device__ Found cut_of_share(double p, const Totals& totals, int bits, int64_t count, Visit for_each, KeyAt key_at,
                              Histogram& bins, Shared& shared) {
  if (!(p > 0)) return {{kAbove, 0}, 0};
  const Units units(max(totals.highest, totals.highest_forced), bits);
  uint64_t forced = 0, sum = 0;
  for_each([&](uint32_t key, bool is_forced) { (is_forced ? forced : sum) += units.of(key); });
  forced = cta_sum<kThreads>(forced, shared.scratch);
  sum = cta_sum<kThreads>(sum, shared.scratch);
  const uint64_t wanted = wanted_units(p, sum + forced, forced);
  if (wanted == 0) return {{kAbove, 0}, 0};
  return find_cut<true>(wanted, count, key_at, units, 3, bins, shared);
}

// ---- lists

/// Writes row `number` of the results: what the cut takes, and the forced entries.
template <class Element>
__device__ void write_row(const Choice& c, int64_t number, const ChoiceRow<Element>& row, Cut cut, Shared& shared) {
  constexpr int warps = kThreads / kWarp;
  const int segment = ceil_div(ceil_div(row.limit, warps), kWarp) * kWarp, lane = lane_of(), warp = warp_of();
  const int first = int(min(int64_t(warp) * segment, int64_t(row.limit)));
  const int last = int(min(int64_t(first) + segment, int64_t(row.limit)));
  uint32_t sure = 0, equal = 0;
  for (int j = first + lane; j < last; j += kWarp) {
    const uint32_t key = key_of(row.value(j));
    const bool forced = key != kNever && row.forced(j);
    sure += key > cut.key || forced;
    equal += cut.ties > 0 && key == cut.key && !forced;
  }
  sure = warp_sum(sure);
  equal = warp_sum(equal);
  if (lane == 0) {
    shared.segments[0][warp] = sure;
    shared.segments[1][warp] = equal;
  }
  __syncthreads();
  int64_t ties = cut.ties, own_ties = 0, place = 0, total = 0;
  for (int w = 0; w < warps; ++w) {
    const int64_t used = min(ties, int64_t(shared.segments[1][w]));
    if (w == warp) {
      own_ties = used;
      place = total;
    }
    ties -= used;
    total += shared.segments[0][w] + used;
  }
  __syncthreads();
  int32_t* out = c.indices + number * c.width;
  double mass = 0;
  for (int start = first; start < last; start += kWarp) {
    const int j = start + lane;
    const float value = j < last ? row.value(j) : -__builtin_huge_valf();
    const uint32_t key = key_of(value);
    const bool forced = key != kNever && row.forced(j);
    bool take = key > cut.key || forced;
    if (own_ties > 0) {
      const bool is_equal = key == cut.key && !forced;
      const unsigned lanes = __ballot_sync(kLanes, is_equal);
      take |= is_equal && __popc(lanes & lanes_before()) < own_ties;
      own_ties -= __popc(lanes);
    }
    const unsigned lanes = __ballot_sync(kLanes, take);
    if (take) {
      out[place + __popc(lanes & lanes_before())] = j;
      mass += double(value);
    }
    place += __popc(lanes);
  }
  for (int64_t slot = total + threadIdx.x; slot < c.width; slot += kThreads) out[slot] = -1;
  if (threadIdx.x == 0) c.counts[number] = int32_t(total);
  if (c.mass) {
    mass = cta_sum<kThreads>(mass, shared.scratch);
    if (threadIdx.x == 0) c.mass[number] = float(mass);
  }
}

// ---- top-k by a sample

/// 16 bytes of scores.
template <class Element>
struct alignas(16) Vector {
  static constexpr int size = 16 / int(sizeof(Element));
  Element elements[size];
};

/// top-k of a row that is read once; false where the sample misled. Shared memory behind the histogram's counts: keys
/// and indices of `call.candidates` entries, then two bitmaps of the row.
template <class Element>
__device__ bool choose_by_sample(const ChoiceCall& call, int64_t number, const ChoiceRow<Element>& row, int64_t k,
                                 Histogram& bins, Shared& shared) {
  const Choice& c = call.c;
  const int room = call.candidates, count = row.local - row.sinks, words = ceil_div(int(c.columns), 32);
  auto* keys = reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(&bins) + kCountBytes);
  auto* indices = reinterpret_cast<int32_t*>(keys + room);
  auto* sure = reinterpret_cast<uint32_t*>(indices + room);
  uint32_t* equal = sure + words;
  const int lane = lane_of(), warp = warp_of();
  const Units no_units(kNever, 0);

  // Forced entries first: they count.
  for (int w = int(threadIdx.x); w < 2 * words; w += kThreads) sure[w] = 0;
  if (threadIdx.x == 0) shared.candidates = 0;
  __syncthreads();
  uint32_t forced = 0;
  const int ends = row.sinks + row.limit - row.local;
  for (int e = int(threadIdx.x); e < ends; e += kThreads) {
    const int j = e < row.sinks ? e : row.local + e - row.sinks;
    if (key_of(row.value(j)) == kNever) continue;
    ++forced;
    atomicOr(&sure[j / 32], 1u << j % 32);
  }
  forced = cta_sum<kThreads>(forced, shared.scratch);
  int64_t wanted = k > forced ? k - forced : 0;
  wanted = bounded(c, wanted, forced, count);
  if (count < 8 * kSample || wanted <= 0 || wanted * 8 > count) return false;

  // The bound: so many of the sample as would be `wanted` of the row, and 4 standard deviations and some more.
  uint32_t eligible = 0;
  for (int piece = warp; piece < kPieces; piece += kThreads / kWarp) {
    const int first = row.sinks + int(int64_t(piece) * (count - kWarp) / (kPieces - 1));
    const uint32_t key = key_of(row.value(first + lane));
    keys[piece * kWarp + lane] = key;
    eligible += key != kNever;
  }
  eligible = cta_sum<kThreads>(eligible, shared.scratch);
  const float expected = float(wanted) * kSample / float(count);
  const auto rank = uint32_t(expected + 4 * sqrtf(expected) + 8);
  if (rank >= eligible) return false;
  const uint32_t bound =
      find_cut<false>(rank, kSample, [&](int64_t e) { return keys[e]; }, no_units, 2, bins, shared).cut.key;
  if (bound == kNever) return false;
  const float least = score_of(bound);  // never NaN: the digits of a key that exists, the rest zero

  // One pass. Room runs out, if at all, without harm: what does not fit is only counted.
  auto collect = [&](float value, int j, bool inside) {
    const bool pass = value >= least && (inside || (j >= row.sinks && j < row.local));
    const unsigned lanes = __ballot_sync(kLanes, pass);
    if (lanes == 0) return;
    uint32_t base = 0;
    if (lane == 0) base = atomicAdd(&shared.candidates, uint32_t(__popc(lanes)));
    base = __shfl_sync(kLanes, base, 0) + __popc(lanes & lanes_before());
    if (pass && base < uint32_t(room)) {
      keys[base] = key_of(value);
      indices[base] = j;
    }
  };
  constexpr int wide = Vector<Element>::size, tile = kWarp * wide;
  constexpr int ahead = 4;  // loads under way per thread: 512 threads x 2 CTAs x 64 bytes
  const bool aligned = reinterpret_cast<uintptr_t>(row.scores) % 16 == 0;
  const int whole = aligned ? row.limit / tile * tile : 0;
  for (int64_t start = int64_t(warp) * tile; start < whole; start += int64_t(kThreads) * wide * ahead) {
    Vector<Element> loaded[ahead];
#pragma unroll
    for (int u = 0; u < ahead; ++u) {
      const int64_t at = start + int64_t(u) * kThreads * wide;
      if (at < whole) loaded[u] = *reinterpret_cast<const Vector<Element>*>(row.scores + at + lane * wide);
    }
#pragma unroll
    for (int u = 0; u < ahead; ++u) {
      const int64_t at = start + int64_t(u) * kThreads * wide;
      if (at >= whole) break;
      bool any = false;
#pragma unroll
      for (int i = 0; i < wide; ++i) any |= widened(loaded[u].elements[i]) >= least;
      if (!__any_sync(kLanes, any)) continue;
      const bool inside = at >= row.sinks && at + tile <= row.local;
#pragma unroll
      for (int i = 0; i < wide; ++i) collect(widened(loaded[u].elements[i]), int(at) + lane * wide + i, inside);
    }
  }
  for (int start = whole + warp * kWarp; start < row.limit; start += kThreads) {
    const int j = start + lane;
    collect(j < row.limit ? row.value(j) : -__builtin_huge_valf(), j, false);
  }
  __syncthreads();
  const int64_t found = shared.candidates;
  if (found > room || found < wanted) return false;

  const Cut cut =
      find_cut<false>(uint64_t(wanted), found, [&](int64_t e) { return keys[e]; }, no_units, 3, bins, shared).cut;
  for (int e = int(threadIdx.x); e < found; e += kThreads) {
    uint32_t* map = keys[e] > cut.key ? sure : keys[e] == cut.key ? equal : nullptr;
    if (map) atomicOr(&map[indices[e] / 32], 1u << indices[e] % 32);
  }
  __syncthreads();
  // Ties in order of their index: the first of all. Then the bits in order.
  const int each = ceil_div(words, kThreads);
  const int begin = min(int(threadIdx.x) * each, words), end = min(begin + each, words);
  uint32_t own = 0, total;
  for (int w = begin; w < end; ++w) own += __popc(equal[w]);
  int64_t ties = cut.ties - int64_t(cta_scan<kThreads>(own, shared.scratch, &total));
  own = 0;
  for (int w = begin; w < end; ++w) {
    uint32_t taken = 0;
    for (uint32_t left = equal[w]; left && ties > 0; left &= left - 1, --ties) taken |= left & -left;
    sure[w] |= taken;
    own += __popc(sure[w]);
  }
  uint32_t place = cta_scan<kThreads>(own, shared.scratch, &total);
  int32_t* out = c.indices + number * c.width;
  double mass = 0;
  for (int w = begin; w < end; ++w) {
    for (uint32_t left = sure[w]; left; left &= left - 1) {
      const int j = w * 32 + __ffs(int(left)) - 1;
      out[place++] = j;
      if (c.mass) mass += double(row.value(j));
    }
  }
  for (int64_t slot = total + int64_t(threadIdx.x); slot < c.width; slot += kThreads) out[slot] = -1;
  if (threadIdx.x == 0) c.counts[number] = int32_t(total);
  if (c.mass) {
    mass = cta_sum<kThreads>(mass, shared.scratch);
    if (threadIdx.x == 0) c.mass[number] = float(mass);
  }
  return true;
}

// ---- kernels

template <class Element>
__global__ void __launch_bounds__(kThreads, 2) choose_long(ChoiceCall call) {
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  __shared__ Shared shared;
  Histogram& bins = *reinterpret_cast<Histogram*>(dynamic_shared);
  const Choice& c = call.c;
  const int64_t number = blockIdx.x;
  const ChoiceRow<Element> row(c, number);
  const int64_t k = c.row_k ? int64_t(c.row_k[number]) : c.k;
  if (call.candidates > 0) {
    if (choose_by_sample(call, number, row, k, bins, shared)) return;
    __syncthreads();
  }
  auto for_each = [&](auto visit) {
    for (int64_t j = threadIdx.x; j < row.limit; j += kThreads) {
      const uint32_t key = key_of(row.value(int(j)));
      if (key != kNever) visit(key, row.forced(int(j)));
    }
  };
  auto key_at = [&](int64_t e) { return key_of(row.value(row.sinks + int(e))); };  // of those between the forced ends
  const int64_t between = row.local - row.sinks;
  const Totals totals = count_entries(for_each, shared);

  Found found = {{kAbove, 0}, 0};
  auto take_above = [&](uint32_t bound) {
    uint64_t above = 0;
    for_each([&](uint32_t key, bool forced) { above += !forced && key > bound; });
    found = {{bound, 0}, int64_t(cta_sum<kThreads>(above, shared.scratch))};
  };
  if (c.rule == ChoiceRule::top_k) {
    found.others = k > totals.forced ? k - totals.forced : 0;
  } else if (c.rule == ChoiceRule::threshold) {
    const float threshold = c.thresholds[number];
    const uint32_t key = key_of(threshold);
    if (threshold == threshold) take_above(key == kNever ? kNever : key - 1);
  } else if (call.head.keys) {
    const int64_t head = number / c.rows;
    const uint32_t cut = call.head.keys[head];
    take_above(cut);
    uint64_t equal = 0;
    for_each([&](uint32_t key, bool forced) { equal += !forced && key == cut; });
    equal = cta_sum<kThreads>(equal, shared.scratch);
    found.cut.ties = clamped(call.head.ties[head] - call.head.before[number], 0, int64_t(equal));
    found.others += found.cut.ties;
  } else {
    const double p = c.row_p ? double(c.row_p[number]) : c.p;
    if (p >= 1) {
      take_above(kZero);
    } else {
      found = cut_of_share(p, totals, call.bits, between, for_each, key_at, bins, shared);
    }
  }
  const auto eligible = int64_t(totals.eligible);
  const int64_t wanted = bounded(c, found.others, totals.forced, eligible);
  Cut cut = found.cut;
  if (wanted != found.others || c.rule == ChoiceRule::top_k) {
    if (wanted <= 0) {
      cut = {kAbove, 0};
    } else if (wanted >= eligible) {
      cut = {kNever, 0};
    } else {
      cut = find_cut<false>(uint64_t(wanted), between, key_at, Units(kNever, 0), 3, bins, shared).cut;
    }
  }
  write_row(c, number, row, cut, shared);
}

/// The cut of all rows of a head together, and in `before` the entries equal to it in the rows before each.
template <class Element>
__global__ void __launch_bounds__(kThreads, 2) cut_heads(ChoiceCall call) {
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  __shared__ Shared shared;
  Histogram& bins = *reinterpret_cast<Histogram*>(dynamic_shared);
  const Choice& c = call.c;
  const int64_t head = blockIdx.x, count = c.rows * c.columns;
  auto entry = [&](int64_t e, bool* forced) -> uint32_t {
    const int64_t r = e / c.columns;
    const int j = int(e - r * c.columns);
    const ChoiceRow<Element> row(c, head * c.rows + r);
    *forced = row.forced(j);
    return j < row.limit ? key_of(row.value(j)) : kNever;
  };
  auto for_each = [&](auto visit) {
    for (int64_t e = threadIdx.x; e < count; e += kThreads) {
      bool forced;
      const uint32_t key = entry(e, &forced);
      if (key != kNever) visit(key, forced);
    }
  };
  auto key_at = [&](int64_t e) {
    bool forced;
    const uint32_t key = entry(e, &forced);
    return forced ? kNever : key;
  };
  Cut cut = {kZero, 0};
  const double p = c.row_p ? double(c.row_p[head]) : c.p;
  if (!(p >= 1)) {
    const Totals totals = count_entries(for_each, shared);
    cut = cut_of_share(p, totals, call.bits, count, for_each, key_at, bins, shared).cut;
  }
  if (threadIdx.x == 0) {
    call.head.keys[head] = cut.key;
    call.head.ties[head] = cut.ties;
  }
  int64_t* before = call.head.before + head * c.rows;
  int64_t sum = 0;
  for (int64_t first = 0; first < c.rows; first += kThreads / kWarp) {  // a warp per row, then in order
    const int64_t r = first + warp_of();
    uint32_t equal = 0;
    if (r < c.rows && cut.ties > 0) {
      const ChoiceRow<Element> row(c, head * c.rows + r);
      for (int j = row.sinks + lane_of(); j < row.local; j += kWarp) equal += key_of(row.value(j)) == cut.key;
    }
    equal = warp_sum(equal);
    if (lane_of() == 0) shared.segments[0][warp_of()] = equal;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 0; w < kThreads / kWarp && first + w < c.rows; ++w) {
        before[first + w] = sum;
        sum += shared.segments[0][w];
      }
    }
    __syncthreads();
  }
}

/// Room for the candidates of top-k rows of `columns`, of which at most `wanted` are taken; 0 where sampling does not
/// pay or shared memory does not hold it.
int candidates_of(const Choice& c) {
  if (c.rule != ChoiceRule::top_k || c.columns < 8 * kSample || c.columns > (1 << 19)) return 0;
  const double wanted = double(std::max<int64_t>(c.row_k ? c.width : std::min(c.k, c.width), c.min_count));
  const double expected = wanted * kSample / double(c.columns);
  const double rank = expected + 4 * std::sqrt(expected) + 8;
  const double room = (rank + 5 * std::sqrt(rank) + 8) * double(c.columns) / kSample;
  if (wanted * 8 > double(c.columns) || room > 16384) return 0;
  return std::max(kSample, (int(room) + 31) / 32 * 32);
}

template <class Element>
void run(ChoiceCall call, bool short_rows, cudaStream_t stream) {
  const Choice& c = call.c;
  if (call.head.keys) launch(cut_heads<Element>, unsigned(c.heads), kThreads, sizeof(Histogram), stream, call);
  if (short_rows) return choose_short_rows(call, stream);
  call.candidates = candidates_of(c);
  size_t bytes = c.rule == ChoiceRule::top_p && !c.by_head ? sizeof(Histogram) : kCountBytes;
  if (call.candidates > 0) bytes += size_t(call.candidates) * 8 + size_t(ceil_div<int64_t>(c.columns, 32)) * 8;
  launch(choose_long<Element>, unsigned(c.heads * c.rows), kThreads, bytes, stream, call);
}

}  // namespace

size_t choice_workspace(const Choice& c) { return c.by_head ? size_t(c.heads) * (c.rows + 2) * sizeof(int64_t) : 0; }

Status choose_rows(const Choice& c, const CudaContext& context) {
  ChoiceCall call;
  call.c = c;
  const int64_t together = c.by_head ? c.rows * c.columns : c.columns;
  while (int64_t(1) << call.bits < together) ++call.bits;
  if (c.by_head) {
    auto* words = static_cast<int64_t*>(context.workspace);
    call.head.ties = words;
    call.head.before = words + c.heads;
    call.head.keys = reinterpret_cast<uint32_t*>(call.head.before + c.heads * c.rows);
  }
  const bool short_rows = c.columns <= kShortRow;
  const auto stream = static_cast<cudaStream_t>(context.stream);
  if (short_rows && !c.by_head) {
    choose_short_rows(call, stream);
  } else if (c.dtype == DType::f16) {
    run<__half>(call, short_rows, stream);
  } else if (c.dtype == DType::bf16) {
    run<__nv_bfloat16>(call, short_rows, stream);
  } else {
    run<float>(call, short_rows, stream);
  }
  return launched("a choice");
}

}  // namespace sparsekit::cuda

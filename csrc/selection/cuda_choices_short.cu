// The choice of the best entries of rows of up to 1,024 (include/sparsekit/selection.h, Choice): one warp per row, the
// row's scores in registers.
//
// A rule becomes a cut (scores above one number, and the first few equal to it), found by halving the interval of keys
// that it lies in: a pass counts the scores, or sums their masses, above the middle. When 32 are left in the interval
// they are sorted across the lanes, one each. Masses are whole units (cuda_choices.cuh), so that the same choice is
// made on every device and run; but first come sums of plain floats, and only where one is so close to what is wanted
// that it cannot tell, the units. List entries are put together in shared memory and written as whole lines.
//
// Bound: issue slots. A row of 1,024 costs about 5 passes of 4 instructions per score; 64 registers let all warps of a
// multiprocessor have a row. Reading and writing 4,096 such rows is 34 MB.
#include "selection/cuda_choices.cuh"
#include "selection/cuda_kernels.h"

namespace sparsekit::cuda {
namespace {

constexpr int kWarps = 4;
constexpr float kNone = -__builtin_huge_valf();

/// The number that a score is above exactly where its key is above `key`: -0 is no key, and what is below the keys of
/// numbers, or above them, is NaN.
__device__ __forceinline__ float pivot_of(uint32_t key) {
  constexpr uint32_t lowest = 0x00800000u;  // of a number
  return key < lowest ? kNone : score_of(key == kZero - 1 ? key - 1 : key);
}

/// Units of masses that are floats (as Units::of has them) in two whole numbers, both by additions of floats: `high`
/// counts 2^low_bits units, `low` the rest, which may be negative.
template <bool FEW>
struct FloatUnits {
  static constexpr float kMagic = 12582912.f;  // 1.5 * 2^23: a float from 2^23 to 2^24 ends with its units
  float first, second;                         // powers of two; their product lifts all masses below 2^22
  int low_bits;
  float low_factor;

  /// The highest key, and `bits` = ceil(log2(entries)); more than 8 unless FEW.
  __device__ __forceinline__ FloatUnits(const Units& units, int bits) {
    low_bits = 30 - bits;
    low_factor = power(low_bits);
    const int up = units.shift - low_bits;
    first = power(min(up, 100));
    second = power(up - min(up, 100));
  }
  struct Sum {
    uint32_t high = 0, low = 0;
  };
  /// Adds a mass >= 0; the sum of `count` of them is units_of(sum, count).
  __device__ __forceinline__ void add(Sum& sum, float mass) const {
    const float lifted = fminf(mass, 3.402823466e38f) * first * second, high = lifted + kMagic;
    const float rest = lifted - (high - kMagic);
    sum.high += __float_as_uint(high);
    sum.low += FEW ? uint32_t(__float2int_rn(rest * low_factor)) : __float_as_uint(fmaf(rest, low_factor, kMagic));
  }
  __device__ __forceinline__ uint64_t units_of(const Sum& sum, uint32_t count) const {
    const uint32_t base = count * __float_as_uint(kMagic);
    return (uint64_t(sum.high - base) << low_bits) + uint64_t(int64_t(int32_t(FEW ? sum.low : sum.low - base)));
  }

 private:
  __device__ __forceinline__ static float power(int exponent) { return __int_as_float((exponent + 127) << 23); }
};

/// Scores of a row: lane l has entries l, l + 32, ... of it; kNone where an entry may not be chosen or is forced.
template <int ENTRIES>
struct WarpScores {
  using Masses = FloatUnits<(ENTRIES < 16)>;
  float scores[ENTRIES];
  float* spare;  // [32] of this warp, shared memory

  __device__ __forceinline__ uint32_t count_above(uint32_t key) const {
    const float pivot = pivot_of(key);
    uint32_t count = 0;
#pragma unroll
    for (int i = 0; i < ENTRIES; ++i) count += scores[i] > pivot;
    return warp_sum(count);
  }

  /// The units above a number >= 0.
  __device__ __forceinline__ uint64_t units_above(float pivot, const Masses& masses) const {
    pivot = __shfl_sync(kLanes, pivot, 0);  // the same; else ptxas keeps an earlier pass's comparisons, 5 instructions
    typename Masses::Sum sum;
#pragma unroll
    for (int i = 0; i < ENTRIES; ++i) masses.add(sum, scores[i] > pivot ? scores[i] : 0.f);
    return warp_sum(masses.units_of(sum, ENTRIES));
  }

  /// The scores with keys in (low, high], at most 32 of them, greatest first, one per lane; kNone behind them.
  __device__ __forceinline__ float sorted(uint32_t low, uint32_t high) const {
    const float above = pivot_of(low), top = pivot_of(high);
    int found = 0;
#pragma unroll
    for (int i = 0; i < ENTRIES; ++i) {
      const bool inside = scores[i] > above && scores[i] <= top;
      const unsigned lanes = __ballot_sync(kLanes, inside);
      if (inside) spare[found + __popc(lanes & lanes_before())] = scores[i];
      found += __popc(lanes);
    }
    __syncwarp();
    const int lane = lane_of();
    float score = lane < found ? spare[lane] : kNone;
    __syncwarp();
#pragma unroll
    for (int size = 2; size <= kWarp; size *= 2) {
#pragma unroll
      for (int stride = size / 2; stride > 0; stride /= 2) {
        const float other = __shfl_xor_sync(kLanes, score, stride);
        const bool greatest_first = (lane & size) == 0, first = (lane & stride) == 0;
        score = greatest_first == first ? fmaxf(score, other) : fminf(score, other);
      }
    }
    return score;
  }
  /// The cut at lane `last` of sorted scores.
  __device__ __forceinline__ static Cut cut_at(float score, int last) {
    const float cut = __shfl_sync(kLanes, score, last);
    return {key_of(cut), last + 2 - __ffs(int(__ballot_sync(kLanes, score == cut)))};
  }

  /// The cut that takes `wanted` of the `eligible` scores; no key is above `highest`.
  __device__ Cut cut_by_count(int wanted, int eligible, uint32_t highest) const {
    if (wanted <= 0) return {kAbove, 0};
    if (wanted >= eligible) return {kNever, 0};
    uint32_t low = kNever, high = highest;
    int above = 0, from_low = eligible;  // keys above `high`, above `low`
    while (high - low > 1 && from_low - above > kWarp) {
      const uint32_t middle = low + (high - low) / 2;
      const int count = int(count_above(middle));
      if (count == wanted) return {middle, 0};
      if (count > wanted) {
        low = middle;
        from_low = count;
      } else {
        high = middle;
        above = count;
      }
    }
    if (from_low - above > kWarp) return {high, wanted - above};
    return cut_at(sorted(low, high), wanted - above - 1);
  }

  /// The sum of floats over the lanes.
  __device__ __forceinline__ static float sum_lanes(float x) {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kLanes, x, step);
    return x;
  }

  /// The cut that takes the fewest scores whose sum is at least `goal` > `doubt`, of the `total` of all that are
  /// positive, and how many that are. False where a sum is so close to the goal, `doubt` or less, that only units can
  /// tell.
  __device__ bool cut_by_sum(float goal, float total, float doubt, int eligible, uint32_t highest, Cut* cut,
                             int64_t* others) const {
    uint32_t low = kZero, high = highest;  // the sum above `low` is more than the goal; above `high`, less
    int above = 0, from_low = eligible;    // keys above them, or more
    float above_sum = 0.f;
    // What is at or below the mean of what may be left out, is.
    const float least = (total - goal - doubt) / float(eligible) * 0.9999f;
    if (least > 0.f) low = min(key_of(least), high - 1);
    while (high - low > 1 && from_low - above > kWarp) {
      const uint32_t middle = low + (high - low) / 2;
      const float pivot = pivot_of(middle);
      float counts[2] = {0.f, 0.f}, sums[2] = {0.f, 0.f};
#pragma unroll
      for (int i = 0; i < ENTRIES; ++i) {
        if (scores[i] > pivot) {
          counts[i % 2] += 1.f;
          sums[i % 2] += scores[i];
        }
      }
      const int count = int(warp_sum(uint32_t(counts[0] + counts[1])));
      const float sum = sum_lanes(sums[0] + sums[1]);
      if (fabsf(sum - goal) <= doubt) return false;
      if (sum > goal) {
        low = middle;
        from_low = count;
      } else {
        high = middle;
        above = count;
        above_sum = sum;
      }
    }
    if (from_low - above > kWarp) {  // scores of one number
      const float each = pivot_of(high), ties = (goal - above_sum) / each;
      if (!(fabsf(ties - rintf(ties)) * each > doubt)) return false;
      *cut = {high, int64_t(ceilf(ties))};
      *others = above + cut->ties;
      return true;
    }
    const float score = sorted(low, high), sum = above_sum + warp_scan(fmaxf(score, 0.f));
    if (__any_sync(kLanes, fabsf(sum - goal) <= doubt)) return false;
    const int last = __ffs(int(__ballot_sync(kLanes, sum > goal))) - 1;
    if (last < 0) return false;  // the sum of all, in another order, is less
    *others = above + last + 1;
    *cut = cut_at(score, last);
    return true;
  }

  /// The cut that takes the fewest scores with at least `wanted` > 0 units, of which all have as many.
  __device__ Cut cut_by_units(const Masses& masses, const Units& units, uint64_t wanted, int eligible, uint32_t highest,
                              int64_t* others) const {
    uint32_t low = kZero, high = highest;  // units above `low`: as many as wanted, or more; above `high`: fewer
    int above = 0, from_low = eligible;    // keys above them, or more
    uint64_t above_units = 0;
    while (high - low > 1 && from_low - above > kWarp) {
      const uint32_t middle = low + (high - low) / 2;
      const int count = int(count_above(middle));
      const uint64_t sum = units_above(pivot_of(middle), masses);
      if (sum >= wanted) {
        low = middle;
        from_low = count;
      } else {
        high = middle;
        above = count;
        above_units = sum;
      }
    }
    if (from_low - above > kWarp) {
      const uint64_t each = units.of(high);  // not 0: the scores of this one number make up what is missing
      const int64_t ties = int64_t((wanted - above_units + each - 1) / each);
      *others = above + ties;
      return {high, ties};
    }
    const float score = sorted(low, high);
    const uint64_t sum = above_units + warp_scan(units.of(key_of(score)));
    const int last = __ffs(int(__ballot_sync(kLanes, sum >= wanted))) - 1;
    *others = above + last + 1;
    return cut_at(score, last);
  }

  /// Top-p, p < 1: of these scores and the forced ones, which `for_forced` visits. `others`: how many the cut takes.
  template <class Visit>
  __device__ __forceinline__ Cut cut_by_mass(double p, int bits, int eligible, uint32_t highest,
                                             uint32_t highest_forced, Visit for_forced, int64_t* others) const {
    *others = 0;
    if (!(p > 0)) return {kAbove, 0};
    const Units units(max(highest, highest_forced), bits);
    if (units.shift > -70 && units.shift < 100) {  // sums below 2^122, and no unit below 2^-100
      float sums[2] = {0.f, 0.f}, forced = 0.f;
#pragma unroll
      for (int i = 0; i < ENTRIES; ++i) sums[i % 2] += fmaxf(scores[i], 0.f);
      for_forced([&](float score) { forced += fmaxf(score, 0.f); });
      const float total = sum_lanes(sums[0] + sums[1]);
      forced = sum_lanes(forced);
      // 37 additions, the last 5 over the lanes, and twice that in the goal, are less than 2^-17 of all off.
      const float goal = float(p) * (total + forced) - forced, doubt = (total + forced) * 0x1p-16f;
      if (goal < -doubt) return {kAbove, 0};
      Cut cut;
      if (goal > doubt && cut_by_sum(goal, total, doubt, eligible, highest, &cut, others)) return cut;
    }
    const Masses masses(units, bits);
    uint64_t forced = 0;
    for_forced([&](float score) { forced += units.of(key_of(score)); });
    forced = warp_sum(forced);
    const uint64_t wanted = wanted_units(p, units_above(0.f, masses) + forced, forced);
    return wanted > 0 ? cut_by_units(masses, units, wanted, eligible, highest, others) : Cut{kAbove, 0};
  }
};

/// The first `taken` of a list of `width` from `stage`, -1 behind them.
template <int ROOM>
__device__ __forceinline__ void write_list(int32_t* out, int64_t width, const int32_t* stage, int taken) {
  __syncwarp();
  if (width % 4 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
    for (int64_t at = 4 * lane_of(); at < width; at += 4 * kWarp) {
      int4 four = at < ROOM ? *reinterpret_cast<const int4*>(stage + at) : make_int4(-1, -1, -1, -1);
      if (at >= taken) four.x = -1;
      if (at + 1 >= taken) four.y = -1;
      if (at + 2 >= taken) four.z = -1;
      if (at + 3 >= taken) four.w = -1;
      *reinterpret_cast<int4*>(out + at) = four;
    }
  } else {
    for (int64_t at = lane_of(); at < width; at += kWarp) out[at] = at < taken ? stage[at] : -1;
  }
}

template <class Element, int ENTRIES, bool BY_MASS>
__global__ void __launch_bounds__(kWarps* kWarp, 8) choose_short(ChoiceCall call) {
  __shared__ __align__(16) int32_t stages[kWarps][ENTRIES * kWarp];
  const Choice& c = call.c;
  const int64_t number = int64_t(blockIdx.x) * kWarps + warp_of();
  if (number >= c.heads * c.rows) return;
  const ChoiceRow<Element> row(c, number);
  const int lane = lane_of();

  int32_t* stage = stages[warp_of()];
  WarpScores<ENTRIES> all;
  all.spare = reinterpret_cast<float*>(stage);
  const int left = row.limit - lane;
  const Element* from = row.scores + lane;
#pragma unroll
  for (int i = 0; i < ENTRIES; ++i) {  // all loads under way at once: nothing else stands between them
    all.scores[i] = i * kWarp < left ? widened(from[i * kWarp]) : kNone;
  }
  if (row.weights) {
    const float* weights = row.weights + lane;
#pragma unroll
    for (int i = 0; i < ENTRIES; ++i) {
      if (i * kWarp < left) all.scores[i] *= weights[i * kWarp];
    }
  }
  uint32_t forced = 0, eligible = 0;  // forced: bit i for entry i
  float best = kNone, best_forced = kNone;
#pragma unroll
  for (int i = 0; i < ENTRIES; ++i) {
    if (row.forced(i * kWarp + lane) && all.scores[i] > kNone) {
      forced |= 1u << i;
      best_forced = fmaxf(best_forced, all.scores[i]);
      all.scores[i] = kNone;
    }
    best = fmaxf(best, all.scores[i]);
    eligible += all.scores[i] > kNone;
  }
  const uint32_t highest = warp_max(key_of(best)), highest_forced = warp_max(key_of(best_forced));
  eligible = warp_sum(eligible);
  const uint32_t forced_count = warp_sum(uint32_t(__popc(forced)));

  Cut cut = {kAbove, 0};
  int64_t others = 0;
  if (c.rule == ChoiceRule::top_k) {
    const int64_t k = (c.row_k ? int64_t(c.row_k[number]) : c.k) - forced_count;
    others = k > 0 ? k : 0;
  } else if (c.rule == ChoiceRule::threshold) {
    const float threshold = c.thresholds[number];
    if (threshold == threshold) {
      const uint32_t key = key_of(threshold);
      cut.key = key == kNever ? kNever : key - 1;
      others = all.count_above(cut.key);
    }
  } else if (call.head.keys) {
    const int64_t head = number / c.rows;
    cut.key = call.head.keys[head];
    uint32_t equal = 0;
#pragma unroll
    for (int i = 0; i < ENTRIES; ++i) equal += all.scores[i] == score_of(cut.key);
    equal = warp_sum(equal);
    cut.ties = clamped(call.head.ties[head] - call.head.before[number], 0, equal);
    others = all.count_above(cut.key) + cut.ties;
  } else {
    const double p = c.row_p ? double(c.row_p[number]) : c.p;
    if (p >= 1) {
      cut.key = kZero;
      others = all.count_above(cut.key);
    } else if constexpr (BY_MASS) {
      const auto for_forced = [&](auto visit) {
        for (uint32_t left = forced; left; left &= left - 1) visit(row.value((__ffs(int(left)) - 1) * kWarp + lane));
      };
      cut = all.cut_by_mass(p, call.bits, int(eligible), highest, highest_forced, for_forced, &others);
    }
  }
  const int64_t wanted = bounded(c, others, forced_count, eligible);
  if (wanted != others || c.rule == ChoiceRule::top_k) cut = all.cut_by_count(int(wanted), int(eligible), highest);

  int taken = 0, ties = int(min(cut.ties, int64_t(ENTRIES * kWarp)));
  const float pivot = pivot_of(cut.key), tied = score_of(cut.key);
#pragma unroll
  for (int i = 0; i < ENTRIES; ++i) {
    bool take = all.scores[i] > pivot || (forced >> i & 1);
    if (ties > 0) {
      const bool equal = all.scores[i] == tied;
      const unsigned lanes = __ballot_sync(kLanes, equal);
      take |= equal && __popc(lanes & lanes_before()) < ties;
      ties -= __popc(lanes);
    }
    const unsigned lanes = __ballot_sync(kLanes, take);
    if (take) stage[taken + __popc(lanes & lanes_before())] = i * kWarp + lane;
    taken += __popc(lanes);
  }
  write_list<ENTRIES * kWarp>(c.indices + number * c.width, c.width, stage, taken);
  if (lane == 0) c.counts[number] = taken;
  if (c.mass) {
    double mass = 0;
    for (int at = lane; at < taken; at += kWarp) mass += double(row.value(stage[at]));
    mass = warp_sum(mass);
    if (lane == 0) c.mass[number] = float(mass);
  }
}

template <class Element, int ENTRIES>
void run(const ChoiceCall& call, cudaStream_t stream) {
  const Choice& c = call.c;
  const auto grid = unsigned(ceil_div(c.heads * c.rows, int64_t(kWarps)));
  const bool by_mass = c.rule == ChoiceRule::top_p && !call.head.keys;
  launch(by_mass ? choose_short<Element, ENTRIES, true> : choose_short<Element, ENTRIES, false>, grid, kWarps * kWarp,
         0, stream, call);
}

template <class Element>
void run_element(const ChoiceCall& call, cudaStream_t stream) {
  call.c.columns <= 8 * kWarp ? run<Element, 8>(call, stream) : run<Element, 32>(call, stream);
}

}  // namespace

void choose_short_rows(const ChoiceCall& call, cudaStream_t stream) {
  switch (call.c.dtype) {
    case DType::f16: return run_element<__half>(call, stream);
    case DType::bf16: return run_element<__nv_bfloat16>(call, stream);
    default: return run_element<float>(call, stream);
  }
}

}  // namespace sparsekit::cuda

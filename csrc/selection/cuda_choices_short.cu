// The choice of the best entries of rows of up to 1,024 (include/sparsekit/selection.h, Choice): one warp per row, the
// row's keys in registers.
//
// A rule becomes a cut (keys above one number, and the first few equal to it), found by halving the interval of keys
// that it lies in: a pass counts the keys, or sums their masses, above the middle. When 32 keys are left in the
// interval they are sorted across the lanes, one each. Integers throughout: the same choice on every device and run.
//
// Bound: issue slots. A row of 1,024 costs about 10 passes of 2 (count) or 4 (mass) instructions per key; reading and
// writing 4,096 such rows is 34 MB.
#include "selection/cuda_choices.cuh"
#include "selection/cuda_kernels.h"

namespace sparsekit::cuda {
namespace {

constexpr int kWarps = 4;

/// Keys of a row: lane l has entries l, l + 32, ... of it; kNever where an entry may not be chosen or is forced.
template <int ENTRIES>
struct WarpKeys {
  uint32_t keys[ENTRIES];
  uint32_t* spare;  // [32] of this warp, shared memory

  __device__ __forceinline__ uint32_t count_above(uint32_t key) const {
    uint32_t count = 0;
#pragma unroll
    for (int i = 0; i < ENTRIES; ++i) count += keys[i] > key;
    return warp_sum(count);
  }

  /// The keys in (low, high], at most 32 of them, greatest first, one per lane; kNever behind them.
  __device__ __forceinline__ uint32_t sorted(uint32_t low, uint32_t high) const {
    int found = 0;
#pragma unroll
    for (int i = 0; i < ENTRIES; ++i) {
      const bool inside = keys[i] > low && keys[i] <= high;
      const unsigned lanes = __ballot_sync(kLanes, inside);
      if (inside) spare[found + __popc(lanes & lanes_before())] = keys[i];
      found += __popc(lanes);
    }
    __syncwarp();
    const int lane = lane_of();
    uint32_t key = lane < found ? spare[lane] : kNever;
    __syncwarp();
#pragma unroll
    for (int size = 2; size <= kWarp; size *= 2) {
#pragma unroll
      for (int stride = size / 2; stride > 0; stride /= 2) {
        const uint32_t other = __shfl_xor_sync(kLanes, key, stride);
        const bool greatest_first = (lane & size) == 0, first = (lane & stride) == 0;
        key = greatest_first == first ? max(key, other) : min(key, other);
      }
    }
    return key;
  }

  /// The cut that takes `wanted` of the `eligible` keys; none is above `highest`.
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
    const uint32_t key = sorted(low, high);
    const int last = wanted - above - 1;
    const uint32_t cut = __shfl_sync(kLanes, key, last);
    return {cut, last + 2 - __ffs(int(__ballot_sync(kLanes, key == cut)))};
  }

  /// The cut that takes the fewest keys with at least `wanted` > 0 units, of which all have as much or more. `others`:
  /// how many that are.
  __device__ Cut cut_by_mass(const uint64_t (&masses)[ENTRIES], uint64_t wanted, int eligible, uint32_t highest,
                             const Units& units, int64_t* others) const {
    uint32_t low = kNever, high = highest;
    int above = 0, from_low = eligible;
    uint64_t above_mass = 0;
    while (high - low > 1 && from_low - above > kWarp) {
      const uint32_t middle = low + (high - low) / 2;
      uint32_t counts[2] = {0, 0};
      uint64_t sums[2] = {0, 0};
#pragma unroll
      for (int i = 0; i < ENTRIES; ++i) {
        if (keys[i] > middle) {
          ++counts[i % 2];
          sums[i % 2] += masses[i];
        }
      }
      const int count = int(warp_sum(counts[0] + counts[1]));
      const uint64_t sum = warp_sum(sums[0] + sums[1]);
      if (sum >= wanted) {
        low = middle;
        from_low = count;
      } else {
        high = middle;
        above = count;
        above_mass = sum;
      }
    }
    if (from_low - above > kWarp) {
      const uint64_t each = units.of(high);  // not 0: the keys of this one number make up what is missing
      const int64_t ties = int64_t((wanted - above_mass + each - 1) / each);
      *others = above + ties;
      return {high, ties};
    }
    const uint32_t key = sorted(low, high);
    const uint64_t sum = above_mass + warp_scan(units.of(key));
    const int last = __ffs(int(__ballot_sync(kLanes, sum >= wanted))) - 1;
    const uint32_t cut = __shfl_sync(kLanes, key, last);
    *others = above + last + 1;
    return {cut, last + 2 - __ffs(int(__ballot_sync(kLanes, key == cut)))};
  }
};

template <class Element, int ENTRIES, bool BY_MASS>
__global__ void __launch_bounds__(kWarps* kWarp, 4) choose_short(ChoiceCall call) {
  __shared__ uint32_t spare[kWarps][kWarp];
  const Choice& c = call.c;
  const int64_t number = int64_t(blockIdx.x) * kWarps + warp_of();
  if (number >= c.heads * c.rows) return;
  const ChoiceRow<Element> row(c, number);
  const int lane = lane_of();

  WarpKeys<ENTRIES> all;
  all.spare = spare[warp_of()];
  float values[ENTRIES];
#pragma unroll
  for (int i = 0; i < ENTRIES; ++i) {  // all loads under way at once: nothing else stands between them
    const int j = i * kWarp + lane;
    values[i] = j < row.limit ? widened(row.scores[j]) : -__builtin_huge_valf();
  }
  if (row.weights) {
#pragma unroll
    for (int i = 0; i < ENTRIES; ++i) {
      const int j = i * kWarp + lane;
      if (j < row.limit) values[i] *= row.weights[j];
    }
  }
  uint32_t forced = 0, highest = kNever, highest_forced = kNever, eligible = 0;  // forced: bit i for entry i
#pragma unroll
  for (int i = 0; i < ENTRIES; ++i) {
    uint32_t key = key_of(values[i]);
    if (key != kNever && row.forced(i * kWarp + lane)) {
      forced |= 1u << i;
      highest_forced = max(highest_forced, key);
      key = kNever;
    }
    all.keys[i] = key;
    highest = max(highest, key);
    eligible += key != kNever;
  }
  highest = warp_max(highest);
  highest_forced = warp_max(highest_forced);
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
    for (int i = 0; i < ENTRIES; ++i) equal += all.keys[i] == cut.key;
    equal = warp_sum(equal);
    cut.ties = clamped(call.head.ties[head] - call.head.before[number], 0, equal);
    others = all.count_above(cut.key) + cut.ties;
  } else {
    const double p = c.row_p ? double(c.row_p[number]) : c.p;
    if (p >= 1) {
      cut.key = kZero;
      others = all.count_above(cut.key);
    } else if constexpr (BY_MASS) {
      const Units units(max(highest, highest_forced), call.bits);
      uint64_t masses[ENTRIES], sum = 0, forced_sum = 0;
#pragma unroll
      for (int i = 0; i < ENTRIES; ++i) {
        masses[i] = units.of(all.keys[i]);
        sum += masses[i];
      }
      for (uint32_t left = forced; left; left &= left - 1) {
        forced_sum += units.of(key_of(row.value((__ffs(int(left)) - 1) * kWarp + lane)));
      }
      sum = warp_sum(sum);
      forced_sum = warp_sum(forced_sum);
      const uint64_t wanted = wanted_units(p, sum + forced_sum, forced_sum);
      if (wanted > 0) cut = all.cut_by_mass(masses, wanted, int(eligible), highest, units, &others);
    }
  }
  const int64_t wanted = bounded(c, others, forced_count, eligible);
  if (wanted != others || c.rule == ChoiceRule::top_k) cut = all.cut_by_count(int(wanted), int(eligible), highest);

  int32_t* out = c.indices + number * c.width;
  int taken = 0, ties = int(min(cut.ties, int64_t(ENTRIES * kWarp)));
  double mass = 0;
#pragma unroll
  for (int i = 0; i < ENTRIES; ++i) {
    const int j = i * kWarp + lane;
    bool take = all.keys[i] > cut.key || (forced >> i & 1);
    if (ties > 0) {
      const bool equal = all.keys[i] == cut.key;
      const unsigned lanes = __ballot_sync(kLanes, equal);
      take |= equal && __popc(lanes & lanes_before()) < ties;
      ties -= __popc(lanes);
    }
    const unsigned lanes = __ballot_sync(kLanes, take);
    if (take) {
      out[taken + __popc(lanes & lanes_before())] = j;
      if (c.mass) mass += double(row.value(j));
    }
    taken += __popc(lanes);
  }
  for (int64_t slot = taken + lane; slot < c.width; slot += kWarp) out[slot] = -1;
  if (lane == 0) c.counts[number] = taken;
  if (c.mass) {
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

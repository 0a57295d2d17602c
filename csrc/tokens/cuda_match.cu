// Bipartite matching around the tensor cores: the search in float64, and the choice of the r best pairs.
//
// Search in float64: a warp per source goes through all destinations, its lanes through the elements; squares of fp32
// never leave float64, so every length is exact. It runs for samples that the tiles (cuda_match_sm80.cu) marked, for
// float64 and for rows that are not aligned. A sample that is not marked costs a load.
//
// Choice: a block per sample. Four passes over the best cosines as 32-bit keys find the key of the r-th best (radix
// select, 8 bits each), then one pass over the tokens in order numbers pairs and kept tokens by prefix sums; of equal
// cosines the lower positions are taken. Bound: latency, 6 us for 576 tokens; counting smaller keys instead took 12.
#include <algorithm>

#include "tokens/cuda_implementations.h"
#include "tokens/cuda_launch.h"
#include "tokens/cuda_numbers.cuh"
#include "tokens/cuda_plan.cuh"

namespace sparsekit::cuda {
namespace {

constexpr int kExactThreads = 256;

__device__ __forceinline__ int64_t count_of(const MatchTokens& m, int64_t s) {
  if (!m.counts) return m.tokens;
  const int64_t n = m.counts[s];
  return n < 0 ? 0 : n > m.tokens ? m.tokens : n;
}

__device__ __forceinline__ double sum_of_lanes(double x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

template <class Element>
__device__ __forceinline__ double element(const Element* row, int64_t d) {
  return widen<double>(row[d]);
}

template <class Element>
__global__ void __launch_bounds__(kExactThreads)
    nearest_exactly(const __grid_constant__ MatchTokens m, const __grid_constant__ MatchSearch search, int64_t blocks) {
  const int64_t s = blockIdx.x / blocks;
  bool marked = search.tiles == 0;
  for (int64_t t = 0; t < search.tiles && !marked; ++t) marked = search.inexact[s * search.tiles + t] != 0;
  if (!marked) return;
  constexpr int warps = kExactThreads / 32;
  const int lane = threadIdx.x % 32;
  const int64_t count = count_of(m, s);
  const Element* sample = static_cast<const Element*>(m.metric.data) + s * m.metric.batch;
  for (int64_t i = int64_t(blockIdx.x) % blocks * warps + threadIdx.x / 32; i < search.sources; i += blocks * warps) {
    double best = -HUGE_VAL;
    int32_t chosen = int32_t(m.protect | 1);
    if (2 * i < count) {
      const Element* source = sample + 2 * i * m.metric.row;
      double length = 0.;
      for (int64_t d = lane; d < m.dim; d += 32) length = fma(element(source, d), element(source, d), length);
      length = sum_of_lanes(length);
      for (int64_t j = m.protect | 1; j < count && isfinite(length); j += 2) {
        const Element* destination = sample + j * m.metric.row;
        double other = 0., product = 0.;
        for (int64_t d = lane; d < m.dim; d += 32) {
          const double x = element(destination, d);
          other = fma(x, x, other);
          product = fma(x, element(source, d), product);
        }
        other = sum_of_lanes(other);
        product = sum_of_lanes(product);
        if (!isfinite(other)) continue;
        const double cosine = product == 0. ? 0. : product / (sqrt(length) * sqrt(other));
        if (cosine > best) best = cosine, chosen = int32_t(j);
      }
    }
    if (lane == 0) {
      search.best[s * search.sources + i] = float(best);
      search.target[s * search.sources + i] = chosen;
    }
  }
}

/// Ascending for descending cosines.
__device__ __forceinline__ uint32_t key_of(float cosine) {
  uint32_t bits = __float_as_uint(cosine == 0.f ? 0.f : cosine);  // -0 is 0
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return ~bits;
}

constexpr int kRankThreads = 512;

struct Threshold {
  uint32_t key = 0;
  int32_t equals = 0;  // pairs with that key that are taken
};

/// The key of the r-th best of candidates first .. end - 1.
__device__ Threshold threshold_of(const float* best, int64_t first, int64_t end, int64_t r) {
  __shared__ int32_t histogram[256], scratch[kRankThreads / 32 + 1], digit_found, left_found;
  uint32_t prefix = 0, known = 0;
  int32_t left = int32_t(r);
  for (int shift = 24; shift >= 0 && r > 0; shift -= 8) {
    for (int n = threadIdx.x; n < 256; n += kRankThreads) histogram[n] = 0;
    __syncthreads();
    for (int64_t i = first + threadIdx.x; i < end; i += kRankThreads) {
      const uint32_t key = key_of(best[i]);
      if ((key & known) == prefix) atomicAdd(histogram + (key >> shift & 255), 1);
    }
    __syncthreads();
    const int32_t mine = threadIdx.x < 256 ? histogram[threadIdx.x] : 0;
    int32_t all;
    const int32_t before = block_prefix(mine, scratch, &all);
    if (mine > 0 && before < left && left <= before + mine) {
      digit_found = int32_t(threadIdx.x);
      left_found = left - before;
    }
    __syncthreads();
    prefix |= uint32_t(digit_found) << shift;
    known |= 255u << shift;
    left = left_found;
    __syncthreads();
  }
  Threshold found;
  found.key = prefix;
  found.equals = left;
  return found;
}

__global__ void __launch_bounds__(kRankThreads)
    rank(const __grid_constant__ MatchTokens m, const __grid_constant__ MatchSearch search) {
  __shared__ int32_t scratch[kRankThreads / 32 + 1];
  const int64_t s = blockIdx.x, count = count_of(m, s);
  const float* best = search.best + s * search.sources;
  const int32_t* target = search.target + s * search.sources;
  const int64_t first = (m.protect + 1) / 2, end = (count + 1) / 2;  // candidates, in pairs of positions

  int64_t r = m.r;
  if (m.ragged_r) {
    r = m.ragged_r_wide ? static_cast<const long long*>(m.ragged_r)[s] : static_cast<const int32_t*>(m.ragged_r)[s];
  }
  const int64_t most = count > m.protect ? (count - m.protect) / 2 : 0;
  r = r < 0 ? 0 : r > most ? most : r;

  const Threshold last = threshold_of(best, first, end, r);
  int32_t* source = m.source + s * m.pair_capacity;
  int32_t* destination = m.destination + s * m.pair_capacity;
  int32_t* kept = m.kept + s * m.kept_capacity;
  int32_t* row = m.row + s * m.tokens;
  int32_t equals = 0, pairs = 0, rows = 0;  // so far
  for (int64_t base = 0; base < count; base += kRankThreads) {
    const int64_t n = base + threadIdx.x, i = n / 2;
    const bool candidate = r > 0 && n < count && n % 2 == 0 && i >= first;
    const uint32_t key = candidate ? key_of(best[i]) : 0xffffffffu;
    int32_t all;
    const int32_t equal = candidate && key == last.key;
    const int32_t equal_before = equals + block_prefix(equal, scratch, &all);
    equals += all;
    const int32_t merged = candidate && (key < last.key || (equal && equal_before < last.equals));
    const int32_t pair = pairs + block_prefix(merged, scratch, &all);
    pairs += all;
    const int32_t mine = rows + int32_t(threadIdx.x) - (pair - (pairs - all));
    if (n < count) {
      if (merged) {
        source[pair] = int32_t(n);
        destination[pair] = target[i];
        row[n] = -2 - target[i];  // until the rows of the destinations are known
      } else {
        row[n] = mine;
        kept[mine] = int32_t(n);
      }
    }
    rows += int32_t(count - base < kRankThreads ? count - base : kRankThreads) - all;
  }
  __syncthreads();
  for (int64_t n = threadIdx.x; n < count; n += kRankThreads) {
    const int32_t at = row[n];
    if (at < -1) row[n] = row[-2 - at];
  }
  if (threadIdx.x == 0) m.new_counts[s] = rows;
  for (int64_t n = count + threadIdx.x; n < m.tokens; n += kRankThreads) row[n] = -1;
  for (int64_t n = rows + threadIdx.x; n < m.kept_capacity; n += kRankThreads) kept[n] = -1;
  for (int64_t n = pairs + threadIdx.x; n < m.pair_capacity; n += kRankThreads) source[n] = destination[n] = -1;
}

}  // namespace

Status match_exactly(const MatchTokens& m, const MatchSearch& search, const CudaContext& context) {
  // A few blocks per sample: nearly always none has anything to do.
  const int64_t most = (search.sources * 32 + kExactThreads - 1) / kExactThreads;
  const int64_t few = 8 * std::max(1, context.multiprocessors) / std::max<int64_t>(1, m.samples);
  const int64_t blocks = search.tiles == 0 ? most : std::min(most, std::max<int64_t>(1, few));
  if (blocks * m.samples > INT32_MAX) {
    return error(Status::Kind::unsupported, "metric: %lld samples of %lld tokens; CUDA takes 2^34 sources",
                 (long long)m.samples, (long long)m.tokens);
  }
  if (blocks * m.samples == 0) return {};
  auto* kernel = m.dtype == DType::f32   ? nearest_exactly<float>
                 : m.dtype == DType::f16 ? nearest_exactly<__half>
                 : m.dtype == DType::f64 ? nearest_exactly<double>
                                         : nearest_exactly<__nv_bfloat16>;
  start(kernel, unsigned(blocks * m.samples), kExactThreads, 0, context.stream, m, search, blocks);
  return started("bipartite_match");
}

Status rank_matches(const MatchTokens& m, const MatchSearch& search, const CudaContext& context) {
  if (m.samples > 0) start(rank, unsigned(m.samples), kRankThreads, 0, context.stream, m, search);
  return started("bipartite_match");
}

}  // namespace sparsekit::cuda

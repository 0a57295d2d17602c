// The entries of a scatter on the device: what an entry says, and what the plan's kernels write (cuda_plan.cu).
#pragma once

#include "tokens/cuda_rows.cuh"

namespace sparsekit::cuda {

constexpr int kSmallMost = 2048;  // entries and rows of a sample: 2 x 8 KB + 3 x 8 KB = 40 KB of shared memory
constexpr int kSmallThreads = 512;
constexpr int kLongRow = 1024;  // entries of a row that are ranked by counting: 1,024 loads from L1 each
constexpr int kLongThreads = 1024, kLongEntries = 4;

/// A range of memory, cut as asked; with a null base it only counts.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    char* at = base_ ? base_ + used_ : nullptr;
    used_ += (size_t(count) * sizeof(T) + 15) / 16 * 16;
    return reinterpret_cast<T*>(at);
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

struct Scatter {
  Side from, to;
  const void* index = nullptr;
  bool wide = false, f64 = false, mean = false;
  const void* weights = nullptr;
  int64_t index_rows = 0, places = 1;
  int64_t all_rows = 0;  // of all samples
  void* totals = nullptr;

  size_t cleared_bytes = 0;      // from `count` on: count, winner, cursor
  int32_t* count = nullptr;      // [all_rows] entries that count for something
  int32_t* winner = nullptr;     // [all_rows] copy: 1 + the last entry; then its row of the source, or -1
  int32_t* cursor = nullptr;     // [2] entries given out, long rows
  int32_t* begin = nullptr;      // [all_rows]
  int32_t* long_rows = nullptr;  // [entries / kLongRow]
  int32_t* slot = nullptr;       // [entries]
  int32_t* unsorted = nullptr;   // [entries]
  int32_t* rows = nullptr;       // [entries] the row of the source
  void* coefficients = nullptr;  // [entries], or null

  explicit Scatter(const ScatterTokens& t)
      : from(t.from),
        to(t.to),
        index(t.index.data),
        wide(t.index.wide),
        f64(t.weights_f64),
        mean(t.reduce == TokenReduce::mean),
        weights(t.weights),
        index_rows(t.index.rows),
        places(t.index.per_row),
        all_rows(t.to.cu_seqlens ? t.to.rows : t.to.samples * t.to.rows),
        totals(t.totals) {}

  __host__ __device__ int64_t per_sample() const { return index_rows * places; }
  __host__ __device__ int64_t entries() const { return to.samples * per_sample(); }

  void lay_out(const ScatterTokens& t, bool backward, bool is_small, Workspace* memory) {
    const bool copy = t.reduce == TokenReduce::copy, weighted = weights || mean;
    if (!backward || copy) {
      const size_t before = memory->used();
      count = memory->take<int32_t>(all_rows);
      if (copy) winner = memory->take<int32_t>(all_rows);
      cursor = memory->take<int32_t>(2);
      cleared_bytes = memory->used() - before;
    }
    if (!backward && copy) return;
    if (!backward) begin = memory->take<int32_t>(all_rows);
    if (!backward && !is_small) {
      long_rows = memory->take<int32_t>(entries() / kLongRow);
      slot = memory->take<int32_t>(entries());
      unsorted = memory->take<int32_t>(entries());
    }
    rows = memory->take<int32_t>(entries());
    if (weighted) coefficients = memory->take<char>(entries() * (f64 ? 8 : 4));
  }
};

struct Entry {
  int64_t inside;  // of the sample
  int64_t target;  // the row inside the sample, -1: none
  int64_t row;     // the row among those of all samples, -1
};

__device__ __forceinline__ Entry entry_of(const Scatter& t, int64_t e) {
  const uint32_t per_sample = uint32_t(t.per_sample());
  const int64_t s = uint32_t(e) / per_sample;  // there are fewer than 2^31 entries
  Entry entry;
  entry.inside = e - s * per_sample;
  entry.target = entry.row = -1;
  if (t.from.cu_seqlens && int64_t(uint32_t(entry.inside) / uint32_t(t.places)) >= t.from.count(s)) return entry;
  entry.target = token_at(t.index, t.wide, e, t.to.count(s));
  if (entry.target >= 0) entry.row = (t.to.cu_seqlens ? t.to.begin(s) : s * t.to.rows) + entry.target;
  return entry;
}

__device__ __forceinline__ double weight_of(const Scatter& t, int64_t e) {
  if (!t.weights) return 1.;
  return t.f64 ? __ldg(static_cast<const double*>(t.weights) + e) : __ldg(static_cast<const float*>(t.weights) + e);
}

__device__ __forceinline__ double total_of(const Scatter& t, int64_t row) {
  return t.f64 ? static_cast<const double*>(t.totals)[row] : static_cast<const float*>(t.totals)[row];
}

__device__ __forceinline__ void set_total(const Scatter& t, int64_t row, double total) {
  if (t.f64) {
    static_cast<double*>(t.totals)[row] = total;
  } else {
    static_cast<float*>(t.totals)[row] = float(total);
  }
}

__device__ __forceinline__ void set_coefficient(const Scatter& t, int64_t at, double c) {
  if (t.f64) {
    static_cast<double*>(t.coefficients)[at] = c;
  } else {
    static_cast<float*>(t.coefficients)[at] = float(c);
  }
}

__device__ __forceinline__ double coefficient_of(const Scatter& t, int64_t at) {
  return t.f64 ? static_cast<const double*>(t.coefficients)[at] : static_cast<const float*>(t.coefficients)[at];
}

/// Entry e to place `at` of the sorted list: its row of the source, and its weight until weigh_row divides it.
__device__ __forceinline__ void write_entry(const Scatter& t, int32_t at, int64_t e, const Entry& entry) {
  t.rows[at] = int32_t(uint32_t(entry.inside) / uint32_t(t.places));
  if (t.coefficients) set_coefficient(t, at, weight_of(t, e));
}

/// The total of a row, in float64 and in order; what a mean's weights become. A mean whose weights sum to 0 has no
/// entries.
__device__ __forceinline__ void weigh_row(const Scatter& t, int64_t n, int32_t count, int32_t begin) {
  double total = count;
  if (t.weights) {
    total = 0.;
    for (int32_t i = 0; i < count; ++i) total += coefficient_of(t, begin + i);
  }
  set_total(t, n, total);
  if (!t.mean) return;
  if (total == 0.) t.count[n] = 0;
  for (int32_t i = 0; i < count && total != 0.; ++i)
    set_coefficient(t, begin + i, coefficient_of(t, begin + i) / total);
}

/// Of all threads of the block: the sum of `value` over the threads before this one, and over all.
__device__ __forceinline__ int32_t block_prefix(int32_t value, int32_t* scratch, int32_t* all) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = int(blockDim.x) >> 5;
  int32_t sum = value;
  for (int step = 1; step < 32; step *= 2) {
    const int32_t other = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) scratch[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    int32_t part = lane < warps ? scratch[lane] : 0;
    for (int step = 1; step < 32; step *= 2) {
      const int32_t other = __shfl_up_sync(0xffffffffu, part, step);
      if (lane >= step) part += other;
    }
    if (lane < warps) scratch[lane] = part;
  }
  __syncthreads();
  *all = scratch[warps - 1];
  const int32_t before = (warp > 0 ? scratch[warp - 1] : 0) + sum - value;
  __syncthreads();  // scratch may be written again
  return before;
}

}  // namespace sparsekit::cuda

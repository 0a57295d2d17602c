// From an index to entries sorted by destination: what a scatter, a merge and the gradient of a gather are made of.
//
// Where a sample has at most 2,048 entries and rows, one block sorts it in shared memory, in one launch. Else, over all
// entries and rows at once:
//   count     each entry takes a slot of its destination's (atomicAdd of an integer: which slot is chance)
//   allocate  each row takes a range of the list; rows of one block in order, blocks in any
//   place     each entry's number into its slot
//   rank      an entry's rank among those of its row, by counting the smaller numbers: now the order is fixed
//   long      a row of more than kLongRow entries is collected in order by a block instead, 4,096 entries at a time
//   weigh     totals, and the coefficients of a mean
// Only where a row's range lies depends on chance; what stands in it, and so every sum, does not.
// Bound: latency, some ten kernels of a few microseconds beside the rows' gigabytes. A copy needs only the last entry
// of each row: one atomicMax per entry. Nothing waits for the host; the workspace depends on shapes alone, so all of it
// can be captured in a CUDA graph.
#include <algorithm>

#include "tokens/cuda_implementations.h"
#include "tokens/cuda_launch.h"
#include "tokens/cuda_plan.cuh"

namespace sparsekit::cuda {
namespace {

__global__ void __launch_bounds__(kRowThreads) count_entries(const __grid_constant__ Scatter t) {
  const int64_t e = int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
  if (e >= t.entries()) return;
  const Entry entry = entry_of(t, e);
  if (entry.row < 0 || weight_of(t, e) == 0.) return;
  const int slot = atomicAdd(t.count + entry.row, 1);
  if (t.winner) {
    atomicMax(t.winner + entry.row, int32_t(entry.inside) + 1);
  } else {
    t.slot[e] = slot;
  }
}

/// Blocks of kRowThreads rows.
__global__ void __launch_bounds__(kRowThreads) allocate_rows(const __grid_constant__ Scatter t) {
  __shared__ int32_t scratch[kRowThreads / 32 + 1], first;
  const int64_t n = int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
  const int32_t count = n < t.all_rows ? t.count[n] : 0;
  int32_t all;
  const int32_t before = block_prefix(count, scratch, &all);
  if (threadIdx.x == 0) first = atomicAdd(t.cursor, all);
  __syncthreads();
  if (n >= t.all_rows) return;
  t.begin[n] = first + before;
  if (count > kLongRow) t.long_rows[atomicAdd(t.cursor + 1, 1)] = int32_t(n);
}

__global__ void __launch_bounds__(kRowThreads) place_entries(const __grid_constant__ Scatter t) {
  const int64_t e = int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
  if (e >= t.entries()) return;
  const Entry entry = entry_of(t, e);
  if (entry.row < 0 || weight_of(t, e) == 0. || t.count[entry.row] > kLongRow) return;
  t.unsorted[t.begin[entry.row] + t.slot[e]] = int32_t(e);
}

__global__ void __launch_bounds__(kRowThreads) rank_entries(const __grid_constant__ Scatter t) {
  const int64_t e = int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
  if (e >= t.entries()) return;
  const Entry entry = entry_of(t, e);
  if (entry.row < 0 || weight_of(t, e) == 0.) return;
  const int32_t count = t.count[entry.row];
  if (count > kLongRow) return;
  const int32_t* list = t.unsorted + t.begin[entry.row];
  int32_t rank = 0;
  for (int32_t i = 0; i < count; ++i) rank += list[i] < e;
  write_entry(t, t.begin[entry.row] + rank, e, entry);
}

__global__ void __launch_bounds__(kLongThreads) collect_long_rows(const __grid_constant__ Scatter t) {
  __shared__ int32_t scratch[kLongThreads / 32 + 1];
  __shared__ double sums[kLongThreads];
  for (int32_t i = blockIdx.x; i < t.cursor[1]; i += gridDim.x) {
    const int32_t row = t.long_rows[i];
    // All entries of a row are of one sample, unless cu_seqlens is not what it should be: then they are cut off.
    const int64_t sample = t.to.cu_seqlens ? t.to.sample_of(row) : row / t.to.rows;
    const int64_t per_sample = t.per_sample(), from = sample < 0 ? 0 : sample * per_sample;
    int32_t at = t.begin[row];
    const int32_t end = at + t.count[row];
    for (int64_t base = 0; base < per_sample && sample >= 0; base += kLongThreads * kLongEntries) {
      bool mine[kLongEntries];
      int32_t found = 0;
      for (int j = 0; j < kLongEntries; ++j) {
        const int64_t inside = base + int64_t(threadIdx.x) * kLongEntries + j;
        mine[j] = inside < per_sample && entry_of(t, from + inside).row == row && weight_of(t, from + inside) != 0.;
        found += mine[j];
      }
      int32_t all;
      int32_t to = at + block_prefix(found, scratch, &all);
      for (int j = 0; j < kLongEntries; ++j) {
        const int64_t e = from + base + int64_t(threadIdx.x) * kLongEntries + j;
        if (mine[j] && to < end) write_entry(t, to++, e, entry_of(t, e));
      }
      at += all;
    }
    if (at > end) at = end;
    const int32_t begin = t.begin[row], count = at - begin;
    if (threadIdx.x == 0) t.count[row] = count;
    __syncthreads();
    if (!t.weights) continue;
    double part = 0.;
    for (int32_t j = threadIdx.x; j < count; j += kLongThreads) part += coefficient_of(t, begin + j);
    sums[threadIdx.x] = part;
    for (int half = kLongThreads / 2; half > 0; half /= 2) {
      __syncthreads();
      if (int(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    __syncthreads();
    const double total = sums[0];
    for (int32_t j = threadIdx.x; t.mean && total != 0. && j < count; j += kLongThreads) {
      set_coefficient(t, begin + j, coefficient_of(t, begin + j) / total);
    }
    if (threadIdx.x == 0) set_total(t, row, total);
    if (threadIdx.x == 0 && t.mean && total == 0.) t.count[row] = 0;
    __syncthreads();
  }
}

/// Totals, and coefficients where there are weights or a mean: a thread per row, but for long ones with weights.
__global__ void __launch_bounds__(kRowThreads) weigh_rows(const __grid_constant__ Scatter t) {
  const int64_t n = int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
  if (n >= t.all_rows || (t.weights && t.count[n] > kLongRow)) return;
  weigh_row(t, n, t.count[n], t.begin[n]);
}

/// The last entry of each row as the index of a copy, and totals.
__global__ void __launch_bounds__(kRowThreads) choose_winners(const __grid_constant__ Scatter t) {
  const int64_t n = int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
  if (n >= t.all_rows) return;
  set_total(t, n, double(t.count[n]));
  t.winner[n] = t.winner[n] > 0 ? int32_t((t.winner[n] - 1) / t.places) : -1;
}

/// A sample per block, everything above in shared memory.
__global__ void __launch_bounds__(kSmallThreads) plan_sample(const __grid_constant__ Scatter t) {
  extern __shared__ int32_t memory[];
  __shared__ int32_t scratch[kSmallThreads / 32 + 1];
  const int rows = int(t.to.rows), entries = int(t.per_sample());
  int32_t* count = memory;        // [rows]
  int32_t* begin = count + rows;  // [rows]
  int32_t* list = begin + rows;   // [entries]
  int32_t* row = list + entries;  // [entries]
  int32_t* slot = row + entries;  // [entries]
  const int64_t s = blockIdx.x, first = s * entries;
  for (int n = threadIdx.x; n < rows; n += kSmallThreads) count[n] = 0;
  __syncthreads();
  const int64_t row0 = t.to.cu_seqlens ? t.to.begin(s) : s * t.to.rows;
  for (int e = threadIdx.x; e < entries; e += kSmallThreads) {
    const Entry entry = entry_of(t, first + e);
    const bool used = entry.row >= 0 && weight_of(t, first + e) != 0.;
    row[e] = used ? int32_t(entry.row - row0) : -1;
    if (used) slot[e] = atomicAdd(count + row[e], 1);
  }
  __syncthreads();
  int32_t carry = 0;
  for (int base = 0; base < rows; base += kSmallThreads) {
    const int n = base + threadIdx.x;
    int32_t all;
    const int32_t before = block_prefix(n < rows ? count[n] : 0, scratch, &all);
    if (n < rows) begin[n] = carry + before;
    carry += all;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < entries; e += kSmallThreads) {
    if (row[e] >= 0) list[begin[row[e]] + slot[e]] = e;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < entries; e += kSmallThreads) {
    if (row[e] < 0) continue;
    const int32_t* mine = list + begin[row[e]];
    int32_t rank = 0;
    for (int i = 0; i < count[row[e]]; ++i) rank += mine[i] < e;
    write_entry(t, first + begin[row[e]] + rank, first + e, entry_of(t, first + e));
  }
  __syncthreads();
  const int64_t exist = t.to.count(s);
  for (int n = threadIdx.x; n < rows && n < exist; n += kSmallThreads) {
    t.begin[row0 + n] = int32_t(first) + begin[n];
    t.count[row0 + n] = count[n];
    weigh_row(t, row0 + n, count[n], int32_t(first) + begin[n]);
  }
}

// ---- backward: what each entry takes of grad_out

__global__ void __launch_bounds__(kRowThreads) backward_entries(const __grid_constant__ Scatter t) {
  const int64_t e = int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
  if (e >= t.entries()) return;
  const Entry entry = entry_of(t, e);
  int32_t row = int32_t(entry.target);
  if (row >= 0 && t.winner && t.winner[entry.row] != int32_t(entry.inside) + 1) row = -1;
  if (row >= 0 && t.coefficients) {
    const double w = weight_of(t, e), total = t.mean ? total_of(t, entry.row) : 1.;
    if (w == 0. || total == 0.) row = -1;
    if (row >= 0) set_coefficient(t, e, w / total);
  }
  t.rows[e] = row;
}

unsigned blocks_of(int64_t things) { return unsigned((things + kRowThreads - 1) / kRowThreads); }

bool small(const ScatterTokens& t) {
  return t.reduce != TokenReduce::copy && t.to.rows <= kSmallMost && t.index.rows * t.index.per_row <= kSmallMost;
}

Status check(const Scatter& t) {
  if (t.entries() <= INT32_MAX && t.all_rows < INT32_MAX) return {};
  return error(Status::Kind::unsupported, "index: %lld entries for %lld rows of all samples; CUDA takes 2^31 - 1",
               (long long)t.entries(), (long long)t.all_rows);
}

size_t bytes_of(const ScatterTokens& t, bool backward) {
  Workspace memory(nullptr);
  Scatter plan(t);
  plan.lay_out(t, backward, small(t), &memory);
  return memory.used();
}

}  // namespace

size_t plan_scatter_workspace(const ScatterTokens& t) { return bytes_of(t, false); }
size_t plan_scatter_backward_workspace(const ScatterTokens& t) { return bytes_of(t, true); }

Status plan_scatter(const ScatterTokens& arguments, const CudaContext& context, DevicePlan* plan) {
  Scatter t(arguments);
  Status status = check(t);
  if (!status.ok()) return status;
  const bool is_small = small(arguments);
  Workspace memory(context.workspace);
  t.lay_out(arguments, /*backward=*/false, is_small, &memory);
  auto stream = static_cast<cudaStream_t>(context.stream);
  plan->from = arguments.from;
  plan->to = arguments.to;
  plan->index_rows = arguments.index.rows;
  plan->base_always = arguments.reduce == TokenReduce::add;
  if (t.all_rows == 0) return {};
  const unsigned by_entry = blocks_of(t.entries()), by_row = blocks_of(t.all_rows);
  if (t.winner) {
    plan->index = t.winner;
    plan->flat = true;
    plan->index_rows = INT64_MAX;
  } else {
    plan->begin = t.begin;
    plan->count = t.count;
    plan->rows = t.rows;
    plan->coefficients = t.coefficients;
    plan->coefficients_f64 = t.f64;
  }
  // The small plan writes what samples own; rows of a packed result without a sample stay 0.
  if (!is_small || t.to.cu_seqlens) {
    cudaMemsetAsync(t.count, 0, t.cleared_bytes, stream);
    if (is_small) cudaMemsetAsync(t.totals, 0, size_t(t.all_rows) * (t.f64 ? 8 : 4), stream);
  }
  if (is_small) {
    if (t.to.samples == 0) return {};
    const size_t shared = size_t(2 * t.to.rows + 3 * t.per_sample()) * sizeof(int32_t);
    start(plan_sample, unsigned(t.to.samples), kSmallThreads, shared, context.stream, t);
    return started("sorting the entries of index");
  }
  if (t.entries() > 0) start(count_entries, by_entry, kRowThreads, 0, context.stream, t);
  if (t.winner) {
    start(choose_winners, by_row, kRowThreads, 0, context.stream, t);
    return started("sorting the entries of index");
  }
  start(allocate_rows, by_row, kRowThreads, 0, context.stream, t);
  if (t.entries() > 0) {
    start(place_entries, by_entry, kRowThreads, 0, context.stream, t);
    start(rank_entries, by_entry, kRowThreads, 0, context.stream, t);
  }
  if (t.per_sample() > kLongRow) {
    const int64_t most = std::min<int64_t>(t.entries() / kLongRow, 2 * std::max(1, context.multiprocessors));
    start(collect_long_rows, unsigned(most), kLongThreads, 0, context.stream, t);
  }
  start(weigh_rows, by_row, kRowThreads, 0, context.stream, t);
  return started("sorting the entries of index");
}

Status plan_scatter_backward(const ScatterTokens& arguments, const CudaContext& context, DevicePlan* plan,
                             bool* moves) {
  Scatter t(arguments);
  Status status = check(t);
  if (!status.ok()) return status;
  Workspace memory(context.workspace);
  t.lay_out(arguments, /*backward=*/true, false, &memory);
  plan->from = arguments.to;  // the gradient flows back
  plan->to = arguments.from;
  plan->index_rows = arguments.index.rows;
  *moves = t.places == 1 && !t.coefficients;
  if (*moves && !t.winner) {
    plan->index = arguments.index.data;
    plan->wide = arguments.index.wide;
    return {};
  }
  plan->index = t.rows;
  plan->rows = t.rows;
  plan->per_row = t.places;
  plan->coefficients = t.coefficients;
  plan->coefficients_f64 = t.f64;
  if (t.entries() == 0) return {};
  if (t.winner) {
    cudaMemsetAsync(t.count, 0, t.cleared_bytes, static_cast<cudaStream_t>(context.stream));
    start(count_entries, blocks_of(t.entries()), kRowThreads, 0, context.stream, t);
  }
  start(backward_entries, blocks_of(t.entries()), kRowThreads, 0, context.stream, t);
  return started("reading the entries of index");
}

}  // namespace sparsekit::cuda

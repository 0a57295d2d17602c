// Lists out of lists on the GPU: vertical and slash lines to blocks and columns, the union over a group of heads; the
// inverse of an order, and the move of rows that follows one.
//
// Blocks are marked in a bitmap of one warp's own, which sorts them and drops duplicates. Vertical lines are sorted
// once per head by counting, for each, those before it: V^2 comparisons, 1 million for 1,000 lines. Entries out of
// range are passed over. Bound: reading and writing the lists; moved rows go at the speed of a copy.
#include "selection/cuda_bitmap.cuh"
#include "selection/cuda_kernels.h"

namespace sparsekit::cuda {
namespace {

constexpr int kThreads = 256;

// ---- vertical and slash lines

/// grid (V / kThreads, heads): sorted[place of v] = v. Equal ones, -1 among them, keep their order.
__global__ void sort_verticals(VerticalSlash a, int32_t* sorted) {
  __shared__ int32_t tile[kThreads];
  const int64_t head = blockIdx.y, count = a.vertical_count;
  const int32_t* lines = a.vertical + head * count;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int32_t own = i < count ? lines[i] : 0;
  int64_t place = 0;
  for (int64_t first = 0; first < count; first += kThreads) {
    if (first + threadIdx.x < count) tile[threadIdx.x] = lines[first + threadIdx.x];
    __syncthreads();
    const int here = int(min(int64_t(kThreads), count - first));
    for (int j = 0; j < here; ++j) place += tile[j] < own || (tile[j] == own && first + j < i);
    __syncthreads();
  }
  if (i < count) sorted[head * count + place] = own;
}

/// One warp per row of blocks of a head.
__global__ void vertical_slash_rows(VerticalSlash a, const int32_t* sorted, int words, int64_t rows) {
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  const int64_t row = int64_t(blockIdx.x) * (blockDim.x / kWarp) + warp_of();
  if (row >= rows) return;
  const int64_t q_blocks = ceil_div(a.len_q, int64_t(a.block_q)), head = row / q_blocks, m = row % q_blocks;
  const int64_t origin = a.len_k - a.len_q, first = m * a.block_q + origin;
  const int64_t last = min(a.len_q, (m + 1) * a.block_q) - 1 + origin;
  WarpBitmap blocks(reinterpret_cast<uint32_t*>(dynamic_shared) + warp_of() * words, words);
  blocks.clear();
  for (int64_t s = lane_of(); s < a.slash_count; s += kWarp) {
    const int64_t distance = a.slash[head * a.slash_count + s];
    if (distance < 0 || last < distance) continue;
    const int64_t end = (last - distance) / a.block_k;
    for (int64_t n = max(first - distance, int64_t(0)) / a.block_k; n <= end; ++n) blocks.set(int(n));
  }
  const int count = blocks.emit(a.indices + row * a.capacity, a.capacity);
  const int32_t* lines = sorted + head * a.vertical_count;
  int32_t* columns = a.column_indices + row * a.vertical_count;
  int64_t taken = 0;
  for (int64_t start = 0; start < a.vertical_count; start += kWarp) {
    const int64_t i = start + lane_of();
    const int32_t column = i < a.vertical_count ? lines[i] : -1;
    const bool again = i > 0 && column >= 0 && lines[i - 1] == column;
    const bool take = column >= 0 && column <= last && !again && !blocks.holds(column / a.block_k);
    const unsigned lanes = __ballot_sync(kLanes, take);
    if (take) columns[taken + __popc(lanes & lanes_before())] = column;
    taken += __popc(lanes);
  }
  for (int64_t at = taken + lane_of(); at < a.vertical_count; at += kWarp) columns[at] = -1;
  if (lane_of() == 0) {
    a.counts[row] = count;
    a.column_counts[row] = int32_t(taken);
  }
}

// ---- union

/// One warp per row of the result.
__global__ void union_rows(UnionLists u, int words, int64_t rows) {
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  const int64_t row = int64_t(blockIdx.x) * (blockDim.x / kWarp) + warp_of();
  if (row >= rows) return;
  const int64_t head = row / u.rows, m = row % u.rows;
  WarpBitmap blocks(reinterpret_cast<uint32_t*>(dynamic_shared) + warp_of() * words, words);
  blocks.clear();
  for (int64_t h = head * u.group; h < (head + 1) * u.group; ++h) {
    const int64_t from = h * u.rows + m, count = clamped(u.counts_in[from], 0, u.capacity_in);
    for (int64_t s = lane_of(); s < count; s += kWarp) {
      const int32_t entry = u.indices_in[from * u.capacity_in + s];
      if (entry >= 0 && entry < u.key_blocks) blocks.set(entry);
    }
  }
  const int count = blocks.emit(u.indices + row * u.capacity, u.capacity);
  if (lane_of() == 0) u.counts[row] = count;
}

/// Launches a kernel with one warp and one bitmap per row.
template <class Kernel, class... Arguments>
Status launch_rows(const char* what, int64_t rows, int64_t key_blocks, cudaStream_t stream, Kernel kernel,
                   const Arguments&... arguments) {
  const int64_t words = ceil_div<int64_t>(key_blocks, 32);
  const int warps = warps_with_bitmaps(words);
  if (warps == 0 || ceil_div<int64_t>(rows, warps) > INT32_MAX) {
    return error(Status::Kind::unsupported, "%s: %lld key blocks and %lld rows; CUDA takes up to 786432 and 2^31", what,
                 (long long)key_blocks, (long long)rows);
  }
  launch(kernel, unsigned(ceil_div<int64_t>(rows, warps)), warps * kWarp, size_t(warps) * words * 4, stream,
         arguments..., int(words), rows);
  return launched(what);
}

// ---- orders

__global__ void invert_orders(InversePermutation p) {
  const int64_t total = p.lists * p.count, step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; at < total; at += step) {
    const int32_t token = p.order[at];
    // The last of those that name a token: what the order says, whoever comes first.
    if (token >= 0 && token < p.length) {
      atomicMax(&p.inverse[at / p.count * p.length + token], int32_t(at % p.count));
    }
  }
}

/// A thread per Unit of a row; consecutive threads move consecutive units.
template <class Unit>
__global__ void permute_rows(PermuteTokens p, int units) {
  const int64_t total = p.batch * p.heads * p.len_out * units, step = int64_t(gridDim.x) * blockDim.x;
  const int64_t group = p.heads / p.order_heads;
  for (int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; at < total; at += step) {
    const int64_t row = at / units, unit = at % units, i = row % p.len_out, head = row / p.len_out;
    const int64_t b = head / p.heads, h = head % p.heads;
    const int32_t from = p.order[b * p.order_batch + h / group * p.len_out + i];
    Unit value = {};
    if (from >= 0 && from < p.len_in) {
      const char* input = p.input + b * p.input_batch + h * p.input_head + from * p.input_row;
      value = reinterpret_cast<const Unit*>(input)[unit];
    }
    char* out = p.out + b * p.out_batch + h * p.out_head + i * p.out_row;
    reinterpret_cast<Unit*>(out)[unit] = value;
  }
}

unsigned grid_of(int64_t threads) { return unsigned(clamped(ceil_div<int64_t>(threads, kThreads), 1, 1 << 20)); }

}  // namespace

size_t vertical_slash_workspace(const VerticalSlash& a) { return size_t(a.heads * a.vertical_count) * sizeof(int32_t); }

Status vertical_slash(const VerticalSlash& a, const CudaContext& context) {
  const auto stream = static_cast<cudaStream_t>(context.stream);
  auto* sorted = static_cast<int32_t*>(context.workspace);
  if (a.vertical_count > 0) {
    if (a.heads > 65535) {
      return error(Status::Kind::unsupported, "vertical: %lld heads in all batches; CUDA takes 65535",
                   (long long)a.heads);
    }
    launch(sort_verticals, dim3(unsigned(ceil_div<int64_t>(a.vertical_count, kThreads)), unsigned(a.heads)), kThreads,
           0, stream, a, sorted);
  }
  const int64_t rows = a.heads * ceil_div<int64_t>(a.len_q, a.block_q);
  return launch_rows("vertical_slash_lists", rows, ceil_div<int64_t>(a.len_k, a.block_k), stream, vertical_slash_rows,
                     a, static_cast<const int32_t*>(sorted));
}

Status union_of_lists(const UnionLists& u, const CudaContext& context) {
  return launch_rows("union_block_lists", u.heads * u.rows, u.key_blocks, static_cast<cudaStream_t>(context.stream),
                     union_rows, u);
}

Status invert(const InversePermutation& p, const CudaContext& context) {
  const auto stream = static_cast<cudaStream_t>(context.stream);
  cudaMemsetAsync(p.inverse, 0xff, size_t(p.lists * p.length) * sizeof(int32_t), stream);
  if (p.lists * p.count > 0) launch(invert_orders, grid_of(p.lists * p.count), kThreads, 0, stream, p);
  return launched("inverse_permutation");
}

Status permute(const PermuteTokens& p, const CudaContext& context) {
  const auto stream = static_cast<cudaStream_t>(context.stream);
  uintptr_t all = reinterpret_cast<uintptr_t>(p.input) | reinterpret_cast<uintptr_t>(p.out) | uintptr_t(p.row_bytes);
  for (int64_t stride : {p.input_batch, p.input_head, p.input_row, p.out_batch, p.out_head, p.out_row}) {
    all |= uintptr_t(stride);
  }
  const int64_t rows = p.batch * p.heads * p.len_out;
  auto run = [&](auto unit) {
    using Unit = decltype(unit);
    const int units = int(p.row_bytes / int64_t(sizeof(Unit)));
    launch(permute_rows<Unit>, grid_of(rows * units), kThreads, 0, stream, p, units);
  };
  if (all % 16 == 0) {
    run(uint4());
  } else if (all % 4 == 0) {
    run(uint32_t());
  } else if (all % 2 == 0) {
    run(uint16_t());
  } else {
    run(uint8_t());
  }
  return launched("permute_tokens");
}

}  // namespace sparsekit::cuda

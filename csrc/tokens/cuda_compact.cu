// Keeps some rows of a cache, in place: row j of a sample becomes row keep[j].
//
// Rows only move towards the beginning, as the list ascends: keep[j] >= j. So a block that owns some columns of one
// (sample, head, tensor) goes through the list in batches: it reads the rows of a batch into registers, waits for all
// of its threads (barrier), and writes them. What a batch writes, rows j .. j + batch - 1, no later batch reads, as
// that reads rows >= j + batch; and other blocks own other columns. No scratch, no second pass over the cache.
//
// The list of a sample ends before its first entry that is -1, names no row in use, or does not ascend; a row whose
// page does not exist is not moved. A first kernel finds that end (and updates lengths, which nothing reads
// afterwards).
//
// Tiling: 512 threads = columns x rows; a slice of columns is 64 bytes or more, as narrow as it takes to have a block
// per multiprocessor. kBatch rows per thread are in flight. Bound: memory, each kept row is read and written once.
#include <algorithm>
#include <initializer_list>

#include "tokens/cuda_implementations.h"
#include "tokens/cuda_launch.h"
#include "tokens/cuda_rows.cuh"

namespace sparsekit::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kBatch = 4;  // rows per thread

struct Compact {
  const void* keep;
  bool wide;
  int64_t slots, keep_heads, samples, heads, capacity;
  const int32_t* block_table;
  int64_t table_pages, pages, page_size;
  int32_t* lengths;
  int32_t* counts;  // [samples, keep_heads] rows kept

  __device__ __forceinline__ int64_t entry(int64_t list, int64_t j) const {
    return wide ? __ldg(static_cast<const long long*>(keep) + list * slots + j)
                : __ldg(static_cast<const int32_t*>(keep) + list * slots + j);
  }
};

__global__ void __launch_bounds__(kThreads) find_ends(const __grid_constant__ Compact c) {
  __shared__ int end;
  const int64_t list = blockIdx.x;
  if (threadIdx.x == 0) end = int(c.slots);
  __syncthreads();
  int64_t limit = c.capacity;
  if (c.lengths) limit = max(int64_t(0), min(limit, int64_t(c.lengths[list])));
  for (int64_t j = threadIdx.x; j < c.slots; j += kThreads) {
    const int64_t token = c.entry(list, j), before = j > 0 ? c.entry(list, j - 1) : -1;
    if (token >= 0 && token < limit && token > before) continue;
    atomicMin(&end, int(j));
    break;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  c.counts[list] = end;
  if (c.lengths) c.lengths[list] = end;
}

struct Part {
  char* data;
  int64_t sample, head, row;  // strides in bytes
  int64_t first_block;
  int slices, columns;  // slices of a row; threads across one
  int64_t vectors;      // of a row
  int vector_bytes;
};

struct Moves {
  Compact c;
  int tensors;
  Part part[kMostTensors];
};

__device__ __forceinline__ char* row_of(const Compact& c, const Part& part, int64_t s, int64_t h, int64_t token) {
  char* data = part.data + h * part.head;
  if (!c.block_table) return data + s * part.sample + token * part.row;
  const int64_t page = __ldg(c.block_table + s * c.table_pages + token / c.page_size);
  if (page < 0 || page >= c.pages) return nullptr;
  return data + page * part.sample + token % c.page_size * part.row;
}

template <class Vector>
__device__ void move_slice(const Compact& c, const Part& part, int64_t s, int64_t h, int slice) {
  const int64_t list = s * c.keep_heads + (c.keep_heads > 1 ? h : 0), kept = c.counts[list];
  const int rows = kThreads / part.columns;  // that stand side by side in the block
  const int mine = int(threadIdx.x) / part.columns;
  const int64_t column = int64_t(slice) * part.columns + threadIdx.x % part.columns;
  const bool works = mine < rows && column < part.vectors;
  for (int64_t j0 = 0; j0 < kept; j0 += rows * kBatch) {
    Vector value[kBatch];
    Vector* to[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t j = j0 + mine + i * rows;
      to[i] = nullptr;
      if (!works || j >= kept) continue;
      const int64_t token = c.entry(list, j);
      if (token == j) continue;
      char* from = row_of(c, part, s, h, token);
      char* into = row_of(c, part, s, h, j);
      if (!from || !into) continue;
      value[i] = reinterpret_cast<const Vector*>(from)[column];
      to[i] = reinterpret_cast<Vector*>(into) + column;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (to[i]) *to[i] = value[i];
    }
  }
}

__global__ void __launch_bounds__(kThreads, 2) compact(const __grid_constant__ Moves a) {
  int i = 0;
  while (i + 1 < a.tensors && int64_t(blockIdx.x) >= a.part[i + 1].first_block) ++i;
  const Part& part = a.part[i];
  const int64_t block = int64_t(blockIdx.x) - part.first_block;
  const int slice = int(block % part.slices);
  const int64_t h = block / part.slices % a.c.heads, s = block / part.slices / a.c.heads;
  switch (part.vector_bytes) {
    case 16: return move_slice<uint4>(a.c, part, s, h, slice);
    case 8: return move_slice<uint2>(a.c, part, s, h, slice);
    case 4: return move_slice<uint32_t>(a.c, part, s, h, slice);
    default: return move_slice<unsigned short>(a.c, part, s, h, slice);
  }
}

}  // namespace
}  // namespace sparsekit::cuda

namespace sparsekit {

size_t compact_rows_workspace(const CompactRows& c) { return size_t(c.samples * c.keep_heads) * sizeof(int32_t); }

Status compact_rows(const CompactRows& c, const CudaContext& context) {
  using namespace cuda;
  if (c.keep.rows > INT32_MAX || c.capacity > INT32_MAX || c.samples * c.keep_heads > INT32_MAX) {
    return error(Status::Kind::unsupported, "keep_index: %lld entries for %lld rows; CUDA takes 2^31 - 1",
                 (long long)c.keep.rows, (long long)c.capacity);
  }
  Moves a{{c.keep.data, c.keep.wide, c.keep.rows, c.keep_heads, c.samples, c.heads, c.capacity, c.block_table,
           c.table_pages, c.pages, c.page_size, c.lengths, static_cast<int32_t*>(context.workspace)},
          0,
          {}};
  const int64_t lists = c.samples * c.keep_heads;
  if (lists == 0) return {};
  start(find_ends, unsigned(lists), kThreads, 0, context.stream, a.c);
  int64_t blocks = 0;
  for (int64_t i = 0; i < c.tensors; ++i) {
    const CompactRows::Cache& cache = c.caches[i];
    TokenTensor view;
    view.data = cache.data;
    view.sample = cache.sample;
    view.outer = cache.head;
    view.row = cache.row;
    view.inner = cache.row_bytes;
    view.element_size = 1;
    Part part{static_cast<char*>(cache.data), cache.sample, cache.head, cache.row, blocks, 1, 1, 0,
              vector_bytes({&view})};
    part.vectors = cache.row_bytes / part.vector_bytes;
    // At least 64 bytes (two sectors) and at most 512 threads across; narrower where blocks are few.
    const int64_t least = std::max(1, 64 / part.vector_bytes), wanted = std::max(1, context.multiprocessors);
    const int64_t others = std::max<int64_t>(1, c.samples * c.heads * c.tensors);
    int64_t columns = std::min<int64_t>(part.vectors, kThreads);
    while (columns / 2 >= least && others * ((part.vectors + columns - 1) / columns) < wanted) columns /= 2;
    part.columns = int(std::max<int64_t>(1, columns));
    part.slices = int((part.vectors + part.columns - 1) / part.columns);
    const int64_t own = c.samples * c.heads * part.slices;
    if (own > 0) {
      blocks += own;
      a.part[a.tensors++] = part;
    }
    if (a.tensors == 0 || (a.tensors < kMostTensors && i + 1 < c.tensors)) continue;
    if (blocks > INT32_MAX) {
      return error(Status::Kind::unsupported, "cache_tensors: %lld samples of %lld heads; CUDA takes 2^31 slices",
                   (long long)c.samples, (long long)c.heads);
    }
    start(compact, unsigned(blocks), kThreads, 0, context.stream, a);
    a.tensors = 0;
    blocks = 0;
  }
  return started("compacting a cache");
}

}  // namespace sparsekit

// What the kernels of selection share: launches, reductions and scans over a warp or a CTA, packed sequences.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "selection/cuda_launch.cuh"
#include "sparsekit/selection.h"

namespace sparsekit::cuda {

constexpr int kWarp = 32;
constexpr unsigned kLanes = 0xffffffffu;

template <class T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}
__host__ __device__ constexpr int64_t clamped(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

__device__ __forceinline__ int lane_of() { return int(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_of() { return int(threadIdx.x) / kWarp; }
__device__ __forceinline__ unsigned lanes_before() { return (1u << lane_of()) - 1; }

__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ float widened(__half x) { return __half2float(x); }
__device__ __forceinline__ float widened(__nv_bfloat16 x) { return __bfloat162float(x); }

/// Row `row` of a head.
template <class Element>
__device__ __forceinline__ const Element* rows_of(const InputView& view, int64_t b, int64_t h, int64_t row) {
  return static_cast<const Element*>(view.data) + b * view.batch + h * view.head + row * view.row;
}

// ---- a warp

/// Sums of at most 52 bits: two reductions of 32 bits, each of 26 bits of every lane.
__device__ __forceinline__ uint64_t warp_sum(uint64_t x) {
  const uint32_t low = __reduce_add_sync(kLanes, uint32_t(x) & 0x3ffffffu);
  const uint32_t high = __reduce_add_sync(kLanes, uint32_t(x >> 26));
  return (uint64_t(high) << 26) + low;
}
__device__ __forceinline__ uint32_t warp_sum(uint32_t x) { return __reduce_add_sync(kLanes, x); }
__device__ __forceinline__ uint32_t warp_max(uint32_t x) { return __reduce_max_sync(kLanes, x); }
__device__ __forceinline__ double warp_sum(double x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kLanes, x, step);
  return x;
}

/// Inclusive.
template <class T>
__device__ __forceinline__ T warp_scan(T x) {
  const int lane = lane_of();
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const T other = __shfl_up_sync(kLanes, x, step);
    if (lane >= step) x += other;
  }
  return x;
}

// ---- a CTA of THREADS threads; all of them call together

/// One word per warp, and one for the result. Calls may follow each other: each ends with a barrier.
struct CtaScratch {
  uint64_t words[kWarp + 1];
};

template <int THREADS, class T, class Combine>
__device__ __forceinline__ T cta_reduce(T x, CtaScratch& scratch, Combine combine) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "one word per warp");
  T* words = reinterpret_cast<T*>(scratch.words);
  for (int step = 16; step > 0; step /= 2) x = combine(x, __shfl_xor_sync(kLanes, x, step));
  if (lane_of() == 0) words[warp_of()] = x;
  __syncthreads();
  x = words[0];
  for (int w = 1; w < THREADS / kWarp; ++w) x = combine(x, words[w]);
  __syncthreads();
  return x;
}
template <int THREADS, class T>
__device__ __forceinline__ T cta_sum(T x, CtaScratch& scratch) {
  return cta_reduce<THREADS>(x, scratch, [](T a, T b) { return a + b; });
}
template <int THREADS, class T>
__device__ __forceinline__ T cta_max(T x, CtaScratch& scratch) {
  return cta_reduce<THREADS>(x, scratch, [](T a, T b) { return a > b ? a : b; });
}

/// The sum over the threads before this one; `total` is that of all.
template <int THREADS, class T>
__device__ __forceinline__ T cta_scan(T x, CtaScratch& scratch, T* total) {
  T* words = reinterpret_cast<T*>(scratch.words);
  const T inclusive = warp_scan(x);
  if (lane_of() == kWarp - 1) words[warp_of()] = inclusive;
  __syncthreads();
  T before = 0, all = 0;
  for (int w = 0; w < THREADS / kWarp; ++w) {
    if (w == warp_of()) before = all;
    all += words[w];
  }
  __syncthreads();
  *total = all;
  return before + inclusive - x;
}

// ---- sequences

/// A sequence of the problem: an unpacked batch entry is one, a packed batch has several. Rows and blocks fit int32.
struct Span {
  int q_begin, q_end, k_begin, k_end;
  int list_row, k_block;  // its first block of queries among all, of keys among all
  int index;

  __device__ __forceinline__ int len_q() const { return q_end - q_begin; }
  __device__ __forceinline__ int len_k() const { return k_end - k_begin; }
  /// Row i of query stands at i + offset().
  __device__ __forceinline__ int offset() const { return len_k() - len_q() - q_begin; }
};

/// The sequences of a problem with blocks of block_q and block_k; in a packed batch found on the device (list_spans).
struct Spans {
  Span* table = nullptr;  // [sequences], null where the batch is not packed
  const int32_t *cu_q = nullptr, *cu_k = nullptr;
  int sequences = 1, len_q = 0, len_k = 0, block_q = 1, block_k = 1;

  __device__ __forceinline__ Span whole() const { return {0, len_q, 0, len_k, 0, 0, 0}; }
};

/// Bytes of workspace for the table; some even for no sequence, as null says that the batch is not packed.
inline size_t spans_bytes(const AttentionProblem& p) {
  return p.packed() ? ceil_div<size_t>(size_t(p.sequences + 1) * sizeof(Span), 256) * 256 : 0;
}

/// The sequences of `p`; `workspace` has spans_bytes(p) bytes.
inline Spans spans_of(const AttentionProblem& p, int block_q, int block_k, void* workspace) {
  Spans spans;
  spans.len_q = int(p.len_q);
  spans.len_k = int(p.len_k);
  spans.block_q = block_q;
  spans.block_k = block_k;
  if (!p.packed()) return spans;
  spans.table = static_cast<Span*>(workspace);
  spans.cu_q = p.cu_seqlens_q;
  spans.cu_k = p.cu_seqlens_k;
  spans.sequences = int(p.sequences);
  return spans;
}

/// Fills the table (cuda_sequences.cu); nothing to do where the batch is not packed.
void list_spans_of(const Spans& spans, cudaStream_t stream);

/// The sequence that holds block `block` of queries (of keys), counted over all; false where it is past the last.
/// `inside` is its number in that sequence.
__device__ __forceinline__ bool find_span(const Spans& spans, bool keys, int block, Span* found, int* inside) {
  Span span = spans.whole();
  if (spans.table) {
    if (spans.sequences == 0) return false;
    int low = 0, high = spans.sequences;  // the last sequence that begins at or before the block, so that it has some
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      const int begin = keys ? spans.table[middle].k_block : spans.table[middle].list_row;
      (begin <= block ? low : high) = middle;
    }
    span = spans.table[low];
  }
  *found = span;
  *inside = block - (keys ? span.k_block : span.list_row);
  const int64_t length = keys ? span.len_k() : span.len_q();
  return int64_t(*inside) * (keys ? spans.block_k : spans.block_q) < length;
}

}  // namespace sparsekit::cuda

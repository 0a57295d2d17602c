// Decode attention over any cache with any options, in fp32 arithmetic: fp32 queries and caches, dimensions and mixes
// of bits that the tensor-core kernels do not take.
//
// A CTA takes 4 query rows of a key head and a share of its chunks of 32 tokens (of the sinks, of blocks of codes, of
// the ring or a plain cache). Keys, then values, of a chunk are dequantized to fp32 in shared memory; a warp per row
// scores a token per lane and takes the online softmax step; then a thread per channel adds weighted values. Bound by
// instructions: unpacking is redone for every 4 rows. Correct first; the way for 16-bit queries is
// cuda_decode_sm80.cuh.
#include <cuda_runtime.h>

#include "common/cuda/launch.h"
#include "common/cuda/math.cuh"
#include "common/cuda/mma.cuh"
#include "kv_cache/cuda_decode.cuh"
#include "kv_cache/cuda_decode.h"

namespace sparsekit {
namespace {

using namespace sparsekit::cuda;

constexpr int kThreads = 128, kRows = 4, kChunk = 32, kMostDim = 512;
constexpr int kColumns = kMostDim / kThreads;  // of values, per thread

__device__ __forceinline__ float load_any(const void* data, int64_t at, DType dtype) {
  switch (dtype) {
    case DType::f32: return static_cast<const float*>(data)[at];
    case DType::f16: return __half2float(static_cast<const __half*>(data)[at]);
    default: return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[at]);
  }
}

/// Up to 32 tokens of a head, neighbours in memory or not.
struct Chunk {
  int first, count;  // the first token's number
  bool packed;
  int64_t b, h;
  int start;  // in its part: sinks (part 0), quantized tokens (1), ring or plain cache (2)
  int part, quantized;
};

__device__ Chunk chunk_of(const Lengths& n, int64_t b, int64_t h, int index) {
  const int parts[3] = {n.sinks, n.quantized, n.recent};
  int part = 0, first = 0;
  while (part < 2 && index >= (parts[part] + kChunk - 1) / kChunk) {
    index -= (parts[part] + kChunk - 1) / kChunk;
    first += parts[part++];
  }
  const int start = index * kChunk;
  return {first + start, min(kChunk, parts[part] - start), part == 1, b, h, start, part, n.quantized};
}

/// Element offset of a full-precision row, or -1: its page is out of range.
__device__ __forceinline__ int64_t row_offset(const Decode& p, const Chunk& chunk, int t, bool value) {
  if (p.packed()) {
    const int dim = value ? p.value_dim : p.head_dim;
    return dim * (chunk.part == 0 ? p.cache.sink_row(chunk.b, chunk.h, chunk.start + t)
                                  : p.cache.ring_row(chunk.b, chunk.h, int64_t(chunk.quantized) + chunk.start + t));
  }
  const Plain& c = p.plain;
  const int token = chunk.start + t;
  const int64_t page = c.page(chunk.b, token / c.page_size), in_page = token % c.page_size;
  if (page < 0) return -1;
  return value ? page * c.value_page + chunk.h * c.value_head + in_page * c.value_token
               : page * c.key_page + chunk.h * c.key_head + in_page * c.key_token;
}

/// Rows of a chunk as fp32, `stride` apart. Returns (to all threads alike) the mask of tokens that exist.
__device__ uint32_t load_chunk(const Decode& p, const Chunk& chunk, bool value, float* rows, int stride,
                               int64_t* offsets) {
  const int dim = value ? p.value_dim : p.head_dim;
  const uint32_t all = chunk.count == 32 ? 0xffffffffu : (1u << chunk.count) - 1;
  if (chunk.packed) {
    const Pool& pool = value ? p.cache.value : p.cache.key;
    const int unit = pool.format.unit, in_unit = chunk.start % unit;
    const Place place = p.cache.place(pool, chunk.b, chunk.h, chunk.start - in_unit);
    if (!place.codes) return 0;
    for (int at = threadIdx.x; at < kChunk * dim; at += kThreads) {
      const int t = at / dim, d = at % dim;
      rows[t * stride + d] = element_of(pool.format, place, in_unit + t, d);
    }
    return all;
  }
  if (threadIdx.x < kChunk)
    offsets[threadIdx.x] = int(threadIdx.x) < chunk.count ? row_offset(p, chunk, threadIdx.x, value) : -1;
  __syncthreads();
  const void* data =
      p.packed() ? (value ? p.cache.value.window : p.cache.key.window) : (value ? p.plain.value : p.plain.key);
  for (int at = threadIdx.x; at < kChunk * dim; at += kThreads) {
    const int t = at / dim, d = at % dim;
    rows[t * stride + d] = offsets[t] < 0 ? 0.f : load_any(data, offsets[t] + d, p.kept);
  }
  uint32_t exist = 0;
  for (int t = 0; t < kChunk; ++t) exist |= uint32_t(offsets[t] >= 0) << t;
  return exist & all;
}

__global__ void __launch_bounds__(kThreads) decode_simple(const __grid_constant__ Decode p) {
  extern __shared__ float shared[];
  __shared__ int64_t offsets[kChunk];
  __shared__ float weights[kRows][kChunk], shrinks[kRows];
  const int widest = max(p.head_dim, p.value_dim), stride = widest + 1;
  float* rows = shared;                     // [32][stride]
  float* query = shared + kChunk * stride;  // [4][head_dim]
  const int split = blockIdx.x % p.splits, first_row = blockIdx.x / p.splits * kRows;
  const int64_t h = blockIdx.y, b = blockIdx.z;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = first_row + warp;
  const bool used = row < p.rows;
  Lengths n = {0, 0, 0};
  if (p.packed()) {
    n = lengths_of(p.cache, b, h);
  } else {
    n.recent = p.plain.length(b);
  }
  for (int at = threadIdx.x; at < kRows * p.head_dim; at += kThreads) {
    const int r = first_row + at / p.head_dim;
    query[at] = r < p.rows ? load_any(p.query.data, p.query_row(b, h, r) + at % p.head_dim, p.dtype) : 0.f;
  }
  auto chunks_of = [](int tokens) { return (tokens + kChunk - 1) / kChunk; };
  const int chunks = chunks_of(n.sinks) + chunks_of(n.quantized) + chunks_of(n.recent);
  const Share share = share_of(chunks, split, p.splits, 1);
  const int limit = used ? p.limit(n.total(), row) : 0;
  const float* bias = used ? p.bias(b, h, row) : nullptr;
  float* scores = used ? p.scores_of(b, h, row) : nullptr;
  float largest = -kInfinity, total = 0.f, acc[kRows][kColumns] = {};
  for (int index = share.first; index < share.last; ++index) {
    const Chunk chunk = chunk_of(n, b, h, index);
    __syncthreads();
    const uint32_t exist = load_chunk(p, chunk, false, rows, stride, offsets);
    __syncthreads();
    float score = -kInfinity;
    const int token = chunk.first + lane;
    if (token < limit && exist >> lane & 1) {
      float sums[4] = {};
      const float* key = rows + lane * stride;
      const float* q = query + warp * p.head_dim;
      int d = 0;
      for (; d + 4 <= p.head_dim; d += 4) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] = fmaf(q[d + i], key[d + i], sums[i]);
      }
      for (; d < p.head_dim; ++d) sums[0] = fmaf(q[d], key[d], sums[0]);
      score = (sums[0] + sums[1] + (sums[2] + sums[3])) * p.scale;
      if (p.softcap > 0.f) score = p.softcap * tanhf(score / p.softcap);
      if (bias && token < p.bias_length) {
        const float add = bias[token];
        score = add == -kInfinity ? -kInfinity : score + add;  // a hidden key reaches nothing, not even by a NaN
      }
      if (scores && token < p.scores_length) scores[token] = score;
      score *= kLog2e;
    }
    float most = score;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
    most = fmaxf(most, largest);
    const float reference = most == -kInfinity ? 0.f : most;
    const float weight = exp2f(score - reference), shrink = exp2f(largest - reference);
    float sum = weight;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    total = total * shrink + sum;
    largest = most;
    weights[warp][lane] = weight;
    if (lane == 0) shrinks[warp] = shrink;
    __syncthreads();
    load_chunk(p, chunk, true, rows, stride, offsets);
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const int d = threadIdx.x + i * kThreads;
        if (d >= p.value_dim) continue;
        float x = acc[r][i] * shrinks[r];
        for (int t = 0; t < chunk.count; ++t) {
          const float w = weights[r][t];
          if (w != 0.f) x = fmaf(w, rows[t * stride + d], x);  // what has no weight reaches nothing
        }
        acc[r][i] = x;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (first_row + r >= p.rows) continue;
    float* to = p.acc + p.state(b, h, split, first_row + r) * p.value_dim;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int d = threadIdx.x + i * kThreads;
      if (d < p.value_dim) to[d] = acc[r][i];
    }
  }
  if (used && lane == 0) p.states[p.state(b, h, split, row)] = make_float2(largest, total);
}

size_t shared_bytes(int head_dim, int value_dim) {
  const int widest = head_dim > value_dim ? head_dim : value_dim;
  return sizeof(float) * (kChunk * size_t(widest + 1) + kRows * size_t(head_dim));
}

const char* refuses(const DecodeAttention& p, const CudaContext&) {
  if (p.head_dim > kMostDim || p.value_dim > kMostDim) return "head_dim above 512";
  return nullptr;
}

void cut(const DecodeAttention& p, const CudaContext& context, int* splits, int* slots) {
  int64_t tokens = 0;
  if (p.plain) tokens = p.plain->pages_per_head * p.plain->page_size;
  if (p.cache) tokens = p.cache->capacity() + p.cache->sinks + p.cache->ring();
  const int64_t row_blocks = (p.heads_q / p.heads_kv * p.len_q + kRows - 1) / kRows;
  *slots = *splits = choose_splits(p.batch * p.heads_kv * row_blocks, (tokens + 4 * kChunk - 1) / (4 * kChunk),
                                   int64_t(context.multiprocessors) * 4, 64);
}

Status run(const Decode& decode, const CudaContext& context) {
  const size_t bytes = shared_bytes(decode.head_dim, decode.value_dim);
  const auto kernel = reinterpret_cast<const void*>(&decode_simple);
  Status status = status_of(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes(kMostDim, kMostDim))),
      "decode_attention");
  if (!status.ok()) return status;
  const int64_t row_blocks = (decode.rows + kRows - 1) / kRows;
  void* arguments[] = {const_cast<Decode*>(&decode)};
  return status_of(
      cudaLaunchKernel(kernel,
                       dim3(unsigned(row_blocks * decode.splits), unsigned(decode.heads_kv), unsigned(decode.batch)),
                       dim3(kThreads), arguments, bytes, static_cast<cudaStream_t>(context.stream)),
      "decode_attention");
}

}  // namespace

const CudaDecodeKernel decode_cuda_simple = {"simple", refuses, cut, run};

}  // namespace sparsekit

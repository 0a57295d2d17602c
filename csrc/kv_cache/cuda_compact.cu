// kv_crop and kv_compact on CUDA.
//
// Crop: a CTA per head; at most one unit goes back to the ring. Compact: three launches. `plan` lists what is kept,
// saves what is needed from the ring and moves sinks; `move` rewrites the units of a head in ascending order, a CTA per
// tensor and 128 channels (what later units need stands behind the unit that is written); `settle` writes the ring and
// the lengths. Both are rare: elements are read and written one by one, whatever their type. Bound: latency.
#include <cuda_runtime.h>

#include "common/cuda/launch.h"
#include "common/cuda/mma.cuh"
#include "kv_cache/cuda_cache.cuh"
#include "sparsekit/attention.h"

namespace sparsekit {
namespace {

using namespace sparsekit::cuda;

constexpr int kThreads = kQuantizeThreads;

// Out of line, with the type at run time: one kernel instead of three, and nothing here is in a hurry.
__device__ __noinline__ float load_element(const char* row, int d, DType dtype) {
  switch (dtype) {
    case DType::f32: return reinterpret_cast<const float*>(row)[d];
    case DType::f16: return to_float(reinterpret_cast<const __half*>(row)[d]);
    default: return to_float(reinterpret_cast<const __nv_bfloat16*>(row)[d]);
  }
}
__device__ __noinline__ void store_element(char* row, int d, DType dtype, float x) {
  switch (dtype) {
    case DType::f32: reinterpret_cast<float*>(row)[d] = x; break;
    case DType::f16: reinterpret_cast<__half*>(row)[d] = from_float<__half>(x); break;
    default: reinterpret_cast<__nv_bfloat16*>(row)[d] = from_float<__nv_bfloat16>(x);
  }
}
__host__ __device__ inline int bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }
__device__ inline char* window_row(const Pool& pool, int64_t row, DType dtype) {
  return static_cast<char*>(pool.window) + row * pool.format.dim * bytes_of(dtype);
}

// ---- crop

struct Crop {
  Cache cache;
  DType dtype;
  const int32_t* limits;
};

__global__ void __launch_bounds__(kThreads) crop(const __grid_constant__ Crop a) {
  const Cache& c = a.cache;
  const int64_t b = blockIdx.x / c.heads, h = blockIdx.x % c.heads;
  Lengths n = lengths_of(c, b, h);
  int limit = max(a.limits[b], 0);
  n.sinks = min(n.sinks, limit);
  limit -= n.sinks;
  if (limit < n.quantized) {  // kept tokens of a cut unit go back to the ring
    const int start = limit / c.unit * c.unit;
    for (int tensor = 0; tensor < 2; ++tensor) {
      const Pool& pool = tensor ? c.value : c.key;
      const Format& f = pool.format;
      for (int at = threadIdx.x; at < (limit - start) * f.dim; at += kThreads) {
        const int token = start + at / f.dim, d = at % f.dim;
        const Place place = c.place(pool, b, h, token / f.unit * f.unit);
        if (!place.codes) continue;
        store_element(window_row(pool, c.ring_row(b, h, token), a.dtype), d, a.dtype,
                      element_of(f, place, token % f.unit, d));
      }
    }
    n.quantized = start;
    n.recent = limit - start;
  } else {
    n.recent = min(n.recent, limit - n.quantized);
  }
  __syncthreads();  // every thread has read the lengths
  if (threadIdx.x == 0) {
    int32_t* to = c.lengths + (b * c.heads + h) * 3;
    to[0] = n.sinks;
    to[1] = n.quantized;
    to[2] = n.recent;
  }
}

// ---- compact

struct Compact {
  Cache cache;
  DType dtype;
  const int32_t* keep;
  int64_t keep_heads, count;
  // Workspace, per head: what is kept [count]; its plan; rows [2][ring] of keys and of values: those that come from the
  // ring, and those that go to it.
  int32_t* kept;
  struct CompactPlan* plans;
  void *key_rows, *value_rows;
};

/// kept[0 .. sinks) are sinks; tokens kept[sinks + i] - (sinks before), i < total, are the others: the first
/// `from_pages` of them are quantized now, the first `packed` will be.
struct CompactPlan {
  int32_t sinks, total, from_pages, packed;
};

__device__ __forceinline__ char* spare_row(const Compact& a, const Pool& pool, int64_t head, int half, int64_t row) {
  auto* rows = static_cast<char*>(pool.format.value_layout ? a.value_rows : a.key_rows);
  return rows + ((head * 2 + half) * a.cache.ring + row) * pool.format.dim * bytes_of(a.dtype);
}

/// Inclusive sum or maximum over the threads of a CTA before and including this one; all of them call it.
template <bool MAXIMUM>
__device__ int scan(int x, int* warps) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, x, step);
    if (lane >= step) x = MAXIMUM ? max(x, other) : x + other;
  }
  __syncthreads();
  if (lane == 31) warps[warp] = x;
  __syncthreads();
  for (int w = 0; w < warp; ++w) x = MAXIMUM ? max(x, warps[w]) : x + warps[w];
  return x;
}

__global__ void __launch_bounds__(kThreads) compact_plan(const __grid_constant__ Compact a) {
  __shared__ int warps[kThreads / 32], last_place, last_largest, sinks, from_pages;
  const Cache& c = a.cache;
  const int64_t head = blockIdx.x, b = head / c.heads, h = head % c.heads;
  const Lengths n = lengths_of(c, b, h);
  const int32_t* keep = a.keep + (b * a.keep_heads + (a.keep_heads == 1 ? 0 : h)) * a.count;
  int32_t* kept = a.kept + head * a.count;
  if (threadIdx.x == 0) sinks = from_pages = 0;
  int all = 0, largest = -1;  // so far
  for (int64_t start = 0; start < a.count; start += kThreads) {
    const int64_t i = start + threadIdx.x;
    int token = i < a.count ? keep[i] : -1;
    if (token >= n.total()) token = -1;
    const int upto = scan<true>(token, warps);
    int before = __shfl_up_sync(0xffffffffu, upto, 1);  // the largest of the threads before this one
    if (threadIdx.x % 32 == 0) {
      before = -1;
      for (int w = 0; w < int(threadIdx.x) / 32; ++w) before = max(before, warps[w]);
    }
    const bool valid = token > max(largest, before);
    const int place = scan<false>(valid, warps);
    if (valid) {
      kept[all + place - 1] = token;
      if (token < n.sinks) {
        atomicAdd(&sinks, 1);
      } else if (token < n.sinks + n.quantized) {
        atomicAdd(&from_pages, 1);
      }
    }
    if (threadIdx.x == kThreads - 1) {
      last_place = place;
      last_largest = upto;
    }
    __syncthreads();
    all += last_place;
    largest = max(largest, last_largest);
    __syncthreads();
  }
  __syncthreads();
  CompactPlan plan = {sinks, all - sinks, from_pages, from_pages / c.unit * c.unit};
  if (plan.total - plan.packed >= c.ring) plan.packed += int(flushed(c, plan.total - plan.packed));
  if (threadIdx.x == 0) a.plans[head] = plan;
  kept += plan.sinks;
  const int saved = plan.total - plan.from_pages, group = threadIdx.x / 16, lane = threadIdx.x % 16;
  for (int tensor = 0; tensor < 2; ++tensor) {
    const Pool& pool = tensor ? c.value : c.key;
    const int bytes = pool.format.dim * bytes_of(a.dtype);
    for (int i = group; i < saved; i += kThreads / 16) {
      const int token = kept[plan.from_pages + i] - n.sinks;
      copy_row(spare_row(a, pool, head, 0, i), window_row(pool, c.ring_row(b, h, token), a.dtype), bytes, lane, 16);
    }
    // Sinks move down in order, each thread its own bytes of every row.
    for (int i = threadIdx.x; i < bytes / 16; i += kThreads) {
      auto* rows = reinterpret_cast<uint4*>(window_row(pool, c.sink_row(b, h, 0), a.dtype)) + i;
      for (int j = 0; j < plan.sinks; ++j) rows[j * (bytes / 16)] = rows[(kept - plan.sinks)[j] * (bytes / 16)];
    }
  }
}

/// Element d of kept token i, without the sinks.
__device__ __noinline__ float kept_element(const Compact& a, bool value, int64_t head, int i, int d) {
  const Cache& c = a.cache;
  const Pool& pool = value ? c.value : c.key;
  const CompactPlan plan = a.plans[head];
  if (i >= plan.from_pages) return load_element(spare_row(a, pool, head, 0, i - plan.from_pages), d, a.dtype);
  const int64_t b = head / c.heads, h = head % c.heads;
  const int token = a.kept[head * a.count + plan.sinks + i] - lengths_of(c, b, h).sinks, unit = pool.format.unit;
  const Place place = c.place(pool, b, h, token / unit * unit);
  return place.codes ? element_of(pool.format, place, token % unit, d) : 0.f;
}

/// The units of one tensor and 128 channels, whose units have OWN tokens.
template <int OWN>
__device__ __forceinline__ void move_units(const Compact& a, const Pool& pool, int64_t head, int slice,
                                           QuantizeShared& shared) {
  const Cache& c = a.cache;
  const Format& f = pool.format;
  const int64_t b = head / c.heads, h = head % c.heads;
  const Lengths n = lengths_of(c, b, h);
  const CompactPlan plan = a.plans[head];
  const int32_t* kept = a.kept + head * a.count + plan.sinks;
  auto token_of = [&](int i) { return kept[i] - n.sinks; };
  auto element = [&](int i, int d) { return kept_element(a, f.value_layout, head, i, d); };
  const int channels = min(f.dim - slice * kSlice, kSlice), first = slice * kSlice;
  // What goes to the ring, before the pages are rewritten.
  for (int at = threadIdx.x; at < (plan.total - plan.packed) * channels; at += kThreads) {
    const int i = plan.packed + at / channels, d = first + at % channels;
    store_element(spare_row(a, pool, head, 1, i - plan.packed), d, a.dtype, element(i, d));
  }
  const int groups = f.per_channel ? channels : (channels + f.group_size - 1) / f.group_size;
  for (int start = 0; start < plan.packed; start += OWN) {
    __syncthreads();
    const Place to = c.place(pool, b, h, start);
    if (!to.codes) continue;
    bool exact = start + OWN <= plan.from_pages;
    if (exact) {
      const int low = token_of(start), high = token_of(start + OWN - 1);
      if (low == start && high == start + OWN - 1) continue;  // stays where it is
      if (f.per_channel) exact = low / OWN == high / OWN;
    }
    if (!exact) {
      constexpr int kPer = OWN / kQuantizeWarps;
      float4 x[kPer];
#pragma unroll
      for (int k = 0; k < kPer; ++k) {
        int t, d;
        place_of<kPer>(f, k, &t, &d);
        const int i = start + t;
        x[k] = make_float4(0.f, 0.f, 0.f, 0.f);
        d += first;
        if (d < f.dim) x[k] = make_float4(element(i, d), element(i, d + 1), element(i, d + 2), element(i, d + 3));
      }
      quantize_tile<kPer>(f, OWN, OWN / kv_block, slice, x, to, shared);
      continue;
    }
    for (int at = threadIdx.x; at < OWN * channels; at += kThreads) {
      const int t = at / channels, d = at % channels, token = token_of(start + t);
      const Place from = c.place(pool, b, h, token / OWN * OWN);
      const uint8_t* block = from.codes + token % OWN / kv_block * f.block_bytes;
      shared.codes[t * kByteRow + d] =
          from.codes ? uint8_t(code_at(f, block, token % kv_block, first + d)) : uint8_t(0);
    }
    // Scales: of a channel each, or of 32 tokens and a group each.
    const int scales = f.per_channel ? channels : OWN * groups;
    uint16_t (*parameters)[kSlice / 32 * kMostTokens] =
        reinterpret_cast<uint16_t (*)[kSlice / 32 * kMostTokens]>(shared.parameters);
    for (int at = threadIdx.x; at < scales; at += kThreads) {
      const int t = f.per_channel ? 0 : at % OWN, d = first + (f.per_channel ? at : at / OWN * f.group_size);
      const int token = token_of(start + t), index = f.scale_index(token % OWN, d);
      const Place from = c.place(pool, b, h, token / OWN * OWN);
      parameters[0][at] = from.codes ? from.scales[index] : uint16_t(0);
      parameters[1][at] = from.minima ? from.minima[index] : uint16_t(0);
    }
    __syncthreads();
    for (int at = threadIdx.x; at < scales; at += kThreads) {
      const int t = f.per_channel ? 0 : at % OWN, d = first + (f.per_channel ? at : at / OWN * f.group_size);
      const int target = f.scale_index(t, d);
      to.scales[target] = parameters[0][at];
      if (to.minima) to.minima[target] = parameters[1][at];
    }
    pack_blocks(f, slice, OWN / kv_block, shared, to.codes);
  }
}

__global__ void __launch_bounds__(kThreads) compact_move(const __grid_constant__ Compact a) {
  __shared__ QuantizeShared shared;
  const int keys = slices_of(a.cache.key.format.dim), at = blockIdx.y;
  const Pool& pool = at < keys ? a.cache.key : a.cache.value;
  const int slice = at < keys ? at : at - keys;
  switch (pool.format.unit) {
    case 32: move_units<32>(a, pool, blockIdx.x, slice, shared); break;
    case 64: move_units<64>(a, pool, blockIdx.x, slice, shared); break;
    default: move_units<128>(a, pool, blockIdx.x, slice, shared);
  }
}

__global__ void __launch_bounds__(kThreads) compact_settle(const __grid_constant__ Compact a) {
  const Cache& c = a.cache;
  const int64_t head = blockIdx.x, b = head / c.heads, h = head % c.heads;
  const CompactPlan plan = a.plans[head];
  const int rows = plan.total - plan.packed, group = threadIdx.x / 16, lane = threadIdx.x % 16;
  for (int i = group; i < 2 * rows; i += kThreads / 16) {
    const Pool& pool = i < rows ? c.key : c.value;
    const int at = i < rows ? i : i - rows;
    copy_row(window_row(pool, c.ring_row(b, h, plan.packed + at), a.dtype), spare_row(a, pool, head, 1, at),
             pool.format.dim * bytes_of(a.dtype), lane, 16);
  }
  if (threadIdx.x == 0) {
    int32_t* n = c.lengths + head * 3;
    n[0] = plan.sinks;
    n[1] = plan.packed;
    n[2] = rows;
  }
}

Status compact_heads(const Compact& a, const CudaContext& context) {
  const unsigned heads = unsigned(a.cache.batch * a.cache.heads);
  const unsigned slices = unsigned(slices_of(a.cache.key.format.dim) + slices_of(a.cache.value.format.dim));
  Status status = launch(reinterpret_cast<const void*>(&compact_plan), dim3(heads), a, context, "kv_cache_compact");
  if (status.ok())
    status = launch(reinterpret_cast<const void*>(&compact_move), dim3(heads, slices), a, context, "kv_cache_compact");
  if (status.ok())
    status = launch(reinterpret_cast<const void*>(&compact_settle), dim3(heads), a, context, "kv_cache_compact");
  return status;
}

int64_t aligned_bytes(int64_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

Status kv_crop(const KvCrop& arguments, const CudaContext& context) {
  Status status = kv_check(arguments.cache);
  const Crop a = {cache_on_device(arguments.cache), arguments.cache.dtype, arguments.limits};
  if (status.ok()) status = check_heads(a.cache);
  const unsigned heads = unsigned(a.cache.batch * a.cache.heads);
  if (!status.ok() || heads == 0) return status;
  return launch(reinterpret_cast<const void*>(&crop), dim3(heads), a, context, "kv_cache_crop");
}

size_t kv_compact_workspace(const KvCompact& a) {
  const KvCache& c = a.cache;
  const int64_t heads = c.batch * c.heads, rows = heads * 2 * c.ring() * size_of(c.dtype);
  return size_t(aligned_bytes(heads * a.count * 4) + aligned_bytes(heads * int64_t(sizeof(CompactPlan))) +
                aligned_bytes(rows * c.key.dim) + aligned_bytes(rows * c.value.dim));
}

Status kv_compact(const KvCompact& arguments, const CudaContext& context) {
  const KvCache& cache = arguments.cache;
  Status status = kv_check(cache);
  if (!status.ok()) return status;
  const int64_t heads = cache.batch * cache.heads, rows = heads * 2 * cache.ring() * size_of(cache.dtype);
  auto* at = static_cast<char*>(context.workspace);
  Compact a = {cache_on_device(cache),
               cache.dtype,
               arguments.keep,
               arguments.keep_heads,
               arguments.count,
               nullptr,
               nullptr,
               nullptr,
               nullptr};
  status = check_heads(a.cache);
  if (!status.ok() || heads == 0) return status;
  if (context.workspace_bytes < kv_compact_workspace(arguments))
    return error(Status::Kind::failed, "kv_cache_compact: the workspace is too small");
  a.kept = reinterpret_cast<int32_t*>(at);
  at += aligned_bytes(heads * arguments.count * 4);
  a.plans = reinterpret_cast<CompactPlan*>(at);
  at += aligned_bytes(heads * int64_t(sizeof(CompactPlan)));
  a.key_rows = at;
  a.value_rows = at + aligned_bytes(rows * cache.key.dim);
  return compact_heads(a, context);
}

}  // namespace sparsekit

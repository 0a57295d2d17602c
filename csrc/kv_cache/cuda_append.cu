// kv_append on CUDA: a head's recent tokens, those of the ring and the new ones, are quantized a unit at a time while
// at least `window` stay (cuda_quantize.cuh); what is left of the new ones goes to the ring, and then the lengths
// change. Short appends are one launch, one CTA per head: a decode step costs a launch and a copy. Longer ones quantize
// in launches of their own: a tensor each of 16-bit rows (cuda_quantize_rows.cuh), else one, a CTA per unit, tensor and
// 128 channels. Bound: memory.
#include <cuda_runtime.h>

#include "common/cuda/launch.h"
#include "common/cuda/mma.cuh"
#include "kv_cache/cuda_append.cuh"
#include "kv_cache/cuda_quantize_tiles.h"
#include "sparsekit/attention.h"

namespace sparsekit {
namespace {

using namespace sparsekit::cuda;

constexpr int kThreads = kQuantizeThreads;
constexpr int kMostUnitsAtOnce = 2;  // of a head that one CTA quantizes on its own

/// Quantizes unit `unit` of what leaves the ring: `part` counts 128 channels of keys, then of values.
template <int PER>
__device__ __forceinline__ void flush_unit(const Append& a, const AppendPlan& plan, int64_t b, int64_t h, int unit,
                                           int part, QuantizeShared& shared) {
  const Cache& c = a.cache;
  const int keys = slices_of(c.key.format.dim), slice = part < keys ? part : part - keys;
  const Pool& pool = part < keys ? c.key : c.value;
  const InputView& view = part < keys ? a.key : a.value;
  const int first = plan.n.quantized + unit * c.unit, held = plan.n.quantized + plan.n.recent;
  const int64_t size = a.dtype == DType::f32 ? 4 : 2, fresh = b * view.batch + h * view.head;
  float4 x[PER];
  load_tile<PER>(
      pool.format, a.dtype, PER * kQuantizeWarps, slice,
      [&](int t) {
        const int token = first + t;
        return token < held ? static_cast<const char*>(pool.window) + c.ring_row(b, h, token) * pool.format.dim * size
                            : static_cast<const char*>(view.data) +
                                  (fresh + int64_t(token - held + plan.sinks) * view.row) * size;
      },
      x);
  quantize_tile<PER>(pool.format, PER * kQuantizeWarps, PER * kQuantizeWarps / kv_block, slice, x,
                     c.place(pool, b, h, first), shared);
}

template <int PER>
__global__ void __launch_bounds__(kThreads, PER == 16 ? 1 : 2) append_flush(const __grid_constant__ Append a) {
  __shared__ QuantizeShared shared;
  const Cache& c = a.cache;
  const int64_t b = blockIdx.y / c.heads, h = blockIdx.y % c.heads;
  const AppendPlan plan = plan_append(a, b, h);
  const int unit = blockIdx.x;
  if (!plan.fits || unit * c.unit >= plan.flush) return;
  flush_unit<PER>(a, plan, b, h, unit, blockIdx.z, shared);
}

template <int PER>
__global__ void __launch_bounds__(kThreads, PER == 16 ? 1 : 2)
    append_rest(const __grid_constant__ Append a, bool quantizes) {
  __shared__ QuantizeShared shared;
  const Cache& c = a.cache;
  const int64_t b = blockIdx.x / c.heads, h = blockIdx.x % c.heads;
  const AppendPlan plan = plan_append(a, b, h);
  if (!plan.fits) return;
  const int parts = slices_of(c.key.format.dim) + slices_of(c.value.format.dim);
  for (int at = 0; quantizes && at / parts * c.unit < plan.flush; ++at)
    flush_unit<PER>(a, plan, b, h, at / parts, at % parts, shared);
  __syncthreads();  // ring slots that were read are written now, and lengths below
  const int held = plan.n.quantized + plan.n.recent, kept = plan.n.quantized + plan.flush;
  const int first = max(plan.sinks, kept - held + plan.sinks);  // the first new token that stays in the ring
  const int rows = plan.sinks + plan.count - first;
  const int group = threadIdx.x / 16, lane = threadIdx.x % 16;
  for (int i = group; i < 2 * rows; i += kThreads / 16) {
    const Pool& pool = i < rows ? c.key : c.value;
    const InputView& view = i < rows ? a.key : a.value;
    const int at = i < rows ? i : i - rows, j = at < plan.sinks ? at : first + at - plan.sinks;
    const int64_t row = j < plan.sinks ? c.sink_row(b, h, plan.n.sinks + j) : c.ring_row(b, h, held + j - plan.sinks);
    const int size = a.dtype == DType::f32 ? 4 : 2, bytes = pool.format.dim * size;
    copy_row(static_cast<char*>(pool.window) + row * bytes,
             static_cast<const char*>(view.data) + (b * view.batch + h * view.head + j * view.row) * size, bytes, lane,
             16);
  }
  if (threadIdx.x == 0) {
    int32_t* n = c.lengths + (b * c.heads + h) * 3;
    n[0] = plan.n.sinks + plan.sinks;
    n[1] = kept;
    n[2] = plan.n.recent + plan.count - plan.sinks - plan.flush;
  }
}

/// What leaves the rings, at most `units` units of a head, of one tensor.
Status flush_tiles(const Append& a, const Pool& pool, const InputView& x, int64_t units, const CudaContext& context) {
  const Cache& c = a.cache;
  QuantizeTiles q{};
  q.format = pool.format;
  const int tile = tile_tokens(pool.format);
  q.tiles = uint32_t((units * c.unit + tile - 1) / tile);
  q.heads = int32_t(c.heads);
  q.x = x;
  q.flush = true;
  q.append = a;
  return quantize_tiles(q, a.dtype, c.batch * c.heads, context, "kv_cache_append");
}

template <int PER>
Status append_tokens(const Append& a, const CudaContext& context) {
  const Cache& c = a.cache;
  const int64_t heads = c.batch * c.heads;
  const int64_t units = flushed(c, c.ring + a.tokens) / c.unit;  // at most: the ring was about to flush
  bool quantizes = units <= kMostUnitsAtOnce;
  if (!quantizes && quantizes_tiles(c.key.format, a.dtype, a.key) &&
      quantizes_tiles(c.value.format, a.dtype, a.value)) {
    Status status = flush_tiles(a, c.key, a.key, units, context);
    if (status.ok()) status = flush_tiles(a, c.value, a.value, units, context);
    if (!status.ok()) return status;
  } else if (!quantizes) {
    const unsigned slices = unsigned(slices_of(c.key.format.dim) + slices_of(c.value.format.dim));
    if (heads > 65535) {
      return error(Status::Kind::unsupported,
                   "key: %lld tokens for %lld heads; supported for more than 65535 heads: %d", (long long)a.tokens,
                   (long long)heads, kMostUnitsAtOnce * c.unit);
    }
    Status status = launch(reinterpret_cast<const void*>(&append_flush<PER>),
                           dim3(unsigned(units), unsigned(heads), slices), a, context, "kv_cache_append");
    if (!status.ok()) return status;
  }
  void* pointers[] = {const_cast<Append*>(&a), &quantizes};
  return status_of(cudaLaunchKernel(reinterpret_cast<const void*>(&append_rest<PER>), dim3(unsigned(heads)),
                                    dim3(kThreads), pointers, 0, static_cast<cudaStream_t>(context.stream)),
                   "kv_cache_append");
}

}  // namespace

Status kv_append(const KvAppend& arguments, const CudaContext& context) {
  Status status = kv_check(arguments.cache);
  const Append a = {cache_on_device(arguments.cache),
                    arguments.cache.dtype,
                    arguments.tokens,
                    arguments.key,
                    arguments.value,
                    arguments.counts};
  if (status.ok()) status = check_heads(a.cache);
  if (!status.ok() || a.cache.batch * a.cache.heads == 0 || a.tokens == 0) return status;
  if (a.tokens > (1 << 30))
    return error(Status::Kind::unsupported, "key has %lld tokens; supported: up to 2^30", (long long)a.tokens);
  switch (a.cache.unit) {
    case 32: return append_tokens<4>(a, context);
    case 64: return append_tokens<8>(a, context);
    default: return append_tokens<16>(a, context);
  }
}

}  // namespace sparsekit

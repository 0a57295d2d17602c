// The kernel around QuantizeRows (cuda_quantize_rows.cuh), and the choice among its shapes.
#pragma once

#include "kv_cache/cuda_quantize_rows.cuh"
#include "kv_cache/cuda_quantize_tiles.h"

namespace sparsekit::cuda {

template <class Element, int BITS, bool CHANNEL, bool VALUE>
__global__ void __launch_bounds__(256, 2) quantize_tiles(const __grid_constant__ QuantizeTiles q) {
  using Rows = QuantizeRows<Element, BITS, CHANNEL, VALUE>;
  __shared__ typename Rows::Shared shared;
  const Format& f = q.format;
  const uint32_t head = blockIdx.x / q.tiles;
  const int tile = blockDim.x / 32 * Rows::kWarpTokens, start = (blockIdx.x - head * q.tiles) * tile;
  const Cache& cache = q.append.cache;
  const Pool& pool = VALUE ? cache.value : cache.key;
  // Rows that are still in a ring, then those of x.
  const auto* x = static_cast<const Element*>(q.x.data);
  const uint32_t heads = uint32_t(q.heads), b = head / heads, h = head - b * heads;
  x += int64_t(b) * q.x.batch + int64_t(h) * q.x.head;
  const Element* ring = nullptr;
  int left = q.tokens - start, first = 0, held = 0, slot = 0;
  if (q.flush) {
    const AppendPlan plan = plan_append(q.append, b, h);
    left = plan.fits ? plan.flush - start : 0;
    first = plan.n.quantized + start;
    held = plan.n.recent - start;
    x += int64_t(plan.sinks - plan.n.recent) * q.x.row;
    if (held > 0) {
      ring = static_cast<const Element*>(pool.window) + cache.sink_row(b, h, cache.sinks) * f.dim;
      slot = first % cache.ring;
    }
  }
  if (left <= 0) return;
  x += start * q.x.row;
  auto row = [&](int t) {
    if (t >= held) return x + t * q.x.row;
    const int at = slot + t;  // the ring holds at least t + 1 tokens
    return ring + (at < cache.ring ? at : at - cache.ring) * f.dim;
  };
  auto place = [&](int t) -> Place {  // codes of the block, scales of the unit of token t
    if (q.flush) return cache.place(pool, b, h, first + t);
    const int token = start + t;
    const int64_t scale = head * q.head_scales + (f.per_channel ? token / f.group_size * f.dim : token * f.groups);
    return {q.codes + (head * q.blocks + token / kv_block) * f.block_bytes, q.scales + scale,
            q.minima ? q.minima + scale : nullptr};
  };
  const bool even = held <= 0 && left >= tile;
  Rows(f, min(left, tile), blockIdx.y, shared).run(even ? x : nullptr, q.x.row, row, place);
}

template <class Element, int BITS>
const void* quantize_kernel(bool per_channel, bool value_layout) {
  if (per_channel) {
    return value_layout ? nullptr : reinterpret_cast<const void*>(&quantize_tiles<Element, BITS, true, false>);
  }
  return value_layout ? reinterpret_cast<const void*>(&quantize_tiles<Element, BITS, false, true>)
                      : reinterpret_cast<const void*>(&quantize_tiles<Element, BITS, false, false>);
}

template <class Element>
const void* quantize_kernel(int bits, bool per_channel, bool value_layout) {
  switch (bits) {
    case kv_fp8: return quantize_kernel<Element, kv_fp8>(per_channel, value_layout);
    case 8: return quantize_kernel<Element, 8>(per_channel, value_layout);
    case 4: return quantize_kernel<Element, 4>(per_channel, value_layout);
    case 3: return quantize_kernel<Element, 3>(per_channel, value_layout);
    default: return quantize_kernel<Element, 2>(per_channel, value_layout);
  }
}

}  // namespace sparsekit::cuda

// The packed format on the device: what packing.h and blocks.h are on the CPU, bit by bit the same numbers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "sparsekit/kv_cache.h"

namespace sparsekit::cuda {

constexpr float kHalfLargest = 65504.f;

/// KvPacking, ready for the device.
struct Format {
  int32_t bits, width, group_size, dim, groups, unit;  // groups: of a token
  bool per_channel, symmetric, minima, value_layout;
  int64_t block_bytes, page_scales;  // scales of a page (0 where there are no pages)

  __device__ __forceinline__ bool fp8() const { return bits == kv_fp8; }
  /// Scales of `tokens` tokens, a multiple of unit.
  __device__ __forceinline__ int64_t scales(int64_t tokens) const {
    return per_channel ? tokens / group_size * dim : tokens * groups;
  }
  /// Index of an element's scale among those of its unit.
  __device__ __forceinline__ int scale_index(int t, int d) const {
    return per_channel ? d : (t / kv_block * groups + d / group_size) * kv_block + t % kv_block;
  }
};

inline Format format_of(const KvPacking& p, int64_t page_size) {
  return {p.bits,        p.width(),   p.group_size,   p.dim,          p.groups_per_token(), p.unit(),
          p.per_channel, p.symmetric, p.has_minima(), p.value_layout, p.block_bytes(),      p.scales(page_size)};
}

/// Where a unit's codes and scales stand; codes null: its page is out of range.
struct Place {
  uint8_t* codes;
  uint16_t *scales, *minima;
};

/// What one tensor of a cache is made of.
struct Pool {
  Format format;
  uint8_t* codes;
  uint16_t *scales, *minima;
  void* window;
};

struct Cache {
  Pool key, value;
  int64_t batch, heads, pages, pages_per_head, table_heads, page_heads;
  int32_t page_size, sinks, window, unit, ring;
  int32_t* lengths;
  const int32_t* block_table;

  __device__ __forceinline__ int capacity() const {
    const int64_t tokens = pages > 0 ? pages_per_head * page_size : 0;
    return tokens < 0x7fffffff ? int(tokens) : 0x7fffffff;
  }
  /// Page `i` of a head, or -1.
  __device__ __forceinline__ int64_t page(int64_t b, int64_t h, int64_t i) const {
    if (i >= pages_per_head) return -1;
    if (!block_table) return b * pages_per_head + i;
    const int64_t number = block_table[(b * table_heads + (table_heads == 1 ? 0 : h)) * pages_per_head + i];
    return number < pages ? number : -1;  // a negative one is none as well
  }
  __device__ __forceinline__ Place place(const Pool& pool, int64_t b, int64_t h, int64_t token) const {
    const int64_t number = page(b, h, token / page_size), in_page = token % page_size;
    if (number < 0) return {nullptr, nullptr, nullptr};
    const int64_t at = number * page_heads + (page_heads == 1 ? 0 : h);
    const int64_t scale = at * pool.format.page_scales + pool.format.scales(in_page);
    return {pool.codes + (at * page_size + in_page) / kv_block * pool.format.block_bytes, pool.scales + scale,
            pool.minima ? pool.minima + scale : nullptr};
  }
  /// Rows of the full-precision part: sink i; recent token i, counted after the sinks.
  __device__ __forceinline__ int64_t sink_row(int64_t b, int64_t h, int64_t i) const {
    return (b * heads + h) * (sinks + ring) + i;
  }
  __device__ __forceinline__ int64_t ring_row(int64_t b, int64_t h, int64_t i) const {
    return sink_row(b, h, sinks + i % ring);
  }
};

inline Cache cache_on_device(const KvCache& c) {
  Cache cache;
  cache.key = {format_of(c.key, c.page_size), c.key_codes, c.key_scales, c.key_minima, c.key_window};
  cache.value = {format_of(c.value, c.page_size), c.value_codes, c.value_scales, c.value_minima, c.value_window};
  cache.batch = c.batch;
  cache.heads = c.heads;
  cache.pages = c.pages;
  cache.pages_per_head = c.pages_per_head;
  cache.table_heads = c.table_heads;
  cache.page_heads = c.page_heads();
  cache.page_size = c.page_size;
  cache.sinks = c.sinks;
  cache.window = c.window;
  cache.unit = c.unit();
  cache.ring = c.ring();
  cache.lengths = c.lengths;
  cache.block_table = c.block_table;
  return cache;
}

/// A head's lengths, clamped to what the cache can hold.
struct Lengths {
  int sinks, quantized, recent;
  __device__ __forceinline__ int total() const { return sinks + quantized + recent; }
};
__device__ __forceinline__ Lengths lengths_of(const Cache& c, int64_t b, int64_t h) {
  const int32_t* n = c.lengths + (b * c.heads + h) * 3;
  return {min(max(n[0], 0), c.sinks), min(max(n[1], 0), c.capacity()) / c.unit * c.unit, min(max(n[2], 0), c.ring)};
}

// ---- numbers

__device__ __forceinline__ float half_value(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ __forceinline__ uint16_t half_bits(float x) { return __half_as_ushort(__float2half_rn(x)); }

/// e4m3 as fp32: exact.
__device__ __forceinline__ float fp8_value(uint32_t code) {
  if ((code & 0x7f) == 0x7f) return __uint_as_float(0x7fc00000);
  const float value = __uint_as_float((code & 0x7f) << 20) * __uint_as_float(0x7b800000);  // * 2^120
  return code & 0x80 ? -value : value;
}

/// To nearest even, saturating at 448, of a finite value.
__device__ __forceinline__ uint32_t fp8_code(float value) {
  const uint32_t bits = __float_as_uint(value), sign = bits >> 24 & 0x80;
  uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x43e00000) return sign | 0x7e;
  if (magnitude < 0x3c800000)  // below 2^-6: in units of 2^-9
    return sign | (__float_as_uint(__uint_as_float(magnitude) + 16384.f) - __float_as_uint(16384.f));
  magnitude += 0x7ffff + (magnitude >> 20 & 1);
  magnitude = (magnitude - 0x3c000000) >> 20;
  return sign | (magnitude > 0x7e ? 0x7e : magnitude);
}

/// One product and one sum, each rounded, as on the CPU: no fused multiply-add.
__device__ __forceinline__ float dequantized(const Format& f, uint32_t code, float scale, float minimum) {
  if (f.fp8()) return __fmul_rn(scale, fp8_value(code));
  if (f.symmetric && f.per_channel) return __fmul_rn(scale, float(int(code) - (1 << (f.bits - 1))));
  if (f.symmetric) minimum = -scale * float(1 << (f.bits - 1));  // exact; the CPU's signs of zero
  return __fadd_rn(__fmul_rn(scale, float(code)), minimum);
}

/// The code of element (t, d) of a block.
__device__ __forceinline__ uint32_t code_at(const Format& f, const uint8_t* block, int t, int d) {
  const auto* words = reinterpret_cast<const uint32_t*>(block);
  const int inner = f.value_layout ? t : d, column = f.value_layout ? d : t;
  const int columns = f.value_layout ? f.dim : kv_block;
  auto plane = [&](const uint32_t* from, int width) {
    const int per_word = 32 / width, e = inner % per_word;
    return from[inner / per_word * columns + column] >> (8 * (e % 4) + width * (e / 4)) & ((1u << width) - 1);
  };
  if (f.width == 3) return plane(words, 2) | plane(words + 2 * f.dim, 1) << 2;
  return plane(words, f.width);
}

/// Element (t, d) of the unit that stands at `place`, dequantized.
__device__ __forceinline__ float element_of(const Format& f, const Place& place, int t, int d) {
  const int at = f.scale_index(t, d);
  return dequantized(f, code_at(f, place.codes + t / kv_block * f.block_bytes, t % kv_block, d),
                     half_value(place.scales[at]), place.minima ? half_value(place.minima[at]) : 0.f);
}

/// Four neighbouring elements, as fp32.
__device__ __forceinline__ float4 load4(const float* from) { return *reinterpret_cast<const float4*>(from); }
__device__ __forceinline__ float4 load4(const __half* from) {
  const uint2 raw = *reinterpret_cast<const uint2*>(from);
  const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&raw.x));
  const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&raw.y));
  return {low.x, low.y, high.x, high.y};
}
__device__ __forceinline__ float4 load4(const __nv_bfloat16* from) {
  const uint2 raw = *reinterpret_cast<const uint2*>(from);
  return {__uint_as_float(raw.x << 16), __uint_as_float(raw.x & 0xffff0000u), __uint_as_float(raw.y << 16),
          __uint_as_float(raw.y & 0xffff0000u)};
}

}  // namespace sparsekit::cuda

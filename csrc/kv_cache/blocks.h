// Where the pieces of a cache stand.
#pragma once

#include "kv_cache/packing.h"
#include "sparsekit/kv_cache.h"

namespace sparsekit {
namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t page_of(const KvCache& c, int64_t b, int64_t h, int64_t i) {
  if (!c.block_table) return b * c.pages_per_head + i;
  return c.block_table[(b * c.table_heads + (c.table_heads == 1 ? 0 : h)) * c.pages_per_head + i];
}

/// Codes and scales of the unit that quantized token `token` (a multiple of the packing's unit) begins.
struct UnitPlace {
  uint8_t* codes;
  uint16_t* scales;
  uint16_t* minima;
};
inline UnitPlace unit_place(const KvCache& c, const KvPacking& p, int64_t b, int64_t h, int64_t token) {
  bool value = p.value_layout;
  int64_t page = page_of(c, b, h, token / c.page_size), in_page = token % c.page_size;
  int64_t at = page * c.page_heads() + (c.page_heads() == 1 ? 0 : h);
  int64_t scale = at * p.scales(c.page_size) + p.scales(in_page);
  uint16_t* minima = value ? c.value_minima : c.key_minima;
  return {(value ? c.value_codes : c.key_codes) + (at * c.page_size + in_page) / kv_block * p.block_bytes(),
          (value ? c.value_scales : c.key_scales) + scale, minima ? minima + scale : nullptr};
}

/// Element offset of a row of the full-precision part: sinks, or recent token number `token` counted after the sinks.
inline int64_t sink_row(const KvCache& c, int32_t dim, int64_t b, int64_t h, int64_t i) {
  return ((b * c.heads + h) * (c.sinks + c.ring()) + i) * dim;
}
inline int64_t ring_row(const KvCache& c, int32_t dim, int64_t b, int64_t h, int64_t token) {
  return sink_row(c, dim, b, h, c.sinks + token % c.ring());
}

}  // namespace
}  // namespace sparsekit

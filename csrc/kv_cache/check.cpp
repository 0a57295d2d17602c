// Checks of packings and caches: sizes first, then, on the CPU, what lengths and block table hold.
#include "sparsekit/kv_cache.h"

namespace sparsekit {
namespace {

using Kind = Status::Kind;

Status check_bits(const KvPacking& p, const char* of) {
  if (p.bits != 8 && p.bits != 4 && p.bits != 3 && p.bits != 2 && p.bits != kv_fp8) {
    return error(Kind::invalid_argument, "%s: %d bits; supported: 8, 4, 3, 2 and -8 (fp8 e4m3)", of, p.bits);
  }
  if (p.group_size != 32 && p.group_size != 64 && p.group_size != 128) {
    return error(Kind::invalid_argument, "group_size is %d; supported: 32, 64, 128", p.group_size);
  }
  int32_t multiple = p.width() == 3 ? 32 : 16;
  if (p.dim <= 0 || p.dim > 512 || p.dim % multiple != 0) {
    return error(Kind::invalid_argument, "%s: head_dim is %d; supported at %d bits: multiples of %d up to 512", of,
                 p.dim, p.width(), multiple);
  }
  return {};
}

}  // namespace

Status kv_check(const KvPacking& p) { return check_bits(p, p.value_layout ? "value" : "key"); }

Status kv_check(const KvCache& c) {
  Status status = check_bits(c.key, "key");
  if (status.ok()) status = check_bits(c.value, "value");
  if (!status.ok()) return status;
  if (c.value.per_channel) return error(Kind::unsupported, "value: groups per channel; supported: per token");
  if (c.dtype == DType::f64) {
    return error(Kind::unsupported, "window: float64; supported: float32, float16, bfloat16");
  }
  if (c.page_size <= 0 || c.page_size % c.unit() != 0) {
    return error(Kind::invalid_argument, "page_size is %d; supported: multiples of %d", c.page_size, c.unit());
  }
  if (c.sinks < 0 || c.window < 0 || c.window % kv_block != 0) {
    return error(Kind::invalid_argument, "sinks is %d, window %d; supported: sinks from 0, window a multiple of %d",
                 c.sinks, c.window, kv_block);
  }
  if (c.table_heads != 1 && c.table_heads != c.heads) {
    return error(Kind::invalid_argument, "block_table has %lld heads; supported: 1 or %lld", (long long)c.table_heads,
                 (long long)c.heads);
  }
  if (!c.block_table && c.pages != c.batch * c.pages_per_head) {
    return error(Kind::invalid_argument,
                 "the pool has %lld pages; without a block_table supported: %lld for %lld sequences",
                 (long long)c.pages, (long long)(c.batch * c.pages_per_head), (long long)c.batch);
  }
  return {};
}

Status kv_check_contents(const KvCache& c) {
  for (int64_t at = 0; at < c.batch * c.heads; ++at) {
    const int32_t* n = c.lengths + at * 3;
    long long b = at / c.heads, h = at % c.heads;
    if (n[0] < 0 || n[0] > c.sinks) {
      return error(Kind::invalid_argument, "lengths[%lld, %lld, 0] is %d sinks; supported: 0 to %d", b, h, n[0],
                   c.sinks);
    }
    if (n[1] < 0 || n[1] > c.capacity() || n[1] % c.unit() != 0) {
      return error(Kind::invalid_argument,
                   "lengths[%lld, %lld, 1] is %d quantized tokens; supported: multiples of %d up to the capacity, %lld",
                   b, h, n[1], c.unit(), (long long)c.capacity());
    }
    if (n[2] < 0 || n[2] > c.ring()) {
      return error(Kind::invalid_argument, "lengths[%lld, %lld, 2] is %d recent tokens; supported: 0 to %d", b, h, n[2],
                   c.ring());
    }
    if (!c.block_table || (c.table_heads == 1 && h > 0 && n[1] <= n[1 - 3])) continue;
    int64_t row = b * c.table_heads + (c.table_heads == 1 ? 0 : h);
    for (int64_t i = 0; i * c.page_size < n[1]; ++i) {
      int32_t page = c.block_table[row * c.pages_per_head + i];
      if (page < 0 || page >= c.pages) {
        return error(Kind::invalid_argument, "block_table[%lld, %lld, %lld] is %d; supported: pages 0 to %lld", b,
                     (long long)(c.table_heads == 1 ? 0 : h), (long long)i, page, (long long)c.pages - 1);
      }
    }
  }
  return {};
}

}  // namespace sparsekit

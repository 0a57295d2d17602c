// kv_append, kv_crop, kv_compact: what changes a cache. One (sequence, head) at a time, in parallel; everything that
// can be wrong is found before the first byte is written.
#include <cstring>
#include <vector>

#include "kv_cache/blocks.h"

namespace sparsekit {
namespace {

using Kind = Status::Kind;

/// Reads, writes and quantizes tokens of one head. Tokens are numbered without the sinks.
class Head {
 public:
  Head(const KvCache& c, int64_t b, int64_t h)
      : c(c), b(b), h(h), n(c.lengths + (b * c.heads + h) * 3), element(size_of(c.dtype)) {}

  const KvCache& c;
  int64_t b, h;
  int32_t* n;  // sinks, quantized, recent

  void write_sink(const void* key, const void* value) { write(sink_row(c, 1, b, h, n[0]++), key, value); }

  /// Appends a row in full precision; a full ring gives its oldest unit to the quantized part.
  void append(const void* key, const void* value) {
    write(ring_row(c, 1, b, h, int64_t(n[1]) + n[2]), key, value);
    if (++n[2] == c.ring()) flush();
  }

  void flush() {
    int32_t unit = c.unit();
    for (bool value : {false, true}) {
      const KvPacking& p = value ? c.value : c.key;
      rows.resize(int64_t(unit) * p.dim);
      for (int32_t t = 0; t < unit; ++t) read_recent(p, n[1] + t, &rows[int64_t(t) * p.dim]);
      for (int32_t t = 0; t < unit; t += p.unit()) quantize(p, n[1] + t, &rows[int64_t(t) * p.dim]);
    }
    n[1] += unit;
    n[2] -= unit;
  }

  void read_recent(const KvPacking& p, int64_t token, float* row) const {
    load_row(p.value_layout ? c.value_window : c.key_window, ring_row(c, p.dim, b, h, token), c.dtype, p.dim, row);
  }
  void write_recent(const KvPacking& p, int64_t token, const float* row) {
    store_row(p.value_layout ? c.value_window : c.key_window, ring_row(c, p.dim, b, h, token), c.dtype, p.dim, row);
  }

  /// Codes of one unit [unit][dim], and its scales.
  UnitPlace read_codes(const KvPacking& p, int64_t token, std::vector<uint8_t>& into) const {
    UnitPlace place = unit_place(c, p, b, h, token);
    into.resize(int64_t(p.unit()) * p.dim);
    for (int32_t t = 0; t < p.unit(); t += kv_block) {
      unpack_block(p, place.codes + t / kv_block * p.block_bytes(), &into[int64_t(t) * p.dim]);
    }
    return place;
  }

  void write_codes(const KvPacking& p, int64_t token, const std::vector<uint8_t>& from,
                   const std::vector<uint16_t>& scales, const std::vector<uint16_t>& minima) {
    UnitPlace place = unit_place(c, p, b, h, token);
    for (int32_t t = 0; t < p.unit(); t += kv_block) {
      pack_block(p, &from[int64_t(t) * p.dim], place.codes + t / kv_block * p.block_bytes());
    }
    std::memcpy(place.scales, scales.data(), scales.size() * sizeof(uint16_t));
    if (place.minima) std::memcpy(place.minima, minima.data(), minima.size() * sizeof(uint16_t));
  }

  void quantize(const KvPacking& p, int64_t token, const float* x) {
    codes.resize(int64_t(p.unit()) * p.dim);
    UnitPlace place = unit_place(c, p, b, h, token);
    quantize_unit(p, x, p.unit(), codes.data(), place.scales, place.minima);
    for (int32_t t = 0; t < p.unit(); t += kv_block) {
      pack_block(p, &codes[int64_t(t) * p.dim], place.codes + t / kv_block * p.block_bytes());
    }
  }

 private:
  void write(int64_t row, const void* key, const void* value) {
    std::memcpy(static_cast<char*>(c.key_window) + row * c.key.dim * element, key, c.key.dim * element);
    std::memcpy(static_cast<char*>(c.value_window) + row * c.value.dim * element, value, c.value.dim * element);
  }

  int64_t element;
  std::vector<float> rows;
  std::vector<uint8_t> codes;
};

int64_t count_of(const KvAppend& a, int64_t b) {
  int64_t count = a.counts ? a.counts[b] : a.tokens;
  return count < 0 ? 0 : count > a.tokens ? a.tokens : count;
}

/// Units that would be quantized after `recent` tokens stand in the ring.
int64_t flushed(const KvCache& c, int64_t recent) {
  return recent < c.ring() ? 0 : (recent - c.window) / c.unit() * c.unit();
}

Status check_append(const KvAppend& a) {
  const KvCache& c = a.cache;
  Status status = kv_check(c);
  if (status.ok()) status = kv_check_contents(c);
  for (int64_t at = 0; at < c.batch * c.heads && status.ok(); ++at) {
    const int32_t* n = c.lengths + at * 3;
    int64_t b = at / c.heads, h = at % c.heads, count = count_of(a, b);
    if (a.counts && a.counts[b] > a.tokens) {
      return error(Kind::invalid_argument, "counts[%lld] is %d; supported: up to %lld, the tokens of key", (long long)b,
                   a.counts[b], (long long)a.tokens);
    }
    int64_t sinks = n[1] + n[2] == 0 ? (count < c.sinks - n[0] ? count : c.sinks - n[0]) : 0;
    int64_t quantized = n[1] + flushed(c, n[2] + count - sinks);
    if (quantized > c.capacity()) {
      return error(Kind::invalid_argument,
                   "the cache is full: sequence %lld, head %lld holds %lld tokens and gets %lld more; supported: %lld "
                   "quantized tokens, and the window (nothing was appended)",
                   (long long)b, (long long)h, (long long)n[0] + n[1] + n[2], (long long)count,
                   (long long)c.capacity());
    }
    for (int64_t i = n[1] / c.page_size; i * c.page_size < quantized; ++i) {
      int64_t page = page_of(c, b, h, i);
      if (page < 0 || page >= c.pages) {
        return error(
            Kind::invalid_argument,
            "block_table of sequence %lld: page %lld is %lld; supported: pages 0 to %lld (nothing was appended)",
            (long long)b, (long long)i, (long long)page, (long long)c.pages - 1);
      }
    }
  }
  return status;
}

void append_head(const KvAppend& a, int64_t b, int64_t h) {
  const KvCache& c = a.cache;
  Head head(c, b, h);
  int64_t element = size_of(c.dtype);
  for (int64_t t = 0, count = count_of(a, b); t < count; ++t) {
    const char* key = static_cast<const char*>(a.key.data) + a.key.offset(b, h, t) * element;
    const char* value = static_cast<const char*>(a.value.data) + a.value.offset(b, h, t) * element;
    if (head.n[0] < c.sinks && head.n[1] + head.n[2] == 0) {
      head.write_sink(key, value);
    } else {
      head.append(key, value);
    }
  }
}

/// The kept tokens of a head move to the front. Tokens `kept` are numbered without the sinks, ascending, so a unit is
/// written where every token that later units need stands behind it.
void keep_tokens(Head& head, const std::vector<int32_t>& kept) {
  const KvCache& c = head.c;
  int64_t quantized = head.n[1], total = int64_t(kept.size()), unit = c.unit();
  int64_t from_pages = 0;
  while (from_pages < total && kept[from_pages] < quantized) ++from_pages;
  // What stays quantized: whole units, and more where the ring could not hold the rest.
  int64_t packed = from_pages / unit * unit;
  if (total - packed >= c.ring()) packed += flushed(c, total - packed);

  for (bool value : {false, true}) {
    const KvPacking& p = value ? c.value : c.key;
    int64_t dim = p.dim, own = p.unit();
    std::vector<float> rows(total - packed > own ? (total - packed) * dim : own * dim);
    std::vector<float> recent((total - from_pages) * dim);  // the ring is written last, and read now
    for (int64_t i = from_pages; i < total; ++i) head.read_recent(p, kept[i], &recent[(i - from_pages) * dim]);
    std::vector<uint8_t> source, codes(own * dim);
    std::vector<uint16_t> scales(p.scales(own)), minima(p.has_minima() ? p.scales(own) : 0);
    UnitPlace place{};
    int64_t loaded = -1;
    auto load_unit = [&](int64_t token) {
      if (token / own != loaded) place = head.read_codes(p, token / own * own, source);
      loaded = token / own;
      return int32_t(token % own);
    };
    auto read = [&](int64_t i, float* row) {
      if (i >= from_pages) {
        std::memcpy(row, &recent[(i - from_pages) * dim], dim * sizeof(float));
      } else {
        int32_t t = load_unit(kept[i]);
        dequantize_row(p, &source[t * dim], t, place.scales, place.minima, row);
      }
    };
    // The rest goes to the ring, dequantized. Before the pages are rewritten: its source may be overwritten.
    std::vector<float> rest((total - packed) * dim);
    for (int64_t i = packed; i < total; ++i) read(i, &rest[(i - packed) * dim]);
    loaded = -1;
    for (int64_t start = 0; start < packed; start += own) {
      bool exact = start + own <= from_pages;
      if (p.per_channel) exact = exact && kept[start] / own == kept[start + own - 1] / own;
      if (exact && kept[start] == start && kept[start + own - 1] == start + own - 1) continue;  // stays where it is
      if (exact) {
        for (int64_t i = 0; i < own; ++i) {
          int32_t t = load_unit(kept[start + i]);
          std::memcpy(&codes[i * dim], &source[t * dim], dim);
          for (int64_t d = 0; d < dim; d += p.per_channel ? 1 : p.group_size) {
            int64_t to = scale_index(p, int32_t(i), int32_t(d)), from = scale_index(p, t, int32_t(d));
            scales[to] = place.scales[from];
            if (place.minima) minima[to] = place.minima[from];
          }
        }
        head.write_codes(p, start, codes, scales, minima);
      } else {
        for (int64_t i = 0; i < own; ++i) read(start + i, &rows[i * dim]);
        head.quantize(p, start, rows.data());
      }
      loaded = -1;
    }
    for (int64_t i = packed; i < total; ++i) head.write_recent(p, i, &rest[(i - packed) * dim]);
  }
  head.n[1] = int32_t(packed);
  head.n[2] = int32_t(total - packed);
}

void crop_head(const KvCrop& a, int64_t b, int64_t h) {
  Head head(a.cache, b, h);
  int64_t limit = a.limits[b] < 0 ? 0 : a.limits[b];
  int64_t sinks = limit < head.n[0] ? limit : head.n[0];
  limit -= sinks;
  head.n[0] = int32_t(sinks);
  if (limit >= int64_t(head.n[1]) + head.n[2]) return;
  if (limit >= head.n[1]) {
    head.n[2] = int32_t(limit - head.n[1]);
    return;
  }
  // A cut unit: its kept tokens go back to the ring. Those before it stay as they are.
  const KvCache& c = a.cache;
  int64_t start = limit / c.unit() * c.unit();
  for (bool value : {false, true}) {
    const KvPacking& p = value ? c.value : c.key;
    std::vector<uint8_t> codes;
    std::vector<float> row(p.dim);
    for (int64_t token = start; token < limit; token += p.unit()) {
      UnitPlace place = head.read_codes(p, token, codes);
      for (int32_t t = 0; t < p.unit() && token + t < limit; ++t) {
        dequantize_row(p, &codes[int64_t(t) * p.dim], t, place.scales, place.minima, row.data());
        head.write_recent(p, token + t, row.data());
      }
    }
  }
  head.n[1] = int32_t(start);
  head.n[2] = int32_t(limit - start);
}

Status check_keep(const KvCompact& a) {
  const KvCache& c = a.cache;
  Status status = kv_check(c);
  if (status.ok()) status = kv_check_contents(c);
  for (int64_t at = 0; at < c.batch * c.heads && status.ok(); ++at) {
    int64_t b = at / c.heads, h = at % c.heads, row = b * a.keep_heads + (a.keep_heads == 1 ? 0 : h);
    const int32_t* n = c.lengths + at * 3;
    int64_t length = int64_t(n[0]) + n[1] + n[2], before = -1;
    for (int64_t i = 0; i < a.count; ++i) {
      int64_t token = a.keep[row * a.count + i];
      bool empty = token == -1;
      if ((!empty && (token <= before || token >= length)) || (token < -1)) {
        return error(
            Kind::invalid_argument,
            "keep[%lld, %lld, %lld] is %lld after %lld; supported: ascending tokens below the length, %lld, then -1",
            (long long)b, (long long)(a.keep_heads == 1 ? 0 : h), (long long)i, (long long)token, (long long)before,
            (long long)length);
      }
      before = empty ? length : token;
    }
  }
  return status;
}

void compact_head(const KvCompact& a, int64_t b, int64_t h) {
  Head head(a.cache, b, h);
  const KvCache& c = a.cache;
  const int32_t* keep = a.keep + (b * a.keep_heads + (a.keep_heads == 1 ? 0 : h)) * a.count;
  std::vector<int32_t> kept;
  int32_t sinks = 0;
  for (int64_t i = 0; i < a.count && keep[i] >= 0; ++i) {
    if (keep[i] >= head.n[0]) {
      kept.push_back(keep[i] - head.n[0]);
      continue;
    }
    for (const KvPacking* p : {&c.key, &c.value}) {
      char* window = static_cast<char*>(p->value_layout ? c.value_window : c.key_window);
      int64_t bytes = size_of(c.dtype);
      std::memmove(window + sink_row(c, p->dim, b, h, sinks) * bytes,
                   window + sink_row(c, p->dim, b, h, keep[i]) * bytes, p->dim * bytes);
    }
    ++sinks;
  }
  head.n[0] = sinks;
  keep_tokens(head, kept);
}

/// Runs `change(arguments, b, h)` for every head.
template <class Arguments, void change(const Arguments&, int64_t, int64_t)>
void for_each_head(const Arguments& arguments, const ParallelFor& parallel) {
  auto body = [](int64_t first, int64_t last, void* context) {
    const auto& a = *static_cast<const Arguments*>(context);
    for (int64_t at = first; at < last; ++at) change(a, at / a.cache.heads, at % a.cache.heads);
  };
  parallel(0, arguments.cache.batch * arguments.cache.heads, 1, body, const_cast<Arguments*>(&arguments));
}

}  // namespace

Status kv_append(const KvAppend& arguments, const ParallelFor& parallel) {
  Status status = check_append(arguments);
  if (status.ok()) for_each_head<KvAppend, append_head>(arguments, parallel);
  return status;
}

Status kv_crop(const KvCrop& arguments, const ParallelFor& parallel) {
  Status status = kv_check(arguments.cache);
  if (status.ok()) status = kv_check_contents(arguments.cache);
  if (status.ok()) for_each_head<KvCrop, crop_head>(arguments, parallel);
  return status;
}

Status kv_compact(const KvCompact& arguments, const ParallelFor& parallel) {
  Status status = check_keep(arguments);
  if (status.ok()) for_each_head<KvCompact, compact_head>(arguments, parallel);
  return status;
}

}  // namespace sparsekit

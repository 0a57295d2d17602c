// Caches through the API without torch: appends in pieces, crop, compact, and decode on every instruction set against
// the reference and against attention over what was appended. Every buffer has exactly its size, so that a sanitizer
// sees the first byte too many.
#include "sparsekit/kv_cache.h"

#include <algorithm>

#include "numpy/thread_pool.h"
#include "problem.h"

namespace sparsekit::testing {
namespace {

constexpr int32_t all_bits[] = {8, 4, 3, 2, kv_fp8};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// [batch * heads][tokens][dim]
using Rows = std::vector<std::vector<std::vector<double>>>;

struct CacheShape {
  int32_t bits = 4, group_size = 32, head_dim = 64, value_dim = 32, sinks = 0, window = 32;
  bool per_channel = true;
  int64_t batch = 2, heads = 2, capacity = 512, table_heads = 0;  // 0: no block table
  DType dtype = DType::f32;
};

/// A cache that owns its buffers, and beside it what was appended and not removed.
struct Cache {
  KvCache cache;
  std::vector<uint8_t> key_codes, value_codes;
  std::vector<uint16_t> key_scales, key_minima, value_scales, value_minima;
  std::unique_ptr<char[]> key_window, value_window;
  std::vector<int32_t> lengths, table;
  Rows keys, values;

  Cache(const CacheShape& s, Random& random) {
    KvCache& c = cache;
    c.key.bits = c.value.bits = s.bits, c.key.group_size = c.value.group_size = s.group_size;
    c.key.dim = s.head_dim, c.value.dim = s.value_dim, c.value.value_layout = true;
    c.key.per_channel = s.per_channel, c.key.symmetric = random() % 2, c.value.symmetric = random() % 2;
    c.dtype = s.dtype, c.batch = s.batch, c.heads = s.heads, c.sinks = s.sinks, c.window = s.window;
    c.page_size = c.unit() * int32_t(1 + random() % 3);
    c.pages_per_head = ceil_div(s.capacity, c.page_size);
    c.pages = s.batch * c.pages_per_head;
    if (s.table_heads) {
      c.pages = s.batch * s.table_heads * c.pages_per_head;
      for (int64_t i = 0; i < c.pages; ++i) table.push_back(int32_t(i));
      std::shuffle(table.begin(), table.end(), random);
      c.block_table = table.data(), c.table_heads = s.table_heads;
    }
    const int64_t slots = c.pages * c.page_heads(), blocks = slots * c.page_size / kv_block;
    key_codes.resize(size_t(blocks * c.key.block_bytes()), 0xee);
    value_codes.resize(size_t(blocks * c.value.block_bytes()), 0xee);
    key_scales.resize(size_t(slots * c.key.scales(c.page_size)), 0x7e00);
    value_scales.resize(size_t(slots * c.value.scales(c.page_size)), 0x7e00);
    if (c.key.has_minima()) key_minima = key_scales;
    if (c.value.has_minima()) value_minima = value_scales;
    const int64_t rows = s.batch * s.heads * (s.sinks + c.ring()) * size_of(s.dtype);
    key_window.reset(new char[size_t(rows * s.head_dim)]), value_window.reset(new char[size_t(rows * s.value_dim)]);
    std::fill_n(key_window.get(), rows * s.head_dim, char(0xff));  // NaN
    std::fill_n(value_window.get(), rows * s.value_dim, char(0xff));
    lengths.resize(size_t(s.batch * s.heads * 3));
    c.key_codes = key_codes.data(), c.value_codes = value_codes.data();
    c.key_scales = key_scales.data(), c.value_scales = value_scales.data();
    c.key_minima = c.key.has_minima() ? key_minima.data() : nullptr;
    c.value_minima = c.value.has_minima() ? value_minima.data() : nullptr;
    c.key_window = key_window.get(), c.value_window = value_window.get(), c.lengths = lengths.data();
    keys.resize(size_t(s.batch * s.heads)), values = keys;
  }

  void append(int64_t tokens, Random& random) {
    Tensor key(cache.dtype, cache.batch, cache.heads, tokens, cache.key.dim);
    Tensor value(cache.dtype, cache.batch, cache.heads, tokens, cache.value.dim);
    key.randomize(random), value.randomize(random);
    std::vector<int32_t> counts;
    for (int64_t b = 0; b < cache.batch; ++b) {
      counts.push_back(b == 0 ? int32_t(tokens) : int32_t(random() % unsigned(tokens + 2)) - 1);
      for (int64_t h = 0; h < cache.heads; ++h)
        for (int64_t t = 0; t < counts.back(); ++t) {
          auto row = [&](const Tensor& x) {
            std::vector<double> all;
            for (int64_t d = 0; d < x.dim; ++d) all.push_back(x.get(b, h, t, d));
            return all;
          };
          keys[size_t(b * cache.heads + h)].push_back(row(key));
          values[size_t(b * cache.heads + h)].push_back(row(value));
        }
    }
    KvAppend call;
    call.cache = cache, call.tokens = tokens, call.counts = counts.data();
    call.key = key.input(), call.value = value.input();
    CHECK_OK(kv_append(call, thread_pool(2)));
  }

  void crop(const std::vector<int32_t>& limits) {
    KvCrop call;
    call.cache = cache, call.limits = limits.data();
    CHECK_OK(kv_crop(call, thread_pool(2)));
    for (size_t at = 0; at < keys.size(); ++at) {
      const size_t limit = size_t(limits[at / size_t(cache.heads)]);
      if (limit < keys[at].size()) keys[at].resize(limit), values[at].resize(limit);
    }
  }

  void compact(int64_t count, Random& random) {
    std::vector<int32_t> keep;
    for (size_t at = 0; at < keys.size(); ++at) {
      std::vector<int32_t> order;
      for (size_t t = 0; t < keys[at].size(); ++t) order.push_back(int32_t(t));
      std::shuffle(order.begin(), order.end(), random);
      order.resize(std::min(size_t(count), order.size()));
      std::sort(order.begin(), order.end());
      std::vector<std::vector<double>> kept_keys, kept_values;
      for (int32_t t : order) kept_keys.push_back(keys[at][size_t(t)]), kept_values.push_back(values[at][size_t(t)]);
      keys[at] = kept_keys, values[at] = kept_values;
      order.resize(size_t(count), -1);
      keep.insert(keep.end(), order.begin(), order.end());
    }
    KvCompact call;
    call.cache = cache, call.keep = keep.data(), call.keep_heads = cache.heads, call.count = count;
    CHECK_OK(kv_compact(call, thread_pool(2)));
  }
};

/// Decode on every instruction set against the reference, and the reference against the rows `keys` and `values` up to
/// `loss` (what quantization may do to an output).
void check_decode(DecodeAttention call, const Rows& keys, const Rows& values, double loss, const char* what,
                  Random& random) {
  Tensor query(call.dtype, call.batch, call.heads_q, call.len_q, call.head_dim);
  query.randomize(random);
  const int64_t rows = call.batch * call.heads_q * call.len_q, group = call.heads_q / call.heads_kv;
  size_t longest = 0;
  for (const auto& head : keys) longest = std::max(longest, head.size());
  const bool biased = random() % 2;
  const int64_t bias_length = int64_t(longest) / 2 + 1;  // tokens past it have none
  std::vector<float> bias(size_t(rows * bias_length)), sinks(size_t(call.heads_q));
  for (float& x : bias) x = random() % 5 ? float(random() % 100) / 50 : -INFINITY;
  for (float& x : sinks) x = float(random() % 100) / 25;
  call.query = query.input(), call.scale = 1 / std::sqrt(float(call.head_dim));
  call.softcap = random() % 3 ? 0 : 4.f;
  call.sinks = random() % 2 ? sinks.data() : nullptr;
  if (biased) call.key_bias = bias.data(), call.bias_length = bias_length, call.bias_row = bias_length;
  call.bias_head = call.bias_row * call.len_q, call.bias_batch = call.bias_head * call.heads_q;
  call.scores_length = random() % 2 ? int64_t(random() % (longest + 5)) : 0;

  std::vector<double> want, want_lse, want_scores;
  for_each_isa([&](const char* isa) {
    Tensor out(call.dtype, call.batch, call.heads_q, call.len_q, call.value_dim);
    std::vector<float> lse(size_t(rows), -77), scores(size_t(rows * call.scores_length), -77);
    out.fill(-77);
    call.out = out.output(), call.lse = lse.data(), call.scores = call.scores_length ? scores.data() : nullptr;
    CHECK_OK(decode_attention(call, thread_pool(2)));
    std::vector<double> got;
    for (int64_t i = 0; i < out.size(); ++i) got.push_back(load(out.bytes.get(), i, out.dtype));
    if (want.empty()) {
      want = got, want_lse.assign(lse.begin(), lse.end()), want_scores.assign(scores.begin(), scores.end());
    }
    auto check = [&](auto& found, const std::vector<double>& wanted, double tolerance, const char* name) {
      for (size_t i = 0; i < wanted.size(); ++i) {
        CHECK(found[i] == wanted[i] || std::fabs(found[i] - wanted[i]) <= tolerance * (1 + std::fabs(wanted[i])),
              "%s on %s, len_q %d, dims %d %d: %s %d of %d is %g, %g wanted", what, isa, int(call.len_q), call.head_dim,
              call.value_dim, name, int(i), int(wanted.size()), double(found[i]), wanted[i]);
      }
    };
    check(got, want, call.dtype == DType::f32 ? 1e-4 : call.dtype == DType::f16 ? 2e-3 : 1.2e-2, "out");
    check(lse, want_lse, 1e-3, "lse");
    check(scores, want_scores, 1e-3, "score");
  });
  if (loss < 0) return;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t i = row % call.len_q, hq = row / call.len_q % call.heads_q, b = row / call.len_q / call.heads_q;
    const auto& k = keys[size_t(b * call.heads_kv + hq / group)];
    const auto& v = values[size_t(b * call.heads_kv + hq / group)];
    std::vector<double> sum(size_t(call.value_dim), 0.);
    double total = call.sinks ? std::exp(double(sinks[size_t(hq)])) : 0;
    bool sees = false;
    for (int64_t j = 0; j < int64_t(k.size()) - call.len_q + 1 + i; ++j) {
      double score = 0;
      for (int64_t d = 0; d < call.head_dim; ++d) score += query.get(b, hq, i, d) * k[size_t(j)][size_t(d)];
      score *= call.scale;
      if (call.softcap > 0) score = call.softcap * std::tanh(score / call.softcap);
      if (biased && j < bias_length) score += bias[size_t(row * bias_length + j)];
      const double weight = std::exp(score);
      sees |= weight > 0, total += weight;
      for (size_t d = 0; d < sum.size(); ++d) sum[d] += weight * v[size_t(j)][d];
    }
    for (size_t d = 0; d < sum.size(); ++d) {
      const double got = want[size_t(row) * sum.size() + d], truth = sees ? sum[d] / total : 0;
      CHECK(std::fabs(got - truth) <= loss + 0.01 * std::fabs(truth), "%s: row %d out %d is %g, attention gives %g",
            what, int(row), int(d), got, truth);
    }
  }
}

void check_cache(const Cache& c, double loss, const char* what, Random& random) {
  DecodeAttention call;
  call.cache = &c.cache, call.dtype = DType(random() % 3), call.batch = c.cache.batch, call.heads_kv = c.cache.heads;
  call.head_dim = c.cache.key.dim;
  call.value_dim = c.cache.value.dim;
  constexpr int64_t lens[] = {1, 3, 16};
  call.len_q = lens[random() % 3], call.heads_q = c.cache.heads * int64_t(call.len_q < 16 ? 1 + random() % 3 : 1);
  check_decode(call, c.keys, c.values, loss, what, random);
}

TEST(caches_hold_what_was_appended) {
  Random random(61);
  constexpr int32_t dims[] = {64, 32, 96, 128, 16, 80};
  for (int32_t bits : all_bits)
    for (int turn = 0; turn < 6; ++turn) {
      CacheShape s;
      s.bits = bits, s.group_size = 32 << turn % 3, s.per_channel = turn % 2, s.dtype = DType(random() % 3);
      s.head_dim = dims[random() % (bits == 3 ? 4 : 6)], s.value_dim = dims[random() % (bits == 3 ? 4 : 6)];
      s.sinks = int32_t(random() % 3) * 5, s.window = int32_t(random() % 3) * 32;
      s.table_heads = turn < 2 ? 0 : turn < 4 ? 1 : s.heads;
      const double loss = bits == 8 ? 0.06 : bits == kv_fp8 ? 0.3 : -1;
      Cache cache(s, random);
      for (int64_t tokens : {1, 7, 33, 130, 40}) cache.append(tokens, random);
      check_cache(cache, loss, "appended", random);
      cache.compact(120, random);
      check_cache(cache, loss, "compacted", random);
      cache.append(19, random);
      cache.crop({77, 13});
      cache.append(90, random);
      check_cache(cache, loss, "appended again", random);
      cache.crop({0, 2});
      check_cache(cache, loss, "emptied", random);
    }
}

TEST(decode_over_plain_caches) {
  Random random(62);
  constexpr int32_t dims[] = {64, 128, 40, 192, 20, 96, 48};
  for (DType dtype : {DType::f32, DType::bf16, DType::f16})
    for (int turn = 0; turn < 8; ++turn) {
      PlainCache plain;
      DecodeAttention call;
      const bool paged = turn % 2;
      call.batch = 2, call.heads_kv = 2, call.heads_q = turn % 3 ? 4 : 2,
      call.len_q = turn % 4 == 3 ? 16 : 1 + turn % 4 * 2;
      call.head_dim = dims[turn % 7], call.value_dim = dims[random() % 7], call.dtype = dtype;
      const int32_t length = turn == 0 ? 1 : turn == 4 ? 2100 : int32_t(random() % 160);
      plain.dtype = dtype, plain.page_size = paged ? 13 : length,
      plain.pages_per_head = paged ? ceil_div(length, 13) : 1;
      plain.pages = 2 * plain.pages_per_head;
      // paged: [pages, page_size, heads, dim] (NHD); else [batch, heads, tokens, dim]. Tensor names its axes HND.
      const int64_t rows = paged ? 2 : plain.page_size, heads = paged ? plain.page_size : 2;
      Tensor key(dtype, plain.pages, heads, rows, call.head_dim),
          value(dtype, plain.pages, heads, rows, call.value_dim);
      key.randomize(random), value.randomize(random);
      plain.key = key.bytes.get(), plain.value = value.bytes.get();
      plain.key_page = heads * rows * key.dim, plain.value_page = heads * rows * value.dim;
      plain.key_head = (paged ? 1 : rows) * key.dim, plain.value_head = (paged ? 1 : rows) * value.dim;
      plain.key_token = (paged ? rows : 1) * key.dim, plain.value_token = (paged ? rows : 1) * value.dim;
      std::vector<int32_t> lengths = {length, length / 2}, table;
      for (int64_t i = 0; i < plain.pages; ++i) table.push_back(int32_t(i));
      std::shuffle(table.begin(), table.end(), random);
      plain.lengths = lengths.data(), plain.block_table = paged ? table.data() : nullptr;
      call.plain = &plain;
      Rows keys(4), values(4);
      for (int64_t at = 0; at < 4; ++at)
        for (int64_t t = 0; t < lengths[size_t(at / 2)]; ++t) {
          const int64_t page = paged ? table[size_t(at / 2 * plain.pages_per_head + t / 13)] : at / 2;
          const int64_t h = paged ? t % 13 : at % 2, row = paged ? at % 2 : t;
          keys[size_t(at)].emplace_back(), values[size_t(at)].emplace_back();
          for (int64_t d = 0; d < key.dim; ++d) keys[size_t(at)].back().push_back(key.get(page, h, row, d));
          for (int64_t d = 0; d < value.dim; ++d) values[size_t(at)].back().push_back(value.get(page, h, row, d));
        }
      check_decode(call, keys, values, 0.02, paged ? "paged" : "contiguous", random);
    }
}

}  // namespace
}  // namespace sparsekit::testing

// decode_attention on the CPU: checks, the cut into splits, dispatch, the merge. See decode.h.
#include "kv_cache/decode.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "common/cpu/features.h"
#include "kv_cache/blocks.h"

namespace sparsekit {
namespace {

using Kind = Status::Kind;

struct Entry {
  const DecodeKernel* kernel;
  Isa isa;
};

constexpr Entry table[] = {
#ifdef SPARSEKIT_X86
    {&decode_avx512_bf16, Isa::avx512_bf16}, {&decode_avx512, Isa::avx512},       {&decode_avx2, Isa::avx2},
#endif
    {&decode_portable, Isa::portable},       {&decode_reference, Isa::reference},
};

const char* refuses(const Entry& entry, const DecodeAttention& problem) {
  const char* reason = isa_refuses(entry.isa);
  return reason ? reason : entry.kernel->refuses(problem);
}

struct HeadLength {
  int64_t parts[3];  // sinks, quantized, ring; plain: all in the last
  int64_t tokens() const { return parts[0] + parts[1] + parts[2]; }
  int64_t chunks() const {
    return ceil_div(parts[0], chunk_tokens) + ceil_div(parts[1], chunk_tokens) + ceil_div(parts[2], chunk_tokens);
  }
};

HeadLength length_of(const DecodeAttention& p, int64_t b, int64_t h) {
  if (p.plain) return {{0, 0, p.plain->lengths[b]}};
  const int32_t* n = p.cache->lengths + (b * p.heads_kv + h) * 3;
  return {{n[0], n[1], n[2]}};
}

Status check_plain(const DecodeAttention& p) {
  const PlainCache& c = *p.plain;
  if (c.dtype == DType::f64) return error(Kind::unsupported, "key: float64; supported: float32, float16, bfloat16");
  int64_t capacity = c.pages_per_head * c.page_size;
  for (int64_t b = 0; b < p.batch; ++b) {
    if (c.lengths[b] < 0 || c.lengths[b] > capacity) {
      return error(Kind::invalid_argument, "lengths[%lld] is %d; supported: 0 to the capacity, %lld", (long long)b,
                   c.lengths[b], (long long)capacity);
    }
    for (int64_t i = 0; c.block_table && i * c.page_size < c.lengths[b]; ++i) {
      int32_t page = c.block_table[b * c.pages_per_head + i];
      if (page < 0 || page >= c.pages) {
        return error(Kind::invalid_argument, "block_table[%lld, %lld] is %d; supported: pages 0 to %lld", (long long)b,
                     (long long)i, page, (long long)c.pages - 1);
      }
    }
  }
  return {};
}

Status check(const DecodeAttention& p) {
  Isa limit;
  bool forced;
  if (const char* text = isa_limit(&limit, &forced)) return error(Kind::invalid_argument, "%s", text);
  if (p.heads_kv <= 0 || p.heads_q % p.heads_kv != 0) {
    return error(Kind::invalid_argument, "query has %lld heads, the cache %lld; supported: a multiple",
                 (long long)p.heads_q, (long long)p.heads_kv);
  }
  if (p.len_q < 1 || p.len_q > 16) {
    return error(Kind::unsupported, "query has %lld rows; supported: 1 to 16", (long long)p.len_q);
  }
  if (p.dtype == DType::f64) return error(Kind::unsupported, "query: float64; supported: float32, float16, bfloat16");
  if (!(p.softcap >= 0)) return error(Kind::invalid_argument, "softcap is %g; supported: from 0", p.softcap);
  if (p.plain) return check_plain(p);
  Status status = kv_check(*p.cache);
  return status.ok() ? kv_check_contents(*p.cache) : status;
}

// ---- the merge

struct Piece {  // one split
  int64_t batch, head, first_chunk, last_chunk;
};

struct Job {
  const DecodeAttention& p;
  const DecodeKernel& kernel;
  std::vector<Piece> pieces;
  std::vector<int64_t> first_piece;        // of each (batch, head), and the end
  std::vector<float> query;                // [batch, heads_q, len_q, head_dim]
  std::vector<float> acc, largest, total;  // [piece][rows]...
  int64_t rows = 0;                        // of one key head
  int64_t next = 0;                        // the piece to take next
};

void run_piece(Job& job, int64_t at, float* scratch) {
  const DecodeAttention& p = job.p;
  const Piece& piece = job.pieces[at];
  DecodeSplit split;
  split.problem = &p;
  split.batch = piece.batch;
  split.head = piece.head;
  split.first_chunk = piece.first_chunk;
  split.last_chunk = piece.last_chunk;
  split.length = length_of(p, piece.batch, piece.head).tokens();
  split.rows = int32_t(job.rows);
  split.query = job.query.data() + (piece.batch * p.heads_kv + piece.head) * job.rows * p.head_dim;
  split.scratch = scratch;
  split.acc = job.acc.data() + at * job.rows * p.value_dim;
  split.largest = job.largest.data() + at * job.rows;
  split.total = job.total.data() + at * job.rows;
  job.kernel.run(split);
}

void merge_row(const Job& job, int64_t batch, int64_t head, int64_t row, float* sum) {
  const DecodeAttention& p = job.p;
  int64_t at = batch * p.heads_kv + head, first = job.first_piece[at], last = job.first_piece[at + 1];
  int64_t query_head = head * (p.heads_q / p.heads_kv) + row / p.len_q, i = row % p.len_q;
  constexpr float log2e = 1.44269504f, ln2 = 0.693147181f;
  float largest = -INFINITY, sink = p.sinks ? p.sinks[query_head] * log2e : -INFINITY;
  bool nan = false;
  for (int64_t s = first; s < last; ++s) {
    float x = job.largest[s * job.rows + row];
    nan |= std::isnan(x);
    largest = x > largest ? x : largest;
  }
  float total = 0;
  for (int32_t d = 0; d < p.value_dim; ++d) sum[d] = 0;
  for (int64_t s = first; s < last; ++s) {
    float x = job.largest[s * job.rows + row];
    if (x == -INFINITY) continue;
    float weight = x == largest ? 1.f : std::exp2(x - largest);
    total += weight * job.total[s * job.rows + row];
    const float* acc = job.acc.data() + (s * job.rows + row) * p.value_dim;
    for (int32_t d = 0; d < p.value_dim; ++d) sum[d] += weight * acc[d];
  }
  bool empty = largest == -INFINITY && !nan;
  float lse = empty ? -INFINITY : (largest + std::log2(total)) * ln2;
  if (nan) lse = NAN;
  // The sink joins the denominator only; a sink far above every score leaves weights that underflow to 0, as it should.
  float reference = sink > largest ? sink : largest;
  float scale =
      empty ? 0.f
            : std::exp2(largest - reference) / (total * std::exp2(largest - reference) + std::exp2(sink - reference));
  for (int32_t d = 0; d < p.value_dim; ++d) sum[d] = nan ? NAN : empty ? 0.f : sum[d] * scale;
  store_row(p.out.data, p.out.offset(batch, query_head, i), p.dtype, p.value_dim, sum);
  p.lse[(batch * p.heads_q + query_head) * p.len_q + i] = lse;
}

void plan_pieces(Job& job) {
  const DecodeAttention& p = job.p;
  for (int64_t at = 0; at < p.batch * p.heads_kv; ++at) {
    job.first_piece.push_back(int64_t(job.pieces.size()));
    int64_t chunks = length_of(p, at / p.heads_kv, at % p.heads_kv).chunks();
    for (int64_t first = 0; first < chunks; first += split_chunks) {
      job.pieces.push_back({at / p.heads_kv, at % p.heads_kv, first, std::min<int64_t>(first + split_chunks, chunks)});
    }
  }
  job.first_piece.push_back(int64_t(job.pieces.size()));
}

void load_query(Job& job) {
  const DecodeAttention& p = job.p;
  job.query.resize(p.batch * p.heads_q * p.len_q * p.head_dim);
  for (int64_t row = 0; row < p.batch * p.heads_q * p.len_q; ++row) {
    int64_t h = row / p.len_q;
    load_row(p.query.data, p.query.offset(h / p.heads_q, h % p.heads_q, row % p.len_q), p.dtype, p.head_dim,
             &job.query[row * p.head_dim]);
  }
}

}  // namespace

void decode_chunk(const DecodeAttention& p, int64_t b, int64_t h, int64_t index, DecodeChunk* chunk) {
  HeadLength length = length_of(p, b, h);
  int part = 0;
  int64_t first = 0;  // of the part
  while (index >= ceil_div(length.parts[part], chunk_tokens)) {
    index -= ceil_div(length.parts[part], chunk_tokens);
    first += length.parts[part++];
  }
  int64_t start = index * chunk_tokens;  // in the part
  chunk->first = first + start;
  chunk->count = int32_t(std::min<int64_t>(chunk_tokens, length.parts[part] - start));
  chunk->quantized = part == 1;
  // Divisions once per page or block: one per token took a fifth of the time of a bf16 decode.
  if (p.plain) {
    const PlainCache& c = *p.plain;
    int64_t element = size_of(c.dtype), page = c.block_table ? start / c.page_size : 0;
    int64_t in_page = start - page * c.page_size;
    chunk->key.first = chunk->value.first = nullptr;
    chunk->key.stride = c.key_token * element;
    chunk->value.stride = c.value_token * element;
    for (int32_t t = 0; t < chunk->count; ++page, in_page = 0) {
      int64_t number = c.block_table ? c.block_table[b * c.pages_per_head + page] : b;
      int64_t key = number * c.key_page + h * c.key_head + in_page * c.key_token;
      int64_t value = number * c.value_page + h * c.value_head + in_page * c.value_token;
      const char* key_row = static_cast<const char*>(c.key) + key * element;
      const char* value_row = static_cast<const char*>(c.value) + value * element;
      int32_t run = int32_t(std::min<int64_t>(c.page_size - in_page, chunk->count - t));
      if (run == chunk->count) {
        chunk->key.first = key_row;
        chunk->value.first = value_row;
        return;
      }
      for (int32_t i = 0; i < run; ++i) chunk->key.rows[t + i] = key_row + i * chunk->key.stride;
      for (int32_t i = 0; i < run; ++i) chunk->value.rows[t + i] = value_row + i * chunk->value.stride;
      t += run;
    }
    return;
  }
  const KvCache& c = *p.cache;
  if (part == 1) {
    int64_t in_page = start % c.page_size, in_group = 0;
    int64_t key_step = c.key.per_channel ? 0 : c.key.scales(kv_block), value_step = c.value.scales(kv_block);
    for (int32_t block = 0; block < chunk_blocks; ++block, in_page += kv_block, in_group += kv_block) {
      chunk->key_codes[block] = chunk->value_codes[block] = nullptr;
      if (block * kv_block >= chunk->count) continue;
      if (in_page == c.page_size) in_page = 0;
      if (in_group == c.key.group_size) in_group = 0;
      if (block > 0 && in_page > 0) {  // behind the block before it
        int64_t next_group = c.key.per_channel && in_group == 0 ? c.key.dim : key_step;
        chunk->key_codes[block] = chunk->key_codes[block - 1] + c.key.block_bytes();
        chunk->value_codes[block] = chunk->value_codes[block - 1] + c.value.block_bytes();
        chunk->key_scales[block] = chunk->key_scales[block - 1] + next_group;
        chunk->value_scales[block] = chunk->value_scales[block - 1] + value_step;
        chunk->key_minima[block] = c.key_minima ? chunk->key_minima[block - 1] + next_group : nullptr;
        chunk->value_minima[block] = c.value_minima ? chunk->value_minima[block - 1] + value_step : nullptr;
        continue;
      }
      int64_t token = start + block * kv_block;
      // A page begins with a unit, and so does a chunk.
      UnitPlace key = unit_place(c, c.key, b, h, token), value = unit_place(c, c.value, b, h, token);
      chunk->key_codes[block] = key.codes;
      chunk->key_scales[block] = key.scales;
      chunk->key_minima[block] = key.minima;
      chunk->value_codes[block] = value.codes;
      chunk->value_scales[block] = value.scales;
      chunk->value_minima[block] = value.minima;
    }
    return;
  }
  int64_t element = size_of(c.dtype), slot = start, ring = c.ring();
  int64_t head = (b * c.heads + h) * (c.sinks + ring);
  if (part == 2) slot = (length.parts[1] + start) % ring;
  chunk->key.first = chunk->value.first = nullptr;
  chunk->key.stride = c.key.dim * element;
  chunk->value.stride = c.value.dim * element;
  const char *keys = static_cast<const char*>(c.key_window), *values = static_cast<const char*>(c.value_window);
  if (part == 2) head += c.sinks;
  if (part != 2 || slot + chunk->count <= ring) {
    chunk->key.first = keys + (head + slot) * chunk->key.stride;
    chunk->value.first = values + (head + slot) * chunk->value.stride;
    return;
  }
  for (int32_t t = 0; t < chunk->count; ++t) {
    chunk->key.rows[t] = keys + (head + slot) * chunk->key.stride;
    chunk->value.rows[t] = values + (head + slot) * chunk->value.stride;
    if (++slot == ring) slot = 0;
  }
}

DecodePlan decode_plan(const DecodeAttention& problem) {
  DecodePlan plan;
  for (const Entry& entry : table) plan.entries[plan.count++] = {entry.kernel->name, refuses(entry, problem)};
  return plan;
}

Status decode_attention(const DecodeAttention& p, const ParallelFor& parallel) {
  Status status = check(p);
  if (!status.ok()) return status;
  const DecodeKernel* kernel = nullptr;
  for (const Entry& entry : table) {
    if (!kernel && !refuses(entry, p)) kernel = entry.kernel;
  }
  Job job{p, *kernel, {}, {}, {}, {}, {}, {}, 0, 0};
  job.rows = p.heads_q / p.heads_kv * p.len_q;
  plan_pieces(job);
  load_query(job);
  int64_t pieces = int64_t(job.pieces.size());
  job.acc.resize(pieces * job.rows * p.value_dim);
  job.largest.resize(pieces * job.rows);
  job.total.resize(pieces * job.rows);
  if (p.scores) {
    for (int64_t i = 0; i < p.batch * p.heads_q * p.len_q * p.scores_length; ++i) p.scores[i] = -INFINITY;
  }
  // Threads take pieces from a counter: of two fixed halves one was done 10 % before the other on a shared machine.
  parallel(
      0, std::max<int64_t>(1, std::min<int64_t>(parallel.threads, pieces)), 1,
      [](int64_t, int64_t, void* context) {
        Job& job = *static_cast<Job*>(context);
        std::vector<float> scratch(job.kernel.scratch(job.p) + 16);
        auto address = reinterpret_cast<uintptr_t>(scratch.data());
        float* aligned = scratch.data() + (64 - address % 64) % 64 / sizeof(float);
        int64_t pieces = int64_t(job.pieces.size());
        for (int64_t at; (at = __atomic_fetch_add(&job.next, 1, __ATOMIC_RELAXED)) < pieces;) {
          run_piece(job, at, aligned);
        }
      },
      &job);
  parallel(
      0, p.batch * p.heads_kv * job.rows, 64,
      [](int64_t first, int64_t last, void* context) {
        Job& job = *static_cast<Job*>(context);
        std::vector<float> sum(job.p.value_dim);
        for (int64_t at = first; at < last; ++at) {
          int64_t head = at / job.rows;
          merge_row(job, head / job.p.heads_kv, head % job.p.heads_kv, at % job.rows, sum.data());
        }
      },
      &job);
  return {};
}

}  // namespace sparsekit

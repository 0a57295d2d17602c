// Block scores by the mean, and self-similarity of blocks. Include after simd_<isa>.h.
//
//   mean over pairs of scale * q_i . k_j = scale * (mean q) . (mean k)
//   a block that causality cuts: sum over i of q_i . (sum of the k_j that row i sees), a running sum of keys
//
// First every key block is averaged, into panels of 16 to 64 blocks side by side; then items of a few query blocks of
// all heads of a key head are averaged and multiplied with the panels. The running sums are made while the query block
// is averaged, so that query is read once, and the keys of the diagonal are in L2 for the heads that share them.
//
// Bound: memory, 2 bytes an element, until ceil(Sk / block) * 2 multiply-adds per averaged element catch up.
#pragma once

#include "selection/cpu_score_tiles.h"
#include "sparsekit/selection.h"

namespace sparsekit {
namespace {

constexpr int panel_blocks = tile_lanes;                     // key blocks of a panel
constexpr int most_vectors = Simd::registers == 32 ? 8 : 4;  // vectors of a row that a pass over a block keeps

/// `vectors` vectors of a row. bf16 comes as its even and its odd elements, in 5 instructions a pair and not 7: the
/// order of d does not matter to a product as long as both sides have it.
template <DType dtype, int vectors>
SPARSEKIT_INLINE void load_elements(const char* row, int64_t at, Simd::Float (&to)[vectors]) {
  if constexpr (dtype == DType::bf16 && vectors > 1) {
#pragma GCC unroll 4
    for (int i = 0; i < vectors; i += 2) {
      typedef uint32_t Bits __attribute__((vector_size(Simd::lanes * 4)));
      Bits pair = (Bits)Simd::load_int(row + 2 * (at + i * Simd::lanes));
      to[i] = (Simd::Float)(pair << 16);
      to[i + 1] = (Simd::Float)(pair & 0xffff0000u);
    }
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i) to[i] = load_row<dtype>(row, at + i * Simd::lanes, Simd::lanes);
  }
}

/// Rows are asked for this many rows ahead, past the end of the block into the next: of its own the processor stops at
/// each page of 4 KiB (16 rows of 128 bf16), which cost a third of the bandwidth.
constexpr int rows_ahead = 24;

template <DType dtype, int vectors>
SPARSEKIT_INLINE void ask_for(const char* row, int64_t stride, int64_t at) {
  constexpr int64_t size = dtype == DType::f32 ? 4 : 2;
  const char* ahead = row + rows_ahead * stride + at * size;
#pragma GCC unroll 8
  for (int64_t byte = 0; byte < vectors * Simd::lanes * size; byte += 64) Simd::prefetch(ahead + byte);
}

/// Rows of one block: sums[d] of `rows` rows.
struct BlockRows {
  const char* first;
  int64_t stride;  // bytes
  int rows;
};

/// What a pass over a block of queries does besides summing: row i adds the keys up to `keys.rows` that it sees (the
/// first `seen` at row 0, one more with each row) to a running sum, and its product with that to the result.
struct DiagonalBlock {
  BlockRows keys;
  int64_t seen;  // may be negative
};

template <DType dtype, int vectors>
static void sum_vectors(const BlockRows& block, int64_t at, float* sums) {
  Simd::Float sum[vectors], x[vectors];
  for (int i = 0; i < vectors; ++i) sum[i] = Simd::zero();
  const char* row = block.first;
  for (int n = 0; n < block.rows; ++n, row += block.stride) {
    ask_for<dtype, vectors>(row, block.stride, at);
    load_elements<dtype, vectors>(row, at, x);
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i) sum[i] = Simd::add(sum[i], x[i]);
  }
  for (int i = 0; i < vectors; ++i) Simd::store(sums + at + i * Simd::lanes, sum[i]);
}

/// The same, with the running sum of a diagonal block; returns the sum of products.
template <DType dtype, int vectors>
static float sum_vectors(const BlockRows& block, int64_t at, float* sums, const DiagonalBlock& diagonal) {
  Simd::Float sum[vectors], running[vectors], x[vectors], product[4];
  for (int i = 0; i < 4; ++i) product[i] = Simd::zero();
  for (int i = 0; i < vectors; ++i) sum[i] = running[i] = Simd::zero();
  const char *row = block.first, *key = diagonal.keys.first;
  int64_t added = 0;
  for (int n = 0; n < block.rows; ++n, row += block.stride) {
    int64_t seen = smaller(diagonal.seen + n, diagonal.keys.rows);
    for (; added < seen; ++added, key += diagonal.keys.stride) {
      load_elements<dtype, vectors>(key, at, x);
#pragma GCC unroll 8
      for (int i = 0; i < vectors; ++i) running[i] = Simd::add(running[i], x[i]);
    }
    ask_for<dtype, vectors>(row, block.stride, at);
    load_elements<dtype, vectors>(row, at, x);
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i) {
      sum[i] = Simd::add(sum[i], x[i]);
      product[i % 4] = Simd::fma(x[i], running[i], product[i % 4]);
    }
  }
  for (int i = 0; i < vectors; ++i) Simd::store(sums + at + i * Simd::lanes, sum[i]);
  return Simd::sum(Simd::add(Simd::add(product[0], product[1]), Simd::add(product[2], product[3])));
}

/// What is left of a row after whole vectors.
template <DType dtype>
static float sum_rest(const BlockRows& block, int64_t at, int count, float* sums, const DiagonalBlock* diagonal) {
  Simd::Float sum = Simd::zero(), running = Simd::zero(), product = Simd::zero();
  int64_t added = 0;
  for (int n = 0; n < block.rows; ++n) {
    for (; diagonal && added < smaller(diagonal->seen + n, diagonal->keys.rows); ++added) {
      running = Simd::add(running, load_row<dtype>(diagonal->keys.first + added * diagonal->keys.stride, at, count));
    }
    Simd::Float x = load_row<dtype>(block.first + n * block.stride, at, count);
    sum = Simd::add(sum, x);
    product = Simd::fma(x, running, product);
  }
  Simd::store_partial(sums + at, sum, count);
  return Simd::sum(product);
}

/// sums[d] over the rows of a block, in the order of load_elements; with `diagonal` also the sum of products.
template <DType dtype>
static float sum_block(const BlockRows& block, int64_t dim, float* sums, const DiagonalBlock* diagonal) {
  float products = 0;
  int64_t at = 0;
  auto pass = [&](auto width) {
    constexpr int vectors = decltype(width)::value;
    for (; at + vectors * Simd::lanes <= dim; at += vectors * Simd::lanes) {
      if (diagonal) {
        products += sum_vectors<dtype, vectors>(block, at, sums, *diagonal);
      } else {
        sum_vectors<dtype, vectors>(block, at, sums);
      }
    }
  };
  pass(Vectors<most_vectors>{});
  pass(Vectors<2>{});
  pass(Vectors<1>{});
  if (at < dim) products += sum_rest<dtype>(block, at, int(dim - at), sums, diagonal);
  return products;
}

/// |sum of x / |x||^2 / rows^2. `sums` has room for a row.
template <DType dtype>
static float block_similarity(const BlockRows& block, int64_t dim, float* sums) {
  for (int64_t d = 0; d < dim; ++d) sums[d] = 0;
  auto count = [=](int64_t at) { return int(smaller(dim - at, Simd::lanes)); };
  for (int n = 0; n < block.rows; ++n) {
    const char* row = block.first + n * block.stride;
    // Scaled by the largest element, so that no square leaves the range of fp32.
    Simd::Float largest = Simd::zero(), norm = Simd::zero();
    for (int64_t at = 0; at < dim; at += Simd::lanes) {
      largest = Simd::max(largest, Simd::abs(load_row<dtype>(row, at, count(at))));
    }
    float lanes[Simd::lanes], most = 0;
    Simd::store(lanes, largest);
    for (float x : lanes) most = x > most ? x : most;
    if (most == 0) continue;
    Simd::Float unit = Simd::set(most);
    for (int64_t at = 0; at < dim; at += Simd::lanes) {
      Simd::Float x = Simd::div(load_row<dtype>(row, at, count(at)), unit);
      norm = Simd::fma(x, x, norm);
    }
    Simd::Float scale = Simd::set(1.f / __builtin_sqrtf(Simd::sum(norm)));
    for (int64_t at = 0; at < dim; at += Simd::lanes) {
      Simd::Float x = Simd::mul(Simd::div(load_row<dtype>(row, at, count(at)), unit), scale);
      Simd::Float sum = Simd::add(Simd::load_partial(sums + at, count(at)), x);
      Simd::store_partial(sums + at, sum, count(at));
    }
  }
  double square = 0;
  for (int64_t d = 0; d < dim; ++d) square += double(sums[d]) * sums[d];
  return float(square / (double(block.rows) * block.rows));
}

struct BlockMeansCall {
  const BlockScores* p;
  SequenceTable table;
  int64_t* first_panel = nullptr;  // of each sequence, [count + 1]
  int64_t* first_item = nullptr;   // likewise, of query items
  int64_t panels = 0;              // of one key head
  int query_blocks = 0;            // of an item
  float* means = nullptr;          // [batch, heads_kv, panels, head_dim, panel_blocks]

  int64_t group() const { return p->heads_q / p->heads_kv; }
  float* panel(int64_t b, int64_t kv_head, int64_t number) const {
    return means + ((b * p->heads_kv + kv_head) * panels + number) * p->head_dim * panel_blocks;
  }
};

static int64_t sequence_of(const int64_t* first, int64_t count, int64_t at) {
  int64_t s = 0;
  while (s + 1 < count && first[s + 1] <= at) ++s;
  return s;
}

/// A panel of key means.
template <DType dtype>
struct KeyMeans {
  const BlockMeansCall& call;
  float* sums;

  explicit KeyMeans(const BlockMeansCall& c) : call(c), sums(static_cast<float*>(malloc(size_t(c.p->head_dim) * 4))) {}
  bool ready() const { return sums != nullptr; }
  void release() { free(sums); }

  void run(int64_t item) {
    const BlockScores& p = *call.p;
    const int64_t number = item % call.panels, head = item / call.panels, b = head / p.heads_kv, h = head % p.heads_kv;
    const int64_t s = sequence_of(call.first_panel, call.table.count, number);
    const Sequence& sequence = call.table.sequences[s];
    const int64_t first = (number - call.first_panel[s]) * panel_blocks;
    const int64_t blocks = ceil_div(sequence.len_k(), p.lists.block_k);
    float* panel = call.panel(b, h, number);
    for (int64_t i = 0; i < panel_blocks; ++i) {
      if (first + i >= blocks) {
        for (int64_t d = 0; d < p.head_dim; ++d) panel[d * panel_blocks + i] = 0;
        continue;
      }
      int64_t key = sequence.k_begin + (first + i) * p.lists.block_k;
      BlockRows block{row_of<dtype>(p.key, b, h, key), p.key.row * int64_t(dtype == DType::f32 ? 4 : 2),
                      int(smaller(p.lists.block_k, sequence.k_end - key))};
      sum_block<dtype>(block, p.head_dim, sums, nullptr);
      const float share = 1.f / float(block.rows);
      for (int64_t d = 0; d < p.head_dim; ++d) panel[d * panel_blocks + i] = sums[d] * share;
      if (!p.k_similarity) continue;
      static_cast<float*>(p.k_similarity)[head * p.k_blocks() + sequence.k_block + first + i] =
          block_similarity<dtype>(block, p.head_dim, sums);
    }
  }
};

/// Some query blocks of all heads that share a key head: their means, times the panels.
template <DType dtype>
struct QueryMeans {
  const BlockMeansCall& call;
  Arena arena;
  float *means, *scores, *sums, *diagonal;
  int64_t row_scale;

  explicit QueryMeans(const BlockMeansCall& c) : call(c) {
    int64_t rows = round_up(c.group() * c.query_blocks, 16);
    int64_t means_at = arena.reserve(rows * c.p->head_dim * 4), scores_at = arena.reserve(rows * panel_blocks * 4);
    int64_t sums_at = arena.reserve(c.p->head_dim * 4);
    if (!arena.allocate()) return;
    means = reinterpret_cast<float*>(arena.data + means_at);
    scores = reinterpret_cast<float*>(arena.data + scores_at);
    sums = reinterpret_cast<float*>(arena.data + sums_at);
  }
  bool ready() const { return arena.data != nullptr; }
  void release() { arena.release(); }

  void run(int64_t item) {
    const BlockScores& p = *call.p;
    const int64_t items = call.first_item[call.table.count], head = item / items, number = item % items;
    const int64_t b = head / p.heads_kv, kv_head = head % p.heads_kv, group = call.group();
    const int64_t s = sequence_of(call.first_item, call.table.count, number);
    const Sequence& sequence = call.table.sequences[s];
    const int64_t first = (number - call.first_item[s]) * call.query_blocks;
    const int64_t last = smaller(first + call.query_blocks, ceil_div(sequence.len_q(), p.lists.block_q));
    const int64_t key_blocks = ceil_div(sequence.len_k(), p.lists.block_k), dim = p.head_dim;
    const int64_t bytes = dtype == DType::f32 ? 4 : 2;
    const int rows = int((last - first) * group);
    const bool scored = p.reduce == BlockReduce::mean;  // else only similarities are asked for
    for (int64_t g = 0; g < group; ++g) {  // blocks of one head follow each other in memory; their keys stay in L2
      for (int64_t m = first; m < last; ++m) {
        const int64_t query = sequence.q_begin + m * p.lists.block_q;
        const int block_rows = int(smaller(p.lists.block_q, sequence.q_end - query));
        const int64_t h = kv_head * group + g, list_row = sequence.list_row + m;
        const Visible range(p, sequence, m);
        float* out = static_cast<float*>(p.scores) + ((b * p.heads_q + h) * p.q_blocks + list_row) * p.key_blocks;
        BlockRows block{row_of<dtype>(p.query, b, h, query), p.query.row * bytes, block_rows};
        float* mean = means + ((m - first) * group + g) * dim;
        if (range.whole == range.end && scored) sum_block<dtype>(block, dim, mean, nullptr);
        for (int64_t n = range.whole; n < range.end && scored; ++n) {
          int64_t key = sequence.k_begin + n * p.lists.block_k;
          DiagonalBlock diagonal;
          diagonal.keys = {row_of<dtype>(p.key, b, kv_head, key), p.key.row * bytes,
                           int(smaller(p.lists.block_k, sequence.k_end - key))};
          diagonal.seen = range.position - n * p.lists.block_k + 1;
          float products = sum_block<dtype>(block, dim, mean, &diagonal);
          out[n] = p.scale * products / float(pairs(diagonal, block_rows));
        }
        const float share = p.scale / float(block_rows);
        for (int64_t d = 0; d < dim && scored; ++d) mean[d] *= share;
        for (int64_t n = range.end; n < p.key_blocks && scored; ++n) out[n] = -__builtin_inff();
        if (!p.q_similarity) continue;
        static_cast<float*>(p.q_similarity)[(b * p.heads_q + h) * p.q_blocks + list_row] =
            block_similarity<dtype>(block, dim, sums);
      }
    }
    if (scored) multiply(b, kv_head, sequence, s, first, rows, key_blocks);
  }

 private:
  /// Key blocks [0, whole) are seen whole by every row of a query block, [whole, end) in part.
  struct Visible {
    int64_t whole, end, position;

    Visible(const BlockScores& p, const Sequence& sequence, int64_t m) {
      whole = end = ceil_div(sequence.len_k(), p.lists.block_k);
      position = m * p.lists.block_q + sequence.len_k() - sequence.len_q();
      if (!p.causal) return;
      int64_t last = smaller(position + p.lists.block_q, sequence.len_k());  // keys that the last row sees
      end = last > 0 ? smaller(end, ceil_div(last, p.lists.block_k)) : 0;
      int64_t seen = position + 1;  // keys that the first row sees
      if (seen < sequence.len_k()) whole = seen > 0 ? smaller(end, seen / p.lists.block_k) : 0;
    }
  };

  static int64_t pairs(const DiagonalBlock& diagonal, int rows) {
    int64_t result = 0;
    for (int n = 0; n < rows; ++n) result += clamp(diagonal.seen + n, 0, diagonal.keys.rows);
    return result;
  }

  void multiply(int64_t b, int64_t kv_head, const Sequence& sequence, int64_t s, int64_t first, int rows,
                int64_t key_blocks) {
    const BlockScores& p = *call.p;
    const int64_t group = call.group();
    LoadedSegment segment;
    segment.keys.count = rows;
    segment.keys.padded = int(round_up(rows, 16));
    segment.key = reinterpret_cast<const char*>(means);
    segment.key_stride = p.head_dim * 4;
    Prefetch prefetch;
    const int64_t end = Visible(p, sequence, first + rows / group - 1).whole;
    for (int64_t n = 0; n < smaller(end, key_blocks); n += panel_blocks) {
      Simd::Float most[tile_registers];
      for (Simd::Float& x : most) x = Simd::zero();
      const float* panel = call.panel(b, kv_head, call.first_panel[s] + n / panel_blocks);
      multiply_keys<FloatProduct, tile_registers>(segment, panel, p.head_dim, scores, most, &prefetch);
      for (int r = 0; r < rows; ++r) {
        const int64_t m = first + r / group, h = kv_head * group + r % group;
        const int64_t count = smaller(Visible(p, sequence, m).whole - n, panel_blocks);
        float* out = static_cast<float*>(p.scores) +
                     ((b * p.heads_q + h) * p.q_blocks + sequence.list_row + m) * p.key_blocks + n;
        if (count > 0) memcpy(out, scores + r * panel_blocks, size_t(count) * 4);
      }
    }
  }
};

template <DType dtype>
static Status block_means(const BlockScores& p, const ParallelFor& parallel) {
  BlockMeansCall call;
  call.p = &p;
  if (!call.table.set(p)) return error(Status::Kind::failed, "out of memory");
  const int64_t count = call.table.count;
  // Query blocks of an item: enough rows to multiply, few enough to stay in L2.
  call.query_blocks = int(larger(1, 64 / call.group()));
  Arena arena;
  int64_t panels_at = arena.reserve((count + 1) * 8), items_at = arena.reserve((count + 1) * 8), rows = 0;
  for (int64_t s = 0; s < count; ++s) {
    call.panels += ceil_div(ceil_div(call.table.sequences[s].len_k(), p.lists.block_k), panel_blocks);
  }
  int64_t means_at = arena.reserve(p.batch * p.heads_kv * call.panels * p.head_dim * panel_blocks * 4);
  if (!arena.allocate()) {
    call.table.release();
    return error(Status::Kind::failed, "out of memory for the means of all key blocks");
  }
  call.first_panel = reinterpret_cast<int64_t*>(arena.data + panels_at);
  call.first_item = reinterpret_cast<int64_t*>(arena.data + items_at);
  call.means = reinterpret_cast<float*>(arena.data + means_at);
  call.first_panel[0] = call.first_item[0] = 0;
  for (int64_t s = 0; s < count; ++s) {
    const Sequence& sequence = call.table.sequences[s];
    const int64_t q_blocks = ceil_div(sequence.len_q(), p.lists.block_q);
    const int64_t k_blocks = ceil_div(sequence.len_k(), p.lists.block_k);
    call.first_panel[s + 1] = call.first_panel[s] + ceil_div(k_blocks, panel_blocks);
    call.first_item[s + 1] = call.first_item[s] + ceil_div(q_blocks, call.query_blocks);
    rows = sequence.list_row + q_blocks;
  }
  Status status = run_items<KeyMeans<dtype>>(call, p.batch * p.heads_kv * call.panels, parallel);
  if (status.ok()) {
    status = run_items<QueryMeans<dtype>>(call, p.batch * p.heads_kv * call.first_item[count], parallel);
  }
  // Rows past the last sequence, and key blocks numbered past it.
  for (int64_t head = 0; head < p.batch * p.heads_q; ++head) {
    float* scores = static_cast<float*>(p.scores) + head * p.q_blocks * p.key_blocks;
    const int64_t end = p.reduce == BlockReduce::mean ? p.q_blocks * p.key_blocks : 0;
    for (int64_t at = rows * p.key_blocks; at < end; ++at) scores[at] = -__builtin_inff();
    for (int64_t m = rows; p.q_similarity && m < p.q_blocks; ++m) {
      static_cast<float*>(p.q_similarity)[head * p.q_blocks + m] = 0;
    }
  }
  int64_t k_blocks = 0;
  for (int64_t s = 0; s < count; ++s) {
    k_blocks = call.table.sequences[s].k_block + ceil_div(call.table.sequences[s].len_k(), p.lists.block_k);
  }
  for (int64_t head = 0; p.k_similarity && head < p.batch * p.heads_kv; ++head) {
    for (int64_t n = k_blocks; n < p.k_blocks(); ++n) {
      static_cast<float*>(p.k_similarity)[head * p.k_blocks() + n] = 0;
    }
  }
  arena.release();
  call.table.release();
  return status;
}

}  // namespace
}  // namespace sparsekit

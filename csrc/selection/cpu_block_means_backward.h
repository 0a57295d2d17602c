// Gradients of block scores by the mean. Include after simd_<isa>.h.
//
// With g = grad[m, n] * scale / (pairs of block (m, n) that see each other), K_n and Q_m the sums over blocks:
//   dq_i = sum over n that m sees whole of g K_n  +  over n that causality cuts of g (sum of the k_j that i sees)
//   dk_j = sum over heads and m that see n whole of g Q_m  +  over m that it cuts of g (sum of the q_i that see j)
// The sums of what a row sees, or is seen by, run along the block, as in forward. Three passes, each element of a
// result summed by one thread in one order: block sums, query blocks, key blocks.
//
// Bound: reading query and key twice and writing their gradients, until the products of block sums catch up.
#pragma once

#include "selection/cpu_block_means.h"

namespace sparsekit {
namespace {

struct BlockMeansBackwardCall {
  const BlockScoresBackward* p;
  SequenceTable table;
  int64_t rows = 0, columns = 0;  // query and key blocks of all sequences
  float* q_sums = nullptr;        // [batch, heads_q, rows, head_dim]
  float* k_sums = nullptr;        // [batch, heads_kv, columns, head_dim]

  /// A block of queries or keys: its sequence, number and rows.
  struct Block {
    const Sequence* sequence;
    int64_t number, first;
    int rows;
  };
  Block query_block(int64_t row) const {
    int64_t s = 0;
    while (s + 1 < table.count && table.sequences[s + 1].list_row <= row) ++s;
    const Sequence& q = table.sequences[s];
    const int64_t first = q.q_begin + (row - q.list_row) * p->lists.block_q;
    return {&q, row - q.list_row, first, int(smaller(p->lists.block_q, q.q_end - first))};
  }
  Block key_block(int64_t column) const {
    int64_t s = 0;
    while (s + 1 < table.count && table.sequences[s + 1].k_block <= column) ++s;
    const Sequence& k = table.sequences[s];
    const int64_t first = k.k_begin + (column - k.k_block) * p->lists.block_k;
    return {&k, column - k.k_block, first, int(smaller(p->lists.block_k, k.k_end - first))};
  }
  /// Keys of block n that row 0 of block m sees; one more with each row. Without causality all.
  int64_t seen(const Sequence& sequence, int64_t m, int64_t n) const {
    if (!p->causal) return INT32_MAX;
    return m * p->lists.block_q + sequence.len_k() - sequence.len_q() + 1 - n * p->lists.block_k;
  }
  /// grad * scale / pairs; 0 where nothing is seen.
  float weight(int64_t b, int64_t h, int64_t row, int64_t n, int64_t seen, int q_rows, int k_rows) const {
    int64_t pairs = int64_t(q_rows) * k_rows;
    if (seen < k_rows) {
      pairs = 0;
      for (int i = 0; i < q_rows; ++i) pairs += clamp(seen + i, 0, k_rows);
    }
    if (pairs == 0) return 0;
    const float* grad = static_cast<const float*>(p->grad_scores);
    return grad[((b * p->heads_q + h) * p->q_blocks + row) * p->key_blocks + n] * p->scale / float(pairs);
  }
};

/// Sums over all blocks of query and key.
template <DType dtype>
struct SumBlocks {
  const BlockMeansBackwardCall& call;
  explicit SumBlocks(const BlockMeansBackwardCall& c) : call(c) {}
  bool ready() const { return true; }
  void release() {}

  void run(int64_t item) {
    const BlockScoresBackward& p = *call.p;
    const int64_t queries = p.batch * p.heads_q * call.rows;
    const bool query = item < queries;
    const int64_t number = query ? item : item - queries, blocks = query ? call.rows : call.columns;
    const int64_t heads = query ? p.heads_q : p.heads_kv, head = number / blocks;
    const auto block = query ? call.query_block(number % blocks) : call.key_block(number % blocks);
    const InputView& view = query ? p.query : p.key;
    float* sums = (query ? call.q_sums : call.k_sums) + number * p.head_dim;
    for (int64_t at = 0; at < p.head_dim; at += Simd::lanes) {
      const int count = int(smaller(p.head_dim - at, Simd::lanes));
      Simd::Float sum = Simd::zero();
      for (int i = 0; i < block.rows; ++i) {
        sum = Simd::add(sum,
                        load_row<dtype>(row_of<dtype>(view, head / heads, head % heads, block.first + i), at, count));
      }
      Simd::store_partial(sums + at, sum, count);
    }
  }
};

template <DType dtype>
SPARSEKIT_INLINE char* row_of(const OutputView& view, int64_t b, int64_t h, int64_t row) {
  return static_cast<char*>(view.data) +
         (b * view.batch + h * view.head + row * view.row) * (dtype == DType::f32 ? 4 : 2);
}

/// Gradient of one block of queries of one head.
template <DType dtype>
struct QueryGradient {
  const BlockMeansBackwardCall& call;
  float* sums;  // [block_q, lanes]
  explicit QueryGradient(const BlockMeansBackwardCall& c)
      : call(c), sums(static_cast<float*>(malloc(size_t(c.p->lists.block_q) * Simd::lanes * 4))) {}
  bool ready() const { return sums != nullptr; }
  void release() { free(sums); }

  void run(int64_t item) {
    const BlockScoresBackward& p = *call.p;
    const int64_t head = item / call.rows, row = item % call.rows, b = head / p.heads_q, h = head % p.heads_q;
    const int64_t kv_head = h / (p.heads_q / p.heads_kv);
    const auto block = call.query_block(row);
    const Sequence& sequence = *block.sequence;
    const int64_t blocks = ceil_div(sequence.len_k(), p.lists.block_k);
    const float* k_sums = call.k_sums + ((b * p.heads_kv + kv_head) * call.columns + sequence.k_block) * p.head_dim;
    for (int64_t at = 0; at < p.head_dim; at += Simd::lanes) {
      const int count = int(smaller(p.head_dim - at, Simd::lanes));
      Simd::Float whole = Simd::zero();
      for (int i = 0; i < block.rows; ++i) Simd::store(sums + i * Simd::lanes, Simd::zero());
      for (int64_t n = 0; n < blocks; ++n) {
        const int64_t first = sequence.k_begin + n * p.lists.block_k, seen = call.seen(sequence, block.number, n);
        const int keys = int(smaller(p.lists.block_k, sequence.k_end - first));
        if (seen + block.rows - 1 <= 0) break;
        const Simd::Float weight = Simd::set(call.weight(b, h, row, n, seen, block.rows, keys));
        if (seen >= keys) {
          whole = Simd::fma(weight, Simd::load_partial(k_sums + n * p.head_dim + at, count), whole);
          continue;
        }
        Simd::Float running = Simd::zero();
        int64_t added = 0;
        for (int i = 0; i < block.rows; ++i) {
          for (; added < smaller(seen + i, keys); ++added) {
            running = Simd::add(running, load_row<dtype>(row_of<dtype>(p.key, b, kv_head, first + added), at, count));
          }
          Simd::store(sums + i * Simd::lanes, Simd::fma(weight, running, Simd::load(sums + i * Simd::lanes)));
        }
      }
      for (int i = 0; i < block.rows; ++i) {
        store_row<dtype>(row_of<dtype>(p.grad_query, b, h, block.first + i), at, count,
                         Simd::add(whole, Simd::load(sums + i * Simd::lanes)));
      }
    }
  }
};

/// Gradient of one block of keys of one key head, over all its query heads.
template <DType dtype>
struct KeyGradient {
  const BlockMeansBackwardCall& call;
  float* sums;  // [block_k, lanes]
  explicit KeyGradient(const BlockMeansBackwardCall& c)
      : call(c), sums(static_cast<float*>(malloc(size_t(c.p->lists.block_k) * Simd::lanes * 4))) {}
  bool ready() const { return sums != nullptr; }
  void release() { free(sums); }

  void run(int64_t item) {
    const BlockScoresBackward& p = *call.p;
    const int64_t head = item / call.columns, b = head / p.heads_kv, kv_head = head % p.heads_kv;
    const int64_t group = p.heads_q / p.heads_kv;
    const auto block = call.key_block(item % call.columns);
    const Sequence& sequence = *block.sequence;
    const int64_t blocks = ceil_div(sequence.len_q(), p.lists.block_q);
    for (int64_t at = 0; at < p.head_dim; at += Simd::lanes) {
      const int count = int(smaller(p.head_dim - at, Simd::lanes));
      Simd::Float whole = Simd::zero();
      for (int j = 0; j < block.rows; ++j) Simd::store(sums + j * Simd::lanes, Simd::zero());
      for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
        const float* q_sums = call.q_sums + ((b * p.heads_q + h) * call.rows + sequence.list_row) * p.head_dim;
        for (int64_t m = 0; m < blocks; ++m) {
          const int64_t first = sequence.q_begin + m * p.lists.block_q, seen = call.seen(sequence, m, block.number);
          const int rows = int(smaller(p.lists.block_q, sequence.q_end - first));
          if (seen + rows - 1 <= 0) continue;
          const Simd::Float weight =
              Simd::set(call.weight(b, h, sequence.list_row + m, block.number, seen, rows, block.rows));
          if (seen >= block.rows) {
            whole = Simd::fma(weight, Simd::load_partial(q_sums + m * p.head_dim + at, count), whole);
            continue;
          }
          Simd::Float running = Simd::zero();
          int64_t added = rows;  // rows from here on are in the sum: key j is seen from row j + 1 - seen on
          for (int j = block.rows - 1; j >= 0; --j) {
            while (added > larger(j + 1 - seen, 0)) {
              --added;
              running = Simd::add(running, load_row<dtype>(row_of<dtype>(p.query, b, h, first + added), at, count));
            }
            Simd::store(sums + j * Simd::lanes, Simd::fma(weight, running, Simd::load(sums + j * Simd::lanes)));
          }
        }
      }
      for (int j = 0; j < block.rows; ++j) {
        store_row<dtype>(row_of<dtype>(p.grad_key, b, kv_head, block.first + j), at, count,
                         Simd::add(whole, Simd::load(sums + j * Simd::lanes)));
      }
    }
  }
};

/// Zero for the rows of a packed tensor that belong to no sequence.
template <DType dtype>
static void clear_rows(const OutputView& view, int64_t batch, int64_t heads, int64_t first, int64_t last, int64_t dim) {
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t row = first; row < last; ++row) {
        memset(row_of<dtype>(view, b, h, row), 0, size_t(dim * (dtype == DType::f32 ? 4 : 2)));
      }
    }
  }
}

template <DType dtype>
static Status block_means_backward(const BlockScoresBackward& p, const ParallelFor& parallel) {
  BlockMeansBackwardCall call;
  call.p = &p;
  if (!call.table.set(p)) return error(Status::Kind::failed, "out of memory");
  int64_t end_q = 0, end_k = 0;
  for (int64_t s = 0; s < call.table.count; ++s) {
    const Sequence& sequence = call.table.sequences[s];
    call.rows = sequence.list_row + ceil_div(sequence.len_q(), p.lists.block_q);
    call.columns = sequence.k_block + ceil_div(sequence.len_k(), p.lists.block_k);
    end_q = sequence.q_end;
    end_k = sequence.k_end;
  }
  Arena arena;
  const int64_t q_at = arena.reserve(p.batch * p.heads_q * call.rows * p.head_dim * 4);
  const int64_t k_at = arena.reserve(p.batch * p.heads_kv * call.columns * p.head_dim * 4);
  Status status;
  if (!arena.allocate()) {
    status = error(Status::Kind::failed, "out of memory for the sums of all blocks");
  } else {
    call.q_sums = reinterpret_cast<float*>(arena.data + q_at);
    call.k_sums = reinterpret_cast<float*>(arena.data + k_at);
    const int64_t q_items = p.batch * p.heads_q * call.rows, k_items = p.batch * p.heads_kv * call.columns;
    clear_rows<dtype>(p.grad_query, p.batch, p.heads_q, end_q, p.len_q, p.head_dim);
    clear_rows<dtype>(p.grad_key, p.batch, p.heads_kv, end_k, p.len_k, p.head_dim);
    status = run_items<SumBlocks<dtype>>(call, q_items + k_items, parallel);
    if (status.ok()) status = run_items<QueryGradient<dtype>>(call, q_items, parallel);
    if (status.ok()) status = run_items<KeyGradient<dtype>>(call, k_items, parallel);
    arena.release();
  }
  call.table.release();
  return status;
}

}  // namespace
}  // namespace sparsekit

// Scores of blocks, columns and rows, written to be read: float64 arithmetic, one pair of query and key at a time.
//
// Takes every valid problem, also float64 tensors (gradcheck). Memory per thread: the scores of one block of queries.
#include <algorithm>
#include <cmath>
#include <vector>

#include "attention/scalar.h"
#include "attention/sequences.h"
#include "selection/implementations.h"

namespace sparsekit {
namespace {

DType result_type(const AttentionProblem& p) { return p.dtype == DType::f64 ? DType::f64 : DType::f32; }

bool sees(const AttentionProblem& p, const Sequence& sequence, int64_t b, int64_t i, int64_t j) {
  int64_t q = p.query_positions ? p.query_positions[b * p.query_positions_batch + i]
                                : i - sequence.q_begin + sequence.len_k() - sequence.len_q();
  int64_t k = p.key_positions ? p.key_positions[b * p.key_positions_batch + j] : j - sequence.k_begin;
  return (!p.causal || k <= q) && (p.window_left < 0 || k >= q - p.window_left) &&
         (p.window_right < 0 || k <= q + p.window_right);
}

double score(const AttentionProblem& p, int64_t b, int64_t h, int64_t i, int64_t j) {
  int64_t q = p.query.offset(b, h, i), k = p.key.offset(b, h / (p.heads_q / p.heads_kv), j);
  double sum = 0;
  for (int32_t d = 0; d < p.head_dim; ++d) sum += load(p.query.data, q + d, p.dtype) * load(p.key.data, k + d, p.dtype);
  sum *= p.scale;
  if (p.softcap > 0) sum = p.softcap * std::tanh(sum / p.softcap);
  return sum + (p.key_bias ? p.key_bias[b * p.key_bias_batch + h * p.key_bias_head + j] : 0.f);
}

double larger(double a, double b) { return b > a || std::isnan(b) ? b : a; }

/// Calls body(b, h, scratch) for every batch and head, in parallel.
template <class Problem, class Body>
void for_each_head(const Problem& p, int64_t heads, const ParallelFor& parallel, Body body) {
  struct Context {
    const Problem& p;
    int64_t heads;
    Body& body;
  } context{p, heads, body};
  auto run = [](int64_t first, int64_t last, void* data) {
    auto& c = *static_cast<Context*>(data);
    for (int64_t at = first; at < last; ++at) c.body(at / c.heads, at % c.heads);
  };
  parallel(0, p.batch * heads, 1, run, &context);
}

/// Scores of one block of queries against all keys of its sequence; -inf where a row does not see the key.
struct BlockRow {
  int64_t first = 0, rows = 0, keys = 0;  // first: row of query
  std::vector<double> scores;             // [rows, keys]

  BlockRow(const AttentionProblem& p, const Sequence& sequence, int64_t b, int64_t h, int64_t block) {
    first = sequence.q_begin + block * p.lists.block_q;
    rows = std::min<int64_t>(p.lists.block_q, sequence.q_end - first);
    keys = sequence.len_k();
    scores.assign(size_t(rows * keys), -INFINITY);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < keys; ++j) {
        int64_t key = sequence.k_begin + j;
        if (sees(p, sequence, b, first + i, key)) at(i, j) = score(p, b, h, first + i, key);
      }
    }
  }
  double& at(int64_t i, int64_t j) { return scores[size_t(i * keys + j)]; }
};

/// Calls visit(i, j) for the pairs of tile (r, c) of a block row's antidiagonals that see each other. An antidiagonal
/// begins at the last row that the tile has and at its first column: causality leaves that pair if it leaves any.
template <class Visit>
void for_each_antidiagonal_pair(const BlockScores& p, BlockRow& row, int64_t r, int64_t c, Visit visit) {
  int64_t i = std::min<int64_t>((r + 1) * p.stride, row.rows) - 1, j = c * p.stride;
  for (int64_t t = 0; t < p.stride && i >= r * p.stride && j < row.keys; ++t, --i, ++j) {
    if (row.at(i, j) != -INFINITY) visit(i, j);
  }
}

/// XAttention's map of one block of queries: rows of tiles x columns of tiles.
struct Antidiagonals {
  int64_t rows, columns, seeing = 0;   // seeing: rows that see any key
  std::vector<double> pairs, weights;  // [rows, columns]: pairs of each tile, softmax of the tiles' means

  Antidiagonals(const BlockScores& p, BlockRow& row)
      : rows(ceil_div(row.rows, p.stride)), columns(ceil_div(row.keys, p.stride)) {
    pairs.assign(size_t(rows * columns), 0);
    weights.assign(size_t(rows * columns), 0);
    for (int64_t r = 0; r < rows; ++r) {
      double *count = &pairs[size_t(r * columns)], *weight = &weights[size_t(r * columns)], highest = -INFINITY,
             sum = 0;
      for (int64_t c = 0; c < columns; ++c) {
        for_each_antidiagonal_pair(p, row, r, c, [&](int64_t i, int64_t j) { weight[c] += row.at(i, j), ++count[c]; });
        weight[c] = count[c] > 0 ? weight[c] / count[c] : -INFINITY;
        highest = larger(highest, weight[c]);
      }
      if (highest == -INFINITY) {
        std::fill(weight, weight + columns, 0.);
        continue;
      }
      ++seeing;
      for (int64_t c = 0; c < columns; ++c) sum += weight[c] = std::exp(weight[c] - highest);
      for (int64_t c = 0; c < columns; ++c) weight[c] /= sum;
    }
  }
};

/// Scores of block row m, one per key block.
std::vector<double> reduce(const BlockScores& p, BlockRow& row) {
  int64_t blocks = ceil_div(row.keys, p.lists.block_k);
  std::vector<double> result(size_t(blocks), -INFINITY), sums(size_t(blocks), 0), counts(size_t(blocks), 0);
  if (p.reduce == BlockReduce::antidiagonal) {
    Antidiagonals map(p, row);
    for (int64_t r = 0; r < map.rows; ++r) {
      for (int64_t c = 0; c < map.columns; ++c) {
        size_t n = size_t(c * p.stride / p.lists.block_k);
        sums[n] += map.weights[size_t(r * map.columns + c)];
        counts[n] += map.pairs[size_t(r * map.columns + c)];
      }
    }
    for (size_t n = 0; n < result.size(); ++n) {
      if (counts[n] > 0) result[n] = std::log(std::max(sums[n] / double(map.seeing), double(least_share)));
    }
    return result;
  }
  for (int64_t i = 0; i < row.rows; ++i) {
    for (int64_t j = 0; j < row.keys; ++j) {
      if (row.at(i, j) == -INFINITY) continue;
      size_t n = size_t(j / p.lists.block_k);
      sums[n] += row.at(i, j), ++counts[n];
      result[n] = larger(result[n], row.at(i, j));
    }
  }
  if (p.reduce == BlockReduce::mean) {
    for (size_t n = 0; n < result.size(); ++n) result[n] = counts[n] > 0 ? sums[n] / counts[n] : -INFINITY;
  }
  return result;
}

/// Gradient of the scores [rows, keys] of a block row, of the gradient of its block scores.
std::vector<double> spread(const BlockScores& p, BlockRow& row, const std::vector<double>& grad) {
  std::vector<double> result(row.scores.size(), 0);
  auto at = [&](int64_t i, int64_t j) -> double& { return result[size_t(i * row.keys + j)]; };
  if (p.reduce == BlockReduce::antidiagonal) {
    Antidiagonals map(p, row);
    std::vector<double> sums(grad.size(), 0);
    auto block = [&](int64_t c) { return size_t(c * p.stride / p.lists.block_k); };
    for (int64_t r = 0; r < map.rows; ++r) {
      for (int64_t c = 0; c < map.columns; ++c) sums[block(c)] += map.weights[size_t(r * map.columns + c)];
    }
    auto of_weight = [&](int64_t c) { return sums[block(c)] > 0 ? grad[block(c)] / sums[block(c)] : 0.; };
    for (int64_t r = 0; r < map.rows; ++r) {
      double dot = 0;
      const double *weight = &map.weights[size_t(r * map.columns)], *pairs = &map.pairs[size_t(r * map.columns)];
      for (int64_t c = 0; c < map.columns; ++c) dot += weight[c] * of_weight(c);
      for (int64_t c = 0; c < map.columns; ++c) {
        double each = weight[c] * (of_weight(c) - dot) / pairs[c];
        for_each_antidiagonal_pair(p, row, r, c, [&](int64_t i, int64_t j) { at(i, j) = each; });
      }
    }
    return result;
  }
  std::vector<double> counts(grad.size(), 0);
  std::vector<int64_t> best(grad.size(), -1);
  for (int64_t i = 0; i < row.rows; ++i) {
    for (int64_t j = 0; j < row.keys; ++j) {
      size_t n = size_t(j / p.lists.block_k);
      if (row.at(i, j) == -INFINITY) continue;
      ++counts[n];
      if (best[n] < 0 || row.at(i, j) > row.scores[size_t(best[n])]) best[n] = i * row.keys + j;
    }
  }
  for (size_t n = 0; n < grad.size(); ++n) {
    if (p.reduce == BlockReduce::max && best[n] >= 0) result[size_t(best[n])] = grad[n];
  }
  for (int64_t i = 0; p.reduce == BlockReduce::mean && i < row.rows; ++i) {
    for (int64_t j = 0; j < row.keys; ++j) {
      size_t n = size_t(j / p.lists.block_k);
      if (row.at(i, j) != -INFINITY) at(i, j) = grad[n] / counts[n];
    }
  }
  return result;
}

/// |mean of x / |x|| ^ 2 = the mean cosine of all pairs; rows of zeros have cosine 0 with every other.
double similarity(const InputView& view, DType dtype, int64_t b, int64_t h, int64_t first, int64_t last, int32_t dim) {
  std::vector<double> sum(size_t(dim), 0);
  for (int64_t i = first; i < last; ++i) {
    int64_t at = view.offset(b, h, i);
    double norm = 0;
    for (int32_t d = 0; d < dim; ++d) norm += load(view.data, at + d, dtype) * load(view.data, at + d, dtype);
    if (norm == 0) continue;
    for (int32_t d = 0; d < dim; ++d) sum[size_t(d)] += load(view.data, at + d, dtype) / std::sqrt(norm);
  }
  double square = 0;
  for (double x : sum) square += x * x;
  return square / double((last - first) * (last - first));
}

void block_scores_head(const BlockScores& p, int64_t b, int64_t h) {
  int64_t head = b * p.heads_q + h, size = p.q_blocks * p.key_blocks;
  for (int64_t at = 0; at < size; ++at) store(p.scores, head * size + at, result_type(p), -INFINITY);
  for (int64_t m = 0; p.q_similarity && m < p.q_blocks; ++m) {
    store(p.q_similarity, head * p.q_blocks + m, result_type(p), 0);
  }
  for (SequenceWalk walk(p); walk.valid(); walk.next()) {
    for (int64_t m = 0; m * p.lists.block_q < walk.current.len_q(); ++m) {
      BlockRow row(p, walk.current, b, h, m);
      int64_t list_row = head * p.q_blocks + walk.current.list_row + m;
      std::vector<double> scores = reduce(p, row);
      for (size_t n = 0; n < scores.size(); ++n) {
        store(p.scores, list_row * p.key_blocks + int64_t(n), result_type(p), scores[n]);
      }
      if (!p.q_similarity) continue;
      double cosine = similarity(p.query, p.dtype, b, h, row.first, row.first + row.rows, p.head_dim);
      store(p.q_similarity, list_row, result_type(p), cosine);
    }
  }
}

void key_similarity_head(const BlockScores& p, int64_t b, int64_t h) {
  int64_t blocks = p.k_blocks(), head = b * p.heads_kv + h;
  for (int64_t n = 0; n < blocks; ++n) store(p.k_similarity, head * blocks + n, result_type(p), 0);
  for (SequenceWalk walk(p); walk.valid(); walk.next()) {
    int64_t n = head * blocks + walk.current.k_block;
    for (int64_t first = walk.current.k_begin; first < walk.current.k_end; first += p.lists.block_k, ++n) {
      int64_t last = std::min<int64_t>(first + p.lists.block_k, walk.current.k_end);
      store(p.k_similarity, n, result_type(p), similarity(p.key, p.dtype, b, h, first, last, p.head_dim));
    }
  }
}

/// All query heads of one key head, so that its gradient is summed by one thread in a fixed order.
void block_scores_backward_group(const BlockScoresBackward& p, int64_t b, int64_t kv_head) {
  int64_t group = p.heads_q / p.heads_kv, dim = p.head_dim;
  std::vector<double> grad_key(size_t(p.len_k * dim), 0), grad_query(static_cast<size_t>(dim));
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    int64_t written = 0;  // rows of query
    for (SequenceWalk walk(p); walk.valid(); walk.next()) {
      for (int64_t m = 0; m * p.lists.block_q < walk.current.len_q(); ++m) {
        BlockRow row(p, walk.current, b, h, m);
        int64_t list_row = (b * p.heads_q + h) * p.q_blocks + walk.current.list_row + m;
        std::vector<double> grad(size_t(ceil_div(row.keys, p.lists.block_k)));
        for (size_t n = 0; n < grad.size(); ++n) {
          grad[n] = load(p.grad_scores, list_row * p.key_blocks + int64_t(n), result_type(p));
        }
        std::vector<double> spread_grad = spread(p, row, grad);
        for (int64_t i = 0; i < row.rows; ++i, ++written) {
          std::fill(grad_query.begin(), grad_query.end(), 0.);
          int64_t q = p.query.offset(b, h, row.first + i);
          for (int64_t j = 0; j < row.keys; ++j) {
            double g = spread_grad[size_t(i * row.keys + j)] * p.scale;
            if (g == 0) continue;
            int64_t k = p.key.offset(b, kv_head, walk.current.k_begin + j);
            for (int64_t d = 0; d < dim; ++d) {
              grad_query[size_t(d)] += g * load(p.key.data, k + d, p.dtype);
              grad_key[size_t((walk.current.k_begin + j) * dim + d)] += g * load(p.query.data, q + d, p.dtype);
            }
          }
          int64_t at = p.grad_query.offset(b, h, row.first + i);
          for (int64_t d = 0; d < dim; ++d) store(p.grad_query.data, at + d, p.dtype, grad_query[size_t(d)]);
        }
      }
    }
    for (; written < p.len_q; ++written) {  // rows past the last sequence
      int64_t at = p.grad_query.offset(b, h, written);
      for (int64_t d = 0; d < dim; ++d) store(p.grad_query.data, at + d, p.dtype, 0);
    }
  }
  for (int64_t j = 0; j < p.len_k; ++j) {
    int64_t at = p.grad_key.offset(b, kv_head, j);
    for (int64_t d = 0; d < dim; ++d) store(p.grad_key.data, at + d, p.dtype, grad_key[size_t(j * dim + d)]);
  }
}

void store_all(void* out, int64_t first, DType dtype, const std::vector<double>& values) {
  for (size_t at = 0; at < values.size(); ++at) store(out, first + int64_t(at), dtype, values[at]);
}

void column_scores_head(const ColumnScores& p, int64_t b, int64_t h) {
  std::vector<double> columns(size_t(p.len_k), 0), diagonals(size_t(p.len_k), 0), scores;
  for (SequenceWalk walk(p); walk.valid(); walk.next()) {
    const Sequence& sequence = walk.current;
    for (int64_t i = sequence.q_begin; i < sequence.q_end; ++i) {
      scores.assign(size_t(sequence.len_k()), -INFINITY);
      double highest = -INFINITY, sum = 0;
      for (int64_t j = 0; j < sequence.len_k(); ++j) {
        if (!sees(p, sequence, b, i, sequence.k_begin + j)) continue;
        scores[size_t(j)] = score(p, b, h, i, sequence.k_begin + j);
        highest = larger(highest, scores[size_t(j)]);
      }
      if (highest == -INFINITY) continue;
      for (double& s : scores) sum += s = std::exp(s - highest);
      int64_t position = p.query_positions[b * p.query_positions_batch + i];
      for (int64_t j = 0; j < sequence.len_k(); ++j) {
        double share = scores[size_t(j)] / sum;
        columns[size_t(sequence.k_begin + j)] += share;
        int64_t o = position - j;
        if (o >= 0 && o < sequence.len_k()) diagonals[size_t(sequence.k_begin + o)] += share;
      }
    }
  }
  store_all(p.columns, (b * p.heads_q + h) * p.len_k, result_type(p), columns);
  store_all(p.diagonals, (b * p.heads_q + h) * p.len_k, result_type(p), diagonals);
}

/// exp(score - lse), 0 where the row sees nothing at all.
double share(const AttentionProblem& p, double lse, int64_t b, int64_t h, int64_t i, int64_t j) {
  return lse == -INFINITY ? 0 : std::exp(score(p, b, h, i, j) - lse);
}

void row_scores_head(const RowScores& p, int64_t b, int64_t h) {
  std::vector<double> result(size_t(p.len_k), 0);
  for (SequenceWalk walk(p); walk.valid(); walk.next()) {
    const Sequence& sequence = walk.current;
    for (int64_t r = 0; r < (p.rows ? p.rows_count : p.len_q); ++r) {
      int64_t i = p.rows ? p.rows[b * p.rows_batch + r] : r;
      if (i < sequence.q_begin || i >= sequence.q_end) continue;
      double lse = load(p.lse, (b * p.heads_q + h) * p.len_q + i, result_type(p));
      for (int64_t j = sequence.k_begin; j < sequence.k_end; ++j) {
        if (!sees(p, sequence, b, i, j)) continue;
        double value = share(p, lse, b, h, i, j), &to = result[size_t(j)];
        to = p.maximum ? larger(to, value) : to + value;
      }
    }
  }
  store_all(p.scores, (b * p.heads_q + h) * p.len_k, result_type(p), result);
}

bool bit(const BlockLists& lists, int64_t entry, int64_t row, int64_t column) {
  if (!lists.bits_index || lists.bits_index[entry] < 0) return true;
  const int32_t* words = lists.bits + (lists.bits_index[entry] * lists.block_q + row) * lists.bits_words();
  return uint32_t(words[column / 32]) >> (column % 32) & 1;
}

void block_map_head(const AttentionBlockMap& p, int64_t b, int64_t h) {
  const BlockLists& lists = p.lists;
  int64_t width = p.listed ? lists.slots_per_row() : p.key_blocks, head = b * p.heads_q + h;
  for (int64_t at = 0; at < p.q_blocks * width; ++at) {
    store(p.map, head * p.q_blocks * width + at, result_type(p), 0);
  }
  for (SequenceWalk walk(p); walk.valid(); walk.next()) {
    const Sequence& sequence = walk.current;
    for (int64_t m = 0; m * lists.block_q < sequence.len_q(); ++m) {
      int64_t first = sequence.q_begin + m * lists.block_q;
      int64_t last = std::min<int64_t>(first + lists.block_q, sequence.q_end);
      int64_t row = sequence.list_row + m;
      /// `entry` of the partial list, or -1: in full blocks nothing is masked, without lists causality and window.
      auto fold = [&](int64_t n, int64_t slot, bool masked, int64_t entry) {
        double result = 0;
        for (int64_t i = first; i < last; ++i) {
          double lse = load(p.lse, head * p.len_q + i, result_type(p));
          int64_t key = sequence.k_begin + n * lists.block_k;
          for (int64_t j = key; j < key + lists.block_k && j < sequence.k_end; ++j) {
            if (masked && !sees(p, sequence, b, i, j)) continue;
            if (entry >= 0 && !bit(lists, entry, i - first, j - key)) continue;
            double value = share(p, lse, b, h, i, j);
            result = p.maximum ? larger(result, value) : result + value;
          }
        }
        store(p.map, (head * p.q_blocks + row) * width + slot, result_type(p), result);
      };
      if (!p.listed) {
        for (int64_t n = 0; n * lists.block_k < sequence.len_k(); ++n) fold(n, n, true, -1);
        continue;
      }
      int64_t list_row = lists.row(b, h, row, p.heads_q);
      for (const BlockList* list : {&lists.partial, &lists.full}) {
        bool partial = list == &lists.partial;
        for (int64_t s = 0; list->counts && s < list->counts[list_row]; ++s) {
          int64_t entry = list_row * list->capacity + s;
          if (list->indices[entry] < 0) continue;
          fold(list->indices[entry], partial ? s : lists.partial.capacity + s, partial, partial ? entry : -1);
        }
      }
    }
  }
}

}  // namespace

Status reference_block_scores(const BlockScores& p, const ParallelFor& parallel) {
  for_each_head(p, p.heads_q, parallel, [&](int64_t b, int64_t h) { block_scores_head(p, b, h); });
  if (p.k_similarity) {
    for_each_head(p, p.heads_kv, parallel, [&](int64_t b, int64_t h) { key_similarity_head(p, b, h); });
  }
  return {};
}

Status reference_block_scores_backward(const BlockScoresBackward& p, const ParallelFor& parallel) {
  for_each_head(p, p.heads_kv, parallel, [&](int64_t b, int64_t h) { block_scores_backward_group(p, b, h); });
  return {};
}

Status reference_column_scores(const ColumnScores& p, const ParallelFor& parallel) {
  for_each_head(p, p.heads_q, parallel, [&](int64_t b, int64_t h) { column_scores_head(p, b, h); });
  return {};
}

Status reference_row_scores(const RowScores& p, const ParallelFor& parallel) {
  for_each_head(p, p.heads_q, parallel, [&](int64_t b, int64_t h) { row_scores_head(p, b, h); });
  return {};
}

Status reference_attention_block_map(const AttentionBlockMap& p, const ParallelFor& parallel) {
  for_each_head(p, p.heads_q, parallel, [&](int64_t b, int64_t h) { block_map_head(p, b, h); });
  return {};
}

const CpuSelection selection_cpu_reference = {
    "reference",
    reference_block_scores,
    reference_block_scores_backward,
    reference_column_scores,
    reference_row_scores,
    reference_attention_block_map,
    reference_choose,
};

}  // namespace sparsekit

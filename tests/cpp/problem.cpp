#include "problem.h"

#include <algorithm>

namespace sparsekit::testing {

std::vector<Span> Problem::spans(const std::vector<int32_t>& lens, int64_t length) {
  if (lens.empty()) return {{0, length}};
  std::vector<Span> all;
  int64_t begin = 0;
  for (int32_t n : lens) all.push_back({begin, begin + n}), begin += n;
  return all;
}

Problem::Problem(const Shape& s, Random& random) : shape(s) {
  auto sum = [](const std::vector<int32_t>& lens) {
    int64_t total = 0;
    for (int32_t n : lens) total += n;
    return total;
  };
  if (!shape.lens_q.empty()) shape.len_q = sum(shape.lens_q), shape.len_k = sum(shape.lens_k), shape.batch = 1;
  query = Tensor(shape.dtype, shape.batch, shape.heads_q, shape.len_q, shape.head_dim);
  key = Tensor(shape.dtype, shape.batch, shape.heads_kv, shape.len_k, shape.head_dim);
  value = Tensor(shape.dtype, shape.batch, shape.heads_kv, shape.len_k, shape.value_dim);
  out = Tensor(shape.dtype, shape.batch, shape.heads_q, shape.len_q, shape.value_dim);
  for (Tensor* tensor : {&query, &key, &value}) tensor->randomize(random);
  std::normal_distribution<float> normal;
  if (shape.key_bias) {
    key_bias.resize(size_t(shape.batch * shape.len_k));
    for (float& x : key_bias) x = random() % 8 ? normal(random) : -INFINITY;
  }
  if (shape.sinks) {
    sinks.resize(size_t(shape.heads_q));
    for (float& x : sinks) x = normal(random);
  }
  auto positions = [&](int64_t n) {
    std::vector<int32_t> order(size_t(shape.batch * n));
    for (size_t i = 0; i < order.size(); ++i) order[i] = int32_t(i % size_t(n));
    for (int64_t b = 0; b < shape.batch; ++b) std::shuffle(order.begin() + b * n, order.begin() + (b + 1) * n, random);
    return order;
  };
  if (shape.positions) q_positions = positions(shape.len_q), k_positions = positions(shape.len_k);
  make_lists(random);
}

void Problem::make_lists(Random& random) {
  struct Row {
    std::vector<int32_t> partial, full, bits;
  };
  std::vector<Row> rows;
  int32_t mask = 0;
  const auto q = q_spans(), k = k_spans();
  for (int64_t outer = 0; outer < shape.batch * shape.heads_q; ++outer) {
    for (size_t s = 0; s < q.size(); ++s) {
      int64_t k_blocks = (k[s].end - k[s].begin + shape.block_k - 1) / shape.block_k;
      for (int64_t first = q[s].begin; first < q[s].end; first += shape.block_q) {
        Row row;
        bool empty = random() % 8 == 0;
        for (int64_t n = 0; n < k_blocks && !empty; ++n) {
          switch (random() % 6) {
            case 0:
            case 1:
              row.partial.push_back(int32_t(n));
              row.bits.push_back(shape.bits && random() % 2 ? mask++ : -1);
              break;
            case 2: row.full.push_back(int32_t(n)); break;
            case 3: row.partial.push_back(-1), row.bits.push_back(-1); break;
            case 4: row.full.push_back(-1); break;
            default: break;
          }
        }
        rows.push_back(row);
      }
    }
  }
  for (const Row& row : rows) {
    capacity = std::max(capacity, int32_t(std::max(row.partial.size(), row.full.size())));
  }
  for (const Span& span : q) q_blocks += (span.end - span.begin + shape.block_q - 1) / shape.block_q;
  const int32_t garbage = 1 << 30;  // past the count: never a block
  for (auto* list : {&counts, &full_counts, &indices, &full_indices}) list->reserve(1);  // a null pointer is no list
  for (const Row& row : rows) {
    counts.push_back(int32_t(row.partial.size()));
    full_counts.push_back(int32_t(row.full.size()));
    for (int32_t slot = 0; slot < capacity; ++slot) {
      indices.push_back(size_t(slot) < row.partial.size() ? row.partial[size_t(slot)] : garbage);
      full_indices.push_back(size_t(slot) < row.full.size() ? row.full[size_t(slot)] : garbage);
      bits_index.push_back(size_t(slot) < row.bits.size() ? row.bits[size_t(slot)] : -1);
    }
  }
  bits.resize(size_t(mask) * size_t(shape.block_q) * size_t((shape.block_k + 31) / 32));
  for (int32_t& word : bits) word = int32_t(random());
  for (const Span& span : q) cu_q.push_back(int32_t(span.begin));
  for (const Span& span : k) cu_k.push_back(int32_t(span.begin));
  cu_q.push_back(int32_t(shape.len_q)), cu_k.push_back(int32_t(shape.len_k));
}

AttentionForward Problem::forward() {
  AttentionForward p;
  p.dtype = shape.dtype;
  p.batch = shape.batch, p.heads_q = shape.heads_q, p.heads_kv = shape.heads_kv;
  p.len_q = shape.len_q, p.len_k = shape.len_k, p.head_dim = shape.head_dim, p.value_dim = shape.value_dim;
  p.query = query.input(), p.key = key.input(), p.value = value.input();
  p.lists.partial = {counts.data(), indices.data(), capacity};
  p.lists.full = {full_counts.data(), full_indices.data(), capacity};
  p.lists.list_batch = shape.batch, p.lists.list_heads = shape.heads_q, p.lists.q_blocks = q_blocks;
  p.lists.block_q = shape.block_q, p.lists.block_k = shape.block_k;
  if (shape.bits) {
    p.lists.bits = bits.data(), p.lists.bits_index = bits_index.data();
    p.lists.bits_count = int64_t(bits.size()) / (shape.block_q * p.lists.bits_words());
  }
  p.scale = float(1 / std::sqrt(double(shape.head_dim)));
  p.softcap = shape.softcap, p.causal = shape.causal;
  p.window_left = shape.window_left, p.window_right = shape.window_right;
  if (shape.key_bias) p.key_bias = key_bias.data(), p.key_bias_batch = shape.len_k;
  if (shape.sinks) p.sinks = sinks.data();
  if (shape.positions) {
    p.query_positions = q_positions.data(), p.query_positions_batch = shape.len_q;
    p.key_positions = k_positions.data(), p.key_positions_batch = shape.len_k;
  }
  if (!shape.lens_q.empty()) {
    p.cu_seqlens_q = cu_q.data(), p.cu_seqlens_k = cu_k.data(), p.sequences = int64_t(shape.lens_q.size());
    p.max_len_q = *std::max_element(shape.lens_q.begin(), shape.lens_q.end());
    p.max_len_k = *std::max_element(shape.lens_k.begin(), shape.lens_k.end());
  }
  out.fill(NAN);
  lse.assign(size_t(shape.batch * shape.heads_q * shape.len_q), NAN);
  p.out = out.output(), p.lse = lse.data();
  return p;
}

bool Problem::sees(int64_t b, int64_t h, int64_t i, int64_t j) const {
  const auto q = q_spans(), k = k_spans();
  int64_t row = 0;
  for (size_t s = 0; s < q.size(); row += (q[s].end - q[s].begin + shape.block_q - 1) / shape.block_q, ++s) {
    if (i < q[s].begin || i >= q[s].end) continue;
    if (j < k[s].begin || j >= k[s].end) return false;
    const int64_t in_q = i - q[s].begin, in_k = j - k[s].begin;
    row = (b * shape.heads_q + h) * q_blocks + row + in_q / shape.block_q;
    const int32_t block = int32_t(in_k / shape.block_k);
    for (int32_t slot = 0; slot < full_counts[size_t(row)]; ++slot) {
      if (full_indices[size_t(row * capacity + slot)] == block) return true;
    }
    for (int32_t slot = 0; slot < counts[size_t(row)]; ++slot) {
      if (indices[size_t(row * capacity + slot)] != block) continue;
      const int32_t mask = shape.bits ? bits_index[size_t(row * capacity + slot)] : -1;
      if (mask >= 0) {
        const int64_t words = (shape.block_k + 31) / 32, key = in_k % shape.block_k;
        const int64_t line = mask * shape.block_q + in_q % shape.block_q;
        if (!((uint32_t(bits[size_t(line * words + key / 32)]) >> (key % 32)) & 1)) return false;
      }
      const int64_t shift = (k[s].end - k[s].begin) - (q[s].end - q[s].begin);
      const int64_t here = shape.positions ? q_positions[size_t(b * shape.len_q + i)] : in_q + shift;
      const int64_t there = shape.positions ? k_positions[size_t(b * shape.len_k + j)] : in_k;
      if (shape.causal && there > here) return false;
      if (shape.window_left >= 0 && there < here - shape.window_left) return false;
      return shape.window_right < 0 || there <= here + shape.window_right;
    }
    return false;
  }
  return false;
}

void Problem::expected(std::vector<double>* result, std::vector<double>* log_sums) const {
  const int64_t group = shape.heads_q / shape.heads_kv;
  const double scale = float(1 / std::sqrt(double(shape.head_dim)));
  result->clear(), log_sums->clear();
  for (int64_t b = 0; b < shape.batch; ++b) {
    for (int64_t h = 0; h < shape.heads_q; ++h) {
      for (int64_t i = 0; i < shape.len_q; ++i) {
        std::vector<double> row(size_t(shape.value_dim), 0.0);
        double sum = 0, top = -INFINITY;
        std::vector<std::pair<int64_t, double>> scores;
        for (int64_t j = 0; j < shape.len_k; ++j) {
          if (!sees(b, h, i, j)) continue;
          double score = 0;
          for (int64_t d = 0; d < shape.head_dim; ++d) score += query.get(b, h, i, d) * key.get(b, h / group, j, d);
          score *= scale;
          if (shape.softcap > 0) score = double(shape.softcap) * std::tanh(score / double(shape.softcap));
          if (shape.key_bias) score += double(key_bias[size_t(b * shape.len_k + j)]);
          scores.push_back({j, score});
          top = std::max(top, score);
        }
        for (auto& [j, score] : scores) {
          double weight = top == -INFINITY ? 0 : std::exp(score - top);
          if (weight == 0) continue;
          sum += weight;
          for (int64_t d = 0; d < shape.value_dim; ++d) row[size_t(d)] += weight * value.get(b, h / group, j, d);
        }
        double total = sum;
        if (shape.sinks && sum > 0) total += std::exp(double(sinks[size_t(h)]) - top);
        for (double x : row) result->push_back(sum > 0 ? x / total : 0);
        log_sums->push_back(sum > 0 ? top + std::log(sum) : -INFINITY);
      }
    }
  }
}

double difference(const Problem& problem, const std::vector<double>& out, const std::vector<double>& lse) {
  double worst = 0;
  auto compare = [&](double found, double wanted) {
    if (found == wanted) return;  // infinities too
    double d = std::fabs(found - wanted);
    worst = d <= worst ? worst : std::isnan(d) ? INFINITY : d;
  };
  for (int64_t i = 0; i < problem.out.size(); ++i) {
    compare(load(problem.out.bytes.get(), i, problem.shape.dtype), out[size_t(i)]);
  }
  for (size_t i = 0; i < lse.size(); ++i) compare(double(problem.lse[i]), lse[i]);
  return worst;
}

}  // namespace sparsekit::testing

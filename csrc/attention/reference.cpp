// Block- and stripe-sparse attention, written to be read: float64 arithmetic, one query row at a time, every argument.
//
//   scores of the keys a row sees -> softmax -> weighted sum of values; backward recomputes the scores
//
// Takes every valid problem, also float64 tensors (gradcheck) and block sizes no other backend takes. Memory per
// thread: one score per key. Other backends are tested against the dense Python reference; this one is too.
#include <cmath>
#include <vector>

#include "attention/cpu_implementations.h"
#include "attention/scalar.h"
#include "attention/sequences.h"

namespace sparsekit {
namespace {

/// One query row: which keys it sees and their scores.
struct Row {
  int64_t batch, head, kv_head, index;  // index: into query's rows
  std::vector<int64_t> keys;            // rows of key and value
  std::vector<double> products;         // scale * q.k after softcap, before key_bias
  std::vector<double> scores;
};

class RowBuilder {
 public:
  explicit RowBuilder(const AttentionProblem& problem) : p_(problem), lists_(problem.lists) {}

  void build(const Sequence& sequence, int64_t b, int64_t h, int64_t i, Row* row) const {
    row->batch = b;
    row->head = h;
    row->kv_head = h / (p_.heads_q / p_.heads_kv);
    row->index = i;
    row->keys.clear();
    row->products.clear();
    row->scores.clear();
    int64_t list_row = lists_.row(b, h, sequence.list_row + (i - sequence.q_begin) / lists_.block_q, p_.heads_q);
    if (p_.stripes.any()) seen_.assign(size_t(p_.len_k), false);
    visit(sequence, lists_.partial, list_row, /*masked=*/true, row);
    visit(sequence, lists_.full, list_row, /*masked=*/false, row);
    if (p_.stripes.any()) visit_stripes(sequence, row);
  }

 private:
  void visit(const Sequence& sequence, const BlockList& list, int64_t list_row, bool masked, Row* row) const {
    if (!list.counts) return;
    for (int32_t slot = 0; slot < list.counts[list_row]; ++slot) {
      int64_t entry = list_row * list.capacity + slot;
      if (list.indices[entry] < 0) continue;
      int64_t first = sequence.k_begin + int64_t(list.indices[entry]) * lists_.block_k;
      for (int64_t j = first; j < first + lists_.block_k && j < sequence.k_end; ++j) {
        if (masked && !(bit(sequence, entry, row->index, j - first) && in_window(sequence, *row, j))) continue;
        see(j, row);
      }
    }
  }

  /// Sink and local keys, and the columns of the row's group: those that it has not seen yet.
  void visit_stripes(const Sequence& sequence, Row* row) const {
    const StripeLists& stripes = p_.stripes;
    int64_t q = query_position(sequence, *row);
    for (int64_t j = 0; j < p_.len_k; ++j) {
      int64_t k = key_position(sequence, *row, j);
      bool sink = stripes.sink > 0 && k < stripes.sink && (!p_.causal || k <= q),
           local = k <= q && k > q - stripes.local;
      if ((sink || local) && !seen_[size_t(j)]) see(j, row);
    }
    int64_t list = stripes.row(row->batch, row->head, row->index / stripes.group_size, p_.heads_q);
    for (int32_t slot = 0; slot < stripes.counts[list]; ++slot) {
      int64_t j = stripes.indices[list * stripes.capacity + slot];
      if (j < 0 || seen_[size_t(j)] || (p_.causal && key_position(sequence, *row, j) > q)) continue;
      see(j, row);
    }
  }

  void see(int64_t j, Row* row) const {
    double product = p_.scale * dot(*row, j);
    if (p_.softcap > 0) product = p_.softcap * std::tanh(product / p_.softcap);
    row->keys.push_back(j);
    row->products.push_back(product);
    row->scores.push_back(product + bias(*row, j));
    if (p_.stripes.any()) seen_[size_t(j)] = true;
  }

  bool bit(const Sequence& sequence, int64_t entry, int64_t i, int64_t column) const {
    if (!lists_.bits_index || lists_.bits_index[entry] < 0) return true;
    int64_t r = (i - sequence.q_begin) % lists_.block_q;
    const int32_t* words = lists_.bits + (lists_.bits_index[entry] * lists_.block_q + r) * lists_.bits_words();
    return uint32_t(words[column / 32]) >> (column % 32) & 1;
  }

  bool in_window(const Sequence& sequence, const Row& row, int64_t j) const {
    int64_t q = query_position(sequence, row), k = key_position(sequence, row, j);
    return (!p_.causal || k <= q) && (p_.window_left < 0 || k >= q - p_.window_left) &&
           (p_.window_right < 0 || k <= q + p_.window_right);
  }

  int64_t query_position(const Sequence& sequence, const Row& row) const {
    return p_.query_positions ? p_.query_positions[row.batch * p_.query_positions_batch + row.index]
                              : row.index - sequence.q_begin + sequence.len_k() - sequence.len_q();
  }
  int64_t key_position(const Sequence& sequence, const Row& row, int64_t j) const {
    return p_.key_positions ? p_.key_positions[row.batch * p_.key_positions_batch + j] : j - sequence.k_begin;
  }

  double dot(const Row& row, int64_t j) const {
    double sum = 0;
    int64_t q = p_.query.offset(row.batch, row.head, row.index), k = p_.key.offset(row.batch, row.kv_head, j);
    for (int32_t d = 0; d < p_.head_dim; ++d) {
      sum += load(p_.query.data, q + d, p_.dtype) * load(p_.key.data, k + d, p_.dtype);
    }
    return sum;
  }

  double bias(const Row& row, int64_t j) const {
    return p_.key_bias ? p_.key_bias[row.batch * p_.key_bias_batch + row.head * p_.key_bias_head + j] : 0;
  }

  const AttentionProblem& p_;
  const BlockLists& lists_;
  mutable std::vector<bool> seen_;  // keys that the row at hand sees; for stripes, which count a key once
};

/// The softmax of a row: exp(score - largest) / sum. Kept apart rather than as one logarithm, which would swallow the
/// sum where every score is as low as a float can be.
struct Softmax {
  double largest = -INFINITY;  // -INFINITY: the row sees no key
  double sum = 0;              // of exp(score - largest), without the sink
  double total = 0;            // with it

  Softmax(const AttentionProblem& p, const Row& row) {
    for (double score : row.scores) largest = score > largest || std::isnan(score) ? score : largest;
    if (empty()) return;
    for (double score : row.scores) sum += std::exp(score - largest);
    total = sum + (p.sinks ? std::exp(p.sinks[row.head] - largest) : 0.);
  }
  bool empty() const { return largest == -INFINITY; }
  double lse() const { return empty() ? largest : largest + std::log(sum); }
  double weight(double score) const { return std::exp(score - largest) / total; }
  double weight_of_sink(double sink) const { return 1 / (1 + std::exp(largest - sink) * sum); }  // total may overflow
  double without_sink(double score) const { return std::exp(score - largest) / sum; }
};

/// Calls visit(row) for all rows of (batch, head); rows of a packed batch that belong to no sequence see no key.
template <class Visit>
void for_each_row(const AttentionProblem& p, int64_t b, int64_t h, Visit visit) {
  RowBuilder builder(p);
  Row row;
  int64_t next = 0;
  for (SequenceWalk walk(p); walk.valid(); walk.next()) {
    for (int64_t i = walk.current.q_begin; i < walk.current.q_end; ++i) {
      builder.build(walk.current, b, h, i, &row);
      visit(row);
    }
    next = walk.current.q_end;
  }
  row = {b, h, 0, next, {}, {}, {}};
  for (; row.index < p.len_q; ++row.index) visit(row);
}

void forward_head(const AttentionForward& p, int64_t b, int64_t h) {
  std::vector<double> out(p.value_dim);
  for_each_row(p, b, h, [&](const Row& row) {
    Softmax softmax(p, row);
    out.assign(p.value_dim, 0.);
    for (size_t n = 0; n < row.keys.size() && !softmax.empty(); ++n) {
      double weight = softmax.weight(row.scores[n]);
      int64_t v = p.value.offset(b, row.kv_head, row.keys[n]);
      for (int32_t d = 0; d < p.value_dim; ++d) out[d] += weight * load(p.value.data, v + d, p.dtype);
    }
    int64_t o = p.out.offset(b, h, row.index);
    for (int32_t d = 0; d < p.value_dim; ++d) store(p.out.data, o + d, p.dtype, out[d]);
    int64_t at = (b * p.heads_q + h) * p.len_q + row.index;
    if (p.dtype == DType::f64) {
      p.lse_f64[at] = softmax.lse();
    } else {
      p.lse[at] = float(softmax.lse());
    }
  });
}

/// All query heads of one key head, so that its gradients are summed by one thread in a fixed order.
void backward_group(const AttentionBackward& p, int64_t b, int64_t kv_head) {
  std::vector<double> grad_key(size_t(p.len_k * p.head_dim)), grad_value(size_t(p.len_k * p.value_dim));
  std::vector<double> grad_query(p.head_dim), grad_bias;
  int64_t group = p.heads_q / p.heads_kv;
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    grad_bias.assign(size_t(p.len_k), 0.);
    double grad_sink = 0;
    for_each_row(p, b, h, [&](const Row& row) {
      int64_t at = (b * p.heads_q + h) * p.len_q + row.index;
      int64_t q = p.query.offset(b, h, row.index), go = p.grad_out.offset(b, h, row.index);
      grad_query.assign(p.head_dim, 0.);
      Softmax softmax(p, row);
      if (!softmax.empty()) {
        double out_dot = 0;
        for (int32_t d = 0; d < p.value_dim; ++d) {
          out_dot +=
              load(p.grad_out.data, go + d, p.dtype) * load(p.out.data, p.out.offset(b, h, row.index) + d, p.dtype);
        }
        // The sink is a key of value 0 outside of lse: lse's gradient spreads by the softmax without it.
        double grad_lse = p.grad_lse_f64 ? p.grad_lse_f64[at] : p.grad_lse ? p.grad_lse[at] : 0.;
        if (p.sinks) grad_sink -= softmax.weight_of_sink(p.sinks[h]) * out_dot;
        for (size_t n = 0; n < row.keys.size(); ++n) {
          int64_t j = row.keys[n], k = p.key.offset(b, kv_head, j), v = p.value.offset(b, kv_head, j);
          double weight = softmax.weight(row.scores[n]), grad_weight = 0;
          for (int32_t d = 0; d < p.value_dim; ++d) {
            double grad_out = load(p.grad_out.data, go + d, p.dtype);
            grad_weight += grad_out * load(p.value.data, v + d, p.dtype);
            grad_value[j * p.value_dim + d] += weight * grad_out;
          }
          double grad_score = weight * (grad_weight - out_dot) + grad_lse * softmax.without_sink(row.scores[n]);
          grad_bias[j] += grad_score;
          double capped = p.softcap > 0 ? row.products[n] / p.softcap : 0.;
          double grad_product = grad_score * (1 - capped * capped) * p.scale;
          for (int32_t d = 0; d < p.head_dim; ++d) {
            grad_query[d] += grad_product * load(p.key.data, k + d, p.dtype);
            grad_key[j * p.head_dim + d] += grad_product * load(p.query.data, q + d, p.dtype);
          }
        }
      }
      int64_t gq = p.grad_query.offset(b, h, row.index);
      for (int32_t d = 0; d < p.head_dim; ++d) store(p.grad_query.data, gq + d, p.dtype, grad_query[d]);
    });
    if (p.grad_key_bias) {
      for (int64_t j = 0; j < p.len_k; ++j) p.grad_key_bias[(b * p.heads_q + h) * p.len_k + j] = float(grad_bias[j]);
    }
    if (p.grad_sinks) p.grad_sinks[b * p.heads_q + h] = float(grad_sink);
  }
  for (int64_t j = 0; j < p.len_k; ++j) {
    int64_t k = p.grad_key.offset(b, kv_head, j), v = p.grad_value.offset(b, kv_head, j);
    for (int32_t d = 0; d < p.head_dim; ++d) store(p.grad_key.data, k + d, p.dtype, grad_key[j * p.head_dim + d]);
    for (int32_t d = 0; d < p.value_dim; ++d) store(p.grad_value.data, v + d, p.dtype, grad_value[j * p.value_dim + d]);
  }
}

const char* refuses(const AttentionProblem&, Direction, const ParallelFor&) { return nullptr; }
size_t workspace(const AttentionProblem&, Direction, const ParallelFor&) { return 0; }

Status forward(const AttentionForward& arguments, const ParallelFor& parallel) {
  auto body = [](int64_t first, int64_t last, void* context) {
    const auto& p = *static_cast<const AttentionForward*>(context);
    for (int64_t at = first; at < last; ++at) forward_head(p, at / p.heads_q, at % p.heads_q);
  };
  parallel(0, arguments.batch * arguments.heads_q, 1, body, const_cast<AttentionForward*>(&arguments));
  return {};
}

Status backward(const AttentionBackward& arguments, const ParallelFor& parallel) {
  auto body = [](int64_t first, int64_t last, void* context) {
    const auto& p = *static_cast<const AttentionBackward*>(context);
    for (int64_t at = first; at < last; ++at) backward_group(p, at / p.heads_kv, at % p.heads_kv);
  };
  parallel(0, arguments.batch * arguments.heads_kv, 1, body, const_cast<AttentionBackward*>(&arguments));
  return {};
}

}  // namespace

const CpuAttention attention_cpu_reference = {"reference", refuses, workspace, forward, backward};

}  // namespace sparsekit

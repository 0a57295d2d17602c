// Merges attention states over disjoint keys: lse = log sum exp(lse_s), out = sum exp(lse_s - lse) out_s.
// One pass over the states; a row that no state saw keys for stays (0, -inf).
#include <cmath>
#include <vector>

#include "attention/scalar.h"

namespace sparsekit {
namespace {

void merge_row(const AttentionMerge& m, int64_t b, int64_t h, int64_t i, double* sum) {
  int64_t at = (b * m.heads + h) * m.rows + i;
  double largest = -INFINITY, total = 0;
  for (int64_t s = 0; s < m.count; ++s) largest = std::fmax(largest, m.lses[s][at]);
  for (int32_t d = 0; d < m.value_dim; ++d) sum[d] = 0;
  for (int64_t s = 0; s < m.count && largest != -INFINITY; ++s) {
    double weight = std::exp(m.lses[s][at] - largest);
    if (weight == 0) continue;  // what a state without keys holds reaches nothing
    total += weight;
    int64_t from = m.outs[s].offset(b, h, i);
    for (int32_t d = 0; d < m.value_dim; ++d) sum[d] += weight * load(m.outs[s].data, from + d, m.dtype);
  }
  m.lse[at] = float(largest == -INFINITY ? largest : largest + std::log(total));
  int64_t to = m.out.offset(b, h, i);
  for (int32_t d = 0; d < m.value_dim; ++d) store(m.out.data, to + d, m.dtype, total > 0 ? sum[d] / total : 0.);
}

}  // namespace

Status attention_merge(const AttentionMerge& arguments, const ParallelFor& parallel) {
  auto body = [](int64_t first, int64_t last, void* context) {
    const auto& m = *static_cast<const AttentionMerge*>(context);
    std::vector<double> sum(m.value_dim);
    for (int64_t at = first; at < last; ++at) {
      merge_row(m, at / m.rows / m.heads, at / m.rows % m.heads, at % m.rows, sum.data());
    }
  };
  parallel(0, arguments.batch * arguments.heads * arguments.rows, 64, body, const_cast<AttentionMerge*>(&arguments));
  return {};
}

}  // namespace sparsekit

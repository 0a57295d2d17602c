// Token kernels in float64 (integers in int64), an element at a time: what the others are measured against, and what
// runs float64 and sums of integers.
#include <cmath>
#include <cstring>
#include <limits>

#include "attention/scalar.h"
#include "tokens/rows.h"

namespace sparsekit {
namespace {

DType float_type(TokenType type) {
  return type == TokenType::f64    ? DType::f64
         : type == TokenType::f16  ? DType::f16
         : type == TokenType::bf16 ? DType::bf16
                                   : DType::f32;
}

bool is_integer(TokenType type) { return type == TokenType::i32 || type == TokenType::i64; }

uint64_t load_integer(const char* row, int64_t d, TokenType type) {
  return type == TokenType::i32 ? uint64_t(int64_t(reinterpret_cast<const int32_t*>(row)[d]))
                                : uint64_t(reinterpret_cast<const int64_t*>(row)[d]);
}

double coefficient(const RowPlan& plan, int64_t e) {
  if (!plan.coefficients) return 1;
  return plan.coefficients_f64 ? static_cast<const double*>(plan.coefficients)[e]
                               : static_cast<const float*>(plan.coefficients)[e];
}

void combine_row(const RowTask& task, int64_t s, int64_t o, int64_t r) {
  const RowPlan& plan = *task.plan;
  const int32_t* offsets = plan.sample_offsets(s);
  int64_t first = s * plan.sample_entries + (offsets ? offsets[r] : r * plan.per_row);
  int64_t last = s * plan.sample_entries + (offsets ? offsets[r + 1] : (r + 1) * plan.per_row);
  int64_t found = 0, only = -1;
  for (int64_t e = first; e < last; ++e) {
    if (plan.rows[e] < 0) continue;
    ++found;
    only = e;
  }
  const TokenType type = task.out.type;
  char* out = task.out_row(s, o, r);
  const bool has_base = task.base.data;
  const char* base = has_base && (found == 0 || plan.base_always) ? task.base_row(s, o, r) : nullptr;
  if (found == 0 || (found == 1 && !base && coefficient(plan, only) == 1)) {
    const char* from = found ? task.in_row(s, o, plan.rows[only]) : base;
    if (from) {
      std::memcpy(out, from, size_t(task.out.row_bytes()));
    } else {
      std::memset(out, 0, size_t(task.out.row_bytes()));
    }
    return;
  }
  for (int64_t d = 0; d < task.in.inner; ++d) {
    if (is_integer(type)) {
      uint64_t sum = base ? load_integer(base, d, type) : 0;  // wraps, as integers in torch do
      for (int64_t e = first; e < last; ++e) {
        if (plan.rows[e] >= 0) sum += load_integer(task.in_row(s, o, plan.rows[e]), d, type);
      }
      if (type == TokenType::i32) {
        reinterpret_cast<int32_t*>(out)[d] = int32_t(uint32_t(sum));
      } else {
        reinterpret_cast<int64_t*>(out)[d] = int64_t(sum);
      }
    } else {
      double sum = base ? load(base, d, float_type(type)) : 0;
      for (int64_t e = first; e < last; ++e) {
        if (plan.rows[e] < 0) continue;
        sum += coefficient(plan, e) * load(task.in_row(s, o, plan.rows[e]), d, float_type(type));
      }
      store(out, d, float_type(type), sum);
    }
  }
}

void combine(const RowTask& task, int64_t s, int64_t o, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; ++r) combine_row(task, s, o, r);
}

void dots(const DotTask& t, int64_t s, int64_t o, int64_t first, int64_t last) {
  const DType type = float_type(t.in.type);
  for (int64_t k = first; k < last; ++k) {
    for (int64_t m = 0; m < t.per_row; ++m) {
      int64_t e = (s * t.index_rows + k) * t.per_row + m, n = t.rows[e];
      if (n < 0) continue;
      const char* minus = t.minus.data ? RowTask::at(t.minus, t.to, s, o, n) : nullptr;
      double sum = 0;
      for (int64_t d = 0; d < t.in.inner; ++d) {
        double x = load(RowTask::at(t.in, t.from, s, o, k), d, type) - (minus ? load(minus, d, type) : 0);
        sum += x * load(RowTask::at(t.grad, t.to, s, o, n), d, type);
      }
      if (t.sums_f64) {
        static_cast<double*>(t.sums)[e] += sum;
      } else {
        static_cast<float*>(t.sums)[e] += float(sum);
      }
    }
  }
}

double squared_length(const void* data, int64_t at, int64_t dim, DType type) {
  double sum = 0;
  for (int64_t d = 0; d < dim; ++d) sum += load(data, at + d, type) * load(data, at + d, type);
  return sum;
}

bool nearest(const NearestTask& task, int64_t s, int64_t first, int64_t last, MatchMemory*) {
  const MatchTokens& m = *task.match;
  const int64_t tokens = task.count(s);
  for (int64_t i = first; i < last; ++i) {
    const int64_t source = m.metric.offset(s, 0, 2 * i);
    const double length = squared_length(m.metric.data, source, m.dim, m.dtype);
    double top = -std::numeric_limits<double>::infinity();
    int64_t chosen = m.protect | 1;
    for (int64_t j = 1; j < tokens; j += 2) {
      const int64_t destination = m.metric.offset(s, 0, j);
      const double other = squared_length(m.metric.data, destination, m.dim, m.dtype);
      if (j < m.protect || !std::isfinite(length) || !std::isfinite(other)) continue;
      double product = 0;
      for (int64_t d = 0; d < m.dim; ++d) {
        product += load(m.metric.data, source + d, m.dtype) * load(m.metric.data, destination + d, m.dtype);
      }
      const double cosine = product == 0 ? 0 : product / (std::sqrt(length) * std::sqrt(other));
      if (!(cosine > top)) continue;
      top = cosine;
      chosen = j;
    }
    task.best[s * task.sources + i] = float(top);
    task.target[s * task.sources + i] = int32_t(chosen);
  }
  return true;
}

const char* takes_every_type(TokenType, bool) { return nullptr; }
const char* takes_every_metric(DType) { return nullptr; }

}  // namespace

const TokenKernels tokens_cpu_reference = {"reference", combine, dots, nearest, takes_every_type, takes_every_metric};

}  // namespace sparsekit

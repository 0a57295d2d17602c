// The block-sparse products in float64, one row at a time: made to be read. Formulas: sparsekit/matmul.h.
#include <cmath>
#include <cstring>
#include <vector>

#include "attention/scalar.h"
#include "matmul/implementations.h"

namespace sparsekit {
namespace {

double activate(Activation activation, double x) {
  switch (activation) {
    case Activation::none: return x;
    case Activation::relu: return x < 0 ? 0 : x;
    case Activation::gelu: return 0.5 * x * std::erfc(-x * std::sqrt(0.5));
    case Activation::gelu_tanh: return x / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::silu: return x / (1 + std::exp(-x));
  }
  return x;
}

struct ProductCall {
  const BlockSparseProduct* p;

  double value(int64_t block, int64_t r, int64_t c) const {
    const BlockSparsePattern& w = p->pattern;
    int64_t at = (block * w.block_rows + r) * w.block_cols + c;
    return p->scales ? static_cast<const int8_t*>(p->values)[at] : load(p->values, at, p->dtype);
  }

  /// The input of one token, rounded to 8 bits where the weight is int8; returns what sums are to be multiplied with.
  double read_token(int64_t t, std::vector<double>* x) const {
    const bool rounds = p->scales && !p->transposed;
    float most = 0;
    bool finite = true;
    for (size_t k = 0; k < x->size(); ++k) {
      (*x)[k] = load(p->input.data, t * p->input.token + int64_t(k) * p->input.feature, p->dtype);
      if (p->scales && p->transposed) (*x)[k] *= p->scales[k];
      most = std::fmax(most, float(std::fabs((*x)[k])));
      finite &= std::isfinite((*x)[k]);
    }
    if (!rounds) return 1;
    if (!finite) return NAN;
    const float inverse = most > 1e-30f ? 127.f / most : 0.f;
    for (double& one : *x) one = std::nearbyint(float(one) * inverse);
    return double(most) / 127;
  }

  void token(int64_t t) const {
    const BlockSparsePattern& w = p->pattern;
    std::vector<double> x(size_t(p->transposed ? w.rows : w.cols)), y(size_t(p -> transposed ? w.cols : w.rows));
    const double unit = read_token(t, &x);
    for (int64_t i = 0; i < w.row_blocks(); ++i) {
      for (int64_t block = w.crow[i]; block < w.crow[i + 1]; ++block) {
        for (int64_t r = 0; r < w.block_rows && i * w.block_rows + r < w.rows; ++r) {
          for (int64_t c = 0; c < w.block_cols && w.col[block] * w.block_cols + c < w.cols; ++c) {
            size_t row = size_t(i * w.block_rows + r), column = size_t(w.col[block] * w.block_cols + c);
            if (p->transposed) {
              y[column] += x[row] * value(block, r, c);
            } else {
              y[row] += x[column] * value(block, r, c);
            }
          }
        }
      }
    }
    for (size_t n = 0; n < y.size(); ++n) {
      double out = y[n] * unit;
      if (p->scales && !p->transposed) out *= p->scales[n];
      if (p->bias) out += load(p->bias, int64_t(n), p->dtype);
      out = activate(p->activation, out);
      int64_t feature = int64_t(n);
      if (p->factor.data) out *= load(p->factor.data, t * p->factor.token + feature * p->factor.feature, p->dtype);
      store(p->output.data, t * p->output.token + feature * p->output.feature, p->dtype, out);
    }
  }
};

Status product(const BlockSparseProduct& arguments, const ParallelFor& parallel) {
  ProductCall call = {&arguments};
  auto body = [](int64_t first, int64_t last, void* context) {
    for (int64_t t = first; t < last; ++t) static_cast<const ProductCall*>(context)->token(t);
  };
  parallel(0, arguments.tokens, 1, body, &call);
  return {};
}

void sddmm_row(const BlockSddmm& s, int64_t i) {
  const BlockSparsePattern& w = s.pattern;
  for (int64_t block = w.crow[i]; block < w.crow[i + 1]; ++block) {
    for (int64_t r = 0; r < w.block_rows; ++r) {
      for (int64_t c = 0; c < w.block_cols; ++c) {
        int64_t row = i * w.block_rows + r, column = w.col[block] * w.block_cols + c;
        double sum = 0;
        for (int64_t k = 0; k < s.inner && row < w.rows && column < w.cols; ++k) {
          sum +=
              load(s.a, row * s.a_row + k * s.a_inner, s.dtype) * load(s.b, k * s.b_inner + column * s.b_col, s.dtype);
        }
        store(s.values, (block * w.block_rows + r) * w.block_cols + c, s.dtype, sum);
      }
    }
  }
}

Status sddmm(const BlockSddmm& arguments, const ParallelFor& parallel) {
  auto body = [](int64_t first, int64_t last, void* context) {
    for (int64_t i = first; i < last; ++i) sddmm_row(*static_cast<const BlockSddmm*>(context), i);
  };
  parallel(0, arguments.pattern.row_blocks(), 1, body, const_cast<BlockSddmm*>(&arguments));
  return {};
}

const char* refuses(DType, const BlockSparsePattern&) { return nullptr; }

}  // namespace

const CpuMatmul matmul_cpu_reference = {"reference", refuses, product, sddmm};

}  // namespace sparsekit

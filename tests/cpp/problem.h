// A random attention problem that owns its tensors, each in an allocation of exactly its size: a sanitizer sees every
// read past an end. And what the answer is, computed densely in float64 from the definition.
#pragma once

#include <limits>
#include <memory>

#include "attention/scalar.h"
#include "sparsekit/attention.h"
#include "testing.h"

namespace sparsekit::testing {

struct Shape {
  DType dtype = DType::f32;
  int64_t batch = 1, heads_q = 2, heads_kv = 1, len_q = 70, len_k = 100;
  int32_t head_dim = 32, value_dim = 32, block_q = 32, block_k = 32;
  bool causal = false;
  int64_t window_left = -1, window_right = -1;
  float softcap = 0;
  bool bits = false, key_bias = false, sinks = false, positions = false;
  std::vector<int32_t> lens_q, lens_k;  // packed
};

/// [batch, heads, rows, dim] in a buffer of exactly that size.
struct Tensor {
  DType dtype = DType::f32;
  int64_t batch = 0, heads = 0, rows = 0, dim = 0;
  std::unique_ptr<char[]> bytes;

  Tensor() = default;
  Tensor(DType type, int64_t b, int64_t h, int64_t r, int64_t d) : dtype(type), batch(b), heads(h), rows(r), dim(d) {
    bytes.reset(new char[size_t(size() * size_of(dtype))]);
  }
  int64_t size() const { return batch * heads * rows * dim; }
  int64_t at(int64_t b, int64_t h, int64_t r, int64_t d) const { return ((b * heads + h) * rows + r) * dim + d; }
  double get(int64_t b, int64_t h, int64_t r, int64_t d) const { return load(bytes.get(), at(b, h, r, d), dtype); }
  void set(int64_t b, int64_t h, int64_t r, int64_t d, double x) { store(bytes.get(), at(b, h, r, d), dtype, x); }
  void fill(double x) {
    for (int64_t i = 0; i < size(); ++i) store(bytes.get(), i, dtype, x);
  }
  void randomize(Random& random) {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < size(); ++i) store(bytes.get(), i, dtype, normal(random));
  }
  InputView input() const { return {bytes.get(), heads * rows * dim, rows * dim, dim}; }
  OutputView output() { return {bytes.get(), heads * rows * dim, rows * dim, dim}; }
};

struct Span {
  int64_t begin, end;
};

class Problem {
 public:
  Problem(const Shape& shape, Random& random);
  Problem(const Problem&) = delete;

  /// The arguments of a forward call, with outputs full of garbage.
  AttentionForward forward();
  /// Dense float64 answer: out and lse.
  void expected(std::vector<double>* out, std::vector<double>* lse) const;
  bool sees(int64_t b, int64_t h, int64_t i, int64_t j) const;
  /// Sequences of query and key rows: one, or those of the packed batch.
  std::vector<Span> q_spans() const { return spans(shape.lens_q, shape.len_q); }
  std::vector<Span> k_spans() const { return spans(shape.lens_k, shape.len_k); }

  Shape shape;
  Tensor query, key, value, out;
  std::vector<float> lse, key_bias, sinks;
  std::vector<int32_t> counts, indices, full_counts, full_indices, bits, bits_index, q_positions, k_positions;
  std::vector<int32_t> cu_q, cu_k;
  int32_t capacity = 0;
  int64_t q_blocks = 0;

 private:
  static std::vector<Span> spans(const std::vector<int32_t>& lens, int64_t length);
  void make_lists(Random& random);
};

/// Largest difference of `out` and `lse` of a finished call from the answer; infinite if one is NaN where it must not
/// be.
double difference(const Problem& problem, const std::vector<double>& out, const std::vector<double>& lse);

}  // namespace sparsekit::testing

// Attention over stripes through the C++ API, forward and backward: every instruction set against the reference, on
// random lists of columns with and without blocks beside them. Buffers have exactly their size: a sanitizer sees the
// first byte too many.
#include <algorithm>
#include <cstring>

#include "numpy/thread_pool.h"
#include "problem.h"

namespace sparsekit::testing {
namespace {

struct Columns {
  std::vector<int32_t> counts, indices;
  StripeLists lists;

  /// Distinct columns in random order with empty slots among them; what stands past a count is garbage.
  Columns(const Shape& shape, int32_t group_size, int64_t list_heads, int density, Random& random) {
    lists.group_size = group_size, lists.list_batch = shape.batch, lists.list_heads = list_heads;
    lists.groups = (shape.len_q + group_size - 1) / group_size;
    lists.capacity = int32_t(shape.len_k) + 1;
    for (int64_t row = 0; row < shape.batch * list_heads * lists.groups; ++row) {
      std::vector<int32_t> list;
      const int keep = random() % 6 == 0 ? 0 : density;
      for (int32_t j = 0; j < shape.len_k; ++j)
        if (int(random() % 100) < keep) list.push_back(j);
      if (keep) list.push_back(-1);
      std::shuffle(list.begin(), list.end(), random);
      counts.push_back(int32_t(list.size()));
      list.resize(size_t(lists.capacity), 1 << 30);
      indices.insert(indices.end(), list.begin(), list.end());
    }
    lists.counts = counts.data(), lists.indices = indices.data();
  }
};

/// out, lse and the gradients of one call, all as doubles.
struct Results {
  std::vector<std::vector<double>> parts;

  void add(const Tensor& tensor) {
    parts.emplace_back();
    for (int64_t i = 0; i < tensor.size(); ++i) parts.back().push_back(load(tensor.bytes.get(), i, tensor.dtype));
  }
  void add(const std::vector<float>& numbers) { parts.emplace_back(numbers.begin(), numbers.end()); }
};

Results run(Problem& problem, const StripeLists& stripes, bool blocks, const Tensor& grad_out,
            const std::vector<float>& grad_lse) {
  const Shape& s = problem.shape;
  Results results;
  AttentionForward forward = problem.forward();
  forward.stripes = stripes;
  if (!blocks) {
    forward.lists.partial = forward.lists.full = {};
    forward.lists.bits = forward.lists.bits_index = nullptr, forward.lists.bits_count = 0;
  }
  CHECK_OK(attention_forward(forward, thread_pool(2)));
  results.add(problem.out), results.add(problem.lse);
  Tensor query(s.dtype, s.batch, s.heads_q, s.len_q, s.head_dim),
      key(s.dtype, s.batch, s.heads_kv, s.len_k, s.head_dim);
  Tensor value(s.dtype, s.batch, s.heads_kv, s.len_k, s.value_dim);
  std::vector<float> key_bias(size_t(s.key_bias ? s.batch * s.heads_q * s.len_k : 0), NAN);
  std::vector<float> sinks(size_t(s.sinks ? s.batch * s.heads_q : 0), NAN);
  AttentionBackward backward;
  static_cast<AttentionProblem&>(backward) = forward;
  for (Tensor* tensor : {&query, &key, &value}) tensor->fill(NAN);
  backward.out = problem.out.input(), backward.grad_out = grad_out.input();
  backward.lse = problem.lse.data(), backward.grad_lse = grad_lse.data();
  backward.grad_query = query.output(), backward.grad_key = key.output(), backward.grad_value = value.output();
  if (s.key_bias) backward.grad_key_bias = key_bias.data();
  if (s.sinks) backward.grad_sinks = sinks.data();
  CHECK_OK(attention_backward(backward, thread_pool(2)));
  for (const Tensor* tensor : {&query, &key, &value}) results.add(*tensor);
  results.add(key_bias), results.add(sinks);
  return results;
}

/// Relative error of each part, NaN counting as infinite.
void compare(const Results& got, const Results& want, DType dtype, const char* isa, unsigned seed) {
  const char* names[] = {"out", "lse", "grad_query", "grad_key", "grad_value", "grad_key_bias", "grad_sinks"};
  const double limit = dtype == DType::f32 ? 2e-5 : dtype == DType::f16 ? 5e-3 : 3e-2;
  for (size_t part = 0; part < want.parts.size(); ++part) {
    double error = 0, norm = 1e-6;
    for (size_t i = 0; i < want.parts[part].size(); ++i) {
      const double a = got.parts[part][i], b = want.parts[part][i];
      if (a == b) continue;  // infinities too
      error += (a - b) * (a - b), norm += std::isfinite(b) ? b * b : 0;
    }
    const double relative = std::sqrt(error / norm);
    CHECK(relative < limit, "%s, %s, seed %u: %s is off by %g", isa, name(dtype), seed, names[part], relative);
  }
}

void check_stripes(const Shape& shape, int32_t group_size, int density, bool blocks, int64_t sink, int64_t local,
                   unsigned seed) {
  Random random(seed);
  Problem problem(shape, random);
  Columns columns(shape, group_size,
                  seed % 3 == 0   ? 1
                  : seed % 3 == 1 ? shape.heads_kv
                                  : shape.heads_q,
                  density, random);
  columns.lists.sink = sink, columns.lists.local = local;
  Tensor grad_out(shape.dtype, shape.batch, shape.heads_q, shape.len_q, shape.value_dim);
  grad_out.randomize(random);
  std::vector<float> grad_lse(size_t(shape.batch * shape.heads_q * shape.len_q));
  for (float& x : grad_lse) x = float(random() % 100) / 100;
  Results want;
  for_each_isa([&](const char* isa) {
    const Results got = run(problem, columns.lists, blocks, grad_out, grad_lse);
    if (want.parts.empty()) want = got;
    compare(got, want, shape.dtype, isa, seed);
  });
}

TEST(stripes_agree_on_every_instruction_set) {
  unsigned seed = 70;
  for (DType dtype : {DType::f32, DType::bf16, DType::f16})
    for (bool causal : {false, true})
      for (auto [len_q, len_k] : {std::pair{1, 1}, {1, 131}, {45, 77}, {70, 133}, {77, 33}, {50, 20}}) {
        const bool blocks = seed % 3 != 2;
        Shape shape;
        shape.dtype = dtype, shape.causal = causal, shape.len_q = len_q, shape.len_k = len_k, shape.heads_q = 2;
        shape.heads_kv = seed % 2 ? 1 : 2, shape.block_q = shape.block_k = seed % 2 ? 16 : 64, shape.bits = blocks;
        shape.key_bias = seed % 7 < 3, shape.sinks = seed % 4 == 0, shape.softcap = seed % 5 ? 0 : 3;
        shape.head_dim = seed % 4 == 1 ? 80 : 32, shape.value_dim = seed % 4 == 3 ? 96 : shape.head_dim;
        const int32_t group_size = seed % 2 ? 16 : seed % 4 ? 64 : 128;
        check_stripes(shape, group_size, seed % 3 ? 12 : 60, blocks, seed % 5 ? 4 : 0, seed % 2 ? 9 : 0, seed);
        ++seed;
      }
}

TEST(stripes_of_batches_and_positions) {
  unsigned seed = 170;
  for (DType dtype : {DType::f32, DType::bf16})
    for (bool positions : {false, true})
      for (int64_t empty : {0, 1, 2}) {
        Shape shape;
        shape.dtype = dtype, shape.causal = true, shape.batch = 2, shape.len_q = 40, shape.len_k = 61;
        shape.positions = positions, shape.heads_q = 3, shape.heads_kv = 3;
        if (empty == 1) shape.len_k = 0;
        if (empty == 2) shape.len_q = 0;
        check_stripes(shape, 32, 30, seed % 2, 3, 7, seed);
        ++seed;
      }
}

TEST(bad_columns_are_errors_that_name_the_entry) {
  Random random(80);
  Shape shape;
  for (int32_t bad : {100, -2, INT32_MAX, INT32_MIN}) {
    Problem problem(shape, random);
    Columns columns(shape, 32, 1, 50, random);
    columns.counts[1] = 3, columns.indices[size_t(columns.lists.capacity) + 2] = bad;
    AttentionForward call = problem.forward();
    call.stripes = columns.lists;
    const Status status = attention_forward(call, thread_pool(1));
    CHECK(!status.ok() && std::strstr(status.message, std::to_string(bad).c_str()), "%s", status.message);
  }
}

}  // namespace
}  // namespace sparsekit::testing

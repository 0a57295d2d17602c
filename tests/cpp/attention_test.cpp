// Forward, backward and merging through the C++ API, on every instruction set of the machine.
#include <cstring>

#include "numpy/thread_pool.h"
#include "problem.h"
#include "sparsekit/selection.h"

namespace sparsekit::testing {
namespace {

/// How far a result may be from the float64 answer of the same inputs: rounding of the output, of bf16 probabilities.
double tolerance(DType dtype) {
  switch (dtype) {
    case DType::bf16: return 0.06;
    case DType::f16: return 0.008;
    default: return 2e-5;
  }
}

void check_forward(const Shape& shape, unsigned seed) {
  Random random(seed);
  Problem problem(shape, random);
  std::vector<double> out, lse;
  problem.expected(&out, &lse);
  for_each_isa([&](const char* isa) {
    CHECK_OK(attention_forward(problem.forward(), thread_pool(2)));
    const double worst = difference(problem, out, lse);
    CHECK(worst < tolerance(shape.dtype), "%s, %s, seed %u: %g", isa, name(shape.dtype), seed, worst);
  });
}

TEST(forward_dtypes_and_head_dims) {
  unsigned seed = 1;
  for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (int32_t dim : {32, 64, 80, 96, 128, 192, 256}) {
      Shape shape;
      shape.dtype = dtype, shape.head_dim = dim, shape.value_dim = dim == 192 ? 128 : dim;
      check_forward(shape, seed++);
    }
  }
}

TEST(forward_block_sizes_and_ragged_lengths) {
  unsigned seed = 100;
  for (auto [block_q, block_k] : {std::pair{16, 16}, {16, 64}, {64, 32}, {128, 128}, {128, 16}}) {
    for (auto [len_q, len_k] : {std::pair{1, 1}, {1, 300}, {130, 33}, {200, 257}}) {
      Shape shape;
      shape.dtype = seed % 2 ? DType::f32 : DType::bf16;
      shape.block_q = block_q, shape.block_k = block_k, shape.len_q = len_q, shape.len_k = len_k;
      check_forward(shape, seed++);
    }
  }
}

TEST(forward_masks) {
  unsigned seed = 200;
  for (bool causal : {false, true}) {
    for (auto [left, right] : {std::pair{-1, -1}, {20, -1}, {7, 3}, {-1, 40}}) {
      for (bool positions : {false, true}) {
        Shape shape;
        shape.batch = 2, shape.heads_q = 4, shape.heads_kv = 2, shape.causal = causal;
        shape.window_left = left, shape.window_right = right, shape.positions = positions, shape.bits = true;
        check_forward(shape, seed++);
      }
    }
  }
}

TEST(forward_bias_sinks_softcap) {
  unsigned seed = 300;
  for (DType dtype : {DType::f32, DType::bf16}) {
    Shape shape;
    shape.dtype = dtype, shape.batch = 2, shape.key_bias = shape.sinks = true, shape.softcap = 3, shape.causal = true;
    check_forward(shape, seed++);
  }
}

TEST(forward_packed) {
  Shape shape;
  shape.lens_q = {40, 1, 0, 65}, shape.lens_k = {100, 33, 20, 64}, shape.bits = shape.key_bias = true;
  for (bool causal : {false, true}) {
    shape.causal = causal;
    check_forward(shape, 400 + causal);
  }
}

TEST(forward_empty_sizes) {
  for (int which = 0; which < 3; ++which) {
    Shape shape;
    (which == 0 ? shape.batch : which == 1 ? shape.len_q : shape.len_k) = 0;
    check_forward(shape, 500u + unsigned(which));
  }
}

/// Keys and values of blocks that no row of a list names are NaN: nothing of them may show.
TEST(forward_never_touches_unlisted_blocks) {
  for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    Random random(600);
    Shape shape;
    shape.dtype = dtype, shape.len_q = 150, shape.len_k = 250, shape.block_k = 64;
    Problem problem(shape, random);
    for (int32_t& index : problem.indices) index = index == 1 ? -1 : index;
    for (int32_t& index : problem.full_indices) index = index == 1 ? -1 : index;
    for (int64_t j = 64; j < 128; ++j) {
      for (int64_t d = 0; d < 32; ++d) problem.key.set(0, 0, j, d, NAN), problem.value.set(0, 0, j, d, INFINITY);
    }
    std::vector<double> out, lse;
    problem.expected(&out, &lse);
    for_each_isa([&](const char* isa) {
      CHECK_OK(attention_forward(problem.forward(), thread_pool(2)));
      const double worst = difference(problem, out, lse);
      CHECK(worst < tolerance(dtype), "%s: %g", isa, worst);
    });
  }
}

/// All scores equal, value column 0 counts keys and column 1 sums their numbers: one key too many or too few shows.
TEST(forward_counts_every_key) {
  Random random(700);
  Shape shape;
  shape.len_q = 90, shape.len_k = 333, shape.causal = true;
  Problem problem(shape, random);
  problem.query.fill(0);
  for (int64_t j = 0; j < shape.len_k; ++j) problem.value.set(0, 0, j, 0, 1), problem.value.set(0, 0, j, 1, double(j));
  for_each_isa([&](const char* isa) {
    CHECK_OK(attention_forward(problem.forward(), thread_pool(2)));
    for (int64_t h = 0; h < shape.heads_q; ++h) {
      for (int64_t i = 0; i < shape.len_q; ++i) {
        double count = 0, sum = 0;
        for (int64_t j = 0; j < shape.len_k; ++j) {
          if (problem.sees(0, h, i, j)) ++count, sum += double(j);
        }
        double found = std::exp(double(problem.lse[size_t(h * shape.len_q + i)]));
        CHECK(std::fabs(found - count) < 1e-3 * (count + 1), "%s row %d: %g keys, %g", isa, int(i), found, count);
        double mean = problem.out.get(0, h, i, 1), wanted = count ? sum / count : 0;
        CHECK(std::fabs(mean - wanted) < 1e-3, "%s row %d: mean key %g, %g", isa, int(i), mean, wanted);
      }
    }
  });
}

TEST(forward_is_bitwise_the_same_on_any_number_of_threads) {
  Random random(800);
  Shape shape;
  shape.dtype = DType::bf16, shape.batch = 2, shape.len_q = 300, shape.len_k = 300;
  Problem problem(shape, random);
  for_each_isa([&](const char* isa) {
    std::vector<char> first;
    for (int threads : {1, 2, 3, 7}) {
      CHECK_OK(attention_forward(problem.forward(), thread_pool(threads)));
      const char* bytes = problem.out.bytes.get();
      std::vector<char> now(bytes, bytes + problem.out.size() * 2);
      if (first.empty()) first = now;
      CHECK(now == first, "%s: %d threads", isa, threads);
    }
  });
}

void expect_error(const AttentionForward& call, const char* part) {
  for_each_isa([&](const char* isa) {
    Status status = attention_forward(call, thread_pool(2));
    CHECK(status.kind == Status::Kind::invalid_argument && std::strstr(status.message, part), "%s: \"%s\" lacks \"%s\"",
          isa, status.message, part);
  });
}

TEST(bad_lists_are_errors_that_name_the_entry) {
  Random random(900);
  Shape shape;
  shape.heads_q = shape.heads_kv = 1, shape.len_q = 70, shape.len_k = 100;
  for (int32_t bad : {4, 1000, -2, INT32_MAX, INT32_MIN}) {  // blocks are 0 to 3
    Problem problem(shape, random);
    problem.counts[2] = 1, problem.indices[size_t(2 * problem.capacity)] = bad;
    std::string entry = "kv_indices[0, 0, 2, 0] is " + std::to_string(bad);
    expect_error(problem.forward(), entry.c_str());
  }
  for (int32_t bad : {1000, -1, INT32_MAX, INT32_MIN}) {
    Problem problem(shape, random);
    problem.full_counts[1] = bad;
    expect_error(problem.forward(), "full_kv_num_blocks[0, 0, 1]");
  }
  Shape with_bits = shape;
  with_bits.bits = true;
  Problem problem(with_bits, random);
  problem.bits_index[0] = int32_t(problem.bits.size());
  expect_error(problem.forward(), "partial_bits_index");

  Shape packed = shape;
  packed.lens_q = {30, 40}, packed.lens_k = {50, 50};
  Problem bad_offsets(packed, random);
  bad_offsets.cu_k[1] = 1000;
  expect_error(bad_offsets.forward(), "cu_seqlens_k[1] is 1000");
}

TEST(a_forced_instruction_set_that_is_unknown_is_an_error) {
  Random random(950);
  Problem problem(Shape{}, random);
  setenv("SPARSEKIT_ISA", "sse9", 1);
  Status status = attention_forward(problem.forward(), thread_pool(1));
  unsetenv("SPARSEKIT_ISA");
  CHECK(!status.ok() && std::strstr(status.message, "SPARSEKIT_ISA"), "%s", status.message);
}

TEST(merged_states_of_split_keys_are_the_whole) {
  Random random(1000);
  Shape shape;
  shape.causal = true;
  Problem whole(shape, random);
  std::vector<double> out, lse;
  whole.expected(&out, &lse);
  std::vector<Tensor> outs;
  std::vector<std::vector<float>> lses;
  const auto counts = whole.counts, full_counts = whole.full_counts;
  for (bool partial : {true, false}) {
    whole.counts.assign(counts.size(), 0), whole.full_counts.assign(counts.size(), 0);
    (partial ? whole.counts : whole.full_counts) = partial ? counts : full_counts;
    CHECK_OK(attention_forward(whole.forward(), thread_pool(2)));
    lses.push_back(whole.lse), outs.push_back(std::move(whole.out));
    whole.out = Tensor(shape.dtype, shape.batch, shape.heads_q, shape.len_q, shape.value_dim);
  }
  const InputView views[2] = {outs[0].input(), outs[1].input()};
  const float* lse_pointers[2] = {lses[0].data(), lses[1].data()};
  whole.out.fill(NAN);
  AttentionMerge merge;
  merge.dtype = shape.dtype, merge.count = 2, merge.batch = shape.batch, merge.heads = shape.heads_q;
  merge.rows = shape.len_q, merge.value_dim = shape.value_dim;
  merge.outs = views, merge.lses = lse_pointers, merge.out = whole.out.output(), merge.lse = whole.lse.data();
  CHECK_OK(attention_merge(merge, thread_pool(2)));
  const double worst = difference(whole, out, lse);
  CHECK(worst < tolerance(shape.dtype), "%g", worst);
}

/// Everything a backward call reads and writes.
struct Gradients {
  Tensor query, key, value, grad_out;
  std::vector<float> grad_lse, key_bias, sinks;
  std::vector<int32_t> offsets, slots;

  Gradients(Problem& problem, Random& random) {
    const Shape& s = problem.shape;
    query = Tensor(s.dtype, s.batch, s.heads_q, s.len_q, s.head_dim);
    key = Tensor(s.dtype, s.batch, s.heads_kv, s.len_k, s.head_dim);
    value = Tensor(s.dtype, s.batch, s.heads_kv, s.len_k, s.value_dim);
    grad_out = Tensor(s.dtype, s.batch, s.heads_q, s.len_q, s.value_dim);
    grad_out.randomize(random);
    grad_lse.resize(size_t(s.batch * s.heads_q * s.len_q));
    for (float& x : grad_lse) x = float(random() % 100) / 100;
    TransposeBlockLists transpose;
    transpose.problem = problem.forward();
    const int64_t lists = s.batch * s.heads_q, k_blocks = transpose.problem.k_blocks();
    offsets.assign(size_t(lists * (k_blocks + 1)), -7);
    slots.assign(size_t(lists * problem.q_blocks * transpose.problem.lists.slots_per_row()), -7);
    transpose.offsets = offsets.data(), transpose.slots = slots.data();
    CHECK_OK(transpose_block_lists(transpose, thread_pool(2)));
  }

  void run(Problem& problem) {
    AttentionForward forward = problem.forward();
    CHECK_OK(attention_forward(forward, thread_pool(2)));
    AttentionBackward backward;
    static_cast<AttentionProblem&>(backward) = forward;
    for (Tensor* tensor : {&query, &key, &value}) tensor->fill(NAN);
    backward.out = problem.out.input(), backward.grad_out = grad_out.input();
    backward.lse = problem.lse.data(), backward.grad_lse = grad_lse.data();
    backward.transpose = {offsets.data(), slots.data()};
    backward.grad_query = query.output(), backward.grad_key = key.output(), backward.grad_value = value.output();
    if (problem.shape.key_bias) {
      key_bias.assign(size_t(problem.shape.batch * problem.shape.heads_q * problem.shape.len_k), NAN);
      backward.grad_key_bias = key_bias.data();
    }
    if (problem.shape.sinks) {
      sinks.assign(size_t(problem.shape.batch * problem.shape.heads_q), NAN);
      backward.grad_sinks = sinks.data();
    }
    CHECK_OK(attention_backward(backward, thread_pool(2)));
  }
  std::vector<double> all() const {
    std::vector<double> values;
    for (const Tensor* tensor : {&query, &key, &value}) {
      for (int64_t i = 0; i < tensor->size(); ++i) values.push_back(load(tensor->bytes.get(), i, tensor->dtype));
    }
    values.insert(values.end(), key_bias.begin(), key_bias.end());
    values.insert(values.end(), sinks.begin(), sinks.end());
    return values;
  }
};

/// d loss / d x of loss = sum(out * grad_out) + sum(lse * grad_lse) by central differences of the dense answer.
double numeric(Problem& problem, const Gradients& gradients, Tensor& tensor, int64_t at) {
  const double step = 1e-3, x = load(tensor.bytes.get(), at, tensor.dtype);
  double loss[2];
  double moved[2];
  for (int side : {0, 1}) {
    store(tensor.bytes.get(), at, tensor.dtype, x + (side ? step : -step));
    moved[side] = load(tensor.bytes.get(), at, tensor.dtype);
    std::vector<double> out, lse;
    problem.expected(&out, &lse);
    loss[side] = 0;
    for (size_t i = 0; i < out.size(); ++i) {
      loss[side] += out[i] * load(gradients.grad_out.bytes.get(), int64_t(i), tensor.dtype);
    }
    for (size_t i = 0; i < lse.size(); ++i) {
      if (std::isfinite(lse[i])) loss[side] += lse[i] * double(gradients.grad_lse[i]);
    }
  }
  store(tensor.bytes.get(), at, tensor.dtype, x);
  return (loss[1] - loss[0]) / (moved[1] - moved[0]);
}

Shape backward_shape(bool packed) {
  Shape shape;
  shape.len_q = 40, shape.len_k = 50, shape.block_q = shape.block_k = 16, shape.causal = true, shape.bits = true;
  shape.softcap = 5, shape.key_bias = shape.sinks = true;
  if (packed) shape.lens_q = {20, 0, 17}, shape.lens_k = {30, 5, 16};
  return shape;
}

TEST(backward_of_the_reference_is_the_derivative) {
  for (bool packed : {false, true}) {
    Random random(1100 + packed);
    Problem problem(backward_shape(packed), random);
    Gradients gradients(problem, random);
    setenv("SPARSEKIT_ISA", "reference", 1);
    gradients.run(problem);
    unsetenv("SPARSEKIT_ISA");
    struct Pair {
      const char* name;
      Tensor &input, &gradient;
    } pairs[] = {{"query", problem.query, gradients.query},
                 {"key", problem.key, gradients.key},
                 {"value", problem.value, gradients.value}};
    for (Pair& pair : pairs) {
      for (int probe = 0; probe < 12; ++probe) {
        const int64_t at = int64_t(random() % uint64_t(pair.input.size()));
        const double wanted = numeric(problem, gradients, pair.input, at);
        const double found = load(pair.gradient.bytes.get(), at, pair.gradient.dtype);
        CHECK(std::fabs(found - wanted) < 2e-3 * (1 + std::fabs(wanted)), "%s[%d]: %g, derivative %g", pair.name,
              int(at), found, wanted);
      }
    }
  }
}

TEST(backward_of_every_instruction_set_is_the_reference) {
  unsigned seed = 1200;
  for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (int32_t dim : {32, 80, 128}) {
      for (bool packed : {false, true}) {
        Random random(++seed);
        Shape shape = backward_shape(packed);
        shape.dtype = dtype, shape.head_dim = shape.value_dim = dim;
        Problem problem(shape, random);
        Gradients gradients(problem, random);
        setenv("SPARSEKIT_ISA", "reference", 1);
        gradients.run(problem);
        const std::vector<double> wanted = gradients.all();
        double norm = 0;
        for (double x : wanted) norm += x * x;
        for_each_isa([&](const char* isa) {
          gradients.run(problem);
          const std::vector<double> found = gradients.all();
          double error = 0;
          for (size_t i = 0; i < found.size(); ++i) error += (found[i] - wanted[i]) * (found[i] - wanted[i]);
          const double relative = std::sqrt(error / norm);
          const double limit = dtype == DType::f32 ? 1e-5 : dtype == DType::f16 ? 3e-3 : 2e-2;
          CHECK(relative < limit, "%s %s D%d packed %d: relative error %g", isa, name(dtype), dim, packed, relative);
        });
      }
    }
  }
}

}  // namespace
}  // namespace sparsekit::testing

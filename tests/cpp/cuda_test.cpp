// The CUDA kernels through the C++ API, without torch: small problems of every kernel, for compute-sanitizer.
//
//   cmake -S . -B build/cuda-test -G Ninja -DSPARSEKIT_TORCH=OFF -DSPARSEKIT_NUMPY=OFF -DSPARSEKIT_TESTS=ON
//   cmake --build build/cuda-test
//   compute-sanitizer --tool memcheck  build/cuda-test/tests/cpp/sparsekit_cuda_tests
//   compute-sanitizer --tool racecheck build/cuda-test/tests/cpp/sparsekit_cuda_tests
//
// Gradients are held to the float64 reference by the Python tests; here to sums that hold whatever the numbers are.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <list>

#include "attention/cuda_sequences.h"
#include "attention/sequences.h"
#include "problem.h"
#include "sparsekit/selection.h"

namespace sparsekit::testing {
namespace {

/// Device memory of exactly the size asked for, freed at the end of the test.
class Device {
 public:
  Device() {
    context.compute_capability = 80;
    context.multiprocessors = 1;  // a card too small for the problem: the order of CTAs is computed, too
  }
  ~Device() {
    for (void* memory : memory_) cudaFree(memory);
  }
  void* allocate(size_t bytes) {
    void* memory = nullptr;
    CHECK(cudaMalloc(&memory, bytes ? bytes : 1) == cudaSuccess, "no device memory");
    memory_.push_back(memory);
    return memory;
  }
  template <class T>
  T* copy(const T* from, size_t count) {
    if (!from) return nullptr;
    void* memory = allocate(count * sizeof(T));
    cudaMemcpy(memory, from, count * sizeof(T), cudaMemcpyHostToDevice);
    return static_cast<T*>(memory);
  }
  template <class T>
  T* copy(const std::vector<T>& from) {
    return copy(from.empty() ? nullptr : from.data(), from.size());
  }
  template <class T>
  std::vector<T> back(const T* from, size_t count) {
    std::vector<T> to(count);
    cudaError_t code = cudaMemcpy(to.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost);
    CHECK(code == cudaSuccess, "%s", cudaGetErrorString(code));
    return to;
  }
  const CudaContext& with_workspace(size_t bytes) {
    context.workspace = allocate(bytes);
    context.workspace_bytes = bytes;
    return context;
  }

  CudaContext context;

 private:
  std::list<void*> memory_;
};

InputView to_device(Device& device, const Tensor& tensor) {
  InputView view = tensor.input();
  view.data = device.copy(tensor.bytes.get(), size_t(tensor.size() * size_of(tensor.dtype)));
  return view;
}

OutputView output_on(Device& device, Tensor& tensor) {
  OutputView view = tensor.output();
  view.data = device.allocate(size_t(tensor.size() * size_of(tensor.dtype)));
  return view;
}

void fetch(Device& device, Tensor& tensor, const void* from) {
  std::vector<char> bytes = device.back(static_cast<const char*>(from), size_t(tensor.size() * size_of(tensor.dtype)));
  std::copy(bytes.begin(), bytes.end(), tensor.bytes.get());
}

/// The problem with every pointer on the device.
AttentionForward on_device(Device& device, Problem& problem) {
  AttentionForward p = problem.forward();
  p.query = to_device(device, problem.query);
  p.key = to_device(device, problem.key);
  p.value = to_device(device, problem.value);
  p.lists.partial = {device.copy(problem.counts), device.copy(problem.indices), p.lists.partial.capacity};
  p.lists.full = {device.copy(problem.full_counts), device.copy(problem.full_indices), p.lists.full.capacity};
  p.lists.bits = device.copy(problem.bits);
  p.lists.bits_index = device.copy(problem.bits_index);
  p.key_bias = device.copy(problem.key_bias);
  p.sinks = device.copy(problem.sinks);
  p.query_positions = device.copy(problem.q_positions);
  p.key_positions = device.copy(problem.k_positions);
  if (p.packed()) p.cu_seqlens_q = device.copy(problem.cu_q), p.cu_seqlens_k = device.copy(problem.cu_k);
  p.out = output_on(device, problem.out);
  p.lse = static_cast<float*>(device.allocate(problem.lse.size() * sizeof(float)));
  return p;
}

BlockTranspose transpose_on(Device& device, const AttentionProblem& problem) {
  TransposeBlockLists t;
  t.problem = problem;
  int64_t heads = problem.lists.list_batch * problem.lists.list_heads;
  int64_t slots = heads * problem.lists.q_blocks * problem.lists.slots_per_row();
  t.offsets = static_cast<int32_t*>(device.allocate(size_t(heads * (problem.k_blocks() + 1)) * sizeof(int32_t)));
  t.slots = static_cast<int32_t*>(device.allocate(size_t(slots) * sizeof(int32_t)));
  CHECK_OK(transpose_block_lists(t, device.with_workspace(transpose_block_lists_workspace(t, device.context))));
  return {t.offsets, t.slots};
}

double tolerance(DType dtype) { return dtype == DType::bf16 ? 0.06 : dtype == DType::f16 ? 0.008 : 2e-5; }

void check(const Shape& shape, unsigned seed, bool deterministic) {
  Random random(seed);
  Problem problem(shape, random);
  std::vector<double> out, lse;
  problem.expected(&out, &lse);

  Device device;
  AttentionForward forward = on_device(device, problem);
  CHECK_OK(attention_forward(forward,
                             device.with_workspace(attention_workspace(forward, Direction::forward, device.context))));
  fetch(device, problem.out, forward.out.data);
  problem.lse = device.back(forward.lse, problem.lse.size());
  const double worst = difference(problem, out, lse);
  CHECK(worst < tolerance(shape.dtype), "forward, %s, seed %u: %g", name(shape.dtype), seed, worst);

  const Shape& s = shape;
  Tensor grad_out(s.dtype, s.batch, s.heads_q, s.len_q, s.value_dim);
  Tensor grad_query(s.dtype, s.batch, s.heads_q, s.len_q, s.head_dim);
  Tensor grad_key(s.dtype, s.batch, s.heads_kv, s.len_k, s.head_dim);
  Tensor grad_value(s.dtype, s.batch, s.heads_kv, s.len_k, s.value_dim);
  grad_out.fill(1);
  AttentionBackward p;
  static_cast<AttentionProblem&>(p) = forward;
  p.transpose = transpose_on(device, forward);
  p.out = to_device(device, problem.out);
  p.grad_out = to_device(device, grad_out);
  p.lse = forward.lse;
  p.deterministic = deterministic;
  p.grad_query = output_on(device, grad_query);
  p.grad_key = output_on(device, grad_key);
  p.grad_value = output_on(device, grad_value);
  const size_t biases = size_t(s.batch * s.heads_q * s.len_k), heads = size_t(s.batch * s.heads_q);
  p.grad_key_bias = static_cast<float*>(device.allocate(biases * sizeof(float)));
  if (p.sinks) p.grad_sinks = static_cast<float*>(device.allocate(heads * sizeof(float)));
  CHECK_OK(attention_backward(p, device.with_workspace(attention_workspace(p, Direction::backward, device.context))));

  // Weights of a row sum to 1 (with sinks: to less), so with dO = 1 the columns of dV sum to the rows that see a key;
  // and scores may be shifted together, so gradients of the bias sum to 0 (with sinks: to those of the sinks, negated).
  fetch(device, grad_value, p.grad_value.data);
  fetch(device, grad_query, p.grad_query.data);
  fetch(device, grad_key, p.grad_key.data);
  double bias_sum = 0, value_sum = 0, rows = 0;
  for (float x : device.back(p.grad_key_bias, biases)) bias_sum += x;
  if (p.sinks) {
    for (float x : device.back(p.grad_sinks, heads)) bias_sum += x;
  }
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t h = 0; h < s.heads_kv; ++h)
      for (int64_t j = 0; j < s.len_k; ++j) value_sum += grad_value.get(b, h, j, 0);
  for (double x : lse) rows += x > -INFINITY;
  const double slack = tolerance(s.dtype) * (rows + 1);
  CHECK(std::fabs(bias_sum) < slack, "bias and sinks, seed %u: %g", seed, bias_sum);
  if (!p.sinks) CHECK(std::fabs(value_sum - rows) < slack, "dV, seed %u: %g, expected %g", seed, value_sum, rows);
  for (const Tensor* gradient : {&grad_query, &grad_key, &grad_value}) {
    for (int64_t i = 0; i < gradient->size(); ++i) {
      if (!std::isfinite(load(gradient->bytes.get(), i, s.dtype))) {
        CHECK(false, "gradient %lld is not finite, seed %u", (long long)i, seed);
        return;
      }
    }
  }
}

TEST(cuda_forward_and_backward) {
  unsigned seed = 1;
  for (DType dtype : {DType::bf16, DType::f16, DType::f32}) {
    for (int32_t dim : {32, 64, 128, 192, 256}) {
      Shape shape;
      shape.dtype = dtype, shape.head_dim = dim, shape.value_dim = dim == 192 ? 128 : dim;
      shape.len_q = 200, shape.len_k = 230, shape.heads_q = 2, shape.heads_kv = 1 + seed % 2;
      shape.block_q = seed % 3 ? 128 : 64, shape.block_k = seed % 2 ? 64 : 128;
      shape.causal = seed % 2, shape.bits = seed % 3 == 1, shape.key_bias = seed % 4 == 2;
      shape.sinks = seed % 5 == 3, shape.positions = seed % 4 == 3, shape.softcap = seed % 6 == 4 ? 3.f : 0.f;
      check(shape, seed, seed % 2);
      ++seed;
    }
  }
}

// ---- The Hopper forward. One multiprocessor makes one persistent CTA walk all list rows: rings and parities go around
// many times, and every kind of row follows every other. With 132 most CTAs get one row or none.

bool hopper() {
  int major = 0;
  return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) == cudaSuccess && major == 9;
}

struct Forward {
  std::vector<char> out;
  std::vector<float> lse;
};

/// Runs the problem on Hopper's kernels; the results are in the problem, too.
Forward run_sm90(Device& device, Problem& problem, const AttentionForward& forward, int multiprocessors) {
  device.context.compute_capability = 90, device.context.multiprocessors = multiprocessors;
  AttentionPlan plan = attention_plan(forward, Direction::forward, device.context);
  CHECK(!std::strcmp(plan.entries[0].name, "sm90") && !plan.entries[0].reason, "sm90: %s", plan.entries[0].reason);
  const size_t workspace = attention_workspace(forward, Direction::forward, device.context);
  device.with_workspace(workspace);
  cudaMemset(device.context.workspace, 0x7f, workspace);  // the counter is not 0 by luck
  cudaMemset(forward.lse, 0xff, problem.lse.size() * sizeof(float));
  const size_t bytes = size_t(problem.out.size() * size_of(problem.shape.dtype));
  cudaMemset(forward.out.data, 0xff, bytes);
  CHECK_OK(attention_forward(forward, device.context));
  fetch(device, problem.out, forward.out.data);
  problem.lse = device.back(forward.lse, problem.lse.size());
  return {{problem.out.bytes.get(), problem.out.bytes.get() + bytes}, problem.lse};
}

/// Where `out` is wrong: one character per 16 rows and 8 columns of each head, and the first wrong numbers.
void print_wrong(const Problem& problem, const std::vector<double>& out) {
  const Tensor& found = problem.out;
  const double allowed = tolerance(problem.shape.dtype);
  int shown = 0;
  auto wrong = [&](int64_t b, int64_t h, int64_t i, int64_t d) {
    const double x = found.get(b, h, i, d), wanted = out[size_t(found.at(b, h, i, d))];
    const bool bad = !(std::fabs(x - wanted) < allowed);
    if (bad && ++shown <= 6) {
      std::printf("    batch %d, head %d, row %d, column %d: %g, expected %g\n", int(b), int(h), int(i), int(d), x,
                  wanted);
    }
    return bad;
  };
  for (int64_t bh = 0; bh < std::min<int64_t>(found.batch * found.heads, 2); ++bh) {
    for (int64_t first = 0; first < std::min<int64_t>(found.rows, 512); first += 16) {
      std::string line;
      for (int64_t d = 0; d < found.dim; d += 8) {
        int count = 0;
        for (int64_t i = first; i < std::min(first + 16, found.rows); ++i) {
          for (int64_t c = d; c < std::min(d + 8, found.dim); ++c)
            count += wrong(bh / found.heads, bh % found.heads, i, c);
        }
        line += count == 0 ? '.' : count < 32 ? 'x' : 'X';
      }
      std::printf("    head %d, rows from %3d  %s\n", int(bh), int(first), line.c_str());
    }
  }
}

/// Against the float64 answer, and bit by bit between two calls and different numbers of CTAs.
void check_sm90(Problem& problem, unsigned seed, const char* what) {
  const bool verbose = std::getenv("SPARSEKIT_TEST_VERBOSE") != nullptr;  // the last line names the problem that hangs
  if (verbose) std::printf("  at %s, seed %u\n", what, seed);
  std::vector<double> out, lse;
  problem.expected(&out, &lse);
  Device device;
  AttentionForward forward = on_device(device, problem);
  Forward first;
  for (int multiprocessors : {1, 3, 132}) {
    Forward now = run_sm90(device, problem, forward, multiprocessors);
    const double worst = difference(problem, out, lse);
    CHECK(worst < tolerance(problem.shape.dtype), "%s, seed %u, %d multiprocessors: %g", what, seed, multiprocessors,
          worst);
    if (verbose && !(worst < tolerance(problem.shape.dtype))) print_wrong(problem, out);
    if (first.out.empty()) first = now;
    CHECK(now.out == first.out && !std::memcmp(now.lse.data(), first.lse.data(), now.lse.size() * sizeof(float)),
          "%s, seed %u: %d multiprocessors change bits", what, seed, multiprocessors);
  }
}

Shape sm90_shape(DType dtype, int32_t dim, int32_t block_q, int32_t block_k) {
  Shape shape;
  shape.dtype = dtype, shape.head_dim = dim, shape.value_dim = dim == 192 ? 128 : dim;
  shape.block_q = block_q, shape.block_k = block_k;
  shape.batch = 1 + (dim == 64), shape.heads_q = 2, shape.heads_kv = 1, shape.len_q = 3 * block_q - 37,
  shape.len_k = 5 * block_k - 29;
  return shape;
}

/// The plain path first: full blocks of one sequence, nothing ragged.
TEST(sm90_a_full_blocks) {
  if (!hopper()) return;
  unsigned seed = 2000;
  for (int32_t dim : {64, 128, 96, 192, 256}) {
    for (auto [block_q, block_k] : {std::pair{128, 128}, {128, 64}, {64, 64}, {64, 128}}) {
      if (block_q == 64 && dim > 128) continue;
      Shape shape = sm90_shape(dim % 3 ? DType::bf16 : DType::f16, dim, block_q, block_k);
      shape.batch = shape.heads_q = shape.heads_kv = 1, shape.len_q = 2 * block_q, shape.len_k = 4 * block_k;
      Random random(seed);
      Problem problem(shape, random);
      for (int32_t row = 0; row < 2; ++row) {
        problem.counts[size_t(row)] = 0, problem.full_counts[size_t(row)] = std::min(problem.capacity, row + 1);
        for (int32_t slot = 0; slot < problem.capacity; ++slot) {
          problem.full_indices[size_t(row * problem.capacity + slot)] = slot % 4;
        }
      }
      const std::string what =
          "dim " + std::to_string(dim) + ", " + std::to_string(block_q) + " x " + std::to_string(block_k);
      check_sm90(problem, seed++, what.c_str());
    }
  }
}

TEST(sm90_b_random_lists_of_both_kinds) {
  if (!hopper()) return;
  unsigned seed = 2100;
  for (DType dtype : {DType::bf16, DType::f16}) {
    for (int32_t dim : {64, 72, 96, 128, 192, 256}) {
      for (auto [block_q, block_k] : {std::pair{128, 128}, {128, 64}, {64, 64}, {64, 128}}) {
        if (block_q == 64 && dim > 128) continue;
        Random random(seed);
        Problem problem(sm90_shape(dtype, dim, block_q, block_k), random);
        const std::string what =
            "dim " + std::to_string(dim) + ", " + std::to_string(block_q) + " x " + std::to_string(block_k);
        check_sm90(problem, seed++, what.c_str());
      }
    }
  }
}

TEST(sm90_c_masks) {
  if (!hopper()) return;
  unsigned seed = 2200;
  for (auto [block_q, block_k] : {std::pair{128, 128}, {128, 64}, {64, 64}, {64, 128}}) {
    for (bool causal : {false, true}) {
      for (auto [left, right] : {std::pair{-1, -1}, {20, -1}, {70, 30}, {-1, 140}}) {
        for (int rest = 0; rest < 4; ++rest) {
          Shape shape = sm90_shape(DType::bf16, rest % 2 ? 64 : 128, block_q, block_k);
          shape.batch = shape.heads_q = 1;
          shape.causal = causal, shape.window_left = left, shape.window_right = right;
          shape.positions = rest == 1, shape.bits = rest >= 2;
          if (seed % 3 == 0) std::swap(shape.len_q, shape.len_k);
          Random random(seed);
          Problem problem(shape, random);
          check_sm90(problem, seed++, "masks");
        }
      }
    }
  }
}

TEST(sm90_d_bias_sinks_softcap) {
  if (!hopper()) return;
  unsigned seed = 2300;
  for (int which = 1; which < 8; ++which) {
    for (int32_t dim : {64, 128, 256}) {
      Shape shape = sm90_shape(which % 2 ? DType::bf16 : DType::f16, dim, 128, which % 3 ? 128 : 64);
      shape.key_bias = which & 1, shape.sinks = which & 2, shape.softcap = which & 4 ? 3.f : 0.f;
      shape.causal = dim == 64;
      Random random(seed);
      Problem problem(shape, random);
      check_sm90(problem, seed++, "bias, sinks, softcap");
    }
  }
}

/// Long lists: more than 32 slots of either kind, so that the walk goes on to the next 32; scores that grow along the
/// keys, so that the maximum moves often.
TEST(sm90_e_long_lists_and_growing_scores) {
  if (!hopper()) return;
  for (auto [block_q, block_k] : {std::pair{128, 128}, {128, 64}, {64, 64}}) {
    Shape shape = sm90_shape(DType::bf16, 64, block_q, block_k);
    shape.batch = 1, shape.heads_q = 2, shape.heads_kv = 1, shape.len_q = 200, shape.len_k = 100 * block_k - 5;
    Random random(2400u + unsigned(block_k));
    Problem problem(shape, random);
    for (int64_t j = 0; j < shape.len_k; ++j) {
      for (int64_t d = 0; d < 64; ++d) {
        problem.key.set(0, 0, j, d, problem.key.get(0, 0, j, d) * (1.0 + 7.0 * double(j) / double(shape.len_k)));
      }
    }
    check_sm90(problem, 2400, "long lists");
  }
}

/// Entries and counts out of range are passed over and clamped; keys and values that no list names are NaN.
TEST(sm90_f_bad_lists_and_unlisted_blocks) {
  if (!hopper()) return;
  for (auto [block_q, block_k] : {std::pair{128, 128}, {128, 64}, {64, 64}}) {
    Random random(2500u + unsigned(block_k));
    Shape shape = sm90_shape(DType::bf16, 128, block_q, block_k);
    shape.batch = 1, shape.bits = true;
    Problem problem(shape, random);
    for (auto* indices : {&problem.indices, &problem.full_indices}) {
      for (int32_t& index : *indices) index = index == 1 ? -1 : index;
    }
    for (int64_t h = 0; h < shape.heads_kv; ++h) {
      for (int64_t j = block_k; j < 2 * block_k; ++j) {
        for (int64_t d = 0; d < 128; ++d) problem.key.set(0, h, j, d, NAN), problem.value.set(0, h, j, d, INFINITY);
      }
    }
    check_sm90(problem, 2500, "unlisted blocks");

    std::vector<double> out, lse;
    problem.expected(&out, &lse);
    const int32_t bad[] = {5, 1000, -2, INT32_MAX, INT32_MIN, 1 << 30};
    for (size_t i = 0, next = 0; i < problem.indices.size(); ++i) {
      if (problem.indices[i] == -1) problem.indices[i] = bad[next++ % 6];
      if (problem.full_indices[i] == -1) problem.full_indices[i] = bad[next++ % 6];
    }
    for (int32_t& count : problem.counts) {
      if (count == problem.capacity) count = 1 << 20;
      if (count == 0) count = -5;
    }
    Device device;
    AttentionForward forward = on_device(device, problem);
    run_sm90(device, problem, forward, 2);
    const double worst = difference(problem, out, lse);
    CHECK(worst < tolerance(shape.dtype), "bad entries, blocks of %d: %g", block_k, worst);
  }
}

/// All scores equal, value column 0 is 1 and column 1 the key's number: one key too many or too few shows.
TEST(sm90_g_counts_every_key) {
  if (!hopper()) return;
  for (auto [block_q, block_k] : {std::pair{128, 128}, {128, 64}, {64, 64}}) {
    Random random(2600u + unsigned(block_k));
    Shape shape = sm90_shape(DType::f16, 64, block_q, block_k);
    shape.batch = shape.heads_q = shape.heads_kv = 1, shape.causal = true, shape.len_k = 3 * block_k + 1;
    Problem problem(shape, random);
    problem.query.fill(0);
    Device device;
    AttentionForward forward = on_device(device, problem);
    run_sm90(device, problem, forward, 1);
    int wrong = 0;
    for (int64_t i = 0; i < shape.len_q; ++i) {
      double count = 0;
      for (int64_t j = 0; j < shape.len_k; ++j) count += problem.sees(0, 0, i, j);
      wrong += !(std::fabs(std::exp(double(problem.lse[size_t(i)])) - count) < 1e-3 * (count + 1));
    }
    CHECK(!wrong, "blocks of %d: %d rows count their keys wrong", block_k, wrong);
  }
}

/// [batch, rows, heads, dim] in memory, as models keep it: other strides, the same results.
TEST(sm90_h_strides) {
  if (!hopper()) return;
  Random random(2700);
  Shape shape = sm90_shape(DType::bf16, 128, 128, 128);
  shape.batch = 2, shape.heads_q = 4, shape.heads_kv = 2;
  Problem problem(shape, random);
  std::vector<double> out, lse;
  problem.expected(&out, &lse);
  Device device;
  AttentionForward forward = on_device(device, problem);
  auto permuted = [&](const Tensor& tensor) {
    Tensor moved(tensor.dtype, tensor.batch, tensor.rows, tensor.heads, tensor.dim);
    for (int64_t b = 0; b < tensor.batch; ++b)
      for (int64_t h = 0; h < tensor.heads; ++h)
        for (int64_t r = 0; r < tensor.rows; ++r)
          for (int64_t d = 0; d < tensor.dim; ++d) moved.set(b, r, h, d, tensor.get(b, h, r, d));
    InputView view = to_device(device, moved);
    view.batch = tensor.rows * tensor.heads * tensor.dim, view.head = tensor.dim, view.row = tensor.heads * tensor.dim;
    return view;
  };
  forward.query = permuted(problem.query), forward.key = permuted(problem.key), forward.value = permuted(problem.value);
  run_sm90(device, problem, forward, 2);
  const double worst = difference(problem, out, lse);
  CHECK(worst < tolerance(shape.dtype), "permuted: %g", worst);
}

/// Packed batches: sequences that end inside a block, that have no rows or no keys; behind the first one's keys come a
/// stranger's, which are NaN.
TEST(sm90_j_packed) {
  if (!hopper()) return;
  unsigned seed = 2800;
  for (auto [block_q, block_k] : {std::pair{128, 128}, {128, 64}, {64, 64}, {64, 128}}) {
    for (int rest = 0; rest < 4; ++rest) {
      Shape shape = sm90_shape(rest % 2 ? DType::bf16 : DType::f16, rest < 2 ? 64 : 128, block_q, block_k);
      shape.batch = shape.heads_q = 1;
      shape.lens_q = {block_q + 30, 0, 5, 40}, shape.lens_k = {block_k + 17, 40, 0, 2 * block_k - 1};
      shape.causal = rest == 1, shape.bits = rest == 2, shape.positions = rest == 3;
      shape.window_left = rest == 3 ? 90 : -1, shape.key_bias = shape.sinks = rest == 1;
      Random random(seed);
      Problem problem(shape, random);
      for (int64_t j = block_k + 17; j < block_k + 17 + 40; ++j) {
        for (int64_t d = 0; d < shape.head_dim; ++d)
          problem.key.set(0, 0, j, d, NAN), problem.value.set(0, 0, j, d, NAN);
      }
      check_sm90(problem, seed++, "packed");
    }
  }
}

/// Against the walk over sequences on the CPU, with more sequences than the kernel has threads; then cu_seqlens that
/// fall, are negative or pass the end.
TEST(cuda_list_row_extents) {
  Random random(7);
  for (int sequences : {1, 3, 1024, 2500}) {
    for (bool bad : {false, true}) {
      std::vector<int32_t> cu_q = {0}, cu_k = {0};
      for (int s = 0; s < sequences; ++s) {
        cu_q.push_back(cu_q.back() + int32_t(s % 100 == 7 ? 400 : random() % 3));
        cu_k.push_back(cu_k.back() + int32_t(random() % 200));
      }
      AttentionProblem p;
      p.batch = 1, p.len_q = cu_q.back(), p.len_k = cu_k.back(), p.sequences = sequences, p.lists.block_q = 64;
      if (bad) {
        for (size_t i = 0; i < cu_q.size(); i += 5)
          cu_q[i] = i % 2 ? -100 : INT32_MAX, cu_k[i] = i % 3 ? INT32_MIN : 1 << 30;
      }
      p.cu_seqlens_q = cu_q.data(), p.cu_seqlens_k = cu_k.data();
      std::vector<int4> expected;
      for (SequenceWalk walk(p); walk.valid(); walk.next()) {
        const Sequence& s = walk.current;
        for (int64_t row = s.q_begin; row < s.q_end; row += 64) {
          expected.push_back({int(row), int(s.q_end), int(s.k_begin), int(s.k_end)});
        }
      }
      expected.insert(expected.end(), 3, int4{0, 0, 0, 0});
      p.lists.q_blocks = int64_t(expected.size());
      Device device;
      p.cu_seqlens_q = device.copy(cu_q), p.cu_seqlens_k = device.copy(cu_k);
      auto* extents = static_cast<int4*>(device.allocate(expected.size() * sizeof(int4)));
      auto* starts = static_cast<int32_t*>(device.allocate(size_t(sequences + 1) * sizeof(int32_t)));
      CHECK_OK(cuda::list_row_extents(p, extents, starts, nullptr));
      const std::vector<int4> found = device.back(extents, expected.size());
      CHECK(!std::memcmp(found.data(), expected.data(), expected.size() * sizeof(int4)), "%d sequences, %s", sequences,
            bad ? "bad" : "good");
    }
  }
}

TEST(sm90_i_what_it_refuses) {
  Device device;
  device.context.compute_capability = 90;
  AttentionProblem p;
  p.dtype = DType::bf16, p.batch = p.heads_q = p.heads_kv = 1, p.len_q = p.len_k = 256, p.head_dim = p.value_dim = 128;
  p.query = p.key = p.value = {nullptr, 256 * 128, 256 * 128, 128};
  p.lists.q_blocks = 2, p.lists.block_q = p.lists.block_k = 128;
  auto reason = [&](const AttentionProblem& problem, Direction direction = Direction::forward) {
    return attention_plan(problem, direction, device.context).entries[0].reason;
  };
  CHECK(!reason(p), "%s", reason(p));
  CHECK(reason(p, Direction::backward), "backward");
  const int32_t cu_seqlens[] = {0, 100, 256};
  AttentionProblem packed = p;
  packed.cu_seqlens_q = packed.cu_seqlens_k = cu_seqlens, packed.sequences = 2;
  CHECK(!reason(packed), "%s", reason(packed));
  AttentionProblem q = p;
  q.dtype = DType::f32;
  CHECK(reason(q), "float32");
  q = p, q.head_dim = 32;
  CHECK(reason(q), "head_dim 32");
  q = p, q.lists.block_k = 32;
  CHECK(reason(q), "blocks of 32");
  q = p, q.key.row = 129;
  CHECK(reason(q), "a row stride of 258 bytes");
  q = p, q.key.row = 0;
  CHECK(reason(q), "a row stride of 0");
  q = p, q.head_dim = q.value_dim = 256, q.lists.block_q = 64;
  CHECK(reason(q), "head_dim 256 with query blocks of 64");
  device.context.compute_capability = 100;
  CHECK(reason(p), "Blackwell");
}

TEST(cuda_lists_from_bool) {
  Device device;
  for (int64_t columns : {1, 31, 130}) {
    std::vector<char> map(size_t(3 * columns));
    for (size_t i = 0; i < map.size(); ++i) map[i] = i % 3 != 1;
    BlockListsFromBool lists;
    lists.map = reinterpret_cast<const bool*>(device.copy(map));
    lists.rows = 3, lists.columns = columns, lists.capacity = 20;
    lists.counts = static_cast<int32_t*>(device.allocate(3 * sizeof(int32_t)));
    lists.indices = static_cast<int32_t*>(device.allocate(60 * sizeof(int32_t)));
    CHECK_OK(block_lists_from_bool(lists, device.context));
    std::vector<int32_t> counts = device.back(lists.counts, 3), indices = device.back(lists.indices, 60);
    for (int64_t row = 0; row < 3; ++row) {
      int32_t found = 0;
      for (int64_t column = 0; column < columns && found < 20; ++column) {
        if (!map[size_t(row * columns + column)]) continue;
        CHECK(indices[size_t(row * 20 + found)] == column, "row %lld", (long long)row);
        ++found;
      }
      CHECK(counts[size_t(row)] == found, "row %lld: %d, expected %d", (long long)row, counts[size_t(row)], found);
    }
  }
}

}  // namespace
}  // namespace sparsekit::testing

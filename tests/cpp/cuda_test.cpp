// The CUDA kernels through the C++ API, without torch: small problems of every kernel, for compute-sanitizer.
//
//   cmake -S . -B build/cuda-test -G Ninja -DSPARSEKIT_TORCH=OFF -DSPARSEKIT_NUMPY=OFF -DSPARSEKIT_TESTS=ON
//   cmake --build build/cuda-test
//   compute-sanitizer --tool memcheck  build/cuda-test/tests/cpp/sparsekit_cuda_tests
//   compute-sanitizer --tool racecheck build/cuda-test/tests/cpp/sparsekit_cuda_tests
//
// Gradients are held to the float64 reference by the Python tests; here to sums that hold whatever the numbers are.
#include <cuda_runtime_api.h>

#include <list>

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

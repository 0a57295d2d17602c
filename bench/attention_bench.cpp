// Attention on one thread, on every instruction set of the machine: kernels without torch, for perf and callgrind.
//
//   sparsekit_bench --benchmark_filter='forward/avx512.*' --benchmark_repetitions=5
//
// items_per_second is effective FLOP/s (listed blocks only); `peak` is its share of the multiply-add peak of one core.
#include <benchmark/benchmark.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "attention/scalar.h"
#include "common/cpu/features.h"
#include "numpy/peak.h"
#include "numpy/thread_pool.h"
#include "sparsekit/attention.h"
#include "sparsekit/selection.h"

namespace sparsekit {
namespace {

constexpr int64_t length = 2048, block = 128, listed = 4;  // 4 of 16 key blocks: 25 %

struct Buffers {
  std::vector<char> query, key, value, out, grad_out, grad_query, grad_key, grad_value;
  std::vector<float> lse;
  std::vector<int32_t> counts, indices, offsets, slots;
  AttentionBackward backward;

  Buffers(DType dtype, int32_t dim) {
    std::mt19937 random(7);
    std::normal_distribution<double> normal;
    const int64_t count = length * dim, bytes = count * size_of(dtype);
    for (auto* data : {&query, &key, &value, &out, &grad_out, &grad_query, &grad_key, &grad_value}) {
      data->resize(size_t(bytes));
      for (int64_t i = 0; i < count; ++i) store(data->data(), i, dtype, normal(random));
    }
    lse.resize(length);
    for (int64_t row = 0; row < length / block; ++row) {
      std::vector<int32_t> columns(length / block);
      for (size_t i = 0; i < columns.size(); ++i) columns[i] = int32_t(i);
      std::shuffle(columns.begin(), columns.end(), random);
      counts.push_back(listed);
      indices.insert(indices.end(), columns.begin(), columns.begin() + listed);
    }
    AttentionProblem& p = backward;
    auto view = [&](std::vector<char>& data) { return InputView{data.data(), count, count, dim}; };
    auto output = [&](std::vector<char>& data) { return OutputView{data.data(), count, count, dim}; };
    p.dtype = dtype, p.batch = p.heads_q = p.heads_kv = 1, p.len_q = p.len_k = length;
    p.head_dim = p.value_dim = dim;
    p.query = view(query), p.key = view(key), p.value = view(value);
    p.lists.full = {counts.data(), indices.data(), listed};
    p.lists.q_blocks = length / block, p.lists.block_q = p.lists.block_k = block;
    p.scale = float(1 / std::sqrt(double(dim)));
    backward.out = view(out), backward.grad_out = view(grad_out), backward.lse = lse.data();
    backward.grad_query = output(grad_query), backward.grad_key = output(grad_key);
    backward.grad_value = output(grad_value);
    offsets.resize(length / block + 1), slots.resize(length / block * listed);
    backward.transpose = {offsets.data(), slots.data()};
  }

  AttentionForward forward() {
    AttentionForward call;
    static_cast<AttentionProblem&>(call) = backward;
    call.out = {out.data(), 0, 0, backward.value_dim};
    call.lse = lse.data();
    return call;
  }
};

void report(benchmark::State& state, DType dtype, double flop) {
  state.SetItemsProcessed(int64_t(double(state.iterations()) * flop));
  static const double peaks[] = {multiply_add_peak(DType::f32, 1), multiply_add_peak(DType::f16, 1),
                                 multiply_add_peak(DType::bf16, 1)};
  const double peak = peaks[int(dtype)];
  if (peak > 0) {
    state.counters["peak"] = benchmark::Counter(flop / peak, benchmark::Counter::kIsIterationInvariantRate);
  }
}

void run_forward(benchmark::State& state, const char* isa, DType dtype, int32_t dim) {
  Buffers buffers(dtype, dim);
  setenv("SPARSEKIT_ISA", isa, 1);
  for (auto _ : state) {
    Status status = attention_forward(buffers.forward(), thread_pool(1));
    if (!status.ok()) return state.SkipWithError(status.message);
  }
  report(state, dtype, 4.0 * length * block * listed * dim);
}

void run_backward(benchmark::State& state, const char* isa, DType dtype, int32_t dim) {
  Buffers buffers(dtype, dim);
  setenv("SPARSEKIT_ISA", isa, 1);
  TransposeBlockLists transpose;
  transpose.problem = buffers.backward;
  transpose.offsets = buffers.offsets.data(), transpose.slots = buffers.slots.data();
  Status status = transpose_block_lists(transpose, thread_pool(1));
  if (status.ok()) status = attention_forward(buffers.forward(), thread_pool(1));
  for (auto _ : state) {
    if (status.ok()) status = attention_backward(buffers.backward, thread_pool(1));
    if (!status.ok()) return state.SkipWithError(status.message);
  }
  report(state, dtype, 10.0 * length * block * listed * dim);
}

void register_all() {
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx}) {
    if (!isa_offered(isa)) continue;
    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      for (int32_t dim : {64, 128}) {
        const std::string rest = std::string("/") + isa_name(isa) + "/" + name(dtype) + "/d" + std::to_string(dim);
        benchmark::RegisterBenchmark(("forward" + rest).c_str(), run_forward, isa_name(isa), dtype, dim)
            ->Unit(benchmark::kMillisecond);
        benchmark::RegisterBenchmark(("backward" + rest).c_str(), run_backward, isa_name(isa), dtype, dim)
            ->Unit(benchmark::kMillisecond);
      }
    }
  }
}

}  // namespace
}  // namespace sparsekit

int main(int argc, char** argv) {
  sparsekit::register_all();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
}

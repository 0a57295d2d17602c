// The CUDA forward through the C++ API, without torch: for finding out what a kernel does, variant by variant.
//
//   sparsekit_cuda_bench [--alone] [words that a case's name must contain...]
//
// One line per case: median of launches with the L2 cache flushed between them, and of launches back to back (which
// meet the card's power limit), effective TFLOP/s (4 * unmasked pairs * (head_dim + value_dim) / 2 over the time, the
// work list included), the work list alone, the Ampere kernel's in the same minute, and the largest difference between
// the two results.
#include <cuda_runtime_api.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "attention/cuda_schedule.h"
#include "attention/scalar.h"
#include "sparsekit/attention.h"

namespace sparsekit {
namespace {

void require(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(code));
  std::exit(1);
}

template <class T>
T* device_memory(size_t count) {
  void* memory = nullptr;
  require(cudaMalloc(&memory, std::max<size_t>(count, 1) * sizeof(T)), "cudaMalloc");
  return static_cast<T*>(memory);
}

template <class T>
T* on_device(const std::vector<T>& from) {
  T* to = device_memory<T>(from.size());
  require(cudaMemcpy(to, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice), "copying to the device");
  return to;
}

struct Case {
  std::string name;
  int32_t head_dim, value_dim, block_q, block_k;
  double density;  // of the blocks that causality leaves
  bool causal = false, bits = false, neighbours = false;
  int64_t heads_kv = 16, length = 32768, batch = 1, heads = 16;
  DType dtype = DType::bf16;
};

/// Normal numbers; a chunk of 2^20 of them, over and over.
void* random_tensor(DType dtype, int64_t count, unsigned seed) {
  constexpr int64_t chunk = 1 << 20;
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  std::vector<char> numbers(size_t(chunk * 2));
  for (int64_t i = 0; i < chunk; ++i) store(numbers.data(), i, dtype, normal(random));
  char* memory = device_memory<char>(size_t(count * 2));
  for (int64_t at = 0; at < count; at += chunk) {
    const size_t bytes = size_t(std::min(chunk, count - at) * 2);
    require(cudaMemcpy(memory + at * 2, numbers.data(), bytes, cudaMemcpyHostToDevice), "copying to the device");
  }
  return memory;
}

class Run {
 public:
  explicit Run(const Case& c) : case_(c) {
    AttentionForward& p = call_;
    p.dtype = c.dtype, p.batch = c.batch, p.heads_q = c.heads, p.heads_kv = c.heads_kv;
    p.len_q = p.len_k = c.length, p.head_dim = c.head_dim, p.value_dim = c.value_dim;
    p.scale = float(1 / std::sqrt(double(c.head_dim))), p.causal = c.causal;
    auto view = [&](int64_t heads, int32_t dim, unsigned seed) {
      const int64_t head = c.length * dim;
      return InputView{keep(random_tensor(c.dtype, c.batch * heads * head, seed)), heads * head, head, dim};
    };
    p.query = view(c.heads, c.head_dim, 1), p.key = view(c.heads_kv, c.head_dim, 2);
    p.value = view(c.heads_kv, c.value_dim, 3);
    const InputView out = view(c.heads, c.value_dim, 4);
    p.out = {const_cast<void*>(out.data), out.batch, out.head, out.row};
    p.lse = keep(device_memory<float>(size_t(c.batch * c.heads * c.length)));
    make_lists();
    require(cudaGetDevice(&device_), "cudaGetDevice");
    require(cudaDeviceGetAttribute(&context.multiprocessors, cudaDevAttrMultiProcessorCount, device_), "attributes");
    use(90);
  }
  ~Run() {
    for (void* memory : memory_) cudaFree(memory);
  }

  void use(int compute_capability) {
    context.compute_capability = compute_capability;
    context.workspace_bytes = attention_workspace(call_, Direction::forward, context);
    context.workspace = keep(device_memory<char>(context.workspace_bytes));
  }
  const char* chosen() const {
    const AttentionPlan plan = attention_plan(call_, Direction::forward, context);
    for (int i = 0; i < plan.count; ++i) {
      if (!plan.entries[i].reason) return plan.entries[i].name;
    }
    return "none";
  }
  void launch() {
    const Status status = attention_forward(call_, context);
    if (status.ok()) return;
    std::printf("%s\n", status.message);
    std::exit(1);
  }
  /// Milliseconds of one launch: median over about `total_ms`.
  double time(double total_ms, bool flush) {
    return time(total_ms, flush, [&] { launch(); });
  }
  double time_work_list() {
    return time(2, true, [&] {
      int32_t* counter = static_cast<int32_t*>(context.workspace);
      const Status status = cuda::schedule_longest_first(call_, counter + 4, context.stream, counter);
      if (!status.ok()) std::printf("%s\n", status.message), std::exit(1);
    });
  }
  template <class Launch>
  double time(double total_ms, bool flush, Launch launch) {
    static char* junk = device_memory<char>(256 << 20);
    auto event = [] {
      cudaEvent_t made;
      require(cudaEventCreate(&made), "cudaEventCreate");
      return made;
    };
    cudaEvent_t first = event(), last = event();
    launch();
    cudaEventRecord(first), launch(), launch(), cudaEventRecord(last);
    require(cudaEventSynchronize(last), "the kernel");
    float once = 0;
    cudaEventElapsedTime(&once, first, last);
    const int runs = std::clamp(int(total_ms / (once / 2)), 5, 400);
    std::vector<cudaEvent_t> events;
    for (int i = 0; i < 2 * runs; ++i) events.push_back(event());
    for (int i = 0; i < runs / 4; ++i) launch();
    for (int i = 0; i < runs; ++i) {
      if (flush) cudaMemsetAsync(junk, 0, 256 << 20);
      cudaEventRecord(events[size_t(2 * i)]), launch(), cudaEventRecord(events[size_t(2 * i + 1)]);
    }
    require(cudaDeviceSynchronize(), "the kernel");
    std::vector<float> times(static_cast<size_t>(runs));
    for (size_t i = 0; i < times.size(); ++i) cudaEventElapsedTime(&times[i], events[2 * i], events[2 * i + 1]);
    for (cudaEvent_t e : events) cudaEventDestroy(e);
    cudaEventDestroy(first), cudaEventDestroy(last);
    std::nth_element(times.begin(), times.begin() + runs / 2, times.end());
    return double(times[size_t(runs / 2)]);
  }
  double flop() const { return 2.0 * double(pairs_) * (case_.head_dim + case_.value_dim); }
  /// A sample of the result: whole rows from all over.
  std::vector<double> result() {
    require(cudaDeviceSynchronize(), "the kernel");
    std::vector<double> values;
    std::vector<char> row(size_t(case_.value_dim * 2));
    const int64_t rows = case_.batch * case_.heads * case_.length;
    for (int64_t r = 0; r < rows; r += rows / 509) {
      const char* from = static_cast<const char*>(call_.out.data) + r * case_.value_dim * 2;
      require(cudaMemcpy(row.data(), from, row.size(), cudaMemcpyDeviceToHost), "copying from the device");
      for (int64_t i = 0; i < case_.value_dim; ++i) values.push_back(load(row.data(), i, case_.dtype));
    }
    return values;
  }

  CudaContext context;

 private:
  template <class T>
  T* keep(T* memory) {
    memory_.push_back(const_cast<std::remove_const_t<T>*>(memory));
    return memory;
  }

  void make_lists() {
    const Case& c = case_;
    const int32_t q_blocks = int32_t(c.length / c.block_q), k_blocks = int32_t(c.length / c.block_k);
    const size_t rows = size_t(c.batch * c.heads * q_blocks);
    std::vector<int32_t> counts(rows, 0), indices(rows * size_t(k_blocks), -1), full_counts(rows, 0),
        full_indices(rows * size_t(k_blocks), -1), bits_index(rows * size_t(k_blocks), -1), before;
    std::mt19937 random(5);
    std::uniform_real_distribution<double> uniform;
    for (size_t row = 0; row < rows; ++row) {
      const int64_t first = int64_t(row % size_t(q_blocks)) * c.block_q, last = first + c.block_q - 1;
      std::vector<int32_t> here;
      for (int32_t n = 0; n < k_blocks; ++n) {
        const int64_t begin = int64_t(n) * c.block_k, end = begin + c.block_k;
        if (c.causal && begin > last) continue;
        bool listed = uniform(random) < c.density;
        // Every second row keeps 0.75 of the row before it.
        if (c.neighbours && row % 2 == 1) {
          const bool old = std::binary_search(before.begin(), before.end(), n);
          listed = old ? uniform(random) < 0.75 : uniform(random) < 0.25 * c.density / (1 - c.density);
        }
        const bool diagonal = c.causal && end - 1 > first;
        if (!listed && !diagonal) continue;
        here.push_back(n);
        if (diagonal || c.bits) {
          const size_t slot = row * size_t(k_blocks) + size_t(counts[row]++);
          indices[slot] = n;
          if (c.bits) bits_index[slot] = int32_t(random() % 64);
        } else {
          full_indices[row * size_t(k_blocks) + size_t(full_counts[row]++)] = n;
        }
        for (int64_t i = first; i <= last && diagonal; ++i) pairs_ += std::clamp<int64_t>(i - begin + 1, 0, c.block_k);
        if (!diagonal) pairs_ += int64_t(c.block_q) * c.block_k;
      }
      before = here;
    }
    BlockLists& lists = call_.lists;
    lists.list_batch = c.batch, lists.list_heads = c.heads, lists.q_blocks = q_blocks;
    lists.block_q = c.block_q, lists.block_k = c.block_k;
    lists.partial = {keep(on_device(counts)), keep(on_device(indices)), k_blocks};
    lists.full = {keep(on_device(full_counts)), keep(on_device(full_indices)), k_blocks};
    if (!c.bits) return;
    std::vector<int32_t> bits(size_t(64) * size_t(c.block_q) * size_t(c.block_k / 32));
    for (int32_t& word : bits) word = int32_t(random() | random());
    lists.bits = keep(on_device(bits)), lists.bits_index = keep(on_device(bits_index)), lists.bits_count = 64;
  }

  const Case& case_;
  AttentionForward call_;
  int64_t pairs_ = 0;
  int device_ = 0;
  std::vector<void*> memory_;
};

std::vector<Case> cases() {
  std::vector<Case> all;
  auto percent = [](double density) { return std::to_string(int(density * 100 + 0.5)); };
  for (int32_t dim : {128, 64}) {
    for (auto [block_q, block_k] : {std::pair{128, 128}, {128, 64}, {64, 64}}) {
      for (double density : {0.05, 0.1, 0.25, 0.5}) {
        const std::string name = "d" + std::to_string(dim) + "-" + std::to_string(block_q) + "x" +
                                 std::to_string(block_k) + "-" + percent(density);
        all.push_back({name, dim, dim, block_q, block_k, density});
      }
    }
  }
  all.push_back({"d128-128x128-100", 128, 128, 128, 128, 1.0});
  Case next = {"d128-causal-25", 128, 128, 128, 128, 0.5, true};  // half of what causality leaves
  all.push_back(next);
  next.name = "d128-causal-gqa-25", next.heads_kv = 4;
  all.push_back(next);
  next = {"d128-causal-100", 128, 128, 128, 128, 1.0, true};
  all.push_back(next);
  next = {"d128-bits-25", 128, 128, 128, 128, 0.25, false, true};
  all.push_back(next);
  next = {"d128-64x64-neighbours-10", 128, 128, 64, 64, 0.1, false, false, true};
  all.push_back(next);
  all.push_back({"d96-128x128-25", 96, 96, 128, 128, 0.25});
  all.push_back({"d192-128x128-25", 192, 128, 128, 128, 0.25});
  all.push_back({"d256-128x128-25", 256, 256, 128, 128, 0.25});
  next = {"d128-64K-10", 128, 128, 128, 128, 0.1};
  next.length = 65536;
  all.push_back(next);
  next = {"d128-short-25", 128, 128, 128, 128, 0.25};
  next.length = 4096, next.batch = 4, next.heads = next.heads_kv = 32;
  all.push_back(next);
  next = {"d128-fp16-25", 128, 128, 128, 128, 0.25};
  next.dtype = DType::f16;
  all.push_back(next);
  return all;
}

void run(const Case& c, bool alone) {
  Run run(c);
  run.launch();
  std::vector<double> hopper = run.result();
  const char* name = run.chosen();
  usleep(200000);  // the power limiter remembers the load before for some 100 ms
  const double flushed = run.time(50, true);
  usleep(200000);
  const double sustained = run.time(100, false);
  const double flop = run.flop() / 1e9, list = 1000 * run.time_work_list();
  std::printf("%-26s %s %8.3f ms %6.1f TFLOP/s | back to back %6.1f | work list %4.1f us%s", c.name.c_str(), name,
              flushed, flop / flushed, flop / sustained, list, alone ? "\n" : "");
  if (alone) return;
  run.use(80);
  run.launch();
  const std::vector<double> ampere = run.result();
  const double baseline = run.time(30, true);
  double worst = 0;
  for (size_t i = 0; i < hopper.size(); ++i) {
    const double difference = std::fabs(hopper[i] - ampere[i]);
    worst = difference <= worst ? worst : std::isnan(difference) ? INFINITY : difference;
  }
  std::printf(" | sm80 %6.1f | differs by %.4f\n", flop / baseline, worst);
}

}  // namespace
}  // namespace sparsekit

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const bool alone = argc > 1 && !std::strcmp(argv[1], "--alone");
  for (const sparsekit::Case& c : sparsekit::cases()) {
    bool wanted = true;
    for (int i = 1 + alone; i < argc; ++i) wanted = wanted && c.name.find(argv[i]) != std::string::npos;
    if (wanted) sparsekit::run(c, alone);
  }
}

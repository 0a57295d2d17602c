// Independent chains hide the latency: 4 cycles of an FMA on two ports want 8, the 6 to 7 of vdpbf16ps (Zen 5) 14, with
// 12 it showed 443 of 478 GFLOP/s. Plain assembly: the loop is exactly what is counted, and the file needs no flags of
// an instruction set. Registers beyond the baseline's hold nothing of the compiler's.
#include "numpy/peak.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

namespace sparsekit {
namespace {

#ifdef __x86_64__

// The registers start as zeros: values cannot overflow, and zeros are not faster to multiply.
#define LOOP(name, op, reg, chains, a, b)                                                                         \
  void name(int64_t rounds) {                                                                                     \
    asm volatile(".irp r, " chains ", " a ", " b "\nvxorps %%" reg "\\r, %%" reg "\\r, %%" reg                    \
                 "\\r\n.endr\n1:\n.irp r, " chains "\n" op " %%" reg a ", %%" reg b ", %%" reg                    \
                 "\\r\n.endr\ndec %0\njnz 1b\nvzeroupper"                                                         \
                 : "+r"(rounds)                                                                                   \
                 :                                                                                                \
                 : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", \
                   "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");                                                  \
  }

#define TWELVE "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11"
#define TWENTY TWELVE ", 12, 13, 14, 15, 16, 17, 18, 19"

LOOP(f32_fma, "vfmadd231ps", "ymm", TWELVE, "12", "13")
LOOP(f64_fma, "vfmadd231pd", "ymm", TWELVE, "12", "13")
LOOP(f32_avx512, "vfmadd231ps", "zmm", TWENTY, "20", "21")
LOOP(f64_avx512, "vfmadd231pd", "zmm", TWENTY, "20", "21")
LOOP(bf16_avx512, "vdpbf16ps", "zmm", TWENTY, "20", "21")

struct Loop {
  void (*run)(int64_t rounds);
  double flop_per_round;
};

Loop widest(DType dtype) {
  bool avx512 = __builtin_cpu_supports("avx512dq"), fma = __builtin_cpu_supports("fma");
  if (dtype == DType::bf16 && __builtin_cpu_supports("avx512bf16")) return {bf16_avx512, 20 * 64.0};
  if (dtype == DType::f64) {
    return avx512 ? Loop{f64_avx512, 20 * 16.0} : fma ? Loop{f64_fma, 12 * 8.0} : Loop{nullptr, 0};
  }
  return avx512 ? Loop{f32_avx512, 20 * 32.0} : fma ? Loop{f32_fma, 12 * 16.0} : Loop{nullptr, 0};
}

#else

struct Loop {
  void (*run)(int64_t rounds);
  double flop_per_round;
};
Loop widest(DType) { return {nullptr, 0}; }

#endif

/// The best time of `repeats` in which `threads` threads, of which this is one, each call body(number) once. They meet
/// before and after each call: starting a thread inside the timed part took 9 % of it. They spin, as a sleeping one
/// wakes late.
template <class Body>
double best_seconds(int threads, int repeats, Body body) {
  std::atomic<int> arrived{0};
  auto meet = [&](int meeting) {
    arrived.fetch_add(1);
    while (arrived.load() < threads * meeting) std::this_thread::yield();
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) {
    others.emplace_back([&, t] {
      for (int repeat = 0; repeat < repeats; ++repeat) {
        meet(2 * repeat + 1);
        body(t);
        meet(2 * repeat + 2);
      }
    });
  }
  double best = 1e30;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    meet(2 * repeat + 1);
    auto start = std::chrono::steady_clock::now();
    body(0);
    meet(2 * repeat + 2);
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  for (std::thread& other : others) other.join();
  return best;
}

}  // namespace

double multiply_add_peak(DType dtype, int threads) {
  const Loop loop = widest(dtype);
  if (!loop.run) return 0;
  const int64_t rounds = 300'000;  // about 0.8 ms: shorter than a time slice, so that some run has the core to itself
  const int count = std::max(threads, 1);
  return count * double(rounds) * loop.flop_per_round / best_seconds(count, 40, [&](int) { loop.run(rounds); });
}

}  // namespace sparsekit

// Twelve independent chains hide the latency of 4 to 6 cycles on two ports. Plain assembly: the loop is exactly what is
// counted, and the file needs no instruction set flags. Registers beyond the baseline's hold nothing of the compiler's.
#include "numpy/peak.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

namespace sparsekit {
namespace {

#ifdef __x86_64__

#define TWELVE(instruction) ".irp r, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11\n" instruction "\n.endr\n"

// The registers start as zeros: values cannot overflow, and zeros are not faster to multiply.
#define LOOP(name, op, reg)                                                                                       \
  void name(int64_t rounds) {                                                                                     \
    asm volatile("vxorps %%xmm12, %%xmm12, %%xmm12\nvxorps %%xmm13, %%xmm13, %%xmm13\n" TWELVE(                   \
                     "vxorps %%xmm\\r, %%xmm\\r, %%xmm\\r") "1:\n" TWELVE(op " %%" reg "12, %%" reg "13, %%" reg  \
                                                                             "\\r") "dec %0\njnz 1b\nvzeroupper"  \
                 : "+r"(rounds)                                                                                   \
                 :                                                                                                \
                 : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", \
                   "xmm11", "xmm12", "xmm13");                                                                    \
  }

LOOP(f32_fma, "vfmadd231ps", "ymm")
LOOP(f64_fma, "vfmadd231pd", "ymm")
LOOP(f32_avx512, "vfmadd231ps", "zmm")
LOOP(f64_avx512, "vfmadd231pd", "zmm")
LOOP(bf16_avx512, "vdpbf16ps", "zmm")

struct Loop {
  void (*run)(int64_t rounds);
  double flop_per_round;
};

Loop widest(DType dtype) {
  bool avx512 = __builtin_cpu_supports("avx512f"), fma = __builtin_cpu_supports("fma");
  if (dtype == DType::bf16 && __builtin_cpu_supports("avx512bf16")) return {bf16_avx512, 12 * 64.0};
  if (dtype == DType::f64) {
    return avx512 ? Loop{f64_avx512, 12 * 16.0} : fma ? Loop{f64_fma, 12 * 8.0} : Loop{nullptr, 0};
  }
  return avx512 ? Loop{f32_avx512, 12 * 32.0} : fma ? Loop{f32_fma, 12 * 16.0} : Loop{nullptr, 0};
}

#else

struct Loop {
  void (*run)(int64_t rounds);
  double flop_per_round;
};
Loop widest(DType) { return {nullptr, 0}; }

#endif

}  // namespace

double multiply_add_peak(DType dtype, int threads) {
  const Loop loop = widest(dtype);
  if (!loop.run) return 0;
  const int64_t rounds = 400'000;  // about 1 ms: shorter than a time slice, so that some run has the core to itself
  double best = 0;
  for (int repeat = 0; repeat < 40; ++repeat) {
    auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back([&] { loop.run(rounds); });
    loop.run(rounds);
    for (std::thread& other : others) other.join();
    double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = std::max(best, std::max(threads, 1) * double(rounds) * loop.flop_per_round / seconds);
  }
  return best;
}

}  // namespace sparsekit

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

#define TWELVE(op, reg)                                                                                    \
  op " %%" reg "12, %%" reg "13, %%" reg "0\n" op " %%" reg "12, %%" reg "13, %%" reg "1\n"                \
  op " %%" reg "12, %%" reg "13, %%" reg "2\n" op " %%" reg "12, %%" reg "13, %%" reg "3\n"                \
  op " %%" reg "12, %%" reg "13, %%" reg "4\n" op " %%" reg "12, %%" reg "13, %%" reg "5\n"                \
  op " %%" reg "12, %%" reg "13, %%" reg "6\n" op " %%" reg "12, %%" reg "13, %%" reg "7\n"                \
  op " %%" reg "12, %%" reg "13, %%" reg "8\n" op " %%" reg "12, %%" reg "13, %%" reg "9\n"                \
  op " %%" reg "12, %%" reg "13, %%" reg "10\n" op " %%" reg "12, %%" reg "13, %%" reg "11\n"

// The registers start as zeros: values cannot overflow, and zeros are not faster to multiply.
#define CLEAR_TWELVE(reg)                                                                                  \
  "vxorps %%" reg "0, %%" reg "0, %%" reg "0\nvxorps %%" reg "1, %%" reg "1, %%" reg "1\n"                 \
  "vxorps %%" reg "2, %%" reg "2, %%" reg "2\nvxorps %%" reg "3, %%" reg "3, %%" reg "3\n"                 \
  "vxorps %%" reg "4, %%" reg "4, %%" reg "4\nvxorps %%" reg "5, %%" reg "5, %%" reg "5\n"                 \
  "vxorps %%" reg "6, %%" reg "6, %%" reg "6\nvxorps %%" reg "7, %%" reg "7, %%" reg "7\n"                 \
  "vxorps %%" reg "8, %%" reg "8, %%" reg "8\nvxorps %%" reg "9, %%" reg "9, %%" reg "9\n"                 \
  "vxorps %%" reg "10, %%" reg "10, %%" reg "10\nvxorps %%" reg "11, %%" reg "11, %%" reg "11\n"           \
  "vxorps %%" reg "12, %%" reg "12, %%" reg "12\nvxorps %%" reg "13, %%" reg "13, %%" reg "13\n"

#define LOOP(name, op, reg)                                                                                \
  void name(int64_t rounds) {                                                                              \
    asm volatile(CLEAR_TWELVE("ymm") "1:\n" TWELVE(op, reg) "dec %0\njnz 1b\nvzeroupper"                   \
                 : "+r"(rounds)                                                                            \
                 :                                                                                         \
                 : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",   \
                   "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");                                  \
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
  const int64_t rounds = 4'000'000;  // about 10 ms
  double best = 0;
  for (int repeat = 0; repeat < 5; ++repeat) {
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

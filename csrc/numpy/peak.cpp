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

#include "common/cpu/features.h"

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

/// Four sums of products of tiles that stay where they are: 16 cycles each, and 52 until one can be added to. Tiles are
/// loaded: as ldtilecfg leaves them they seem not to need the unit that two hardware threads share (42 TFLOP/s on 16
/// threads, which reach 15 to 17 with tiles that were loaded, be it with zeros).
void bf16_amx(int64_t rounds) {
  struct alignas(64) Shapes {
    uint8_t palette = 1, rest[15] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } const shapes;
  alignas(64) uint16_t ones[16][32];
  for (auto& row : ones)
    for (uint16_t& one : row) one = 0x3f80;
  asm volatile(
      "ldtilecfg %1\n"
      ".irp t, 0, 1, 2, 3, 4, 5, 6, 7\ntileloadd (%2,%3,1), %%tmm\\t\n.endr\n"
      "1: tdpbf16ps %%tmm6, %%tmm4, %%tmm0\ntdpbf16ps %%tmm7, %%tmm4, %%tmm1\n"
      "tdpbf16ps %%tmm6, %%tmm5, %%tmm2\ntdpbf16ps %%tmm7, %%tmm5, %%tmm3\n"
      "dec %0\njnz 1b\ntilerelease"
      : "+r"(rounds)
      : "m"(shapes), "r"(&ones), "r"(int64_t(64))
      : "cc", "memory");
}

struct Loop {
  void (*run)(int64_t rounds);
  double flop_per_round;
};

/// The loops that may be the fastest.
std::vector<Loop> widest(DType dtype) {
  const bool avx512 = __builtin_cpu_supports("avx512dq"), fma = __builtin_cpu_supports("fma");
  if (dtype == DType::f64) {
    if (avx512) return {{f64_avx512, 20 * 16.0}};
    return fma ? std::vector<Loop>{{f64_fma, 12 * 8.0}} : std::vector<Loop>{};
  }
  std::vector<Loop> loops;
  if (dtype == DType::bf16) {
    if (__builtin_cpu_supports("amx-bf16") && isa_offered(Isa::amx)) return {{bf16_amx, 4 * 16384.0}};
    if (__builtin_cpu_supports("avx512bf16")) loops.push_back({bf16_avx512, 20 * 64.0});
  }
  // Also for bf16: there are processors that run vdpbf16ps at less than half the rate of FMA.
  if (avx512) loops.push_back({f32_avx512, 20 * 32.0});
  if (!avx512 && fma) loops.push_back({f32_fma, 12 * 16.0});
  return loops;
}

#else

struct Loop {
  void (*run)(int64_t rounds);
  double flop_per_round;
};
std::vector<Loop> widest(DType) { return {}; }

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
  const int count = std::max(threads, 1);
  double best = 0;
  for (const Loop& loop : widest(dtype)) {
    // About 0.8 ms: shorter than a time slice, so that some run has the core to itself.
    const int64_t rounds = loop.flop_per_round < 4096 ? 300'000 : 30'000;
    const double seconds = best_seconds(count, 40, [&](int) { loop.run(rounds); });
    best = std::max(best, count * double(rounds) * loop.flop_per_round / seconds);
  }
  return best;
}

}  // namespace sparsekit

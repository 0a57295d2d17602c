// How a CPU kernel runs in parallel without knowing whose threads it uses.
//
// The torch adapter passes torch's pool, the NumPy module and the benchmarks a small pool of their own. Kernels never
// link OpenMP: torch's wheel brings its own copy, and a second one would over-subscribe the machine.
#pragma once

#include <cstdint>

namespace sparsekit {

/// Calls `body(first, last, context)` on disjoint ranges that cover [begin, end), possibly on several threads.
/// `body` must not throw. An empty `run` means: on the calling thread.
struct ParallelFor {
  using Body = void (*)(int64_t first, int64_t last, void* context);

  void (*run)(int64_t begin, int64_t end, int64_t grain, Body body, void* context) = nullptr;
  int32_t threads = 1;  // upper bound of ranges that run at the same time

  void operator()(int64_t begin, int64_t end, int64_t grain, Body body, void* context) const {
    if (begin >= end) return;
    if (run && threads > 1) {
      run(begin, end, grain, body, context);
    } else {
      body(begin, end, context);
    }
  }
};

}  // namespace sparsekit

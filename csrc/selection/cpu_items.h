// Work cut by shape and taken from a counter: who does an item does not change its result. Include after simd_<isa>.h.
#pragma once

#include "attention/cpu_tiles.h"
#include "selection/implementations.h"
#include "sparsekit/parallel.h"

namespace sparsekit {
namespace {

/// Runs `Worker(call)` on every thread: `ready()` says whether it has its memory, `run(item)` does an item.
template <class Worker, class Call>
static Status run_items(const Call& call, int64_t items, const ParallelFor& parallel) {
  struct Shared {
    const Call* call;
    int64_t items, next;
    int out_of_memory;
  } shared{&call, items, 0, 0};
  auto body = [](int64_t first, int64_t last, void* context) {
    Shared& s = *static_cast<Shared*>(context);
    for (; first < last; ++first) {
      Worker worker(*s.call);
      if (!worker.ready()) {
        __atomic_store_n(&s.out_of_memory, 1, __ATOMIC_RELAXED);
        return;
      }
      for (;;) {
        int64_t item = __atomic_fetch_add(&s.next, 1, __ATOMIC_RELAXED);
        if (item >= s.items) break;
        worker.run(item);
      }
      worker.release();
    }
  };
  parallel(0, smaller(parallel.threads, items), 1, body, &shared);
  if (shared.out_of_memory) return error(Status::Kind::failed, "out of memory for the scratch of a thread");
  return {};
}

/// The sequences of a problem, with what else is counted over them.
struct SequenceTable {
  Sequence* sequences = nullptr;
  int64_t count = 0;

  bool set(const AttentionProblem& p) {
    sequences = list_sequences(p, &count);
    return sequences != nullptr;
  }
  void release() { free(sequences); }
};

}  // namespace
}  // namespace sparsekit

// An append on the device: what each head takes in, and what of it leaves the ring.
#pragma once

#include "kv_cache/cuda_cache.cuh"

namespace sparsekit::cuda {

struct Append {
  Cache cache;
  DType dtype;
  int64_t tokens;
  InputView key, value;
  const int32_t* counts;
};

struct AppendPlan {
  Lengths n;
  int count, sinks, flush;  // new tokens; of them to the sinks; tokens that leave the ring
  bool fits;
};

/// The same for every thread of a CTA; all of them call it.
__device__ __forceinline__ AppendPlan plan_append(const Append& a, int64_t b, int64_t h) {
  const Cache& c = a.cache;
  AppendPlan plan;
  plan.n = lengths_of(c, b, h);
  plan.count = int(a.counts ? min(max(int64_t(a.counts[b]), int64_t(0)), a.tokens) : a.tokens);
  plan.sinks = plan.n.quantized + plan.n.recent == 0 ? min(plan.count, c.sinks - plan.n.sinks) : 0;
  plan.flush = int(flushed(c, int64_t(plan.n.recent) + plan.count - plan.sinks));
  plan.fits = int64_t(plan.n.quantized) + plan.flush <= c.capacity();
  if (c.block_table && plan.fits && plan.flush > 0) {
    const int last = (plan.n.quantized + plan.flush - 1) / c.page_size;
    bool bad = false;
    for (int i = plan.n.quantized / c.page_size + int(threadIdx.x); i <= last; i += int(blockDim.x))
      bad |= c.page(b, h, i) < 0;
    plan.fits = !__syncthreads_or(bad);
  }
  return plan;
}

}  // namespace sparsekit::cuda

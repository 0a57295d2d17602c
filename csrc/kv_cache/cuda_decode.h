// Between the dispatch of decode attention on CUDA and its kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sparsekit/attention.h"
#include "sparsekit/kv_cache.h"

namespace sparsekit {

namespace cuda {
struct Decode;
}

struct CudaDecodeKernel {
  const char* name;
  const char* (*refuses)(const DecodeAttention& problem, const CudaContext& context);
  /// Splits of each (sequence, key head), and states per row that its launch leaves (at least that many).
  void (*cut)(const DecodeAttention& problem, const CudaContext& context, int* splits, int* slots);
  Status (*run)(const cuda::Decode& decode, const CudaContext& context);
};

constexpr int kMostSplits = 256, kMostSlots = kMostSplits + 1;

extern const CudaDecodeKernel decode_cuda_sm80;    // tensor cores, 16-bit queries
extern const CudaDecodeKernel decode_cuda_simple;  // everything, fp32 arithmetic

/// Fills scores with -inf, runs the kernel, merges its states into out and lse. Workspace: acc of every state, fp32,
/// rounded up to 256 bytes, and (largest, total) of each.
Status decode_cuda_launch(const CudaDecodeKernel& kernel, const DecodeAttention& problem, int splits, int slots,
                          const CudaContext& context);

/// Splits for `heads` parts of work of up to `chunks` chunks each, where `resident` CTAs run at once: the number up to
/// `most` with the least time, the smaller one of equals. A round of CTAs costs its chunks and, to fill the pipeline
/// and to leave it, about two more: few long CTAs are better than full rounds of short ones.
inline int choose_splits(int64_t heads, int64_t chunks, int64_t resident, int64_t most) {
  constexpr int64_t kOverhead = 2;
  if (most > chunks) most = chunks;
  int64_t best = 1, least = INT64_MAX;
  for (int64_t splits = 1; splits <= most; ++splits) {
    const int64_t rounds = (heads * splits + resident - 1) / resident;
    const int64_t cost = rounds * ((chunks + splits - 1) / splits + kOverhead);
    if (cost < least) {
      best = splits;
      least = cost;
    }
  }
  return int(best);
}

}  // namespace sparsekit

// Between the dispatch of decode attention on CUDA and its kernels.
#pragma once

#include <cstddef>

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

extern const CudaDecodeKernel decode_cuda_sm80;    // tensor cores, 16-bit queries
extern const CudaDecodeKernel decode_cuda_simple;  // everything, fp32 arithmetic

/// Fills scores with -inf, runs the kernel, merges its states into out and lse. Workspace: acc of every state, fp32,
/// rounded up to 256 bytes, and (largest, total) of each.
Status decode_cuda_launch(const CudaDecodeKernel& kernel, const DecodeAttention& problem, int splits, int slots,
                          const CudaContext& context);

/// Splits for `heads` parts of work of up to `chunks` chunks each, where `resident` CTAs run at once: the number up to
/// `most` that fills whole rounds best, the smaller one of equals.
inline int choose_splits(int64_t heads, int64_t chunks, int64_t resident, int64_t most) {
  if (most > chunks) most = chunks;
  int best = 1;
  double best_share = 0;
  for (int64_t splits = 1; splits <= most; ++splits) {
    const int64_t ctas = heads * splits, rounds = (ctas + resident - 1) / resident;
    const double share = double(ctas) / double(rounds * resident);
    if (share > best_share + 0.02) {
      best = int(splits);
      best_share = share;
    }
  }
  return best;
}

}  // namespace sparsekit

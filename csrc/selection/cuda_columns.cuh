// Column scores of few probe rows: what the kernels for any card and those for Hopper share.
#pragma once

#include "common/cuda/math.cuh"
#include "selection/cuda_kernels.h"
#include "selection/cuda_rows.cuh"
#include "selection/cuda_score_tiles.cuh"

namespace sparsekit::cuda {

constexpr int kProbeRows = 64, kProbeHeads = 4;  // of a CTA: rows at most, query heads that share their keys

struct ColumnCall {
  ColumnScores p;
  int ranges = 1, keys_each = 0;  // of keys: each CTA has one
  float2* parts = nullptr;    // [batch, heads_q, 64, ranges]: highest score (in units of log 2), sum of 2^(score - it)
  const int* fits = nullptr;  // [batch]: whether the rows stand at consecutive positions
};

/// lse, in units of log 2, of a row; +inf where it sees nothing, so that its shares are 0.
__device__ __forceinline__ float lse_of_parts(const float2* parts, int ranges) {
  float most = -kInfinity, sum = 0.f;
#pragma unroll 8
  for (int r = 0; r < ranges; ++r) most = larger(most, parts[r].x);
  if (most == -kInfinity) return kInfinity;
#pragma unroll 8
  for (int r = 0; r < ranges; ++r) sum += parts[r].y * exp2_fast(parts[r].x - most);
  return most + log2f(sum);
}

// cuda_columns_sm90.cu. Keys of a range, or 0 where it does not take the problem.
int columns_sm90_keys(const ColumnScores& p, const CudaContext& context);
void score_columns_sm90(const ColumnCall& call, cudaStream_t stream);

}  // namespace sparsekit::cuda

// What the kernels that fold over rows share: their arguments, and shares as whole numbers.
#pragma once

#include "selection/cuda_support.cuh"

namespace sparsekit::cuda {

struct RowFold {
  RowScores p;  // lse and, for diagonals, query_positions
  Spans spans;
  bool vectors = false;
  unsigned long long* diagonals = nullptr;  // [batch, heads_q, len_k] in whole units of `unit`, or null
  float unit = 0;
  const int* done = nullptr;  // [batch] or null: entries that need nothing any more
  int tiles = 0;              // of keys
};

/// The value of a unit: a power of two of which `rows` shares of up to 1, and what rounding adds, make less than 2^62.
inline float share_unit(int64_t rows) {
  int bits = 0;
  while ((int64_t(1) << bits) <= rows) ++bits;
  float unit = 1.f;
  for (int i = 0; i < 60 - bits; ++i) unit *= 0.5f;
  return unit;
}

/// Adds whole units; NaN is the highest bit, which no sum reaches.
__device__ __forceinline__ void add_share(unsigned long long* to, float share, float unit) {
  if (share != share) {
    atomicOr(to, 1ull << 63);
  } else {
    atomicAdd(to, __float2ull_rn(share / unit));
  }
}
__device__ __forceinline__ float share_of(unsigned long long units, float unit) {
  return units >> 63 ? __uint_as_float(0x7fc00000u) : float(double(units) * double(unit));
}

inline size_t padded_bytes(int64_t bytes) { return size_t(ceil_div<int64_t>(bytes, 256) * 256); }

/// Tiles of `size` rows or keys of a problem, at most: each sequence of a packed batch is rounded up.
inline int64_t tiles_of(int64_t length, int64_t size, const AttentionProblem& p) {
  const int64_t tiles = p.packed() ? length / size + p.sequences : ceil_div<int64_t>(length, size);
  return tiles > 0 ? tiles : 1;
}

}  // namespace sparsekit::cuda

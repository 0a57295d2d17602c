// Tiles of scores q.k in the registers of a CTA: 64 rows x 128 keys, four warps of 16 rows each.
//
// Both operands come through shared memory in stages of 128 bytes of a row (64 elements of 16 bits, 32 of fp32), one
// stage ahead of the products, so that any head dimension fits. 16-bit operands are multiplied exactly and summed in
// fp32; fp32 ones as three tf32 products (common/cuda/mma.cuh). Rows and keys are given by functions of their number,
// so that gathered rows, means of blocks and antidiagonals take the same path. Source of the layout: common/cuda.
//
// Bound: 64 FLOP per byte of L2, 350 TFLOP/s of 16-bit products.
#pragma once

#include "common/cuda/math.cuh"
#include "common/cuda/mma.cuh"
#include "common/cuda/shared_memory.cuh"
#include "selection/cuda_support.cuh"

namespace sparsekit::cuda {

template <class Element>
class ScoreTile {
 public:
  static constexpr int kRows = 64, kKeys = 128, kThreads = 128;
  static constexpr int kRowBytes = 128, kColumns = kRowBytes / int(sizeof(Element));
  static constexpr int kStageBytes = (kRows + kKeys) * kRowBytes, kBytes = 2 * kStageBytes;

  /// This thread's scores: c[j][i] is row row_of(i), key key_of(j, i).
  float c[kKeys / 8][4];
  __device__ __forceinline__ static int row_of(int i) { return warp_of() * 16 + lane_of() / 4 + i / 2 * 8; }
  __device__ __forceinline__ static int key_of(int j, int i) { return j * 8 + lane_of() % 4 * 2 + i % 2; }

  /// Sums over `segments` of row_at(r, segment) . key_at(n, segment), vectors of `dim` elements, or null for zeros.
  /// `vectors`: they begin at multiples of 16 bytes and are as long. All threads call; shared memory is free
  /// afterwards.
  template <class RowAt, class KeyAt>
  __device__ __forceinline__ void multiply(int segments, int dim, bool vectors, RowAt row_at, KeyAt key_at,
                                           unsigned char* memory) {
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) c[j][0] = c[j][1] = c[j][2] = c[j][3] = 0.f;
    const int per_segment = ceil_div(dim, kColumns), stages = segments * per_segment;
    load(0, per_segment, dim, vectors, row_at, key_at, memory);
    copy_async_commit();
#pragma unroll 1
    for (int stage = 0; stage < stages; ++stage) {
      if (stage + 1 < stages) {
        load(stage + 1, per_segment, dim, vectors, row_at, key_at, memory + (stage + 1) % 2 * kStageBytes);
      }
      copy_async_commit();
      copy_async_wait<1>();
      __syncthreads();
      const int left = (dim - stage % per_segment * kColumns) * int(sizeof(Element));
      add(shared_address(memory + stage % 2 * kStageBytes), min(left, kRowBytes));
      __syncthreads();
    }
  }

 private:
  static constexpr int kChunk = 16 / int(sizeof(Element));  // elements of 16 bytes

  template <class RowAt, class KeyAt>
  __device__ __forceinline__ static void load(int stage, int per_segment, int dim, bool vectors, RowAt row_at,
                                              KeyAt key_at, unsigned char* memory) {
    const int segment = stage / per_segment, chunk = int(threadIdx.x) % 8;
    const int column = stage % per_segment * kColumns + chunk * kChunk;
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i) {
      const int r = int(threadIdx.x) / 8 + 16 * i;
      put(memory, r, chunk, row_at(r, segment), column, dim, vectors);
    }
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      const int n = int(threadIdx.x) / 8 + 16 * i;
      put(memory + kRows * kRowBytes, n, chunk, key_at(n, segment), column, dim, vectors);
    }
  }

  __device__ __forceinline__ static void put(unsigned char* tile, int r, int chunk, const Element* from, int column,
                                             int dim, bool vectors) {
    const uint32_t at = swizzled<kRowBytes>(r, chunk);
    if (vectors) {
      const bool valid = from && column < dim;
      copy_async_16(shared_address(tile) + at, valid ? from + column : from, valid);
      return;
    }
    auto* to = reinterpret_cast<Element*>(tile + at);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) to[e] = from && column + e < dim ? from[column + e] : from_float<Element>(0.f);
  }

  /// Adds the products of a stage of which `bytes` of every row count.
  __device__ __forceinline__ void add(uint32_t tile, int bytes) {
    const int lane = lane_of();
    const uint32_t rows = address_rows16<kRowBytes>(tile, warp_of() * 16, 0, lane);
    const uint32_t keys = address_columns16<kRowBytes>(tile + kRows * kRowBytes, 0, 0, lane);
#pragma unroll
    for (int step = 0; step < kRowBytes / 32; ++step) {
      if (step * 32 >= bytes) break;
      uint32_t a[4];
      load_matrices(a, advance_chunks<kRowBytes>(rows, step));
      if constexpr (sizeof(Element) == 2) {
#pragma unroll
        for (int n = 0; n < kKeys / 16; ++n) {
          uint32_t b[4];
          load_matrices(b, advance_chunks<kRowBytes>(keys, step) + n * 16 * kRowBytes);
          mma_m16n8k16<Element>(c[2 * n], a, b[0], b[1]);
          mma_m16n8k16<Element>(c[2 * n + 1], a, b[2], b[3]);
        }
      } else {
        Tf32Pair pair[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) pair[i] = split_tf32(__uint_as_float(a[i]));
#pragma unroll
        for (int n = 0; n < kKeys / 16; ++n) {
          uint32_t b[4];
          load_matrices(b, advance_chunks<kRowBytes>(keys, step) + n * 16 * kRowBytes);
          const Tf32Pair near[2] = {split_tf32(__uint_as_float(b[0])), split_tf32(__uint_as_float(b[1]))};
          const Tf32Pair far[2] = {split_tf32(__uint_as_float(b[2])), split_tf32(__uint_as_float(b[3]))};
          mma_m16n8k8_f32(c[2 * n], pair, near);
          mma_m16n8k8_f32(c[2 * n + 1], pair, far);
        }
      }
    }
  }
};

/// Whether vectors of `dim` elements of the view begin at multiples of 16 bytes and are as long.
inline bool in_vectors(const InputView& view, const AttentionProblem& p) {
  const int64_t size = size_of(p.dtype);
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && p.head_dim * size % 16 == 0 && view.row * size % 16 == 0 &&
         view.head * size % 16 == 0 && view.batch * size % 16 == 0;
}

/// The larger of both; NaN where one is.
__device__ __forceinline__ float larger(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;\n" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

}  // namespace sparsekit::cuda

// Tiles of the block-sparse products on the tensor cores of one warp (mma.sync): how a step of the contraction comes to
// shared memory, and the products of a warp's part of it.
//
// A step is 128 bytes of the contraction: 64 elements of 16 bits, 32 of fp32. A tile has SIZE rows or columns of an
// operand (M or N) for one step, 128 * SIZE bytes, either way round:
//   TRANS false   the contraction is contiguous in memory: SIZE rows of 128 bytes
//   TRANS true    the operand's own dimension is: one row of SIZE elements for each number of the contraction
// Where a chunk of 16 bytes comes from is asked of a Source: source(mn, k) -> Span, the address and how many elements
// from there on (along the contiguous dimension) exist; the rest become zeros. What does not exist is never read.
#pragma once

#include "common/cuda/mma.cuh"
#include "common/cuda/shared_memory.cuh"
#include "sparsekit/matmul.h"

namespace sparsekit::cuda {

template <class Element>
constexpr int kChunk = 16 / int(sizeof(Element));  // elements of 16 bytes
template <class Element>
constexpr int kStep = 8 * kChunk<Element>;  // elements of the contraction in a step

template <class Element>
struct Span {
  const Element* data;
  int count;
};

/// As copy_async_16, of which the first `bytes` (0 to 16) are read and the rest are zeros.
__device__ __forceinline__ void copy_async_part(uint32_t destination, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(destination), "l"(source), "r"(bytes)
               : "memory");
}

template <class Element, bool TRANS, int SIZE>
struct TileShape {
  static constexpr int kBytes = SIZE * 128;
  static constexpr int kRowBytes = TRANS ? SIZE * int(sizeof(Element)) : 128;
};

/// All THREADS threads load one tile. Not ALIGNED: addresses of any alignment, element by element.
template <class Element, bool TRANS, int SIZE, int THREADS, bool ALIGNED, class Source>
__device__ __forceinline__ void load_tile(uint32_t tile, const Source& source) {
  using Shape = TileShape<Element, TRANS, SIZE>;
  constexpr int kPerRow = Shape::kRowBytes / 16, kChunks = SIZE * 8;
  static_assert(kChunks % THREADS == 0, "every thread loads the same number of chunks");
#pragma unroll
  for (int i = 0; i < kChunks / THREADS; ++i) {
    const int at = int(threadIdx.x) + i * THREADS, row = at / kPerRow, chunk = at % kPerRow;
    const int mn = TRANS ? chunk * kChunk<Element> : row, k = TRANS ? row : chunk * kChunk<Element>;
    const uint32_t to = tile + swizzled<Shape::kRowBytes>(row, chunk);
    if constexpr (ALIGNED) {
      const Span<Element> span = source(mn, k);
      copy_async_part(to, span.data, span.count * int(sizeof(Element)));
    } else {
      alignas(16) Element values[kChunk<Element>];
#pragma unroll
      for (int e = 0; e < kChunk<Element>; ++e) {
        const Span<Element> span = source(TRANS ? mn + e : mn, TRANS ? k : k + e);
        values[e] = span.count > 0 ? *span.data : from_float<Element>(0.f);
      }
      const uint4 packed = *reinterpret_cast<const uint4*>(values);
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(to), "r"(packed.x), "r"(packed.y), "r"(packed.z),
                   "r"(packed.w)
                   : "memory");
    }
  }
}

__device__ __forceinline__ uint32_t load_shared(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(value) : "r"(address));
  return value;
}

/// Element (k, mn) of an fp32 tile with TRANS: ldmatrix cannot transpose 32-bit elements.
template <int SIZE>
__device__ __forceinline__ uint32_t element_f32(uint32_t tile, int k, int mn) {
  return load_shared(tile + swizzled<SIZE * 4>(k, mn / 4) + uint32_t(mn % 4) * 4);
}

/// The A operand (16 of M x 32 bytes of the contraction) from `pair` (chunks 2 pair, 2 pair + 1).
template <class Element, bool TRANS, int SIZE>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], uint32_t tile, int m, int pair, int lane) {
  constexpr int kRowBytes = TileShape<Element, TRANS, SIZE>::kRowBytes;
  if constexpr (!TRANS) {
    load_matrices(a, address_rows16<kRowBytes>(tile, m, 2 * pair, lane));
  } else if constexpr (sizeof(Element) == 2) {
    load_matrices_transposed(a, address_columns16<kRowBytes>(tile, 16 * pair, m / 8, lane));
  } else {
    const int g = lane / 4, t = 8 * pair + lane % 4;
    a[0] = element_f32<SIZE>(tile, t, m + g), a[1] = element_f32<SIZE>(tile, t, m + g + 8);
    a[2] = element_f32<SIZE>(tile, t + 4, m + g), a[3] = element_f32<SIZE>(tile, t + 4, m + g + 8);
  }
}

/// The B operands of 16 of N: registers 0 and 1 of the first 8, 2 and 3 of the others.
template <class Element, bool TRANS, int SIZE>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], uint32_t tile, int n, int pair, int lane) {
  constexpr int kRowBytes = TileShape<Element, TRANS, SIZE>::kRowBytes;
  if constexpr (!TRANS) {
    load_matrices(b, address_columns16<kRowBytes>(tile, n, 2 * pair, lane));
  } else if constexpr (sizeof(Element) == 2) {
    load_matrices_transposed(b, address_rows16<kRowBytes>(tile, 16 * pair, n / 8, lane));
  } else {
    const int g = lane / 4, t = 8 * pair + lane % 4;
    b[0] = element_f32<SIZE>(tile, t, n + g), b[1] = element_f32<SIZE>(tile, t + 4, n + g);
    b[2] = element_f32<SIZE>(tile, t, n + g + 8), b[3] = element_f32<SIZE>(tile, t + 4, n + g + 8);
  }
}

/// Sums of a warp: 16 * MT of M x 16 * NT of N. fp32 sums are kept in two levels, so that chains are short: `recent` is
/// added to `total` every few steps (of 9,000 terms with a mean a single chain lost twice what torch's product does).
template <class Element, int MT, int NT>
struct Sums {
  static constexpr bool kTwoLevels = sizeof(Element) == 4;
  float total[MT][2 * NT][4];
  float recent[kTwoLevels ? MT : 1][kTwoLevels ? 2 * NT : 1][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
      for (int j = 0; j < 2 * NT; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          total[i][j][e] = 0.f;
          if constexpr (kTwoLevels) recent[i][j][e] = 0.f;
        }
  }
  __device__ __forceinline__ void fold() {
    if constexpr (kTwoLevels) {
#pragma unroll
      for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int j = 0; j < 2 * NT; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) total[i][j][e] += recent[i][j][e], recent[i][j][e] = 0.f;
    }
  }
};

/// sums += A B of one step: the warp's rows of A from m on, its columns of B from n on. fp32 as three TF32 products, or
/// one (`tf32`).
template <class Element, bool TRANS_A, int SIZE_A, bool TRANS_B, int SIZE_B, int MT, int NT>
__device__ __forceinline__ void multiply_step(Sums<Element, MT, NT>& sums, uint32_t tile_a, uint32_t tile_b, int m,
                                              int n, int lane, [[maybe_unused]] bool tf32) {
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    uint32_t a[MT][4], b[NT][4];
#pragma unroll
    for (int i = 0; i < MT; ++i) load_a<Element, TRANS_A, SIZE_A>(a[i], tile_a, m + 16 * i, pair, lane);
#pragma unroll
    for (int j = 0; j < NT; ++j) load_b<Element, TRANS_B, SIZE_B>(b[j], tile_b, n + 16 * j, pair, lane);
    if constexpr (sizeof(Element) == 2) {
#pragma unroll
      for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int j = 0; j < 2 * NT; ++j)
          mma_m16n8k16<Element>(sums.total[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    } else if (tf32) {
#pragma unroll
      for (int i = 0; i < MT; ++i) {
#pragma unroll
        for (int r = 0; r < 4; ++r) a[i][r] = split_tf32(__uint_as_float(a[i][r])).big;
      }
#pragma unroll
      for (int j = 0; j < 2 * NT; ++j) {
        const uint32_t b0 = split_tf32(__uint_as_float(b[j / 2][j % 2 * 2])).big;
        const uint32_t b1 = split_tf32(__uint_as_float(b[j / 2][j % 2 * 2 + 1])).big;
#pragma unroll
        for (int i = 0; i < MT; ++i) mma_m16n8k8_tf32(sums.recent[i][j], a[i], b0, b1);
      }
    } else {
      Tf32Pair pa[MT][4];
#pragma unroll
      for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int r = 0; r < 4; ++r) pa[i][r] = split_tf32(__uint_as_float(a[i][r]));
#pragma unroll
      for (int j = 0; j < 2 * NT; ++j) {
        const Tf32Pair pb[2] = {split_tf32(__uint_as_float(b[j / 2][j % 2 * 2])),
                                split_tf32(__uint_as_float(b[j / 2][j % 2 * 2 + 1]))};
#pragma unroll
        for (int i = 0; i < MT; ++i) mma_m16n8k8_f32(sums.recent[i][j], pa[i], pb);
      }
    }
  }
}

/// The warp's sums into a tile of fp32 in shared memory, element (m, n) at m * step_m + n * step_n.
template <class Element, int MT, int NT>
__device__ __forceinline__ void stage_sums(const Sums<Element, MT, NT>& sums, float* staged, int step_m, int step_n,
                                           int m, int n, int lane) {
  const int row = m + lane / 4, column = n + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < MT; ++i)
#pragma unroll
    for (int j = 0; j < 2 * NT; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        staged[(row + 16 * i + e / 2 * 8) * step_m + (column + 8 * j + e % 2) * step_n] = sums.total[i][j][e];
}

__device__ __forceinline__ int64_t index_at(const IndexArray& indices, int64_t i) {
  return indices.wide ? __ldg(static_cast<const long long*>(indices.data) + i)
                      : int64_t(__ldg(static_cast<const int*>(indices.data) + i));
}

/// Where list `i` of a pattern begins and ends, inside [0, nnz] whatever the offsets are.
struct Extent {
  int64_t begin, end;
};
__device__ __forceinline__ Extent list_extent(const IndexArray& offsets, int64_t i, int64_t nnz) {
  const int64_t begin = min(max(index_at(offsets, i), int64_t(0)), nnz);
  return {begin, min(max(index_at(offsets, i + 1), begin), nnz)};
}

}  // namespace sparsekit::cuda

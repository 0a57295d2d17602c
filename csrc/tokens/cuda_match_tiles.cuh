// The steps of the search on tensor cores (cuda_match_sm80.cu): products, squares, and the comparison of a tile.
#pragma once

#include "common/cuda/math.cuh"
#include "common/cuda/mma.cuh"
#include "common/cuda/shared_memory.cuh"

namespace sparsekit::cuda {

constexpr int kStepBytes = 128, kStepChunks = kStepBytes / kChunkBytes;

template <class Element>
constexpr uint32_t kAllButSigns = sizeof(Element) == 4 ? 0x7fffffffu : 0x7fff7fffu;

struct Nearest {
  const char* metric;
  int64_t sample_bytes, row_bytes;  // strides
  int64_t dim, tokens, protect, sources;
  const int32_t* counts;  // [samples] or null
  float* best;            // [samples, sources]
  int32_t* target;        // [samples, sources]
  int32_t* inexact;       // [samples, tiles]

  __device__ __forceinline__ int64_t count(int64_t s) const {
    if (!counts) return tokens;
    const int64_t n = counts[s];
    return n < 0 ? 0 : n > tokens ? tokens : n;
  }
};

/// Two 8x8 matrices of 16-bit elements (lanes 0..15 give addresses), as load_matrices.
__device__ __forceinline__ void load_two_matrices(uint32_t (&registers)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
               : "=r"(registers[0]), "=r"(registers[1])
               : "r"(address));
}

/// The two elements of a word.
template <class Element>
__device__ __forceinline__ void widen_two(uint32_t word, float* low, float* high);
template <>
__device__ __forceinline__ void widen_two<__nv_bfloat16>(uint32_t word, float* low, float* high) {
  *low = __uint_as_float(word << 16);
  *high = __uint_as_float(word & 0xffff0000u);
}
template <>
__device__ __forceinline__ void widen_two<__half>(uint32_t word, float* low, float* high) {
  *low = __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
  *high = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
}

/// Products of 32 bytes of the rows, 16 elements of 16 bits or 8 of 32: the same addresses for either.
template <class Element, int TILES_M, int TILES_N>
__device__ __forceinline__ void multiply(float (&sum)[TILES_M][TILES_N][4], const uint32_t (&a)[TILES_M][4],
                                         const uint32_t (&b)[TILES_N][2]) {
  if constexpr (sizeof(Element) == 2) {
#pragma unroll
    for (int i = 0; i < TILES_M; ++i) {
#pragma unroll
      for (int j = 0; j < TILES_N; ++j) mma_m16n8k16<Element>(sum[i][j], a[i], b[j][0], b[j][1]);
    }
  } else {
    Tf32Pair rows[TILES_M][4];
#pragma unroll
    for (int i = 0; i < TILES_M; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) rows[i][r] = split_tf32(__uint_as_float(a[i][r]));
    }
#pragma unroll
    for (int j = 0; j < TILES_N; ++j) {
      const Tf32Pair columns[2] = {split_tf32(__uint_as_float(b[j][0])), split_tf32(__uint_as_float(b[j][1]))};
#pragma unroll
      for (int i = 0; i < TILES_M; ++i) mma_m16n8k8_f32(sum[i][j], rows[i], columns);
    }
  }
}

/// The sum of the squares of 16 bytes of a row.
template <class Element>
__device__ __forceinline__ float add_squares(const char* chunk, float square) {
  const uint4 four = *reinterpret_cast<const uint4*>(chunk);
  const uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(Element) == 4) {
      const float x = __uint_as_float(words[i]);
      square = fmaf(x, x, square);
    } else {
      float low, high;
      widen_two<Element>(words[i], &low, &high);
      square = fmaf(low, low, square);
      square = fmaf(high, high, square);
    }
  }
  return square;
}

/// sum += the products of one stage, rows first_row .. with rows first_column .. of the tile; squares += those of this
/// thread's rows (`own_row` on) and chunks of others (`own_chunk` on): addresses in the stage. They are spread over the
/// products, so that one is loaded while the other is computed.
template <class Element, class Tile>
__device__ __forceinline__ void multiply_step(float (&sum)[Tile::tiles_m][Tile::tiles_n][4],
                                              float (&squares)[Tile::own_rows + Tile::own_chunks], uint32_t stage,
                                              const char* memory, int first_row, int first_column, int lane) {
  const int thread = int(threadIdx.x);
#pragma unroll
  for (int pair = 0; pair < kStepChunks / 2; ++pair) {
    uint32_t a[Tile::tiles_m][4], b[Tile::tiles_n][2];
#pragma unroll
    for (int i = 0; i < Tile::tiles_m; ++i) {
      load_matrices(a[i], address_rows16<kStepBytes>(stage, first_row + 16 * i, 2 * pair, lane));
    }
#pragma unroll
    for (int j = 0; j + 1 < Tile::tiles_n; j += 2) {
      uint32_t both[4];
      load_matrices(both, address_columns16<kStepBytes>(stage, first_column + 8 * j, 2 * pair, lane));
      b[j][0] = both[0], b[j][1] = both[1], b[j + 1][0] = both[2], b[j + 1][1] = both[3];
    }
    if constexpr (Tile::tiles_n % 2 == 1) {
      const int row = first_column + 8 * (Tile::tiles_n - 1) + (lane & 7);
      load_two_matrices(b[Tile::tiles_n - 1], stage + swizzled<kStepBytes>(row, 2 * pair + ((lane >> 3) & 1)));
    }
    multiply<Element>(sum, a, b);
#pragma unroll
    for (int i = 0; i < Tile::own_rows; ++i) {
#pragma unroll
      for (int c = 2 * pair; c < 2 * pair + 2; ++c) {
        const char* chunk = memory + swizzled<kStepBytes>(i * Tile::threads + thread, c);
        squares[i] = add_squares<Element>(chunk, squares[i]);
      }
    }
#pragma unroll
    for (int i = pair * Tile::own_chunks / 4; i < (pair + 1) * Tile::own_chunks / 4; ++i) {
      const int row = Tile::own_rows * Tile::threads + thread / kStepChunks + i * Tile::apart;
      const char* chunk = memory + swizzled<kStepBytes>(row, thread % kStepChunks);
      squares[Tile::own_rows + i] = add_squares<Element>(chunk, squares[Tile::own_rows + i]);
    }
  }
}

/// Of each source of the tile the best destination among this warp's columns. `inverse`: 1 / length of the panel's
/// rows, 0 for rows of zeros (their products are 0).
template <class Tile>
__device__ __forceinline__ void compare_tile(const Nearest& m, const float (&sum)[Tile::tiles_m][Tile::tiles_n][4],
                                             const float* inverse, int first, int destinations, int warp_m, int warp_n,
                                             int lane, float* value_of, int32_t* place_of) {
  const int group = lane >> 2, column0 = warp_n * Tile::tiles_n * 8 + 2 * (lane & 3);
#pragma unroll
  for (int i = 0; i < Tile::tiles_m; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float best = -kInfinity;
      int32_t place = INT32_MAX;
#pragma unroll
      for (int j = 0; j < Tile::tiles_n; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int column = column0 + 8 * j + c;
          const int32_t token = 2 * (first + column) + 1;
          const float value = sum[i][j][2 * half + c] * inverse[column];
          if (first + column < destinations && token >= m.protect && value > best) best = value, place = token;
        }
      }
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        const float other = __shfl_xor_sync(0xffffffffu, best, step);
        const int32_t other_place = __shfl_xor_sync(0xffffffffu, place, step);
        if (other > best || (other == best && other_place < place)) best = other, place = other_place;
      }
      const int row = (warp_m * Tile::tiles_m + i) * 16 + 8 * half + group;
      if ((lane & 3) == 0) {
        value_of[warp_n * Tile::sources + row] = best;
        place_of[warp_n * Tile::sources + row] = place;
      }
    }
  }
}

}  // namespace sparsekit::cuda

// Blocks of one to eight rows (1 x 16, 4 x 1, 8 x 8): one tile covers them, and a slab of x is used once for each.
//
// Rows share slabs by going through the inner dimension together, a chunk of slabs that stays in L1 after the other. A
// visit of a row is short, 16 steps of a 1 x 16 block at 25 %, so the loop over the rows is here, and what the next
// chunk wants is fetched meanwhile: its slabs, and per row the weights that follow; without that, a visit took 240
// cycles longer, most of which it waited for weights.
//
// Bound: loads, of which a step of one row has nine for eight multiply-adds.
#pragma once

#include "matmul/cpu_tiles.h"

namespace sparsekit {
namespace {

/// One chunk of the rows of an item.
template <class Product>
struct LowChunk {
  using Element = typename Product::Element;
  const BlockSparseProduct* p = nullptr;
  const IndexArray* offsets = nullptr;
  const int32_t* slabs = nullptr;
  const int32_t* entries = nullptr;
  const Element* packed = nullptr;
  int64_t first = 0, last = 0;   // blocks of rows
  int64_t chunk_end = 0;         // slabs
  int64_t group = 0;             // blocks that are summed in one chain
  int64_t depth = 0, width = 0;  // of a slab
  int64_t weight_stride = 0;     // as in Blocks
  const char* ahead = nullptr;   // slabs of the next chunk
  const char* ahead_end = nullptr;
  int64_t* cursors = nullptr;
  float* sums = nullptr;
};

template <class Product, int rows, int registers, bool down>
static void multiply_low(const LowChunk<Product>& c) {
  using Element = typename Product::Element;
  const Element* values = static_cast<const Element*>(c.p->values);
  const int64_t block_size = int64_t(c.p->pattern.block_rows) * c.p->pattern.block_cols / Product::pair;
  const int64_t slab_size = c.depth * c.width, share = round_up((c.ahead_end - c.ahead) / (c.last - c.first), 64);
  const char* ahead = c.ahead;
  float* out = c.sums;
  for (int64_t block = c.first; block < c.last; ++block, out += rows * c.width) {
    const char* to = c.ahead_end - ahead < share ? c.ahead_end : ahead + share;
    for (; ahead < to; ahead += 64) Simd::prefetch(ahead);
    int64_t& cursor = c.cursors[block - c.first];
    int64_t n = cursor;
    const int64_t begin = (*c.offsets)[block], end = (*c.offsets)[block + 1];
    while (n < end && c.slabs[n] < c.chunk_end) {
      const bool add = n > begin;
      const int64_t chain_end = smaller(end, n + c.group);
      Simd::Float sum[rows][registers];
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < registers; ++j) sum[i][j] = Simd::zero();
      do {
        const Element* weight = values + (c.entries ? c.entries[n] : n) * block_size;
        const Element* slab = c.packed + c.slabs[n] * slab_size;
        for (int64_t k = 0; k < c.depth; ++k)
          tile_step<Product, rows, registers, down>(weight, c.weight_stride, slab, c.width, sum);
      } while (++n < chain_end && c.slabs[n] < c.chunk_end);
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < registers; ++j) {
          float* at = out + i * c.width + j * Simd::lanes;
          Simd::store(at, add ? Sums<Product>::add(Simd::load(at), sum[i][j]) : sum[i][j]);
        }
    }
    if (n == cursor) continue;
    cursor = n;
    if (n < end) Simd::prefetch(values + (c.entries ? c.entries[n] : n) * block_size);
  }
}

/// Whether there is such a loop for blocks of `rows` rows and panels of `registers` vectors.
static bool has_low(int64_t rows, int registers) {
  constexpr bool many = Simd::registers == 32;
  return (registers == (many ? 8 : 4) && (rows == 1 || rows == 2)) || (registers == (many ? 6 : 2) && rows == 4) ||
         (many && registers == 3 && rows == 8);
}

template <class Product, bool down>
static void multiply_low(const LowChunk<Product>& c, int64_t rows) {
  constexpr bool many = Simd::registers == 32;
  switch (rows) {
    case 1: return multiply_low<Product, 1, many ? 8 : 4, down>(c);
    case 2: return multiply_low<Product, 2, many ? 8 : 4, down>(c);
    case 4: return multiply_low<Product, 4, many ? 6 : 2, down>(c);
  }
  if constexpr (many) multiply_low<Product, 8, 3, down>(c);
}

}  // namespace
}  // namespace sparsekit

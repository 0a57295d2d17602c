// The loop that takes the time in every block-sparse product: a register tile of sums.
//
//   sum[i][lane] += sum over listed blocks, over steps k of the block, of weight(i, k) * slab[k][lane]
//
// Lanes are tokens (block_sddmm: columns). What stands in the lanes was packed into slabs, one per block column, once
// per call; weights are broadcast from memory where their tensor has them, so that no layout is ever prepared and every
// block size is the same code. A step is one Product::Element of the inner dimension: one fp32, two bf16, four int8.
//
// Per step a tile of `rows` x `registers` loads rows + registers times for rows * registers multiply-adds: 8 x 3 of 32
// registers makes 24 of 11 loads, and reads a slab from L2 with 16 bytes a cycle.
#pragma once

#include <cstdlib>
#include <cstring>

#include "common/cpu/scratch.h"
#include "common/cpu/simd_math.h"
#include "matmul/implementations.h"

namespace sparsekit {
namespace {

SPARSEKIT_INLINE int64_t round_up(int64_t a, int64_t to) { return (a + to - 1) / to * to; }
SPARSEKIT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
SPARSEKIT_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/// Scratch memory, carved from one piece that the next call finds again: first reserve() everything, then allocate().
/// What is reserved may be read up to 64 bytes beyond its end. What each thread wants is reserved in a Scratch of its
/// own, as many times as there are threads.
struct Scratch {
  char* data = nullptr;
  int64_t size = 0;

  int64_t reserve(int64_t bytes) {
    int64_t at = size;
    size += round_up(bytes, 64);
    return at;
  }
  bool allocate() { return (data = take_scratch(size + 64)) != nullptr; }
  void release() { give_back_scratch(data); }
};

/// How the sums of a product are added, and made fp32 in the end: they are, unless a product says otherwise.
template <class Product>
struct Sums {
  SPARSEKIT_INLINE Simd::Float add(Simd::Float a, Simd::Float b) { return Simd::add(a, b); }
  SPARSEKIT_INLINE void to_float(float*, const int32_t*, int64_t, int64_t) {}
};

/// Steps that are summed in one chain: fp32 sums of 384 terms had twice the error of torch's. bf16 rounds more than
/// that.
template <class Product>
constexpr int64_t longest_chain = Product::pair == 1 ? 128 : 512;

/// Blocks to be multiplied with slabs, and summed.
template <class Product>
struct Blocks {
  using Element = typename Product::Element;
  const Element* weights = nullptr;
  int64_t block_size = 0;            // elements from one block to the next
  const int32_t* entries = nullptr;  // block numbers in `weights`; null: 0, 1, 2, ...
  int64_t weight_stride = 0;         // elements from one row of a block to the next (`down`: from one step to the next)
  const Element* slabs = nullptr;
  int64_t slab_size = 0;          // elements from one slab to the next
  const int32_t* slab = nullptr;  // [count] slab numbers
  int64_t slab_stride = 0;        // elements from one step to the next
  int64_t count = 0;
  int64_t depth = 0;  // steps of a block
  // Brought into L2 meanwhile, a part by every tile: what block number n + ahead needs, while it exists.
  int64_t ahead = 0, exist = 0;        // from the first of these blocks on
  bool prefetch_slabs = false;         // they do not all fit L2
  const char* next_weights = nullptr;  // of block 0 (of entry 0, where entries are given), as they are stored
  int64_t next_bytes = 0;              // of one of them
  const int32_t* next_entries = nullptr;
};

/// Rows of a register tile of `registers` vectors: the accumulators fill the register file.
constexpr int tile_rows(int registers) {
  return Simd::registers == 32 ? (registers == 1   ? 16
                                  : registers <= 3 ? 8
                                  : registers <= 6 ? 4
                                                   : 2)
                               : (registers == 1   ? 8
                                  : registers == 2 ? 4
                                                   : 2);
}

/// A line of the weights that come next is fetched every so many steps: all at once, they took 5 % of the loads' time.
template <int rows>
constexpr int fetch_steps = rows >= 16 ? 1 : 16 / rows;

/// One step of a tile.
template <class Product, int rows, int registers, bool down>
SPARSEKIT_INLINE void tile_step(const typename Product::Element*& weight, int64_t stride,
                                const typename Product::Element*& slab, int64_t slab_stride,
                                Simd::Float (&sum)[rows][registers]) {
  typename Product::Operand x[registers];
#pragma GCC unroll 8
  for (int j = 0; j < registers; ++j) x[j] = Product::load(slab + j * Simd::lanes);
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    typename Product::Operand w = Product::broadcast(weight + (down ? i : i * stride));
    if (registers > 1) Simd::hold(w);
#pragma GCC unroll 8
    for (int j = 0; j < registers; ++j) sum[i][j] = Product::madd(w, x[j], sum[i][j]);
  }
  weight += down ? stride : 1;
  slab += slab_stride;
}

/// One tile, which fetches what comes next or has no instruction for it: rows `row` to `row + rows` of the blocks.
/// Stores its sums to out[i][lane], or adds them to it.
template <class Product, int rows, int registers, bool down, bool fetch>
static __attribute__((noinline)) void multiply_tile(const Blocks<Product>& blocks, int64_t row, int64_t all_rows,
                                                    float* out, int64_t out_stride, bool add) {
  using Element = typename Product::Element;
  Simd::Float sum[rows][registers];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < registers; ++j) sum[i][j] = Simd::zero();
  const int64_t stride = blocks.weight_stride, slab_stride = blocks.slab_stride, depth = blocks.depth;
  const Element* weights = blocks.weights + (down ? row : row * stride);
  const int64_t slab_bytes = depth * slab_stride * int64_t(sizeof(Element));
  int64_t part_from = 0, part_to = 0, first_share = 0, fetch_step = 0;
  if (fetch) {  // divisions, which short visits do without
    part_from = row * slab_bytes / all_rows, part_to = (row + rows) * slab_bytes / all_rows;
    first_share = blocks.next_bytes * row / all_rows;
    fetch_step = blocks.next_bytes * rows / all_rows / larger(1, depth / fetch_steps<rows>);
  }
  for (int64_t n = 0; n < blocks.count; ++n) {
    const Element* weight = weights + (blocks.entries ? blocks.entries[n] : n) * blocks.block_size;
    const Element* slab = blocks.slabs + blocks.slab[n] * blocks.slab_size;
    const char* ahead = reinterpret_cast<const char*>(slab);
    if (fetch && n + blocks.ahead < blocks.exist) {
      const int64_t next = n + blocks.ahead;
      if (blocks.prefetch_slabs) {
        const char* part = reinterpret_cast<const char*>(blocks.slabs + blocks.slab[next] * blocks.slab_size);
        for (int64_t at = part_from; at < part_to; at += 64) Simd::prefetch(part + at);
      }
      if (blocks.next_weights)
        ahead = blocks.next_weights + (blocks.next_entries ? blocks.next_entries[next] : next) * blocks.next_bytes +
                first_share;
    }
    int64_t k = 0;
    for (; fetch && k + fetch_steps<rows> <= depth; k += fetch_steps<rows>) {
      Simd::prefetch(ahead);
      ahead += fetch_step;
      for (int u = 0; u < fetch_steps<rows>; ++u)
        tile_step<Product, rows, registers, down>(weight, stride, slab, slab_stride, sum);
    }
    for (; k < depth; ++k) tile_step<Product, rows, registers, down>(weight, stride, slab, slab_stride, sum);
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < registers; ++j) {
      float* to = out + i * out_stride + j * Simd::lanes;
      Simd::store(to, add ? Sums<Product>::add(Simd::load(to), sum[i][j]) : sum[i][j]);
    }
}

/// All `count` rows of the blocks, in tiles as high as they fit.
template <class Product, int registers, bool down>
static void multiply_blocks(const Blocks<Product>& blocks, int64_t count, float* out, int64_t out_stride, bool add) {
  constexpr int most = tile_rows(registers);
  int64_t row = 0;
  for (; row + most <= count; row += most) {
    if (blocks.ahead < blocks.exist) {
      multiply_tile<Product, most, registers, down, true>(blocks, row, count, out + row * out_stride, out_stride, add);
    } else {
      multiply_tile<Product, most, registers, down, false>(blocks, row, count, out + row * out_stride, out_stride, add);
    }
  }
  if (most > 8 && row + 8 <= count) {
    multiply_tile < Product,
        most<8 ? most : 8, registers, down, false>(blocks, row, count, out + row * out_stride, out_stride, add);
    row += 8;
  }
  if (most > 4 && row + 4 <= count) {
    multiply_tile < Product,
        most<4 ? most : 4, registers, down, false>(blocks, row, count, out + row * out_stride, out_stride, add);
    row += 4;
  }
  if (most > 2 && row + 2 <= count) {
    multiply_tile<Product, 2, registers, down, false>(blocks, row, count, out + row * out_stride, out_stride, add);
    row += 2;
  }
  if (row < count)
    multiply_tile<Product, 1, registers, down, false>(blocks, row, count, out + row * out_stride, out_stride, add);
}

/// The same with a number of registers that is known at run time: 1, 2, 3 (of 32 registers) and 4, 6, 8 for low blocks.
template <class Product, bool down>
static void multiply_blocks(const Blocks<Product>& blocks, int registers, int64_t count, float* out, int64_t out_stride,
                            bool add) {
  switch (registers) {
    case 1: return multiply_blocks<Product, 1, down>(blocks, count, out, out_stride, add);
    case 2: return multiply_blocks<Product, 2, down>(blocks, count, out, out_stride, add);
    case 4: return multiply_blocks<Product, 4, down>(blocks, count, out, out_stride, add);
  }
  if constexpr (Simd::registers == 32) {
    switch (registers) {
      case 3: return multiply_blocks<Product, 3, down>(blocks, count, out, out_stride, add);
      case 6: return multiply_blocks<Product, 6, down>(blocks, count, out, out_stride, add);
      case 8: return multiply_blocks<Product, 8, down>(blocks, count, out, out_stride, add);
    }
  }
}

}  // namespace
}  // namespace sparsekit

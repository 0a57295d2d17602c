// The lists of several block rows brought into the order in which cuda_small_blocks_sm90.cuh walks them.
//
// A panel is 256 features, the lists of 256 / list_size block rows (x W: block columns). The contraction is cut into
// chunks of 32; what any of a panel's lists holds of x is loaded once, chunk after chunk. A unit is 16 numbers of the
// contraction of a block. Units lie in their list's own extent, sorted by chunk, and their weights are packed as the
// operands of mma.sync: a warp reads 512 contiguous bytes for 16 features, whichever way round the block is stored.
#pragma once

#include <cstddef>

#include "common/cuda/launch.h"
#include "sparsekit/matmul.h"

namespace sparsekit::cuda {

struct ProductCall;

constexpr int kSmallFeatures = 256, kSmallChunk = 32;

struct SmallBlocks {
  int lists = 0;  // of a panel
  int tiles = 0;  // of 16 features in a list
  int units = 0;  // in a block
  int64_t panels = 0, chunks = 0;
  uint4* fragments = nullptr;  // [nnz, units, tiles, 32 lanes]
  int2* entries = nullptr;     // [nnz]: the block's place in values, and where it begins in the contraction
  int32_t* codes = nullptr;    // [nnz, units]: 2 * place of the unit's chunk in `used` + which half of it
  int32_t* used = nullptr;     // [panels, chunks]: the chunks that the panel uses, ascending
  int32_t* counts = nullptr;   // [panels]: how many
  int32_t* lengths = nullptr;  // [panels * lists]: units of a list
};

/// Sizes only; blocks have sides of 16 and 32.
SmallBlocks small_blocks_of(const ProductCall& call);
size_t small_blocks_bytes(const SmallBlocks& blocks, int64_t nnz);
int small_blocks_shared_bytes(const SmallBlocks& blocks);

/// Points into `workspace` and launches the kernels that fill it.
Status make_small_blocks(SmallBlocks* blocks, const ProductCall& call, void* workspace, void* stream);

}  // namespace sparsekit::cuda

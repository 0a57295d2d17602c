// A block-sparse product as the kernels see it, and the order of its tiles.
#pragma once

#include "matmul/cuda_epilogue.cuh"

namespace sparsekit::cuda {

struct ProductCall {
  BlockSparsePattern pattern;
  IndexArray offsets;    // crow, or ccol
  IndexArray neighbour;  // of an entry: the block of the contraction it stands at (col, or row)
  IndexArray place;      // of an entry: its block in values (x W only)
  const void* values;
  TokensView<const void*> input;
  Output out;
  int64_t lists;              // block rows (x W: block columns)
  int64_t inner, neighbours;  // length of the contraction, and its blocks
  int list_size, inner_size;  // of a block: features, contraction
  int parts;                  // tiles of BN in list_size
  int64_t token_tiles;
  bool tf32;
};

/// Which CTAs run at the same time: GROUP token tiles, which share x in L2, go through all lists together.
struct TileAt {
  int64_t token_tile, list;
  int part;
};
template <int GROUP>
__device__ __forceinline__ TileAt tile_at(const ProductCall& call, int64_t cta) {
  const int64_t per_token_tile = call.lists * call.parts, per_group = per_token_tile * GROUP;
  const int64_t group = cta / per_group, first = group * GROUP, within = cta - group * per_group;
  const int64_t size = min(int64_t(GROUP), call.token_tiles - first);
  const int64_t feature_tile = within / size;
  return {first + within % size, feature_tile / call.parts, int(feature_tile % call.parts)};
}

/// All but `parts` and `token_tiles`.
inline ProductCall product_call(const BlockSparseProduct& p) {
  const BlockSparsePattern& w = p.pattern;
  ProductCall call;
  call.pattern = w;
  call.offsets = p.transposed ? p.transpose.ccol : w.crow;
  call.neighbour = p.transposed ? p.transpose.row : w.col;
  if (p.transposed) call.place = p.transpose.entry;
  call.values = p.values;
  call.input = p.input;
  call.out = output_of(p);
  call.lists = p.transposed ? w.col_blocks() : w.row_blocks();
  call.neighbours = p.transposed ? w.row_blocks() : w.col_blocks();
  call.inner = p.transposed ? w.rows : w.cols;
  call.list_size = p.transposed ? w.block_cols : w.block_rows;
  call.inner_size = p.transposed ? w.block_rows : w.block_cols;
  call.parts = 1;
  call.token_tiles = 1;
  call.tf32 = p.tf32;
  return call;
}

}  // namespace sparsekit::cuda

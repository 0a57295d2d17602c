// Stripe-sparse attention forward on tensor cores: the loop of cuda_forward_sm80.cuh over tiles of a stripe plan.
//
//   S = q k^T,  P = exp2(S scale log2e - m),  l += rowsum P,  O = O exp2(m_old - m) + P v,  out = O / l
//
// Tiling: a CTA owns the 128 or 64 rows of a unit (cuda_stripes.h). K and V of a tile are gathered row by row with
// cp.async into the layout that blocks have, so the products do not know the difference; the row numbers come through
// a ring in shared memory, two tiles ahead. Tiles of listed blocks take the same way.
//
// Bound: tensor cores, as for blocks. A gathered row of 128 elements is two whole lines of 128 bytes: what gathering
// costs is one read of shared memory for each 16-byte copy.
#pragma once

#include "attention/cuda_forward_sm80.cuh"
#include "attention/cuda_stripes_kernels.h"
#include "attention/cuda_stripes_tiles.cuh"

namespace sparsekit::sm80 {

/// load_rows for the rows of a tile. Row numbers are read before the copies, which the compiler leaves in their order.
template <int ROW_BYTES>
__device__ __forceinline__ void gather_rows(uint32_t tile, const char* head, int row_bytes, const int32_t* place,
                                            bool of_block, int count, int end, int chunks, const Lane& at) {
  constexpr int kChunks = ROW_BYTES / kChunkBytes;
  for (int eight = at.warp; eight < count / 8; eight += at.warps) {
    int from[kChunks / 4];
#pragma unroll
    for (int i = 0; i < kChunks / 4; ++i) {
      from[i] = tile_row(place, of_block, eight * 8 + (i * kWarpSize + at.lane) / kChunks);
    }
#pragma unroll
    for (int i = 0; i < kChunks / 4; ++i) {
      const int row = (i * kWarpSize + at.lane) / kChunks, chunk = (i * kWarpSize + at.lane) % kChunks;
      copy_async_16(tile + eight * 8 * ROW_BYTES + swizzled<ROW_BYTES>(row, chunk),
                    head + int64_t(from[i]) * row_bytes + chunk * kChunkBytes, from[i] < end && chunk < chunks);
    }
  }
}

/// Hides what a row of a masked tile does not see: s = -inf there.
template <class Tile>
__device__ __forceinline__ void mask_stripes(Scores<Tile>& s, const StripeSight& sight, const int32_t* place,
                                             bool of_block, int first_row, const Lane& at) {
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + 16 * i + 8 * half + at.group;
#pragma unroll
      for (int n = 0; n < Tile::kKeys / 8; n += 4) {
        const uint32_t wanted = (Tile::kKeys < 32 ? 0x0303u : 0x03030303u) << (2 * at.pair);
        const uint32_t word = sight.word(place, of_block, row, 8 * n, wanted) >> (2 * at.pair);
#pragma unroll
        for (int j = 0; j < 4 && n + j < Tile::kKeys / 8; ++j) {
          if (!(word >> (8 * j) & 1)) s[i][n + j][2 * half] = -kInfinity;
          if (!(word >> (8 * j + 1) & 1)) s[i][n + j][2 * half + 1] = -kInfinity;
        }
      }
    }
  }
}

/// The same for a tile of columns where a key's position is its number: what a row does not see are keys above one
/// bound, and of those that only the band shows, keys up to another. Bit by bit this took as long as two other tiles.
template <class Tile>
__device__ __forceinline__ void mask_columns(Scores<Tile>& s, const StripeSight& sight, const int32_t* place,
                                             int first_row, const Lane& at) {
  const AttentionProblem& p = sight.p;
  int last[Tile::kRowTiles][2], before_band[Tile::kRowTiles][2];
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t position = sight.position(first_row + 16 * i + 8 * half + at.group);
      last[i][half] = int(min(position, int64_t(kColumnRow) - 1));
      before_band[i][half] = int(min(max(position - p.stripes.local, int64_t(-1)), int64_t(kColumnRow) - 1));
    }
  }
#pragma unroll
  for (int n = 0; n < Tile::kKeys / 8; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int entry = place[8 * n + 2 * at.pair + c], key = entry & kColumnRow;
      const int above = key >= p.len_k ? kColumnRow : p.causal || entry < 0 ? key : INT_MIN;
      const int below = entry < 0 ? key : kColumnRow;
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (above > last[i][half] || below <= before_band[i][half]) s[i][n][2 * half + c] = -kInfinity;
        }
      }
    }
  }
}

/// transform_scores for the keys of a tile.
template <class Tile>
__device__ __forceinline__ void transform_stripes(Scores<Tile>& s, const AttentionProblem& p, const float* bias,
                                                  const int32_t* place, bool of_block, const Lane& at) {
#pragma unroll
  for (int n = 0; n < Tile::kKeys / 8; ++n) {
    float added[2] = {0.f, 0.f};
    if (bias) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int key = tile_row(place, of_block, 8 * n + 2 * at.pair + c);
        if (key < p.len_k) added[c] = bias[key] * kLog2e;
      }
    }
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float x = s[i][n][c] * p.scale;
        if (p.softcap > 0.f) x = p.softcap * tanh_fast(x / p.softcap);
        s[i][n][c] = fmaf(x, kLog2e, added[c % 2]);
      }
    }
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kCtas)
    stripes_forward(const __grid_constant__ AttentionForward p, const __grid_constant__ StripePlan plan) {
  using Element = typename Tile::Element;
  constexpr int kKeys = Tile::kKeys, kRow = Tile::kKeyRowBytes, kValueRow = Tile::kValueRowBytes;
  extern __shared__ __align__(128) char shared[];
  const Lane at;
  const StripeUnit unit = stripe_unit(p, plan, blockIdx.x);
  if (unit.rows.first >= unit.rows.end) return;
  const int cta_rows = at.warps * Tile::kRowsPerWarp;
  const int first_row = unit.rows.first + at.warp * Tile::kRowsPerWarp;

  const uint32_t q_tile = shared_address(shared), k_tile = q_tile + cta_rows * kRow, v_tile = k_tile + kKeys * kRow;
  const uint32_t ring_at = v_tile + kKeys * kValueRow - q_tile;
  const int64_t element = sizeof(Element);
  const char* key =
      static_cast<const char*>(p.key.data) + (unit.batch * p.key.batch + unit.kv_head * p.key.head) * element;
  const char* value =
      static_cast<const char*>(p.value.data) + (unit.batch * p.value.batch + unit.kv_head * p.value.head) * element;
  const int key_chunks = p.head_dim * int(sizeof(Element)) / kChunkBytes;
  const int value_chunks = p.value_dim * int(sizeof(Element)) / kChunkBytes;

  const TileRing<kKeys> ring(plan, unit.cell, reinterpret_cast<int32_t*>(shared + ring_at));
  auto load_key = [&](int tile) {
    gather_rows<kRow>(k_tile, key, int(p.key.row * element), ring.place(tile), ring.of_block(tile), kKeys, int(p.len_k),
                      key_chunks, at);
  };
  auto load_value = [&](int tile) {
    gather_rows<kValueRow>(v_tile, value, int(p.value.row * element), ring.place(tile), ring.of_block(tile), kKeys,
                           int(p.len_k), value_chunks, at);
  };
  ring.fill(ring.place(0), 0);
  ring.fill(ring.place(1), 1);
  copy_async_commit();
  const char* query =
      static_cast<const char*>(p.query.data) + (unit.batch * p.query.batch + unit.head * p.query.head) * element;
  load_rows<kRow>(q_tile, query, int(p.query.row * element), unit.rows.first, cta_rows, unit.rows.end, key_chunks, at);
  copy_async_commit();

  const bool transformed = p.softcap > 0.f || p.key_bias || !(p.scale > 0.f);
  const float factor = transformed ? 1.f : p.scale * kLog2e;
  const float* bias = p.key_bias ? p.key_bias + unit.batch * p.key_bias_batch + unit.head * p.key_bias_head : nullptr;
  const StripeSight sight(p, unit.batch, unit.rows.first);

  Outputs<Tile> o;
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i)
#pragma unroll
    for (int n = 0; n < Tile::kValue / 8; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c) o[i][n][c] = 0.f;
  Softmax<Tile> softmax;

  auto exists = [&](int tile) {
    return tile < ring.count && !sight.ends(ring.place(tile), ring.of_block(tile), unit.rows.end - 1);
  };
  copy_async_wait<1>();
  __syncthreads();  // the first two places are filled
  bool more = exists(0);
  if (more) load_key(0);
  copy_async_commit();

  const uint32_t q_lane = address_rows16<kRow>(q_tile, at.warp * Tile::kRowsPerWarp, 0, at.lane);
  const uint32_t k_lane = address_columns16<kRow>(k_tile, 0, 0, at.lane);
  const uint32_t v_lane = address_rows16<kValueRow>(v_tile, 0, 0, at.lane);
  for (int tile = 0; more; ++tile) {
    copy_async_wait<0>();
    __syncthreads();  // K, Q and the next place are here, and nobody reads the last V any more
    load_value(tile);
    copy_async_commit();

    Scores<Tile> s;
    multiply_keys<Tile>(s, q_lane, k_lane);
    copy_async_wait<0>();
    __syncthreads();  // V is here, and nobody reads K any more
    more = exists(tile + 1);
    if (more) load_key(tile + 1);
    ring.fill(ring.place(tile + 2), tile + 2);
    copy_async_commit();

    const int32_t* place = ring.place(tile);
    const bool of_block = ring.of_block(tile);
    if (transformed) transform_stripes<Tile>(s, p, bias, place, of_block, at);
    if (sight.masks<kKeys>(place, of_block)) {
      if (of_block || p.key_positions) {
        mask_stripes<Tile>(s, sight, place, of_block, first_row, at);
      } else {
        mask_columns<Tile>(s, sight, place, first_row, at);
      }
    }
    softmax.add(s, o, factor);
    if constexpr (sizeof(Element) == 2) {
      multiply_values_16bit<Tile>(o, s, v_lane);
    } else {
      multiply_values_f32<Tile>(o, s, shared + (v_tile - q_tile), at);
    }
  }
  // Without a tile Q may still be arriving, from all threads, where O is about to be staged.
  copy_async_wait<0>();
  __syncthreads();
  // write_rows ends at row len_q: here that is the unit's end, and lse moves with it.
  AttentionForward own = p;
  own.lse = p.lse + (int64_t(unit.batch) * p.heads_q + unit.head) * (p.len_q - unit.rows.end);
  own.len_q = unit.rows.end;
  write_rows<Tile>(o, softmax, factor, own, unit.batch, unit.head, first_row,
                   shared + at.warp * Tile::kRowsPerWarp * kRow, at);
}

template <class Tile>
constexpr StripesForwardKernel stripes_kernel_of() {
  return {stripes_forward<Tile>, Tile::kHead, Tile::kValue, Tile::kRowsPerWarp, Tile::kKeys, Tile::kCtas};
}

/// The tile sizes of bf16 and fp16: those of blocks (cuda_forward_sm80_16bit.cuh) in the classes that matter. Tiles of
/// 64 keys also serve blocks of 64.
template <class Element>
StripesForwardKernels stripes_forward_kernels_16bit() {
  static const StripesForwardKernel kernels[] = {
      stripes_kernel_of<ForwardTile<Element, 64, 64, 32, 128, 2>>(),
      stripes_kernel_of<ForwardTile<Element, 64, 64, 32, 64, 2>>(),
      stripes_kernel_of<ForwardTile<Element, 128, 128, 32, 64, 2>>(),
      stripes_kernel_of<ForwardTile<Element, 192, 128, 32, 64, 2>>(),
      stripes_kernel_of<ForwardTile<Element, 256, 256, 16, 64, 1>>(),
  };
  return {kernels, int(sizeof kernels / sizeof *kernels)};
}

}  // namespace sparsekit::sm80

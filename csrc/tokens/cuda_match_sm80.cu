// The most similar odd-positioned token of each even-positioned one, on tensor cores.
//
//   best[i] = max_j <m_2i, m_2j+1> / (|m_2i| |m_2j+1|),   target[i] = the first j that reaches it
//
// Tiling: a CTA owns `Tile::sources` even tokens of a sample and goes through the odd ones in panels. Both are read in
// steps of 128 bytes of each row through a ring of stages in shared memory (cp.async), all products of the tile wait in
// registers. The squares of the lengths are summed from the same stages between the products, so the metric is read
// from memory once and normalised never: after the last step a product is multiplied with 1 / |m_2j+1|, compared with
// the best so far and dropped. No matrix of similarities exists.
//   large   144 x 288, 12 warps of 48 x 72: 576 tokens are two tiles of one panel; 110 MB from L2 for 64 x 576 x 1024
//   in
//           bf16, where tiles of 64 x 96 take 310 MB
//   small   64 x 128, 8 warps of 32 x 32: short sequences, and cards with less shared memory
// Bound: tensor cores (mma.sync reaches 62 % of Hopper's peak: 20 us for 64 x 576 x 1024) and the one read of the
// metric (18 us), one under the other.
//
// Precision: products of 16-bit numbers are exact and added in fp32; fp32 goes through three tf32 products
// (common/cuda/mma.cuh). Squares leave fp32 beyond 1e+-9 or so of length: a tile that meets such a row (or NaN, or
// infinity) marks its sample, and cuda_match.cu searches that again in float64. Rows of zeros are similar by 0 here.
// Source: bipartite soft matching, Token Merging (arXiv 2210.09461), section 3.
#include <algorithm>

#include "common/cuda/mma.cuh"
#include "common/cuda/shared_memory.cuh"
#include "tokens/cuda_implementations.h"
#include "tokens/cuda_launch.h"
#include "tokens/cuda_match_tiles.cuh"

namespace sparsekit::cuda {
namespace {

/// WARPS_M x WARPS_N warps, each with TILES_M x TILES_N products of 16 x 8.
template <int WARPS_M, int WARPS_N, int TILES_M, int TILES_N, int STAGES>
struct Tile {
  static constexpr int warps_m = WARPS_M, warps_n = WARPS_N, tiles_m = TILES_M, tiles_n = TILES_N, stages = STAGES;
  static constexpr int threads = 32 * WARPS_M * WARPS_N;
  static constexpr int sources = 16 * WARPS_M * TILES_M, panel = 8 * WARPS_N * TILES_N;
  static constexpr int rows = sources + panel;
  static constexpr int stage_bytes = rows * kStepBytes;
  static constexpr int copies = rows * kStepChunks / threads;  // of 16 bytes, per thread and step
  static constexpr int apart = threads / kStepChunks;          // rows between those of a thread's copies
  // Whose squares a thread adds: its own rows; of the rows that are left, chunks.
  static constexpr int own_rows = rows / threads, own_chunks = (rows - own_rows * threads) * kStepChunks / threads;
  // Behind the stages: 1 / length of each row, then value and position of the best of each source and column of warps.
  static constexpr int shared_bytes = STAGES * stage_bytes + rows * 4 + 2 * WARPS_N * sources * 4;
  static_assert(rows * kStepChunks % threads == 0 && threads >= sources && apart % 8 == 0 && sources % apart == 0, "");
};
using Large = Tile<3, 4, 3, 9, 4>;  // 144 x 288
using Small = Tile<2, 4, 2, 4, 3>;  // 64 x 128

template <class Element, class Tile>
struct Stream {
  const char* sample;
  int64_t row_bytes, length;            // of a row: stride, and what is read
  int count, first_source, steps, all;  // steps of a panel, of all panels

  /// The token of this thread's i-th row.
  __device__ __forceinline__ int token_of(int panel, int i) const {
    const int row = int(threadIdx.x) / kStepChunks + i * Tile::apart;
    return row < Tile::sources ? 2 * (first_source + row) : 2 * (panel * Tile::panel + row - Tile::sources) + 1;
  }

  /// Whether this thread's part of a row holds anything but zeros.
  __device__ bool any(int token) const {
    uint32_t bits = 0;
    for (int64_t at = int(threadIdx.x) % kStepChunks * kChunkBytes; at < length; at += kStepBytes) {
      const uint4 four = *reinterpret_cast<const uint4*>(sample + token * row_bytes + at);
      bits |= four.x | four.y | four.z | four.w;
    }
    return (bits & kAllButSigns<Element>) != 0;
  }

  /// Starts the copies of step `step` into its stage; an empty group past the end.
  __device__ __forceinline__ void load(uint32_t shared, int step) const {
    if (step < all) {
      // A thread copies the same chunk of rows `apart` from each other: one offset, one swizzle.
      const int panel = step / steps, row = int(threadIdx.x) / kStepChunks, chunk = int(threadIdx.x) % kStepChunks;
      const int64_t at = int64_t(step - panel * steps) * kStepBytes + chunk * kChunkBytes;
      uint32_t to = shared + uint32_t(step % Tile::stages) * Tile::stage_bytes + swizzled<kStepBytes>(row, chunk);
#pragma unroll
      for (int i = 0; i < Tile::copies; ++i, to += Tile::apart * kStepBytes) {
        const int token = token_of(panel, i);
        const bool valid = token < count && at < length;
        copy_async_16(to, sample + (valid ? token * row_bytes + at : 0), valid);
      }
    }
    copy_async_commit();
  }
};

template <class Tile>
__device__ __forceinline__ void write_squares(const float (&squares)[Tile::own_rows + Tile::own_chunks], float* to) {
#pragma unroll
  for (int i = 0; i < Tile::own_rows; ++i) to[i * Tile::threads + threadIdx.x] = squares[i];
#pragma unroll
  for (int i = 0; i < Tile::own_chunks; ++i) {
    float square = squares[Tile::own_rows + i];
#pragma unroll
    for (int step = 1; step < kStepChunks; step *= 2) square += __shfl_xor_sync(0xffffffffu, square, step);
    if (threadIdx.x % kStepChunks != 0) continue;
    to[Tile::own_rows * Tile::threads + threadIdx.x / kStepChunks + i * Tile::apart] = square;
  }
}

/// Squares of lengths to 1 / length, 0 for rows of zeros. Returns whether this thread found that a length left fp32.
template <class Element, class Tile>
__device__ __forceinline__ bool invert_lengths(const Stream<Element, Tile>& stream, int panel, float* lengths) {
  bool inexact = false;
#pragma unroll 1
  for (int i = 0; i < Tile::copies; ++i) {
    const int row = int(threadIdx.x) / kStepChunks + i * Tile::apart, token = stream.token_of(panel, i);
    const float square = lengths[row];
    const bool fits = square > 0x1p-60f && square < 0x1p+60f;
    if (!fits && token < stream.count) inexact |= stream.any(token);
    __syncwarp();
    if (threadIdx.x % kStepChunks == 0) lengths[row] = fits ? 1.f / sqrtf(square) : 0.f;
  }
  return inexact;
}

template <class Element, class Tile>
__global__ void __launch_bounds__(Tile::threads) nearest(const __grid_constant__ Nearest m) {
  extern __shared__ __align__(1024) char memory[];
  const uint32_t shared = shared_address(memory);
  float* inverse = reinterpret_cast<float*>(memory + Tile::stages * Tile::stage_bytes);  // [rows]
  float* value_of = inverse + Tile::rows;                                                // [warps_n][sources]
  int32_t* place_of = reinterpret_cast<int32_t*>(value_of + Tile::warps_n * Tile::sources);

  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int warp_m = warp / Tile::warps_n, warp_n = warp % Tile::warps_n;
  const int64_t s = blockIdx.y;
  const int64_t count = m.count(s);
  const int first_source = int(blockIdx.x) * Tile::sources;
  const int sources = int((count + 1) / 2), destinations = int(count / 2);
  const int panels = (destinations + Tile::panel - 1) / Tile::panel;

  Stream<Element, Tile> stream{m.metric + s * m.sample_bytes,
                               m.row_bytes,
                               m.dim * int64_t(sizeof(Element)),
                               int(count),
                               first_source,
                               int((m.dim * int64_t(sizeof(Element)) + kStepBytes - 1) / kStepBytes),
                               0};
  if (first_source < sources) stream.all = panels * stream.steps;
  bool inexact = false;
  float top = -kInfinity;  // of source threadIdx.x
  int32_t chosen = int32_t(m.protect | 1);

#pragma unroll
  for (int i = 0; i < Tile::stages - 1; ++i) stream.load(shared, i);

  float sum[Tile::tiles_m][Tile::tiles_n][4];
  for (int panel = 0; panel < (first_source < sources ? panels : 0); ++panel) {
    float squares[Tile::own_rows + Tile::own_chunks];
#pragma unroll
    for (float& square : squares) square = 0.f;
#pragma unroll
    for (int i = 0; i < Tile::tiles_m; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::tiles_n; ++j) sum[i][j][0] = sum[i][j][1] = sum[i][j][2] = sum[i][j][3] = 0.f;
    }
    for (int part = 0; part < stream.steps; ++part) {
      const int step = panel * stream.steps + part;
      copy_async_wait<Tile::stages - 2>();
      __syncthreads();  // this stage is there, and the one before is free
      stream.load(shared, step + Tile::stages - 1);
      const uint32_t stage_at = uint32_t(step % Tile::stages) * Tile::stage_bytes;
      multiply_step<Element, Tile>(sum, squares, shared + stage_at, memory + stage_at, warp_m * Tile::tiles_m * 16,
                                   Tile::sources + warp_n * Tile::tiles_n * 8, lane);
    }
    write_squares<Tile>(squares, inverse);
    __syncthreads();
    inexact |= invert_lengths<Element, Tile>(stream, panel, inverse);
    __syncthreads();
    compare_tile<Tile>(m, sum, inverse + Tile::sources, panel * Tile::panel, destinations, warp_m, warp_n, lane,
                       value_of, place_of);
    __syncthreads();
    if (int(threadIdx.x) < Tile::sources) {
      for (int i = 0; i < Tile::warps_n; ++i) {
        const float value = value_of[i * Tile::sources + threadIdx.x];
        const int32_t place = place_of[i * Tile::sources + threadIdx.x];
        if (value > top || (value == top && value != -kInfinity && place < chosen)) top = value, chosen = place;
      }
    }
    // The next panel writes `inverse` and the bests only after the barriers of its steps (dim >= 1: there is one).
  }
  copy_async_wait<0>();
  if (int(threadIdx.x) < Tile::sources && first_source + int(threadIdx.x) < m.sources) {
    const int64_t at = s * m.sources + first_source + threadIdx.x;
    const bool exists = first_source + int(threadIdx.x) < sources && panels > 0;
    m.best[at] = exists && top != -kInfinity ? top * inverse[threadIdx.x] : -kInfinity;
    m.target[at] = chosen;
  }
  inexact = __syncthreads_or(inexact);
  if (threadIdx.x == 0) m.inexact[s * gridDim.x + blockIdx.x] = inexact;
}

template <class Tile>
double cost(const MatchTokens& m, const CudaContext& context, double relative) {
  const int64_t sources = (m.tokens + 1) / 2, tiles = (sources + Tile::sources - 1) / Tile::sources;
  const int64_t panels = (m.tokens / 2 + Tile::panel - 1) / Tile::panel, cards = std::max(1, context.multiprocessors);
  return double((m.samples * tiles + cards - 1) / cards) * double(panels) * Tile::sources * Tile::panel * relative;
}

/// The large tile where it takes less time, and where the card has the memory: a wave of CTAs, times their work.
/// `relative`: the small tile loads more per product.
bool large(const MatchTokens& m, const CudaContext& context) {
  if (m.dtype == DType::f32) return false;  // three products per pair: its operands do not fit the registers
  SharedMemory memory;
  if (!shared_memory_of_device(&memory).ok() || memory.per_block < Large::shared_bytes) return false;
  return cost<Large>(m, context, 1.) <= cost<Small>(m, context, 1.4);
}

template <class Element, class Tile>
Status run(const Nearest& nearest_arguments, const CudaContext& context, int64_t tiles, int64_t samples) {
  auto* kernel = nearest<Element, Tile>;
  Status status = allow_shared_memory(kernel, Tile::shared_bytes);
  if (!status.ok()) return status;
  start(kernel, dim3(unsigned(tiles), unsigned(samples)), Tile::threads, Tile::shared_bytes, context.stream,
        nearest_arguments);
  return started("bipartite_match");
}

template <class Tile>
Status run_dtype(const MatchTokens& m, const Nearest& a, const CudaContext& context, int64_t tiles) {
  switch (m.dtype) {
    case DType::f16: return run<__half, Tile>(a, context, tiles, m.samples);
    case DType::bf16: return run<__nv_bfloat16, Tile>(a, context, tiles, m.samples);
    default:
      if constexpr (Tile::sources == Small::sources) return run<float, Tile>(a, context, tiles, m.samples);
      return error(Status::Kind::failed, "bipartite_match: no tile for float32");
  }
}

}  // namespace

const char* match_tiles_refuses(const MatchTokens& m, const CudaContext& context) {
  if (context.compute_capability < 80) return "needs a GPU of compute capability 8.0 (Ampere) or newer";
  if (m.dtype == DType::f64) return "float64 runs on the exact search";
  const int64_t size = size_of(m.dtype);
  const bool aligned = reinterpret_cast<uintptr_t>(m.metric.data) % 16 == 0 && m.metric.batch * size % 16 == 0 &&
                       m.metric.row * size % 16 == 0 && m.dim * size % 16 == 0;
  if (!aligned) return "rows are not aligned to 16 bytes: they run on the exact search";
  if (m.dim == 0) return "rows without elements run on the exact search";
  if (m.samples > 65535) return "more than 65535 samples run on the exact search";
  return nullptr;
}

int64_t match_tiles_count(const MatchTokens& m, const CudaContext& context) {
  const int64_t rows = large(m, context) ? Large::sources : Small::sources;
  return ((m.tokens + 1) / 2 + rows - 1) / rows;
}

Status match_tiles(const MatchTokens& m, const MatchSearch& search, const CudaContext& context) {
  const int64_t size = size_of(m.dtype);
  const Nearest a{static_cast<const char*>(m.metric.data),
                  m.metric.batch * size,
                  m.metric.row * size,
                  m.dim,
                  m.tokens,
                  m.protect,
                  search.sources,
                  m.counts,
                  search.best,
                  search.target,
                  search.inexact};
  return large(m, context) ? run_dtype<Large>(m, a, context, search.tiles)
                           : run_dtype<Small>(m, a, context, search.tiles);
}

}  // namespace sparsekit::cuda

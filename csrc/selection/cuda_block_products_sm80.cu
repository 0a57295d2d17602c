// Block scores by the mean on the GPU, from the means of blocks (cuda_block_means_sm80.cu): their products.
//
// A mean is the sum of three bf16 numbers, 24 bits, and a product that of the six products of parts that are not below
// 2^-24 of it. A CTA has 128 x 128 scores: 32 elements of all parts of both factors are in shared memory at once, so
// that they are read once for six products (each product by itself would read them twice over), and the six are added
// up outside the tensor cores, which truncate.
//
// Bound: products; 1,024 x 1,024 blocks of 32 heads, causal, D = 128: 29 GFLOP, and 134 MB of scores.
#include "common/cuda/math.cuh"
#include "common/cuda/mma.cuh"
#include "common/cuda/shared_memory.cuh"
#include "selection/cuda_block_means.cuh"
#include "selection/cuda_kernels.h"
#include "selection/cuda_rows.cuh"

namespace sparsekit::cuda {
namespace {

constexpr int kThreads = 256;

/// Products of 128 means of queries and 128 of keys; a warp has 32 x 64 of them.
class MeansTile {
 public:
  static constexpr int kRows = kTileBlocks, kKeys = 128, kParts = 3;
  static constexpr int kRowBytes = 64, kColumns = kRowBytes / 2;  // of a stage
  static constexpr int kPartBytes = kRows * kRowBytes, kStageBytes = 2 * kParts * kPartBytes, kBytes = 2 * kStageBytes;

  float c[2][8][4];  // c[i][j][e] is row row_of(i, e), key key_of(j, e)
  __device__ __forceinline__ static int row_of(int i, int e) {
    return warp_of() / 2 * 32 + i * 16 + lane_of() / 4 + e / 2 * 8;
  }
  __device__ __forceinline__ static int key_of(int j, int e) {
    return warp_of() % 2 * 64 + j * 8 + lane_of() % 4 * 2 + e % 2;
  }

  /// `q` and `k` are the first of `rows` and `keys` means of `dim` elements.
  __device__ __forceinline__ void multiply(const Means& q_means, const Means& k_means, int64_t q, int64_t k, int rows,
                                           int keys, int dim, unsigned char* memory) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) c[i][j][0] = c[i][j][1] = c[i][j][2] = c[i][j][3] = 0.f;
    }
    auto load = [&](int stage) {
      unsigned char* to = memory + stage % 2 * kStageBytes;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        put(to + part * kPartBytes, q_means.parts + part * q_means.count + q * dim, rows, dim, stage * kColumns);
        put(to + (kParts + part) * kPartBytes, k_means.parts + part * k_means.count + k * dim, keys, dim,
            stage * kColumns);
      }
      copy_async_commit();
    };
    const int stages = ceil_div(dim, kColumns);
    load(0);
#pragma unroll 1
    for (int stage = 0; stage < stages; ++stage) {
      if (stage + 1 < stages) {
        load(stage + 1);
      } else {
        copy_async_commit();
      }
      copy_async_wait<1>();
      __syncthreads();
      add(shared_address(memory + stage % 2 * kStageBytes));
      __syncthreads();
    }
  }

 private:
  /// Columns [column, column + kColumns) of kRows rows; zeros for what does not exist.
  __device__ __forceinline__ static void put(unsigned char* tile, const __nv_bfloat16* from, int rows, int dim,
                                             int column) {
#pragma unroll
    for (int i = 0; i < kRows * kRowBytes / 16 / kThreads; ++i) {
      const int at = int(threadIdx.x) + i * kThreads, r = at / (kRowBytes / 16), chunk = at % (kRowBytes / 16);
      const int d = column + chunk * 8;
      const uint32_t to = swizzled<kRowBytes>(r, chunk);
      if (dim % 8 == 0) {
        const bool valid = r < rows && d < dim;
        copy_async_16(shared_address(tile) + to, valid ? from + int64_t(r) * dim + d : from, valid);
        continue;
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        reinterpret_cast<__nv_bfloat16*>(tile + to)[e] =
            r < rows && d + e < dim ? from[int64_t(r) * dim + d + e] : from_float<__nv_bfloat16>(0.f);
      }
    }
  }

  /// Adds the products of a stage.
  __device__ __forceinline__ void add(uint32_t tile) {
    const uint32_t rows = address_rows16<kRowBytes>(tile, warp_of() / 2 * 32, 0, lane_of());
    const uint32_t keys = address_columns16<kRowBytes>(tile + kParts * kPartBytes, warp_of() % 2 * 64, 0, lane_of());
#pragma unroll
    for (int step = 0; step < kRowBytes / 32; ++step) {
      uint32_t a[2][kParts][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          load_matrices(a[i][part], advance_chunks<kRowBytes>(rows, step) + part * kPartBytes + i * 16 * kRowBytes);
        }
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        uint32_t b[kParts][4];
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          load_matrices(b[part], advance_chunks<kRowBytes>(keys, step) + part * kPartBytes + n * 16 * kRowBytes);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
            for (int product = 0; product < 6; ++product) {  // the small ones first
              constexpr int q_part[6] = {2, 0, 1, 1, 0, 0}, k_part[6] = {0, 2, 1, 0, 1, 0};
              const uint32_t (&key)[4] = b[k_part[product]];
              mma_m16n8k16<__nv_bfloat16>(sum, a[i][q_part[product]], key[2 * half], key[2 * half + 1]);
            }
#pragma unroll
            for (int e = 0; e < 4; ++e) c[i][2 * n + half][e] += sum[e];
          }
        }
      }
    }
  }
};

/// grid (128 key blocks, 128 query blocks, heads): products of means. Cut blocks: from the diagonal's sums, or left to
/// score_cut_blocks.
__global__ void __launch_bounds__(kThreads, 2) multiply_means(BlockScores p, BlockMeans means) {
  using Tile = MeansTile;
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  const int head = blockIdx.z, b = head / int(p.heads_q), h = head % int(p.heads_q);
  const int kv_head = h / int(p.heads_q / p.heads_kv), dim = p.head_dim;
  Span span;
  int tile_row;
  if (!find_span(means.tiles, false, blockIdx.y, &span, &tile_row)) return;
  if (means.tiles.table) span = means.blocks.table[span.index];  // list_row in blocks, not in tiles
  const int first_m = tile_row * Tile::kRows, first_n = int(blockIdx.x) * Tile::kKeys;
  const int rows = min(Tile::kRows, ceil_div(span.len_q(), p.lists.block_q) - first_m);
  const int blocks = min(int(p.key_blocks), ceil_div(span.len_k(), p.lists.block_k));
  const int64_t row = int64_t(head) * p.q_blocks + span.list_row + first_m;
  const int fit = int(min(int64_t(rows), p.q_blocks - span.list_row - first_m));  // cu_seqlens may hold anything
  float* out = static_cast<float*>(p.scores) + row * p.key_blocks;
  const SeenBlocks last(p, span, first_m + rows - 1);
  const bool any = first_n < last.seen && first_n < blocks;
  Tile tile;
  if (any) {
    const int64_t k_row = (int64_t(b) * p.heads_kv + kv_head) * means.k_blocks + span.k_block + first_n;
    const int fit_k = int(min(int64_t(blocks - first_n), means.k_blocks - span.k_block - first_n));
    tile.multiply(means.q, means.k, row, k_row, fit, fit_k, dim, dynamic_shared);
  }
  const bool pairs = p.key_blocks % 2 == 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int m = Tile::row_of(i, 2 * r);
      if (m >= fit) continue;
      const SeenBlocks bounds(p, span, first_m + m);
      const int whole = min(bounds.whole, blocks), seen = min(bounds.seen, blocks);
      float* to = out + m * p.key_blocks;
      const float cut = means.diagonal && whole < seen && whole >= first_n
                            ? means.diagonal[row + m] * p.scale / BlockPair(p, span, first_m + m, whole).pairs()
                            : 0.f;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int n = first_n + Tile::key_of(j, 0);
        float x[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          x[e] = n + e < whole ? tile.c[i][j][2 * r + e] * p.scale : n + e < seen ? cut : -kInfinity;
        }
        if (pairs && n < p.key_blocks) {
          *reinterpret_cast<float2*>(to + n) = make_float2(x[0], x[1]);
        } else {
          if (n < p.key_blocks) to[n] = x[0];
          if (n + 1 < p.key_blocks) to[n + 1] = x[1];
        }
      }
    }
  }
}

/// grid (query blocks, heads): each cut block of the row, a thread per element of a row of query.
template <class Element>
__global__ void __launch_bounds__(kThreads) score_cut_blocks(BlockScores p, Spans spans) {
  __shared__ CtaScratch scratch;
  const int head = blockIdx.y, b = head / int(p.heads_q), h = head % int(p.heads_q);
  Span span;
  int m;
  if (!find_span(spans, false, blockIdx.x, &span, &m)) return;
  const SeenBlocks bounds(p, span, m);
  const Element* query = rows_of<Element>(p.query, b, h, span.q_begin + int64_t(m) * p.lists.block_q);
  for (int n = bounds.whole; n < min(int64_t(bounds.seen), p.key_blocks); ++n) {
    const BlockPair pair(p, span, m, n);
    const Element* key =
        rows_of<Element>(p.key, b, h / int(p.heads_q / p.heads_kv), span.k_begin + int64_t(n) * p.lists.block_k);
    float product = 0.f;
    for (int d = int(threadIdx.x); d < p.head_dim; d += kThreads) {
      float seen = 0.f;
      int next = 0;
      for (int i = int(clamped(1 - pair.first_seen, 0, pair.rows)); i < pair.rows; ++i) {
        for (; next < pair.keys && next < pair.first_seen + i; ++next) seen += widened(key[next * p.key.row + d]);
        product = fmaf(widened(query[i * p.query.row + d]), seen, product);
      }
    }
    product = cta_sum<kThreads>(product, scratch);
    if (threadIdx.x == 0) {
      static_cast<float*>(p.scores)[(int64_t(head) * p.q_blocks + blockIdx.x) * p.key_blocks + n] =
          product * p.scale / pair.pairs();
    }
  }
}

}  // namespace

Status score_block_means(const BlockScores& p, const CudaContext& context) {
  const auto stream = static_cast<cudaStream_t>(context.stream);
  BlockMeans means = block_means_of(p, context.workspace, /*parts=*/true);
  find_block_means(p, &means, true, context.multiprocessors, stream);
  const int64_t heads = p.batch * p.heads_q;
  if (p.q_blocks == 0 || p.key_blocks == 0) return launched("block_scores");
  if (p.packed()) fill(static_cast<float*>(p.scores), heads * p.q_blocks * p.key_blocks, -kInfinity, stream);
  const int64_t row_tiles = tiles_of(p.len_q, int64_t(p.lists.block_q) * kTileBlocks, p);
  if (row_tiles > 65535) {
    return error(Status::Kind::unsupported, "block_scores: %lld blocks of queries; CUDA takes 8388480",
                 (long long)p.q_blocks);
  }
  launch(multiply_means,
         dim3(unsigned(ceil_div<int64_t>(p.key_blocks, MeansTile::kKeys)), unsigned(row_tiles), unsigned(heads)),
         kThreads, MeansTile::kBytes, stream, p, means);
  if (p.causal && !means.diagonal) {
    const dim3 grid(unsigned(p.q_blocks), unsigned(heads));
    switch (p.dtype) {
      case DType::f16: launch(score_cut_blocks<__half>, grid, kThreads, 0, stream, p, means.blocks); break;
      case DType::bf16: launch(score_cut_blocks<__nv_bfloat16>, grid, kThreads, 0, stream, p, means.blocks); break;
      default: launch(score_cut_blocks<float>, grid, kThreads, 0, stream, p, means.blocks);
    }
  }
  return launched("block_scores");
}

}  // namespace sparsekit::cuda

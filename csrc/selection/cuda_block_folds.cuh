// What the folds over blocks and their gradients share: which blocks a CTA has, and the antidiagonals of tiles of
// scores.
#pragma once

#include "selection/cuda_block_means.cuh"
#include "selection/cuda_score_tiles.cuh"

namespace sparsekit::cuda {

struct BlockFold {
  AttentionProblem p;
  Spans blocks, groups;                             // in blocks; groups.block_q is that of blocks_each blocks
  int64_t q_blocks = 0, key_blocks = 0, width = 0;  // width: of a row of the result
  int stride = 1, blocks_each = 1;
  bool maximum = false, listed = false, vectors = false;
  bool sums = false;  // antidiagonal: the sums of shares themselves, 0 where nothing is seen
  const float* lse =
      nullptr;  // map: [batch, heads_q, len_q]; antidiagonal: [batch, heads_q, q_blocks * rows of a block]
  float* out = nullptr;

  __host__ __device__ int rows_per_block() const { return p.lists.block_q / stride; }
  __host__ __device__ int keys_per_block() const { return p.lists.block_k / stride; }
};

using Shape = ScoreTile<float>;
constexpr int kRows = Shape::kRows, kKeys = Shape::kKeys, kThreads = Shape::kThreads;
constexpr int kPitch =
    kKeys + 5;  // floats of a row of scores in shared memory: odd, so that columns meet no bank twice

/// What a CTA works on.
struct Place {
  int head, b, h, kv_head;
  Span span;
  int64_t row0;   // list row of the first block
  int m0, count;  // blocks of the sequence

  /// False where there is nothing.
  __device__ __forceinline__ bool find(const BlockFold& f, int group, int at_head) {
    head = at_head;
    b = head / int(f.p.heads_q);
    h = head % int(f.p.heads_q);
    kv_head = h / int(f.p.heads_q / f.p.heads_kv);
    int inside;
    if (!find_span(f.groups, false, group, &span, &inside)) return false;
    if (f.blocks.table) span = f.blocks.table[span.index];
    m0 = inside * f.blocks_each;
    row0 = int64_t(span.list_row) + m0;
    const int blocks = ceil_div(span.len_q(), f.p.lists.block_q);
    count = int(min(int64_t(min(f.blocks_each, blocks - m0)), f.q_blocks - row0));
    return count > 0;
  }
  /// Position of row i of the sequence.
  __device__ __forceinline__ int64_t position(int64_t i) const { return i + span.len_k() - span.len_q(); }
};

/// Tiles of stride x stride: row of tiles `first` (its first row in the sequence) against column `key` (its first key).
struct TileRow {
  int rows;      // that exist
  int64_t last;  // position of the last, where the antidiagonal begins

  __device__ __forceinline__ TileRow(const Place& at, int64_t first, int stride) {
    rows = int(clamped(at.span.len_q() - first, 0, stride));
    last = at.position(first + rows - 1);
  }
  /// Pairs of the antidiagonal that exist.
  __device__ __forceinline__ int pairs(const Place& at, int64_t key, int stride) const {
    return int(min(int64_t(rows), clamped(at.span.len_k() - key, 0, stride)));
  }
  /// Of those the first so many see each other.
  __device__ __forceinline__ int seen(bool causal, int pairs, int64_t key) const {
    if (!causal) return pairs;
    return key > last ? 0 : int(min(int64_t(pairs), (last - key) / 2 + 1));
  }
};

/// The means of the antidiagonals of 64 rows of tiles (from row `row0` of the sequence on) and 128 columns (from key
/// `key0` on, before `key_end`) into shared memory, -inf where nothing is seen.
template <class Element>
__device__ __forceinline__ void antidiagonal_tile(const BlockFold& f, const Place& at, int64_t row0, int64_t row_end,
                                                  int64_t key0, int64_t key_end, ScoreTile<Element>& tile,
                                                  unsigned char* memory) {
  const AttentionProblem& p = f.p;
  const int stride = f.stride;
  auto* scores = reinterpret_cast<float*>(memory);
  const Element* query = rows_of<Element>(p.query, at.b, at.h, at.span.q_begin);
  const Element* key = rows_of<Element>(p.key, at.b, at.kv_head, at.span.k_begin);
  tile.multiply(
      stride, p.head_dim, f.vectors,
      [&](int r, int t) -> const Element* {
        const int64_t first = row0 + int64_t(r) * stride;
        const int64_t i = min(first + stride, int64_t(at.span.len_q())) - 1 - t;
        return first < row_end && i >= first ? query + i * p.query.row : nullptr;
      },
      [&](int n, int t) -> const Element* {
        const int64_t first = key0 + int64_t(n) * stride, j = first + t;
        return first < key_end && j < at.span.len_k() ? key + j * p.key.row : nullptr;
      },
      memory);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = tile.row_of(i);
    const TileRow row(at, min(row0 + int64_t(r) * stride, row_end), stride);
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
      const int n = tile.key_of(j, i);
      const int64_t first = key0 + int64_t(n) * stride;
      const int pairs = first < key_end ? row.pairs(at, first, stride) : 0;
      const bool sees = row.seen(p.causal, pairs, first) > 0;
      scores[r * kPitch + n] = sees ? tile.c[j][i] * p.scale / float(pairs) : -kInfinity;
    }
  }
  __syncthreads();
  if (!p.causal) return;
  // Tiles that causality cuts: at most two per row.
  for (int r = warp_of(); r < kRows && row0 + int64_t(r) * stride < row_end; r += kThreads / kWarp) {
    const int64_t first = row0 + int64_t(r) * stride;
    const TileRow row(at, first, stride);
    if (row.rows == 0 || row.last < 0) continue;
    for (int64_t column = max(row.last / stride - 1, int64_t(0)); column <= row.last / stride; ++column) {
      const int64_t begin = column * stride;
      if (begin < key0 || begin >= key_end || begin >= key0 + int64_t(kKeys) * stride) continue;
      const int pairs = row.pairs(at, begin, stride), seen = row.seen(true, pairs, begin);
      if (seen == 0 || seen == pairs) continue;
      float sum = 0.f;
      for (int t = 0; t < seen; ++t) {
        const Element* q = query + (first + row.rows - 1 - t) * p.query.row;
        const Element* k = key + (begin + t) * p.key.row;
        for (int d = lane_of(); d < p.head_dim; d += kWarp) sum = fmaf(widened(q[d]), widened(k[d]), sum);
      }
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kLanes, sum, step);
      if (lane_of() == 0) scores[r * kPitch + int((begin - key0) / stride)] = sum * p.scale / float(seen);
    }
  }
  __syncthreads();
}

/// Blocks per CTA, sequences and alignment of a problem whose other members are set; their tables stand at `workspace`.
inline void set_places(BlockFold* f, void* workspace, cudaStream_t stream) {
  const AttentionProblem& p = f->p;
  f->blocks_each = f->listed || kRows < f->rows_per_block() ? 1 : kRows / f->rows_per_block();
  f->vectors = in_vectors(p.query, p) && in_vectors(p.key, p);
  auto* memory = static_cast<char*>(workspace);
  f->blocks = spans_of(p, p.lists.block_q, p.lists.block_k, memory);
  const int64_t group = clamped(int64_t(f->blocks_each) * p.lists.block_q, 1, INT32_MAX);
  f->groups = spans_of(p, int(group), p.lists.block_k, memory + spans_bytes(p));
  list_spans_of(f->blocks, stream);
  list_spans_of(f->groups, stream);
}

constexpr size_t kScoreBytes = size_t(kRows) * kPitch * sizeof(float);
constexpr size_t kFoldBytes = kScoreBytes > size_t(Shape::kBytes) ? kScoreBytes : size_t(Shape::kBytes);

/// Antidiagonals: lse of every row of tiles, [batch, heads_q, q_blocks * rows of a block], and the sums of shares over
/// blocks into f.out, of which what is past the sequences is left as it is (cuda_blocks_sm80.cu).
void find_tile_sums(const BlockFold& f, float* lse, int multiprocessors, cudaStream_t stream);

}  // namespace sparsekit::cuda

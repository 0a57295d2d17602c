// Column scores of few probe rows against many keys: up to 64 rows, 16-bit tensors, head dimensions up to 128.
//
// Two sweeps over the keys, cut into as many ranges as the card holds CTAs: one for the lse of each row, one for the
// shares. A CTA has all rows of four query heads that share their keys: its warps hold 32 rows each as the second
// operand of m16n8k16 in registers (64 of them), and the keys, 64 at a time through four stages of shared memory, are
// the first. So a key is read once per sweep for four heads; and sums over rows run along registers, not across lanes.
//
// Diagonals: 8 x 8 tiles of the accumulators on one diagonal of tiles have the same offsets inside, so they are added
// in registers: 88 tiles become 11. What is left is sheared through shared memory: row g of a tile to places that no
// other row writes, then 8 reads per diagonal. A tile finishes the 64 diagonals that no later key meets, and hands 31
// on. Two CTAs share the diagonals at the border of their ranges: both add to zeros, which has one result in either
// order. That takes rows at consecutive positions, as the last rows of a prompt are: columns_fit says so on the device,
// and where they are not, cuda_rows_sm80.cu's fold does the work instead.
//
// Bound: products; 64 rows, 131,072 keys, 32 heads, D = 128: 2 x 69 GFLOP, of which mma.sync does 390 to 450 a ms.
#include <algorithm>

#include "selection/cuda_columns.cuh"

namespace sparsekit::cuda {
namespace {

constexpr int kThreads = 256, kWarps = 8, kHeads = kProbeHeads,
              kHalf = kProbeRows / 2;  // a warp: half of the 64 rows of one of 4 heads
constexpr int kKeys = 64, kStages = 4;

/// A sheared tile: [8][kShear] floats, diagonal x of row g at g * kShear + x.
constexpr int kDiagonals = 95, kShear = 97;

template <int DIM>
struct Layout {
  static constexpr int kRowBytes = DIM * 2, kStageBytes = kKeys * kRowBytes;
  static constexpr int kShearAt = kStages * kStageBytes, kShearBytes = 8 * kShear * 4;
  static constexpr int kColumnsAt = kShearAt + kWarps * kShearBytes;  // [kWarps][kKeys]
  static constexpr int kDoneAt = kColumnsAt + kWarps * kKeys * 4;     // [2][kWarps][kKeys]: finished diagonals
  static constexpr int kSweepBytes = kShearAt, kBytes = kDoneAt + 2 * kWarps * kKeys * 4;
};

/// The keys of a CTA's range through kStages stages.
template <class Element, int DIM>
class KeyStream {
 public:
  using L = Layout<DIM>;

  __device__ __forceinline__ KeyStream(const Element* keys, int64_t stride, int first, int end, int dim,
                                       uint32_t memory)
      : keys_(keys), stride_(stride), first_(first), end_(end), dim_(dim), memory_(memory) {
    for (int tile = 0; tile < kStages - 1; ++tile) load(tile);
  }
  /// The address of tile `tile`, once it is there; all threads call, tile by tile.
  __device__ __forceinline__ uint32_t next(int tile) {
    copy_async_wait<kStages - 2>();
    __syncthreads();
    load(tile + kStages - 1);  // into the stage that all have left
    return memory_ + tile % kStages * L::kStageBytes;
  }

 private:
  __device__ __forceinline__ void load(int tile) {
    constexpr int chunks = L::kRowBytes / 16;
#pragma unroll
    for (int i = 0; i < kKeys * chunks / kThreads; ++i) {
      const int at = int(threadIdx.x) + i * kThreads, r = at / chunks, chunk = at % chunks;
      const int key = first_ + tile * kKeys + r;
      const bool valid = key < end_ && chunk * 8 < dim_;
      const Element* from = valid ? keys_ + key * stride_ + chunk * 8 : keys_;
      copy_async_16(memory_ + tile % kStages * L::kStageBytes + swizzled<L::kRowBytes>(r, chunk), from, valid);
    }
    copy_async_commit();
  }
  const Element* keys_;
  int64_t stride_;
  int first_, end_, dim_;
  uint32_t memory_;
};

/// What a warp is: 32 rows of a head. Accumulator c[i][j][e] is key 16 i + lane / 4 + 8 (e / 2), row 8 j + 2 (lane % 4)
/// + e % 2.
template <class Element, int DIM>
struct Probes {
  uint32_t query[DIM / 16][kHalf / 8][2];  // second operands
  int rows;                                // that exist

  __device__ __forceinline__ void load(const Element* from, int64_t stride, int count, int dim) {
    rows = count;
    const int g = lane_of() / 4, t = lane_of() % 4;
#pragma unroll
    for (int k = 0; k < DIM / 16; ++k) {
#pragma unroll
      for (int j = 0; j < kHalf / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int row = 8 * j + g, d = 16 * k + 2 * t + 8 * e;
          query[k][j][e] = row < count && d < dim ? *reinterpret_cast<const uint32_t*>(from + row * stride + d) : 0;
        }
      }
    }
  }
  __device__ __forceinline__ void multiply(uint32_t tile, float (&c)[kKeys / 16][kHalf / 8][4]) const {
    const uint32_t keys = address_rows16<DIM * 2>(tile, 0, 0, lane_of());
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
#pragma unroll
      for (int j = 0; j < kHalf / 8; ++j) c[i][j][0] = c[i][j][1] = c[i][j][2] = c[i][j][3] = 0.f;
#pragma unroll
      for (int k = 0; k < DIM / 16; ++k) {
        uint32_t a[4];
        load_matrices(a, advance_chunks<DIM * 2>(keys, k) + i * 16 * DIM * 2);
#pragma unroll
        for (int j = 0; j < kHalf / 8; ++j) mma_m16n8k16<Element>(c[i][j], a, query[k][j][0], query[k][j][1]);
      }
    }
  }
  __device__ __forceinline__ static int row_of(int j, int e) { return 8 * j + lane_of() % 4 * 2 + e; }
};

/// The range and heads of a CTA: grid (ranges, head quads, batch * key heads).
struct Work {
  int b, kv_head, h, half, first, end;  // h: of this warp, or -1; keys of the range
  int rows;                             // of this warp

  __device__ __forceinline__ explicit Work(const ColumnCall& call) {
    const ColumnScores& p = call.p;
    const int heads_each = int(p.heads_q / p.heads_kv), quad = int(blockIdx.y) * kHeads + warp_of() / 2;
    b = int(blockIdx.z) / int(p.heads_kv);
    kv_head = int(blockIdx.z) % int(p.heads_kv);
    h = quad < heads_each ? kv_head * heads_each + quad : -1;
    half = warp_of() % 2;
    rows = h < 0 ? 0 : int(clamped(p.len_q - half * kHalf, 0, kHalf));
    first = int(blockIdx.x) * call.keys_each;
    end = int(min(int64_t(first) + call.keys_each, p.len_k));
  }
};

/// Highest score and sum of 2^(score - highest) of every row over the CTA's keys.
template <class Element, int DIM>
__global__ void __launch_bounds__(kThreads, 1) sweep_for_lse(ColumnCall call) {
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  const ColumnScores& p = call.p;
  const Work work(call);
  if (!call.fits[work.b]) return;
  const int32_t* positions = p.query_positions + work.b * p.query_positions_batch;
  const float unit = p.scale * kLog2e;
  const int first_row = work.half * kHalf, position = positions[0] + first_row;  // of this warp's first row
  Probes<Element, DIM> probes;
  probes.load(rows_of<Element>(p.query, work.b, max(work.h, 0), min(first_row, int(p.len_q) - 1)), p.query.row,
              work.rows, p.head_dim);
  KeyStream<Element, DIM> stream(rows_of<Element>(p.key, work.b, work.kv_head, 0), p.key.row, work.first, work.end,
                                 p.head_dim, shared_address(dynamic_shared));
  float highest[kHalf / 8][2], total[kHalf / 8][2];
#pragma unroll
  for (int j = 0; j < kHalf / 8; ++j) {
    highest[j][0] = highest[j][1] = -kInfinity;
    total[j][0] = total[j][1] = 0.f;
  }
  const int tiles = ceil_div(work.end - work.first, kKeys), g = lane_of() / 4;
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    const uint32_t keys = stream.next(tile);
    const int key0 = work.first + tile * kKeys;
    if (work.rows == 0 || (p.causal && key0 > position + kHalf - 1)) continue;
    float c[kKeys / 16][kHalf / 8][4];
    probes.multiply(keys, c);
    const bool whole = key0 + kKeys <= work.end && (!p.causal || key0 + kKeys - 1 <= position);
#pragma unroll
    for (int j = 0; j < kHalf / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int last = p.causal ? min(position + probes.row_of(j, e), work.end - 1) : work.end - 1;
        float most = highest[j][e];
#pragma unroll
        for (int i = 0; i < kKeys / 16; ++i) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            float& score = c[i][j][2 * r + e];
            score *= unit;
            if (!whole && key0 + 16 * i + 8 * r + g > last) score = -kInfinity;
            most = larger(most, score);
          }
        }
        const float base = most == -kInfinity ? 0.f : most;
        float sum = total[j][e] * exp2_fast(highest[j][e] - base);
#pragma unroll
        for (int i = 0; i < kKeys / 16; ++i) {
          sum += exp2_fast(c[i][j][e] - base);
          sum += exp2_fast(c[i][j][2 + e] - base);
        }
        highest[j][e] = most;
        total[j][e] = sum;
      }
    }
  }
  copy_async_wait<0>();
  if (work.h < 0) return;
#pragma unroll
  for (int j = 0; j < kHalf / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float most = highest[j][e], sum = total[j][e];
#pragma unroll
      for (int step = 4; step < kWarp; step *= 2) {  // the lanes that have other keys of the row
        const float other = __shfl_xor_sync(kLanes, most, step), other_sum = __shfl_xor_sync(kLanes, sum, step);
        const float both = larger(most, other), base = both == -kInfinity ? 0.f : both;
        sum = sum * exp2_fast(most - base) + other_sum * exp2_fast(other - base);
        most = both;
      }
      if (g == 0) {
        const int row = first_row + probes.row_of(j, e);
        const int64_t at = (int64_t(work.b) * p.heads_q + work.h) * (2 * kHalf) + row;
        call.parts[at * call.ranges + blockIdx.x] = make_float2(most, sum);
      }
    }
  }
}

/// Shares of the CTA's keys, to columns and diagonals.
template <class Element, int DIM>
__global__ void __launch_bounds__(kThreads, 1) sweep_for_shares(ColumnCall call) {
  using L = Layout<DIM>;
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  const ColumnScores& p = call.p;
  const Work work(call);
  if (!call.fits[work.b]) return;
  const int32_t* positions = p.query_positions + work.b * p.query_positions_batch;
  const float unit = p.scale * kLog2e;
  const int tid = int(threadIdx.x), warp = warp_of(), lane = lane_of(), g = lane / 4, t = lane % 4;
  const int first_row = work.half * kHalf, position = positions[0] + first_row;
  auto* shear = reinterpret_cast<float*>(dynamic_shared + L::kShearAt) + warp * 8 * kShear;
  auto* columns = reinterpret_cast<float*>(dynamic_shared + L::kColumnsAt);
  auto* done = reinterpret_cast<float*>(dynamic_shared + L::kDoneAt);
  Probes<Element, DIM> probes;
  probes.load(rows_of<Element>(p.query, work.b, max(work.h, 0), min(first_row, int(p.len_q) - 1)), p.query.row,
              work.rows, p.head_dim);
  float lse[kHalf / 8][2];
#pragma unroll
  for (int j = 0; j < kHalf / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = probes.row_of(j, e);
      const int64_t at = (int64_t(work.b) * p.heads_q + max(work.h, 0)) * (2 * kHalf) + first_row + row;
      lse[j][e] = row < work.rows ? lse_of_parts(call.parts + at * call.ranges, call.ranges) : kInfinity;
    }
  }
  for (int at = tid; at < 2 * kWarps * kKeys; at += kThreads) done[at] = 0.f;
  KeyStream<Element, DIM> stream(rows_of<Element>(p.key, work.b, work.kv_head, 0), p.key.row, work.first, work.end,
                                 p.head_dim, shared_address(dynamic_shared));
  const int tiles = ceil_div(work.end - work.first, kKeys);
  float carried = 0.f;  // lane x < 31: diagonal x of those that the next tile still meets

  // What tile `tile` finished: of head tid / 64 key or diagonal tid % 64. Behind a barrier.
  const int heads_each = int(p.heads_q / p.heads_kv), quad = int(blockIdx.y) * kHeads + tid / kKeys, x = tid % kKeys;
  auto finish = [&](int tile) {
    if (quad >= heads_each) return;
    const int64_t row = ((int64_t(work.b) * p.heads_q + work.kv_head * heads_each + quad) * p.len_k);
    const int key0 = work.first + tile * kKeys, pair = tid / kKeys * 2;
    if (tile < tiles && key0 + x < work.end) {
      static_cast<float*>(p.columns)[row + key0 + x] = columns[pair * kKeys + x] + columns[(pair + 1) * kKeys + x];
    }
    // The lower half's diagonals begin 32 before the upper half's: half of them were finished a tile ago.
    const float* now = done + tile % 2 * kWarps * kKeys;
    const float* before = done + (tile + 1) % 2 * kWarps * kKeys;
    const float lower = x < kHalf ? now[pair * kKeys + kHalf + x] : before[pair * kKeys + x - kHalf];
    const float both = lower + now[(pair + 1) * kKeys + x];
    const int64_t o = int64_t(positions[0]) - key0 + x;
    if (o < 0 || o >= p.len_k) return;
    float* to = static_cast<float*>(p.diagonals) + row + o;
    if (tile == 0 || tile == tiles) {
      atomicAdd(to, both);
    } else {
      *to = both;
    }
  };

#pragma unroll 1
  for (int tile = 0; tile <= tiles; ++tile) {  // one more, of no keys, finishes what is left
    uint32_t keys = 0;
    if (tile < tiles) {
      keys = stream.next(tile);
    } else {
      __syncthreads();
    }
    if (tile > 0) finish(tile - 1);
    const int key0 = work.first + tile * kKeys;
    float along[kKeys / 8 + kHalf / 8 - 1][2];  // of the diagonals of 8 x 8 tiles: rows' tile - keys' tile + 7
#pragma unroll
    for (int d = 0; d < kKeys / 8 + kHalf / 8 - 1; ++d) along[d][0] = along[d][1] = 0.f;
    float sums[kKeys / 16][2];
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) sums[i][0] = sums[i][1] = 0.f;
    if (tile < tiles && work.rows > 0 && !(p.causal && key0 > position + kHalf - 1)) {
      float c[kKeys / 16][kHalf / 8][4];
      probes.multiply(keys, c);
      const bool whole = key0 + kKeys <= work.end && (!p.causal || key0 + kKeys - 1 <= position);
#pragma unroll
      for (int i = 0; i < kKeys / 16; ++i) {
#pragma unroll
        for (int j = 0; j < kHalf / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float share = exp2_fast(fmaf(c[i][j][e], unit, -lse[j][e % 2]));
            if (!whole) {
              const int last = p.causal ? min(position + probes.row_of(j, e % 2), work.end - 1) : work.end - 1;
              share = key0 + 16 * i + 8 * (e / 2) + g <= last ? share : 0.f;
            }
            sums[i][e / 2] += share;
            along[j - (2 * i + e / 2) + kKeys / 8 - 1][e % 2] += share;
          }
        }
      }
    }
    __syncthreads();  // finish() has read what is written now
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float sum = row_sum(sums[i][r]);
        if (t == 0) columns[warp * kKeys + 16 * i + 8 * r + g] = sum;
      }
    }
    // Diagonal (row - key) + 63 of the tile; of 8 x 8 tile d, place (g, 2 t + e): 8 (d - 7) + 2 t + e - g + 63.
#pragma unroll
    for (int d = 0; d < kKeys / 8 + kHalf / 8 - 1; ++d) {
#pragma unroll
      for (int e = 0; e < 2; ++e) shear[g * kShear + 8 * d + 2 * t + e - g + 7] = along[d][e];
    }
    __syncwarp();
    float found[3];
#pragma unroll
    for (int u = 0; u < 3; ++u) {
      const int at = lane + kWarp * u;  // row r wrote places 7 - r to 94 - r
      float sum = 0.f;
#pragma unroll
      for (int r = 0; r < 8; ++r) sum += at >= 7 - r && at <= kDiagonals - 1 - r ? shear[r * kShear + at] : 0.f;
      found[u] = sum;
    }
    __syncwarp();
    float* out = done + (tile % 2 * kWarps + warp) * kKeys;  // diagonals 31 to 94
    if (lane == 31) out[0] = found[0];
    out[lane + 1] = found[1];
    if (lane < 31) {
      out[lane + 33] = found[2] + carried;
      carried = found[0];
    }
  }
  __syncthreads();
  finish(tiles);
  copy_async_wait<0>();
}

/// One CTA per batch entry: whether its rows stand at consecutive positions.
__global__ void columns_fit(ColumnScores p, int* fits) {
  const int32_t* positions = p.query_positions + blockIdx.x * p.query_positions_batch;
  const int i = int(threadIdx.x);
  const bool off = i < p.len_q && int64_t(positions[i]) != int64_t(positions[0]) + i;
  const bool far = i == 0 && (positions[0] < 0 || positions[0] > INT32_MAX - 65536);
  const int bad = __syncthreads_or(off || far);
  if (i == 0) fits[blockIdx.x] = !bad;
}

template <class Element, int DIM>
void run(const ColumnCall& call, cudaStream_t stream) {
  const ColumnScores& p = call.p;
  const dim3 grid(unsigned(call.ranges), unsigned(ceil_div<int64_t>(p.heads_q / p.heads_kv, kHeads)),
                  unsigned(p.batch * p.heads_kv));
  launch(sweep_for_lse<Element, DIM>, grid, kThreads, Layout<DIM>::kSweepBytes, stream, call);
  launch(sweep_for_shares<Element, DIM>, grid, kThreads, Layout<DIM>::kBytes, stream, call);
}

/// Ranges of keys: as many CTAs as fit on the card at once, no range of less than 4 tiles. Whether it is Hopper's.
bool set_ranges(ColumnCall* call, const ColumnScores& p, const CudaContext& context) {
  call->keys_each = columns_sm90_keys(p, context);
  if (call->keys_each > 0) {
    call->ranges = int(ceil_div<int64_t>(p.len_k, call->keys_each));
    return true;
  }
  const int64_t others = p.batch * p.heads_kv * ceil_div<int64_t>(p.heads_q / p.heads_kv, kHeads);
  const int64_t tiles = ceil_div<int64_t>(p.len_k, kKeys);
  const int64_t ranges = clamped(context.multiprocessors / others, 1, std::max<int64_t>(tiles / 4, 1));
  call->keys_each = int(ceil_div(tiles, ranges) * kKeys);
  call->ranges = int(ceil_div<int64_t>(p.len_k, call->keys_each));
  return false;
}

}  // namespace

bool few_columns(const ColumnScores& p) {
  return p.dtype != DType::f32 && !p.packed() && p.head_dim <= 128 && p.head_dim % 8 == 0 && p.len_q >= 1 &&
         p.len_q <= 2 * kHalf && p.len_k >= 1 && p.batch * p.heads_kv <= 65535 && in_vectors(p.query, p) &&
         in_vectors(p.key, p);
}

size_t few_columns_workspace(const ColumnScores& p, const CudaContext& context) {
  ColumnCall call;
  set_ranges(&call, p, context);
  return padded_bytes(p.batch * p.heads_q * 2 * kHalf * call.ranges * int64_t(sizeof(float2))) +
         padded_bytes(p.batch * int64_t(sizeof(int)));
}

const int* score_few_columns(const ColumnScores& p, const CudaContext& context, void* workspace) {
  const auto stream = static_cast<cudaStream_t>(context.stream);
  ColumnCall call;
  call.p = p;
  const bool hopper = set_ranges(&call, p, context);
  call.parts = static_cast<float2*>(workspace);
  auto* fits =
      reinterpret_cast<int*>(static_cast<char*>(workspace) +
                             padded_bytes(p.batch * p.heads_q * 2 * kHalf * call.ranges * int64_t(sizeof(float2))));
  call.fits = fits;
  launch(columns_fit, unsigned(p.batch), 2 * kHalf, 0, stream, p, fits);
  if (hopper) {
    score_columns_sm90(call, stream);
    return fits;
  }
  cudaMemsetAsync(p.diagonals, 0, size_t(p.batch * p.heads_q * p.len_k) * sizeof(float), stream);
  const bool wide = p.head_dim > 64;
  if (p.dtype == DType::f16) {
    wide ? run<__half, 128>(call, stream) : run<__half, 64>(call, stream);
  } else {
    wide ? run<__nv_bfloat16, 128>(call, stream) : run<__nv_bfloat16, 64>(call, stream);
  }
  return fits;
}

}  // namespace sparsekit::cuda

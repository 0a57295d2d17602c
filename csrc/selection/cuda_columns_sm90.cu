// Column scores of few probe rows on Hopper: up to 64 rows at consecutive positions, 16-bit tensors, head dimensions up
// to 128, many keys. Other problems: cuda_columns_sm80.cu, which also says what the two sweeps are.
//
// A CTA has a range of keys and four query heads that share them. One warpgroup copies keys (cp.async), two multiply:
// 64 keys by the 64 rows of two heads each (wgmma, m64n128), one product ahead of the exponentials.
//
// The sums along diagonals decide which keys and rows stand where. The range is cut into 32 runs, and a step takes keys
// 2 T and 2 T + 1 of all runs: key 16 w + 8 r + g of the product is key 2 T + r of run 8 w + g. Row 8 j + 2 t + e of
// the product is probe row 16 t + 2 j + e. So a lane has two neighbouring keys of a run, in every step the next two,
// and 16 neighbouring rows: its diagonals move on by one row per key, from register to register and, at the last, to
// the next lane. One addition per share, and at row 63 a diagonal comes out whole; only those that a run begins with
// lack what the run before it holds at its end, which is added when all is done.
//
// Bound: tensor cores and exponentials; 64 rows, 131,072 keys, 32 heads, D = 128: 2 x 69 GFLOP and 2 x 268M
// exponentials. Both take 70 us a sweep at their full rates (4,096 FLOP and 16 a clock and multiprocessor).
#include <algorithm>

#include "common/cuda/barriers_sm90.cuh"
#include "common/cuda/shared_memory.cuh"
#include "common/cuda/wgmma_sm90.cuh"
#include "selection/cuda_columns.cuh"

namespace sparsekit::cuda {
namespace {

constexpr int kConsumers = 256, kThreads = kConsumers + 128, kRuns = 32, kKeys = 64, kStages = 6;
constexpr int kLag = 4;                       // steps under way before the first is waited for
constexpr int kOut = 32, kOutRow = kOut + 1;  // keys of a run between two writings of results
constexpr int kTogether = 2;                  // steps between two times when no product is under way
constexpr float kSlack = 40.f;                // how far scores may be above their reference

// Registers of a thread once the warpgroups have parted; a CTA begins with 168 each, and more than it has then would be
// waited for forever.
constexpr int kConsumerRegisters = 224, kProducerRegisters = 56;
static_assert(kConsumerRegisters * kConsumers + kProducerRegisters * 128 <= 168 * kThreads, "as many as there are");

template <int DIM>
struct Layout {
  static constexpr int kPanels = DIM / 64, kStageBytes = kPanels * kKeys * 128;
  static constexpr int kPairBytes = kPanels * 128 * 128;  // rows of two heads
  static constexpr int kQueryAt = 0, kKeysAt = kQueryAt + 2 * kPairBytes;
  static constexpr int kRowsAt = kKeysAt + kStages * kStageBytes;  // [8][128] floats: references; or [256]: lse
  static constexpr int kSumsAt = kRowsAt + 8 * 128 * 4;            // [8][128]: sums of the warps
  static constexpr int kOutAt = kSumsAt + 8 * 128 * 4;             // [2][4][kRuns][kOutRow]: columns, diagonals
  static constexpr int kBarriersAt = kOutAt + 2 * 4 * kRuns * kOutRow * 4;  // full, then empty
  static constexpr int kBytes = kBarriersAt + 2 * kStages * 8 + 1024;       // panels begin at multiples of 1024
  static_assert(kStages * kStageBytes >= 4 * kRuns * kProbeRows * 4, "what is left over takes the keys' place");
};

/// The CTA: grid (ranges, head quads, batch * key heads).
struct Work {
  int b, kv_head, first_head, heads;  // heads: of the CTA, query heads
  int rows, first, end, run;          // keys [first, end) of the tensor; keys of a run

  __device__ __forceinline__ explicit Work(const ColumnCall& call) {
    const ColumnScores& p = call.p;
    const int heads_each = int(p.heads_q / p.heads_kv), quad = int(blockIdx.y) * kProbeHeads;
    b = int(blockIdx.z) / int(p.heads_kv);
    kv_head = int(blockIdx.z) % int(p.heads_kv);
    first_head = kv_head * heads_each + quad;
    heads = min(kProbeHeads, heads_each - quad);
    rows = int(p.len_q);
    first = int(blockIdx.x) * call.keys_each;
    end = int(min(int64_t(first) + call.keys_each, p.len_k));
    run = call.keys_each / kRuns;
  }
  __device__ __forceinline__ int64_t head(const ColumnScores& p, int i) const {
    return int64_t(b) * p.heads_q + first_head + i;
  }
};

/// Rows of the probes into their panels, in the order of the product; zeros for what does not exist.
template <class Element, int DIM>
__device__ __forceinline__ void load_probes(const ColumnScores& p, const Work& work, unsigned char* memory) {
  using L = Layout<DIM>;
  constexpr int chunks = DIM / 8;
  for (int at = int(threadIdx.x); at < kProbeHeads * kProbeRows * chunks; at += kThreads) {
    const int chunk = at % chunks, n = at / chunks % kProbeRows, i = at / chunks / kProbeRows;
    const int row = n % 8 / 2 * 16 + n / 8 * 2 + n % 2;
    uint4 bits = make_uint4(0, 0, 0, 0);
    if (i < work.heads && row < work.rows && chunk * 8 < p.head_dim) {
      bits = *reinterpret_cast<const uint4*>(rows_of<Element>(p.query, work.b, work.first_head + i, row) + chunk * 8);
    }
    const uint32_t to =
        i / 2 * L::kPairBytes + chunk / 8 * 128 * 128 + swizzled<128>(i % 2 * kProbeRows + n, chunk % 8);
    *reinterpret_cast<uint4*>(memory + L::kQueryAt + to) = bits;
  }
}

/// The producers' warpgroup: keys of all steps through the ring.
template <class Element, int DIM>
__device__ __forceinline__ void copy_keys(const ColumnScores& p, const Work& work, uint32_t memory) {
  using L = Layout<DIM>;
  constexpr int chunks = DIM / 8, rows_at_once = 128 / chunks, copies = kKeys / rows_at_once;
  const int tid = int(threadIdx.x) - kConsumers, chunk = tid % chunks, steps = work.run / 2;
  const uint32_t full = memory + L::kBarriersAt, empty = full + kStages * 8;
  const Element* keys = rows_of<Element>(p.key, work.b, work.kv_head, 0) + chunk * 8;
  Ring<kStages> ring, landed;
  for (int step = 0; step < steps; ++step, ring.advance()) {
    mbarrier_wait(empty + ring.stage * 8, ring.parity ^ 1);
#pragma unroll
    for (int i = 0; i < copies; ++i) {
      const int m = tid / chunks + i * rows_at_once;  // of the product
      const int key = work.first + (m / 16 * 8 + m % 8) * work.run + 2 * step + m / 8 % 2;
      const bool valid = key < work.end && chunk * 8 < p.head_dim;
      copy_async_16(
          memory + L::kKeysAt + ring.stage * L::kStageBytes + chunk / 8 * kKeys * 128 + swizzled<128>(m, chunk % 8),
          valid ? keys + key * p.key.row : static_cast<const Element*>(p.key.data), valid);
    }
    copy_async_commit();
    if (step >= kLag) {
      copy_async_wait<kLag>();
      fence_async_proxy();
      mbarrier_arrive(full + landed.stage * 8);
      landed.advance();
    }
  }
  copy_async_wait<0>();
  fence_async_proxy();
  for (int step = max(steps - kLag, 0); step < steps; ++step, landed.advance()) {
    mbarrier_arrive(full + landed.stage * 8);
  }
}

/// A consumer warpgroup's products: use(step, c) for all steps, in order. c[32 h + 4 j + 2 r + e] is row 16 t + 2 j + e
/// of head h, key 2 step + r of run 8 w + g.
__device__ constexpr int place_of(int h, int r, int i) { return 32 * h + i / 2 * 4 + 2 * r + i % 2; }

template <class Element, int DIM, class Use>
__device__ __forceinline__ void multiply_keys(int steps, uint32_t memory, Use use) {
  using L = Layout<DIM>;
  const uint32_t full = memory + L::kBarriersAt, empty = full + kStages * 8;
  const uint32_t query = descriptor_low(memory + L::kQueryAt + int(threadIdx.x) / 128 * L::kPairBytes, 16);
  Ring<kStages> ring, used;
  auto start = [&](float (&c)[64]) {
    mbarrier_wait(full + ring.stage * 8, ring.parity);
    const uint32_t keys = descriptor_low(memory + L::kKeysAt + ring.stage * L::kStageBytes, 16);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < DIM / 16; ++k) {
      const int inside = k % 4 * 32 / 16;
      wgmma_shared<Element>(c, descriptor(keys + k / 4 * (kKeys * 128 / 16) + inside),
                            descriptor(query + k / 4 * (128 * 128 / 16) + inside), k > 0);
    }
    wgmma_commit();
    ring.advance();
  };
  float even[64], odd[64];
  // Products of four steps, one ahead. None is under way at the end: ptxas follows them to the end of a loop only.
#pragma unroll 1
  for (int step = 0; step < steps; step += kTogether) {
    start(even);
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      float (&c)[64] = i % 2 ? odd : even;
      if (i + 1 < kTogether) {
        start(i % 2 ? even : odd);
        wgmma_wait<1>();
      } else {
        wgmma_wait<0>();
      }
      pin(c);
      if (lane_of() == 0) mbarrier_arrive(empty + used.stage * 8);
      used.advance();
      use(step + i, c);
    }
  }
}

/// -inf where a row does not see the key; all threads of a warp know whether any of its keys needs it.
struct Mask {
  const ColumnScores& p;
  const Work& work;
  int position;  // of row 0

  __device__ __forceinline__ bool needed(int step) const {
    const int last = work.first + (warp_of() % 4 * 8 + 7) * work.run + 2 * step + 1;
    return last >= work.end || work.rows < kProbeRows || (p.causal && last > position);
  }
  __device__ __forceinline__ void apply(int step, float (&scores)[2][16]) const {
    const int g = lane_of() / 4, t = lane_of() % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int key = work.first + (warp_of() % 4 * 8 + g) * work.run + 2 * step + r;
      // Rows [low, high) of the lane's see it.
      const int low = key >= work.end ? 16 : p.causal ? key - position - 16 * t : 0, high = work.rows - 16 * t;
#pragma unroll
      for (int i = 0; i < 16; ++i) scores[r][i] = i >= low && i < high ? scores[r][i] : -kInfinity;
    }
  }
};

template <int DIM>
__device__ __forceinline__ void set_barriers(uint32_t memory) {
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(memory + Layout<DIM>::kBarriersAt + stage * 8, 128);
      mbarrier_init(memory + Layout<DIM>::kBarriersAt + (kStages + stage) * 8, kConsumers / kWarp);
    }
    mbarrier_fence_init();
  }
}

/// Highest score and sum of 2^(score - highest) of every row over the CTA's keys. Also clears the diagonals.
template <class Element, int DIM>
__global__ void __launch_bounds__(kThreads, 1) sweep_for_lse(ColumnCall call) {
  using L = Layout<DIM>;
  extern __shared__ __align__(1024) unsigned char dynamic_shared[];
  const ColumnScores& p = call.p;
  const Work work(call);
  if (!call.fits[work.b]) return;
  unsigned char* shared = dynamic_shared + (-shared_address(dynamic_shared) & 1023);
  const uint32_t memory = shared_address(shared);
  set_barriers<DIM>(memory);
  load_probes<Element, DIM>(p, work, shared);
  auto* references = reinterpret_cast<float*>(shared + L::kRowsAt);
  auto* sums = reinterpret_cast<float*>(shared + L::kSumsAt);
  for (int at = int(threadIdx.x); at < 8 * 128; at += kThreads) references[at] = 0.f;
  fence_async_proxy();
  __syncthreads();
  if (threadIdx.x >= kConsumers) {
    fewer_registers<kProducerRegisters>();
    copy_keys<Element, DIM>(p, work, memory);
    return;
  }
  more_registers<kConsumerRegisters>();
  const int warp = warp_of(), lane = lane_of(), t = lane % 4, tid = int(threadIdx.x);
  for (int i = 0; i < work.heads; ++i) {
    float* diagonals = static_cast<float*>(p.diagonals) + work.head(p, i) * p.len_k;
    for (int o = work.first + tid; o < work.end; o += kConsumers) diagonals[o] = 0.f;
  }
  const Mask mask{p, work, p.query_positions[work.b * p.query_positions_batch]};
  const float unit = p.scale * kLog2e;
  float* own = references + warp * 128;  // [head of the pair][row]; each warp its own
  float total[2][16];
#pragma unroll
  for (int i = 0; i < 16; ++i) total[0][i] = total[1][i] = 0.f;
  multiply_keys<Element, DIM>(work.run / 2, memory, [&](int step, const float (&c)[64]) {
    const bool masked = mask.needed(step);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float scores[2][16], above = -kInfinity;  // above the reference of the row
#pragma unroll
      for (int four = 0; four < 4; ++four) {
        const float4 base = *reinterpret_cast<const float4*>(own + h * kProbeRows + 16 * t + four * 4);
        const float bases[4] = {base.x, base.y, base.z, base.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = four * 4 + e;
#pragma unroll
          for (int r = 0; r < 2; ++r) scores[r][i] = fmaf(c[place_of(h, r, i)], unit, -bases[e]);
        }
      }
      if (masked) mask.apply(step, scores);
#pragma unroll
      for (int i = 0; i < 16; ++i) above = fmaxf(above, fmaxf(scores[0][i], scores[1][i]));
      if (step == 0 || __any_sync(kLanes, above > kSlack)) {  // references move up to the best of the warp's keys
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          float by = fmaxf(scores[0][i], scores[1][i]);
#pragma unroll
          for (int lanes = 4; lanes < kWarp; lanes *= 2) by = fmaxf(by, __shfl_xor_sync(kLanes, by, lanes));
          if (step > 0) {
            by = fmaxf(by, 0.f);
            total[h][i] *= exp2_fast(-by);
          } else if (by == -kInfinity) {
            by = 0.f;
          }
          scores[0][i] -= by;
          scores[1][i] -= by;
          float& reference = own[h * kProbeRows + 16 * t + i];
          const float now = reference + by;
          __syncwarp();
          if (lane < 4) reference = now;
        }
        __syncwarp();
      }
#pragma unroll
      for (int i = 0; i < 16; ++i) total[h][i] += exp2_fast(scores[0][i]) + exp2_fast(scores[1][i]);
    }
  });
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    float sum = total[i / 16][i % 16];
#pragma unroll
    for (int step = 4; step < kWarp; step *= 2) sum += __shfl_xor_sync(kLanes, sum, step);
    if (lane < 4) sums[warp * 128 + i / 16 * 64 + 16 * t + i % 16] = sum;
  }
  named_barrier_sync(1 + warp / 4, 128);
  const int pair = tid / 128, row = tid % 64, i = pair * 2 + tid % 128 / 64;
  if (i >= work.heads) return;
  float most = -kInfinity, sum = 0.f;
#pragma unroll
  for (int w = 0; w < 4; ++w) {  // a sum of 0: the warp saw nothing
    const int at = (pair * 4 + w) * 128 + tid % 128;
    if (sums[at] != 0.f) most = fmaxf(most, references[at]);
  }
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const int at = (pair * 4 + w) * 128 + tid % 128;
    if (sums[at] != 0.f) sum += sums[at] * exp2_fast(references[at] - most);
  }
  const float2 part = make_float2(most, sum);
  call.parts[(work.head(p, i) * kProbeRows + row) * call.ranges + blockIdx.x] = part;
}

/// Shares of the CTA's keys, to columns and diagonals.
template <class Element, int DIM>
__global__ void __launch_bounds__(kThreads, 1) sweep_for_shares(ColumnCall call) {
  using L = Layout<DIM>;
  extern __shared__ __align__(1024) unsigned char dynamic_shared[];
  const ColumnScores& p = call.p;
  const Work work(call);
  if (!call.fits[work.b]) return;
  unsigned char* shared = dynamic_shared + (-shared_address(dynamic_shared) & 1023);
  const uint32_t memory = shared_address(shared);
  const int tid = int(threadIdx.x);
  set_barriers<DIM>(memory);
  load_probes<Element, DIM>(p, work, shared);
  auto* lse = reinterpret_cast<float*>(shared + L::kRowsAt);
  if (tid < kConsumers) {
    const int i = tid / kProbeRows, row = tid % kProbeRows;
    const float2* parts = call.parts + (work.head(p, i) * kProbeRows + row) * call.ranges;
    lse[tid] = i < work.heads && row < work.rows ? lse_of_parts(parts, call.ranges) : kInfinity;
  }
  fence_async_proxy();
  __syncthreads();
  if (tid >= kConsumers) {
    fewer_registers<kProducerRegisters>();
    copy_keys<Element, DIM>(p, work, memory);
    return;
  }
  more_registers<kConsumerRegisters>();
  const int warp = warp_of(), lane = lane_of(), g = lane / 4, t = lane % 4, pair = warp / 4;
  const int position = p.query_positions[work.b * p.query_positions_batch];
  const Mask mask{p, work, position};
  const float unit = p.scale * kLog2e;
  auto* out = reinterpret_cast<float*>(shared + L::kOutAt);  // [columns, diagonals][head][run][key]
  const int run0 = warp % 4 * 8;                             // the warp's runs: nobody else writes or reads them
  auto result_of = [&](int kind, int h, int run) {
    return out + ((kind * kProbeHeads + pair * 2 + h) * kRuns + run) * kOutRow;
  };

  // Results of kOut keys from key `begin` of each run on.
  auto write = [&](int begin) {
    __syncwarp();
#pragma unroll 4
    for (int line = 0; line < 32; ++line) {  // of 2 kinds, 2 heads and 8 runs
      const int kind = line / 16, h = line / 8 % 2, run = run0 + line % 8, i = pair * 2 + h;
      const int key = work.first + run * work.run + begin + lane;
      if (i >= work.heads) continue;
      const float x = result_of(kind, h, run)[lane];
      const int64_t row = work.head(p, i) * p.len_k;
      if (kind == 0) {
        if (key < work.end) static_cast<float*>(p.columns)[row + key] = x;
        continue;
      }
      const int64_t o = int64_t(position) + kProbeRows - 1 - key;  // of the diagonal that row 63 ends
      if (o < 0 || o >= p.len_k) continue;
      float* to = static_cast<float*>(p.diagonals) + row + o;
      if (run == 0 && begin + lane < kProbeRows - 1) {  // the range before adds to it: to zero, in any order
        atomicAdd(to, x);
      } else {
        *to = x;
      }
    }
    __syncwarp();
  };

  float held[2][16];  // diagonals through the rows at the last key
#pragma unroll
  for (int i = 0; i < 16; ++i) held[0][i] = held[1][i] = 0.f;
  multiply_keys<Element, DIM>(work.run / 2, memory, [&](int step, const float (&c)[64]) {
    const bool masked = mask.needed(step);
    const int at_out = 2 * step % kOut;
    float columns[2][2];  // [head][key]
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float shares[2][16];
#pragma unroll
      for (int four = 0; four < 4; ++four) {
        const float4 base = *reinterpret_cast<const float4*>(lse + (pair * 2 + h) * kProbeRows + 16 * t + four * 4);
        const float bases[4] = {base.x, base.y, base.z, base.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = four * 4 + e;
#pragma unroll
          for (int r = 0; r < 2; ++r) shares[r][i] = fmaf(c[place_of(h, r, i)], unit, -bases[e]);
        }
      }
      if (masked) mask.apply(step, shares);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float sums[2] = {0.f, 0.f};
#pragma unroll
        for (int i = 0; i < 16; ++i) sums[i % 2] += shares[r][i] = exp2_fast(shares[r][i]);
        columns[h][r] = sums[0] + sums[1];
      }
      // Each diagonal moves on by a row: first to key 2 step, then to the next.
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float from_left = __shfl_up_sync(kLanes, held[h][15], 1);
#pragma unroll
        for (int i = 15; i > 0; --i) held[h][i] = shares[r][i] + held[h][i - 1];
        held[h][0] = shares[r][0] + (t > 0 ? from_left : 0.f);
        if (t == 3) result_of(1, h, run0 + g)[at_out + r] = held[h][15];
      }
    }
    // Sums over the four lanes of a key; lane t ends with key t % 2 of head t / 2.
    float half[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float other = __shfl_xor_sync(kLanes, t % 2 ? columns[h][0] : columns[h][1], 1);
      half[h] = (t % 2 ? columns[h][1] : columns[h][0]) + other;
    }
    const float other = __shfl_xor_sync(kLanes, t / 2 ? half[0] : half[1], 2);
    result_of(0, t / 2, run0 + g)[at_out + t % 2] = (t / 2 ? half[1] : half[0]) + other;
    if (at_out + 2 == kOut) write(2 * step + 2 - kOut);
  });

  // What the runs hold at their ends belongs to the first diagonals of the next. Keys are done with: their place is
  // free.
  auto* left = reinterpret_cast<float*>(shared + L::kKeysAt);  // [head][run][row]
  named_barrier_sync(1, kConsumers);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int i = 0; i < 16; ++i) left[((pair * 2 + h) * kRuns + run0 + g) * kProbeRows + 16 * t + i] = held[h][i];
  }
  named_barrier_sync(1, kConsumers);
  for (int at = tid; at < work.heads * kRuns * kProbeRows; at += kConsumers) {
    const int row = at % kProbeRows, run = at / kProbeRows % kRuns, i = at / kProbeRows / kRuns;
    const int64_t last = work.first + int64_t(run + 1) * work.run - 1, o = position + row - last;
    if (row == kProbeRows - 1 || o < 0 || o >= p.len_k) continue;
    float* to = static_cast<float*>(p.diagonals) + work.head(p, i) * p.len_k + o;
    if (run == kRuns - 1) {
      atomicAdd(to, left[at]);
    } else {
      *to = __ldcg(to) + left[at];
    }
  }
}

template <class Element, int DIM>
void run(const ColumnCall& call, cudaStream_t stream) {
  const ColumnScores& p = call.p;
  const dim3 grid(unsigned(call.ranges), unsigned(ceil_div<int64_t>(p.heads_q / p.heads_kv, kProbeHeads)),
                  unsigned(p.batch * p.heads_kv));
  launch(sweep_for_lse<Element, DIM>, grid, kThreads, Layout<DIM>::kBytes, stream, call);
  launch(sweep_for_shares<Element, DIM>, grid, kThreads, Layout<DIM>::kBytes, stream, call);
}

}  // namespace

int columns_sm90_keys(const ColumnScores& p, const CudaContext& context) {
  constexpr int64_t least = kRuns * kProbeRows;  // a run holds every diagonal that it begins with
  if (context.compute_capability != 90 || p.len_k < 2 * least || p.len_k > INT32_MAX - 65536) return 0;
  const int64_t others = p.batch * p.heads_kv * ceil_div<int64_t>(p.heads_q / p.heads_kv, kProbeHeads);
  const int64_t ranges = clamped(context.multiprocessors / others, 1, p.len_k / least);
  return int(ceil_div(ceil_div<int64_t>(p.len_k, ranges), int64_t(kRuns * kOut)) * (kRuns * kOut));
}

void score_columns_sm90(const ColumnCall& call, cudaStream_t stream) {
  const bool wide = call.p.head_dim > 64;
  if (call.p.dtype == DType::f16) {
    wide ? run<__half, 128>(call, stream) : run<__half, 64>(call, stream);
  } else {
    wide ? run<__nv_bfloat16, 128>(call, stream) : run<__nv_bfloat16, 64>(call, stream);
  }
}

}  // namespace sparsekit::cuda

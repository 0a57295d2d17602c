// Stripe-sparse attention backward on Hopper (sm_90a), query-stationary: wgmma, and warps of their own for gathering.
// Formulas: cuda_backward.cuh.
//
// Tiling: a CTA owns a unit of 128 query rows (cuda_stripes.h); Q and dO stay in shared memory. Warpgroup 0 gathers the
// rows of K and V of a tile of 64 keys with cp.async, two tiles deep. Warpgroups 1 and 2 own 64 query rows each:
//   S = Q K^T, dP = dO V^T, P and dX to shared memory, dQ += dX K (64 x DIM in registers)
// and then one key product of all 128 rows each, whose A operand is read transposed:
//   warpgroup 1: dV = P^T dO        warpgroup 2: dK = dX^T Q
// dK and dV are added to fp32 sums in memory by atomics of 16 bytes, while the scores of the next tile are computed.
//
// Bound: tensor cores take 2,560 clocks a tile (DIM 128) and shared memory 2,000; exponentials and what surrounds them
// are not hidden. See docs/stripes-performance.md.
#pragma once

#include "attention/cuda_stripes_backward.h"
#include "attention/cuda_stripes_tiles.cuh"
#include "common/cuda/barriers_sm90.cuh"
#include "common/cuda/math.cuh"
#include "common/cuda/wgmma_transposed_sm90.cuh"

namespace sparsekit::sm90 {

using namespace sparsekit::cuda;

/// Sizes of one kernel. DIM bounds both head dimensions: columns behind smaller ones are zeros.
template <class ElementType, int DIM>
struct StripesBackwardTile {
  using Element = ElementType;
  static constexpr int kDim = DIM, kPanels = DIM / 64, kRows = 128, kKeys = 64, kStages = 2;
  static constexpr int kRowBytes = 128;  // of a panel
  static constexpr int kQueryPanel = kRows * kRowBytes, kKeyPanel = kKeys * kRowBytes;
  static constexpr int kQueryBytes = kPanels * kQueryPanel, kKeyBytes = kPanels * kKeyPanel;
  static constexpr int kScoreBytes = kRows * kRowBytes;  // P or dX: a panel of 64 keys
  static constexpr int kThreads = 384, kProducers = 128;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

  // Byte offsets into shared memory.
  static constexpr int kQueryAt = 0, kGradOutAt = kQueryAt + kQueryBytes, kKeyAt = kGradOutAt + kQueryBytes;
  static constexpr int kValueAt = kKeyAt + kStages * kKeyBytes, kWeightAt = kValueAt + kStages * kKeyBytes;
  static constexpr int kGradientAt = kWeightAt + 2 * kScoreBytes, kPlaceAt = kGradientAt + 2 * kScoreBytes;
  static constexpr int kFlagsAt = kPlaceAt + kStages * kKeys * 4;  // of a tile: is some key hidden from some row
  static constexpr int kFull = kFlagsAt + kStages * 8, kEmpty = kFull + 8 * kStages;
  static constexpr int kSharedBytes = kEmpty + 8 * kStages + 1024;  // the base is rounded up to 1024 bytes
  static_assert(kSharedBytes <= 227 * 1024, "shared memory of a CTA");
};

/// Tiles of a unit's plan that its rows see.
template <class Tile>
__device__ __forceinline__ int tiles_of_unit(const AttentionProblem& p, const StripePlan& plan, const StripeUnit& unit,
                                             const TileRing<Tile::kKeys>& ring) {
  if (!p.causal || p.query_positions || p.key_positions) return ring.count;
  const int end = unit.rows.end + int(p.len_k) - int(p.len_q);
  const int seen = entries_below(ring.columns, plan.counts[unit.cell].columns, end);
  return ring.block_tiles + (seen + Tile::kKeys - 1) / Tile::kKeys;
}

/// The warpgroup that gathers.
template <class Tile>
__device__ __forceinline__ void gather_unit(const StripesBackward& work, const StripeUnit& unit, int tiles,
                                            const TileRing<Tile::kKeys>& ring, uint32_t shared, char* memory) {
  constexpr int kChunks = Tile::kPanels * 8, kStep = Tile::kProducers / kChunks;  // rows at a time
  const AttentionBackward& a = work.rows.a;
  const int thread = threadIdx.x;
  const StripeSight sight(a, unit.batch, unit.rows.first);
  const char* key = static_cast<const char*>(a.key.data) + 2 * (unit.batch * a.key.batch + unit.kv_head * a.key.head);
  const char* value =
      static_cast<const char*>(a.value.data) + 2 * (unit.batch * a.value.batch + unit.kv_head * a.value.head);
  const int chunk = thread % kChunks, first = thread / kChunks;
  const int key_end = chunk * 8 < a.head_dim ? int(a.len_k) : 0, value_end = chunk * 8 < a.value_dim ? int(a.len_k) : 0;
  const int key_row = int(a.key.row * 2), value_row = int(a.value.row * 2);
  key += chunk * kChunkBytes, value += chunk * kChunkBytes;
  auto entry_of = [&](int tile) {  // this thread's entry of a tile, or word of a BlockTile
    if (thread >= Tile::kKeys || tile >= tiles) return 0;
    if (!ring.of_block(tile)) return ring.columns[int64_t(tile - ring.block_tiles) * Tile::kKeys + thread];
    return thread < int(sizeof(BlockTile) / 4) ? reinterpret_cast<const int32_t*>(ring.tiles + tile)[thread] : 0;
  };
  Ring<Tile::kStages> stage;
  int entry = entry_of(0);
  for (int tile = 0; tile < tiles; ++tile) {
    const uint32_t full = shared + Tile::kFull + 8 * stage.stage;
    int32_t* place = reinterpret_cast<int32_t*>(memory + Tile::kPlaceAt) + stage.stage * Tile::kKeys;
    const bool of_block = ring.of_block(tile);
    mbarrier_wait(shared + Tile::kEmpty + 8 * stage.stage, stage.parity ^ 1);
    if (thread < Tile::kKeys) place[thread] = entry;
    named_barrier_sync(1, Tile::kProducers);
    entry = entry_of(tile + 1);
    const uint32_t to = shared + stage.stage * Tile::kKeyBytes + chunk / 8 * Tile::kKeyPanel;
#pragma unroll
    for (int i = 0; i < Tile::kKeys; i += kStep) {
      const int n = first + i, row = tile_row(place, of_block, n);
      const uint32_t at = n * Tile::kRowBytes + ((chunk % 8) ^ (n % 8)) * kChunkBytes;
      copy_async_16(to + Tile::kKeyAt + at, key + int64_t(row) * key_row, row < key_end);
      copy_async_16(to + Tile::kValueAt + at, value + int64_t(row) * value_row, row < value_end);
    }
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(full) : "memory");
    if (thread < kWarpSize) {
      const bool masked = sight.template masks<Tile::kKeys>(place, of_block);
      if (thread == 0) reinterpret_cast<int32_t*>(memory + Tile::kFlagsAt)[stage.stage] = masked;
    }
    mbarrier_arrive(full);
    stage.advance();
  }
}

/// A warpgroup that multiplies: 64 query rows, and dV (group 0) or dK (group 1) of all of them.
template <class Tile>
class StripesBackwardConsumer {
 public:
  __device__ __forceinline__ StripesBackwardConsumer(const StripesBackward& work, const StripeUnit& unit,
                                                     uint32_t shared, char* memory, int group)
      : work_(work),
        a_(work.rows.a),
        unit_(unit),
        shared_(shared),
        memory_(memory),
        group_(group),
        warp_(threadIdx.x % 128 / kWarpSize),
        lane_(threadIdx.x % kWarpSize),
        row_(group * 64 + warp_ * 16 + lane_ / 4),
        scale_(a_.scale * kLog2e),
        sums_((group == 0 ? work.value_sum : work.key_sum) +
              (int64_t(unit.batch) * a_.heads_kv + unit.kv_head) * a_.len_k * Tile::kDim + lane_ % 4 * 4) {}

  __device__ __forceinline__ void run(const TileRing<Tile::kKeys>& ring, int tiles) {
#pragma unroll
    for (int i = 0; i < Tile::kDim / 2; ++i) grad_query_[i] = 0.f;
    load_queries();
    if (tiles > 0) {
      first_scores(ring.of_block(0));
      for (int tile = 0; tile + 1 < tiles; ++tile) step(ring.of_block(tile), ring.of_block(tile + 1), tile % 2);
      last_gradients(ring.of_block(tiles - 1), (tiles - 1) % 2);
    }
    write_query_gradient();
  }

 private:
  using Element = typename Tile::Element;

  /// Q and dO to shared memory, lse' and delta of this thread's rows to registers.
  __device__ __forceinline__ void load_queries() {
    const int thread = int(threadIdx.x) - Tile::kProducers, rows = unit_.rows.end - unit_.rows.first;
    constexpr int kChunks = Tile::kPanels * 8;
    const char* query =
        static_cast<const char*>(a_.query.data) +
        2 * (unit_.batch * a_.query.batch + unit_.head * a_.query.head + unit_.rows.first * a_.query.row);
    const char* grad_out =
        static_cast<const char*>(a_.grad_out.data) +
        2 * (unit_.batch * a_.grad_out.batch + unit_.head * a_.grad_out.head + unit_.rows.first * a_.grad_out.row);
#pragma unroll 4
    for (int i = thread; i < Tile::kRows * kChunks; i += 256) {
      const int row = i / kChunks, chunk = i % kChunks;
      const uint32_t at =
          chunk / 8 * Tile::kQueryPanel + row * Tile::kRowBytes + ((chunk % 8) ^ (row % 8)) * kChunkBytes;
      const bool in_query = row < rows && chunk * 8 < a_.head_dim, in_out = row < rows && chunk * 8 < a_.value_dim;
      copy_async_16(shared_ + Tile::kQueryAt + at, in_query ? query + row * a_.query.row * 2 + chunk * 16 : query,
                    in_query);
      copy_async_16(shared_ + Tile::kGradOutAt + at,
                    in_out ? grad_out + row * a_.grad_out.row * 2 + chunk * 16 : grad_out, in_out);
    }
    const int64_t first = (int64_t(unit_.batch) * a_.heads_q + unit_.head) * work_.rows.padded_rows + unit_.rows.first;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool exists = row_ + 8 * r < rows;
      lse_[r] = exists ? work_.rows.row_lse[first + row_ + 8 * r] : kInfinity;
      delta_[r] = exists ? work_.rows.row_delta[first + row_ + 8 * r] : 0.f;
    }
    copy_async_commit();
    copy_async_wait<0>();
    fence_async_proxy();
    named_barrier_sync(2, 256);
  }

  __device__ __forceinline__ void wait_tile() {
    mbarrier_wait(shared_ + Tile::kFull + 8 * stage_.stage, stage_.parity);
    fence_async_proxy();
  }
  __device__ __forceinline__ void issue_scores(float (&s)[32]) {
    multiply_rows(s, descriptor_low(shared_ + Tile::kQueryAt + group_ * 64 * Tile::kRowBytes, 16),
                  descriptor_low(shared_ + Tile::kKeyAt + stage_.stage * Tile::kKeyBytes, 16));
  }

  __device__ __forceinline__ void issue_weight_gradients(float (&g)[32]) {
    multiply_rows(g, descriptor_low(shared_ + Tile::kGradOutAt + group_ * 64 * Tile::kRowBytes, 16),
                  descriptor_low(shared_ + Tile::kValueAt + stage_.stage * Tile::kKeyBytes, 16));
  }

  __device__ __forceinline__ void first_scores(bool of_block) {
    float s[32], g[32];
    wait_tile();
    issue_scores(s);
    issue_weight_gradients(g);
    finish_scores(s, g, of_block, 0);
  }

  /// The products with P and dX of a tile (in `buffer`), and P and dX of the next. Nothing is in flight in between:
  /// accumulators would be moved.
  __device__ __forceinline__ void step(bool of_block, bool next_of_block, int buffer) {
    float product[Tile::kDim / 2], s[32], g[32];
    int keys[2];
    find_keys(keys, of_block);
    issue_gradients(product, buffer);
    const int stage = stage_.stage;
    stage_.advance();
    wait_tile();
    issue_scores(s);
    wgmma_wait<1>();
    pin(grad_query_);
    pin(product);
    pin(gradient_);
    release(stage);
    add_to_sums(keys, product);
    issue_weight_gradients(g);
    finish_scores(s, g, next_of_block, buffer ^ 1);
  }

  __device__ __forceinline__ void last_gradients(bool of_block, int buffer) {
    float product[Tile::kDim / 2];
    int keys[2];
    find_keys(keys, of_block);
    issue_gradients(product, buffer);
    wgmma_wait<0>();
    pin(grad_query_);
    pin(product);
    add_to_sums(keys, product);
  }

  __device__ __forceinline__ const int32_t* place() const {
    return reinterpret_cast<const int32_t*>(memory_ + Tile::kPlaceAt) + stage_.stage * Tile::kKeys;
  }
  /// Of this thread's rows of the key product.
  __device__ __forceinline__ void find_keys(int (&keys)[2], bool of_block) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) keys[r] = tile_row(place(), of_block, warp_ * 16 + lane_ / 4 + 8 * r);
  }
  __device__ __forceinline__ void release(int stage) {
    __syncwarp();
    if (lane_ == 0) mbarrier_arrive(shared_ + Tile::kEmpty + 8 * stage);
  }

  /// From products in flight, scores and dP, to P and dX in shared memory.
  __device__ __forceinline__ void finish_scores(float (&s)[32], float (&g)[32], bool of_block, int buffer) {
    const bool masked =
        __shfl_sync(kAllLanes, reinterpret_cast<const int32_t*>(memory_ + Tile::kFlagsAt)[stage_.stage], 0);
    wgmma_wait<1>();
    pin(s);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[4 * j + i] = exp2_fast(fmaf(s[4 * j + i], scale_, -lse_[i / 2]));
    }
    if (masked) hide(s, place(), of_block);
    uint32_t weight[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) weight[i] = pack<Element>(s[2 * i], s[2 * i + 1]);
    store_words(shared_ + Tile::kWeightAt + buffer * Tile::kScoreBytes, weight);
    wgmma_wait<0>();
    pin(g);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float delta = delta_[i % 2];
      gradient_[i] = pack<Element>(s[2 * i] * (g[2 * i] - delta), s[2 * i + 1] * (g[2 * i + 1] - delta));
    }
    store_words(shared_ + Tile::kGradientAt + buffer * Tile::kScoreBytes, gradient_);
    fence_async_proxy();
    named_barrier_sync(2, 256);  // P and dX of all rows are there; nobody reads those of the tile before any more
  }

  /// dQ += dX K, and this group's product of keys: dV = P^T dO or dK = dX^T Q.
  __device__ __forceinline__ void issue_gradients(float (&product)[Tile::kDim / 2], int buffer) {
    const uint32_t keys = descriptor_low(shared_ + Tile::kKeyAt + stage_.stage * Tile::kKeyBytes, Tile::kKeyPanel);
    const uint32_t scores =
        descriptor_low(shared_ + (group_ == 0 ? Tile::kWeightAt : Tile::kGradientAt) + buffer * Tile::kScoreBytes, 16);
    const uint32_t rows =
        descriptor_low(shared_ + (group_ == 0 ? Tile::kGradOutAt : Tile::kQueryAt), Tile::kQueryPanel);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < Tile::kKeys / 16; ++i) {
      wgmma_registers<Element>(grad_query_, &gradient_[4 * i], descriptor(keys + (i * 16 * Tile::kRowBytes >> 4)));
    }
#pragma unroll
    for (int i = 0; i < Tile::kRows / 16; ++i) {
      const int step = i * 16 * Tile::kRowBytes >> 4;
      wgmma_transposed<Element>(product, descriptor(scores + step), descriptor(rows + step), i > 0);
    }
    wgmma_commit();
  }

  /// d = rows of A times rows of B, contraction along them.
  __device__ __forceinline__ void multiply_rows(float (&d)[32], uint32_t a, uint32_t b) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < Tile::kDim / 16; ++i) {
      const int panel = i / 4, inside = i % 4 * 32;
      wgmma_shared<Element>(d, descriptor(a + ((panel * Tile::kQueryPanel + inside) >> 4)),
                            descriptor(b + ((panel * Tile::kKeyPanel + inside) >> 4)), i > 0);
    }
    wgmma_commit();
  }

  /// P = 0 where a row does not see a key.
  __device__ __forceinline__ void hide(float (&s)[32], const int32_t* place, bool of_block) {
    const StripeSight sight(a_, unit_.batch, unit_.rows.first);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        const int shift = 2 * (lane_ % 4);
        const uint32_t seen =
            sight.word(place, of_block, unit_.rows.first + row_ + 8 * r, 32 * w, 0x03030303u << shift) >> shift;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (!(seen >> (8 * j) & 1)) s[16 * w + 4 * j + 2 * r] = 0.f;
          if (!(seen >> (8 * j + 1) & 1)) s[16 * w + 4 * j + 2 * r + 1] = 0.f;
        }
      }
    }
  }

  /// words[2 j + r]: this lane's pair of columns 8 j ... of row row_ + 8 r.
  __device__ __forceinline__ void store_words(uint32_t panel, const uint32_t (&words)[16]) {
    const uint32_t at = panel + row_ * Tile::kRowBytes + lane_ % 4 * 4;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t chunk = (j ^ (lane_ / 4)) * kChunkBytes;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(at + 8 * r * Tile::kRowBytes + chunk), "r"(words[2 * j + r])
                     : "memory");
      }
    }
  }

  /// In the order of sum_column(): the four values of a lane in 16 columns are neighbours.
  __device__ __forceinline__ void add_to_sums(const int (&keys)[2], const float (&product)[Tile::kDim / 2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool exists = keys[r] >= 0 && keys[r] < a_.len_k;  // no branch beside products in flight
      float* to = sums_ + (exists ? int64_t(keys[r]) * Tile::kDim : 0);
#pragma unroll
      for (int j = 0; j < Tile::kDim / 8; j += 2) {
        const float* left = product + 4 * j + 2 * r;
        asm volatile(
            "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n"
            "@p red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n}\n" ::"l"(to + 8 * j),
            "f"(left[0]), "f"(left[1]), "f"(left[4]), "f"(left[5]), "r"(int(exists))
            : "memory");
      }
    }
  }

  __device__ __forceinline__ void write_query_gradient() {
    auto* to = static_cast<uint16_t*>(a_.grad_query.data) + unit_.batch * a_.grad_query.batch +
               unit_.head * a_.grad_query.head;
    const int pair = lane_ % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = unit_.rows.first + row_ + 8 * r;
      if (row >= unit_.rows.end) continue;
#pragma unroll
      for (int j = 0; j < Tile::kDim / 8; ++j) {
        if (8 * j >= a_.head_dim) continue;
        *reinterpret_cast<uint32_t*>(to + row * a_.grad_query.row + 8 * j + 2 * pair) =
            pack<Element>(grad_query_[4 * j + 2 * r] * a_.scale, grad_query_[4 * j + 2 * r + 1] * a_.scale);
      }
    }
  }

  const StripesBackward& work_;
  const AttentionBackward& a_;
  const StripeUnit& unit_;
  const uint32_t shared_;
  char* const memory_;  // the same place
  const int group_, warp_, lane_, row_;
  const float scale_;
  float* const sums_;  // dV's or dK's, of this lane's columns
  Ring<Tile::kStages> stage_;
  float lse_[2], delta_[2];
  float grad_query_[Tile::kDim / 2];
  uint32_t gradient_[16];  // dX, the A operand of dQ
};

/// A CTA for a unit.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    stripes_backward_units(const __grid_constant__ StripesBackward work) {
  extern __shared__ char dynamic[];
  const uint32_t shared = (shared_address(dynamic) + 1023) & ~1023u;
  char* memory = dynamic + (shared - shared_address(dynamic));
  const AttentionProblem& p = work.rows.a;
  const StripeUnit unit = stripe_unit(p, work.plan, blockIdx.x);
  if (unit.rows.first >= unit.rows.end) return;
  const TileRing<Tile::kKeys> ring(work.plan, unit.cell, nullptr);
  const int tiles = __shfl_sync(kAllLanes, tiles_of_unit<Tile>(p, work.plan, unit, ring), 0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::kStages; ++i) {
      mbarrier_init(shared + Tile::kFull + 8 * i, 2 * Tile::kProducers);  // their copies, and what else they wrote
      mbarrier_init(shared + Tile::kEmpty + 8 * i, 8);
    }
    mbarrier_fence_init();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(kAllLanes, int(threadIdx.x) / 128, 0);
  // One if/else with a role per branch: setmaxnreg takes effect in no other form.
  if (warpgroup == 0) {
    fewer_registers<Tile::kProducerRegisters>();
    gather_unit<Tile>(work, unit, tiles, ring, shared, memory);
  } else {
    more_registers<Tile::kConsumerRegisters>();
    StripesBackwardConsumer<Tile>(work, unit, shared, memory, warpgroup - 1).run(ring, tiles);
  }
}

template <class Tile>
constexpr StripesBackwardKernel stripes_backward_kernel_of() {
  return {stripes_backward_units<Tile>,
          nullptr,
          [](int, bool) { return Tile::kSharedBytes; },
          Tile::kDim,
          Tile::kRows,
          Tile::kKeys,
          Tile::kThreads,
          1};
}

template <class Element>
StripesBackwardKernels stripes_backward_kernels_16bit() {
  static const StripesBackwardKernel kernels[] = {
      stripes_backward_kernel_of<StripesBackwardTile<Element, 64>>(),
      stripes_backward_kernel_of<StripesBackwardTile<Element, 128>>(),
  };
  return {kernels, int(sizeof kernels / sizeof *kernels), nullptr};
}

}  // namespace sparsekit::sm90

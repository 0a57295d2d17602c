// y = factor * act(x W^T + bias) of 1 to 16 tokens (decode) on Hopper: stored weights stream through shared memory by
// bulk copies, so that what is on its way does not depend on registers or on what a warp waits for. With a gate:
// act(x G^T) * (x W^T) in one pass.
//
// A slab is 16 rows of a block row; of each block they are contiguous. A CTA takes slabs one after the other; its warps
// take turns along the blocks of a slab, 128 columns a turn, each with a ring of its own that it fills past the end of
// the slab into the next ones: the first copies need nothing but the offsets. Products are those of the kernel for
// sm_80 (cuda_few_tokens_sm80.cu): weights are the A operand of mma.sync. Partial sums of the warps meet in shared
// memory; a warp, another one for each slab, adds them in order while the others go on.
//
// Bound: memory, the stored weights, and three latencies: offsets, weights, x. In a product that `follows`, as many
// weights as the rings hold are there before the product before has ended (programmatic dependent launch).
#include <algorithm>

#include "common/cuda/barriers_sm90.cuh"
#include "common/cuda/launch.h"
#include "common/cuda/shared_memory.cuh"
#include "common/cuda/tma_sm90.cuh"
#include "matmul/cuda_epilogue.cuh"
#include "matmul/cuda_implementations.h"

namespace sparsekit {
namespace {

using namespace sparsekit::cuda;

constexpr int kMostTokens = 16, kTurn = 128;  // columns
constexpr int kWarps = 8, kThreads = kWarps * 32, kSlabRows = 16;
constexpr int kSlotBytes = kSlabRows * kTurn * 2, kMostBlocks = kTurn / 16;  // blocks of a turn
constexpr int kHeaderBytes = kMostBlocks * 8, kMostSlots = 6, kMostSlabs = 32;  // of a warp; of a CTA
constexpr int kSums = 2;  // buffers of partial sums

struct StreamCall {
  BlockSparsePattern pattern[2];  // W, and the gate
  const void* values[2];
  TokensView<const void*> input;
  Output out;
  int slabs_of_block, slabs, slots, lists;
};

/// Shared memory: slots of all warps, their headers (columns), partial sums, then what is below.
struct Layout {
  int headers, sums, sums_bytes, bytes;
  __host__ __device__ explicit Layout(const StreamCall& call) {
    headers = kWarps * call.slots * kSlotBytes;
    sums = headers + kWarps * call.slots * kHeaderBytes;
    sums_bytes = kWarps * call.lists * int(call.out.tokens) * kSlabRows * 4;  // of a buffer
    bytes = sums + kSums * sums_bytes;
  }
};

__device__ __forceinline__ void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;\n" ::: "memory"); }
__device__ __forceinline__ void let_next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
}
/// An index to shared memory; arrive_after_copies then counts as one arrival when this lane's copies have landed.
template <int BYTES>
__device__ __forceinline__ void copy_index(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;\n" ::"r"(to), "l"(from), "n"(BYTES) : "memory");
}
__device__ __forceinline__ void arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(barrier) : "memory");
}
/// 16 bytes of x, or zeros: written by a kernel that may still run when this one begins.
__device__ __forceinline__ uint4 load_tokens(const void* from, bool there) {
  uint4 v;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@p ld.global.v4.b32 {%0, %1, %2, %3}, [%4];\n}\n"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(from), "r"(int(there)));
  return v;
}
__device__ __forceinline__ uint4 load_weights(uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from));
  return v;
}

/// A turn of a warp: `blocks` blocks from `first` on, of list `list` of the CTA's slab number `slab`.
template <int LISTS>
struct Turns {
  int slab = 0, list = 0;
  int64_t first = -1;

  /// The warp's next turn; false at the end.
  __device__ __forceinline__ bool next(const int64_t (*extents)[LISTS][2], int slabs, int warp, int per_turn) {
    if (slab >= slabs) return false;
    first = first < 0 ? extents[slab][list][0] + warp * per_turn : first + kWarps * per_turn;
    while (first >= extents[slab][list][1]) {
      if (++list == LISTS) list = 0, ++slab;
      if (slab >= slabs) return false;
      first = extents[slab][list][0] + warp * per_turn;
    }
    return true;
  }
};

// GROUPS: of 8 tokens. LISTS: 2 with a gate.
template <class Element, int GROUPS, int LISTS>
__global__ void __launch_bounds__(kThreads, 2) stream_tokens(const __grid_constant__ StreamCall call) {
  extern __shared__ __align__(1024) char shared[];
  __shared__ int64_t extents[kMostSlabs][LISTS][2];
  __shared__ __align__(8) uint64_t full_words[kWarps][kMostSlots], sums_words[kSums][2];
  const Layout layout(call);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int R = call.pattern[0].block_rows, C = call.pattern[0].block_cols, tokens = int(call.out.tokens);
  const int slots = call.slots, per_turn = kTurn / C, piece = kSlabRows * C * 2;
  const int slabs = (call.slabs - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x);
  const uint32_t full = shared_address(full_words[warp]);
  const uint32_t ring = shared_address(shared) + uint32_t(warp * slots * kSlotBytes);
  const uint32_t headers = shared_address(shared) + uint32_t(layout.headers + warp * slots * kHeaderBytes);
  const bool wide = call.pattern[0].col.wide;
  auto slab_at = [&](int slab) { return int(blockIdx.x) + slab * int(gridDim.x); };

  if (int(threadIdx.x) < slabs * LISTS) {
    const int slab = int(threadIdx.x) / LISTS, list = int(threadIdx.x) % LISTS;
    const Extent extent = list_extent(call.pattern[list].crow, slab_at(slab) / call.slabs_of_block,
                                      call.pattern[list].nnz);
    extents[slab][list][0] = extent.begin, extents[slab][list][1] = extent.end;
  }
  if (lane == 0) {
    for (int i = 0; i < slots; ++i) mbarrier_init(full + uint32_t(i * 8), 33);
    if (warp == 0) {
      for (int i = 0; i < kSums; ++i) {
        mbarrier_init(shared_address(&sums_words[i][0]), kWarps);
        mbarrier_init(shared_address(&sums_words[i][1]), 1);
      }
    }
    mbarrier_fence_init();
  }
  __syncthreads();
  let_next_kernel_start();

  // Starts the copies of a turn into a slot.
  auto start = [&](const Turns<LISTS>& turn, int slot) {
    const BlockSparsePattern& pattern = call.pattern[turn.list];
    const int blocks = int(min(extents[turn.slab][turn.list][1] - turn.first, int64_t(per_turn)));
    const int row = slab_at(turn.slab) % call.slabs_of_block * kSlabRows;  // in the block
    const uint32_t barrier = full + uint32_t(slot * 8);
    if (lane == 0) mbarrier_expect(barrier, blocks * piece);
    __syncwarp();
    if (lane < blocks) {
      const Element* from = static_cast<const Element*>(call.values[turn.list]) + ((turn.first + lane) * R + row) * C;
      bulk_load(ring + uint32_t(slot * kSlotBytes + lane * piece), from, piece, barrier);
      const uint32_t to = headers + uint32_t(slot * kHeaderBytes + lane * 8);
      const int64_t at = turn.first + lane;
      if (wide) {
        copy_index<8>(to, static_cast<const int64_t*>(pattern.col.data) + at);
      } else {
        copy_index<4>(to, static_cast<const int32_t*>(pattern.col.data) + at);
      }
    }
    arrive_after_copies(barrier);
    if (lane == 0) mbarrier_arrive(barrier);
  };

  Turns<LISTS> ahead;
  bool more = true;
  for (int i = 0; i < slots; ++i) {
    more = more && ahead.next(extents, slabs, warp, per_turn);
    if (more) start(ahead, i);
  }
  wait_for_kernel_before();

  const Element* x = static_cast<const Element*>(call.input.data);
  const int shift = 31 - __clz(C);
  Turns<LISTS> turn;
  bool left = turn.next(extents, slabs, warp, per_turn);
  int slot = 0;
  uint32_t parity = 0;
  for (int slab = 0; slab < slabs; ++slab) {
    float sums[LISTS][GROUPS][4] = {};
#pragma unroll
    for (int list = 0; list < LISTS; ++list) {
      const BlockSparsePattern& pattern = call.pattern[list];
      const int64_t col_blocks = (pattern.cols + C - 1) / C;
      float other[GROUPS][4] = {};  // two chains of products
      while (left && turn.slab == slab && turn.list == list) {
        const int blocks = int(min(extents[slab][list][1] - turn.first, int64_t(per_turn)));
        mbarrier_wait(full + uint32_t(slot * 8), parity);
        const uint32_t weights = ring + uint32_t(slot * kSlotBytes);
        uint4 of_tokens[4][GROUPS], upper[4], lower[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int block = (32 * j + 8 * t) >> shift, within = (32 * j + 8 * t) & (C - 1);
          const uint32_t header = headers + uint32_t(slot * kHeaderBytes + block * 8);
          int64_t column = -1;
          if (block < blocks) {
            if (wide) {
              asm volatile("ld.shared.b64 %0, [%1];\n" : "=l"(column) : "r"(header));
            } else {
              int32_t narrow;
              asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(narrow) : "r"(header));
              column = narrow;
            }
          }
          const int64_t feature = column * C + within;
          const bool valid = column >= 0 && column < col_blocks && feature < pattern.cols;
#pragma unroll
          for (int group = 0; group < GROUPS; ++group) {
            const int token = 8 * group + g;
            of_tokens[j][group] = load_tokens(x + token * call.input.token + feature, valid && token < tokens);
          }
          const uint32_t from = weights + uint32_t(block * piece + (g * C + within) * 2);
          upper[j] = lower[j] = make_uint4(0, 0, 0, 0);
          if (valid) upper[j] = load_weights(from), lower[j] = load_weights(from + uint32_t(8 * C * 2));
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t a0[4] = {upper[j].x, lower[j].x, upper[j].y, lower[j].y};
          const uint32_t a1[4] = {upper[j].z, lower[j].z, upper[j].w, lower[j].w};
#pragma unroll
          for (int group = 0; group < GROUPS; ++group) {
            mma_m16n8k16<Element>(sums[list][group], a0, of_tokens[j][group].x, of_tokens[j][group].y);
            mma_m16n8k16<Element>(other[group], a1, of_tokens[j][group].z, of_tokens[j][group].w);
          }
        }
        __syncwarp();
        more = more && ahead.next(extents, slabs, warp, per_turn);
        if (more) start(ahead, slot);
        if (++slot == slots) slot = 0, parity ^= 1;
        left = turn.next(extents, slabs, warp, per_turn);
      }
#pragma unroll
      for (int group = 0; group < GROUPS; ++group)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[list][group][e] += other[group][e];
    }

    // [list][warp][token][row]
    const int buffer = slab % kSums;
    const uint32_t ready = shared_address(&sums_words[buffer][0]), empty = ready + 8;
    const uint32_t phase = uint32_t(slab / kSums) & 1;
    float* partial = reinterpret_cast<float*>(shared + layout.sums + buffer * layout.sums_bytes);
    const int of_warp = tokens * kSlabRows, of_list = kWarps * of_warp;
    mbarrier_wait(empty, phase ^ 1);
#pragma unroll
    for (int list = 0; list < LISTS; ++list)
#pragma unroll
      for (int group = 0; group < GROUPS; ++group)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int token = 8 * group + 2 * t + e % 2;
          if (token < tokens) {
            partial[list * of_list + warp * of_warp + token * kSlabRows + g + e / 2 * 8] = sums[list][group][e];
          }
        }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(ready);
    if (slab % kWarps != warp) continue;
    mbarrier_wait(ready, phase);
    const int64_t first = int64_t(slab_at(slab)) / call.slabs_of_block * R + slab_at(slab) % call.slabs_of_block * kSlabRows;
    for (int i = lane; i < of_warp; i += 32) {
      const int row = i % kSlabRows, token = i / kSlabRows;
      const int64_t feature = first + row;
      if (feature >= call.out.features) continue;
      float sum = 0.f, gate = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += partial[w * of_warp + i];
      if constexpr (LISTS == 2) {
#pragma unroll
        for (int w = 0; w < kWarps; ++w) gate += partial[of_list + w * of_warp + i];
        sum *= to_float(from_float<Element>(activate(call.out.activation, gate)));
      } else {
        sum = finish<Element>(call.out, sum, token, feature);
      }
      Element* to = static_cast<Element*>(call.out.output.data);
      to[token * call.out.output.token + feature * call.out.output.feature] = from_float<Element>(sum);
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(empty);
  }
}

const char* refuses_weight(const BlockSparsePattern& w, const void* values) {
  if (w.block_rows % kSlabRows || w.block_cols < 16 || w.block_cols > kTurn || w.block_cols & (w.block_cols - 1)) {
    return "values: supported are blocks of multiples of 16 rows and 16, 32, 64 or 128 columns";
  }
  if (w.cols % 8) return "columns of W: supported are multiples of 8";
  if (std::max(w.cols, w.rows) > int64_t(1) << 30) return "weight: supported are up to 2^30 rows and columns";
  return reinterpret_cast<uintptr_t>(values) % 16 ? "values: supported are addresses of 16 bytes" : nullptr;
}

const char* refuses(const BlockSparseProduct& p, const CudaContext& context) {
  if (context.compute_capability != 90) return "needs a GPU of compute capability 9.0 (Hopper)";
  if (p.dtype != DType::bf16 && p.dtype != DType::f16) return "dtype: supported are float16, bfloat16";
  if (p.scales) return "int8 weights run on the CPU only";
  if (p.transposed) return "transposed weights are not in this implementation";
  if (p.tokens > kMostTokens) return "tokens: supported are 1 to 16";
  if (p.gate && (p.gate->pattern.block_rows != p.pattern.block_rows ||
                 p.gate->pattern.block_cols != p.pattern.block_cols ||
                 p.gate->pattern.col.wide != p.pattern.col.wide || p.bias || p.factor.data)) {
    return "gate: supported are the same blocks and dtype of indices, without bias and factor";
  }
  const char* reason = refuses_weight(p.pattern, p.values);
  if (!reason && p.gate) reason = refuses_weight(p.gate->pattern, p.gate->values);
  if (reason) return reason;
  if (p.input.feature != 1) return "input: supported are contiguous features";
  if (reinterpret_cast<uintptr_t>(p.input.data) % 16 || p.input.token % 8) {
    return "input: supported are rows at multiples of 16 bytes";
  }
  return nullptr;
}

size_t workspace(const BlockSparseProduct&, const CudaContext&) { return 0; }

template <class Element>
void (*kernel_of(bool gated, bool many))(StreamCall) {
  if (gated) return many ? stream_tokens<Element, 2, 2> : stream_tokens<Element, 1, 2>;
  return many ? stream_tokens<Element, 2, 1> : stream_tokens<Element, 1, 1>;
}

Status product(const BlockSparseProduct& p, const CudaContext& context) {
  StreamCall call;
  call.pattern[0] = p.pattern;
  call.values[0] = p.values;
  call.pattern[1] = p.gate ? p.gate->pattern : p.pattern;
  call.values[1] = p.gate ? p.gate->values : p.values;
  call.input = p.input;
  call.out = output_of(p);
  call.slabs_of_block = p.pattern.block_rows / kSlabRows;
  call.slabs = int(p.pattern.row_blocks() * call.slabs_of_block);
  call.lists = p.gate ? 2 : 1;
  // Two kernels of an MLP share a multiprocessor; else one has it alone.
  call.slots = p.follows ? (p.tokens > 8 ? 2 : 3) : p.gate ? 3 : kMostSlots;
  const int bytes = Layout(call).bytes;
  void (*kernel)(StreamCall) = p.dtype == DType::bf16 ? kernel_of<__nv_bfloat16>(p.gate, p.tokens > 8)
                                                      : kernel_of<__half>(p.gate, p.tokens > 8);
  const cudaError_t code = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (code != cudaSuccess) return status_of(code, "setting the product's shared memory");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(std::min(
      call.slabs, std::max(context.multiprocessors, (call.slabs + kMostSlabs - 1) / kMostSlabs))));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = size_t(bytes);
  config.stream = static_cast<cudaStream_t>(context.stream);
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  config.numAttrs = p.follows ? 1 : 0;
  return status_of(cudaLaunchKernelEx(&config, kernel, call), "launching the block-sparse product of few tokens");
}

}  // namespace

const CudaMatmul matmul_cuda_stream_tokens = {"stream_tokens", refuses, workspace, product, nullptr, nullptr, nullptr};

}  // namespace sparsekit

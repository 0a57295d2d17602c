// y = factor * act(x W^T + bias) of 1 to 16 tokens (decode) on Hopper: stored weights stream through shared memory by
// bulk copies, so that what is on its way does not depend on registers or on what a warp waits for. With a gate:
// act(x G^T) * (x W^T) in one pass.
//
// A slab is 16 rows of a block row; of each block they are contiguous. A team of 1 to 8 warps takes slabs one after the
// other; its warps take turns along the blocks of a slab, 128 columns a turn, each with a ring of its own that it fills
// past the end of the slab into the next ones: the first copies need nothing but the offsets. What a turn needs of x
// comes into its slot by cp.async. Products are those of the kernel for sm_80 (cuda_few_tokens_sm80.cu): weights are the
// A operand of mma.sync. Partial sums of a team meet in shared memory and are added in the order of its warps.
//
// Bound: memory, the stored weights; but a turn must cost few instructions (a first version of 600 took 44 us for 107
// MB, in caches or not). In a product that `follows`, as many weights as the rings hold are there before the product
// before has ended (programmatic dependent launch).
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
constexpr int kWeightBytes = kSlabRows * kTurn * 2, kMostSlots = 6, kMostItems = 32;  // of a warp; of a team

struct StreamCall {
  BlockSparsePattern pattern[2];  // W, and the gate
  const void* values[2];
  TokensView<const void*> input;
  Output out;
  int slabs_of_block, slabs, slots, team;  // warps of a team
  int slot_bytes;                          // weights, then [tokens][128] of x
};

/// Shared memory: slots of all warps, their headers (32 bytes: columns), partial sums.
struct Layout {
  int headers, sums, sums_bytes, bytes;
  __host__ __device__ Layout(const StreamCall& call, int lists) {
    headers = kWarps * call.slots * call.slot_bytes;
    sums = headers + kWarps * call.slots * 32;
    sums_bytes = lists * int(call.out.tokens) * kSlabRows * 4;  // of a warp
    bytes = sums + kWarps * sums_bytes;
  }
};

__device__ __forceinline__ void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;\n" ::: "memory"); }
__device__ __forceinline__ void let_next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
}
/// 16 bytes to shared memory, or zeros; arrive_after_copies counts as one arrival when this lane's copies have landed.
__device__ __forceinline__ void copy_16(uint32_t to, const void* from, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}
__device__ __forceinline__ void arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ uint4 load_chunk(uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from));
  return v;
}

/// A list of a slab: its blocks, and where their values begin.
struct Item {
  int32_t begin, end;
  const char* values;  // of the slab's rows in block 0
};

/// A warp's place in its team's items: the blocks of a turn begin at `first`.
struct Cursor {
  int item = -1, first = 0, end = 0;

  /// The next turn; false at the end.
  __device__ __forceinline__ bool next(const Item* items, int count, int offset, int stride) {
    first += stride;
    while (first >= end) {
      if (++item >= count) return false;
      first = items[item].begin + offset, end = items[item].end;
    }
    return true;
  }
};

// C columns of a block. GROUPS of 8 tokens. LISTS: 2 with a gate.
template <class Element, int C, int GROUPS, int LISTS>
__global__ void __launch_bounds__(kThreads, 2) stream_tokens(const __grid_constant__ StreamCall call) {
  constexpr int kBlocks = kTurn / C, kPiece = kSlabRows * C * 2;  // blocks of a turn; bytes of a block's slab
  extern __shared__ __align__(1024) char shared[];
  __shared__ Item items_of[kWarps][kMostItems];
  __shared__ __align__(8) uint64_t full_words[kWarps][kMostSlots];
  const Layout layout(call, LISTS);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int team = warp / call.team, of_team = warp % call.team, teams = kWarps / call.team;
  const int slots = call.slots, tokens = int(call.out.tokens);
  const int64_t block_bytes = int64_t(call.pattern[0].block_rows) * C * 2;
  const uint32_t full = shared_address(full_words[warp]);
  const uint32_t ring = shared_address(shared) + uint32_t(warp * slots * call.slot_bytes);
  const uint32_t headers = shared_address(shared) + uint32_t(layout.headers + warp * slots * 32);

  // Slab k of a team is k * stride + first_slab: the slabs of a block row, as long as one another, are of many teams.
  const int first_slab = team * int(gridDim.x) + int(blockIdx.x), stride = teams * int(gridDim.x);
  const int slabs = first_slab < call.slabs ? (call.slabs - first_slab + stride - 1) / stride : 0;
  const int count = slabs * LISTS;
  Item* items = items_of[team];
  for (int i = of_team * 32 + lane; i < count; i += call.team * 32) {
    const int slab = first_slab + i / LISTS * stride, list = i % LISTS, row = slab / call.slabs_of_block;
    const Extent extent = list_extent(call.pattern[list].crow, row, call.pattern[list].nnz);
    items[i] = {int32_t(extent.begin), int32_t(extent.end),
                static_cast<const char*>(call.values[list]) + (slab - row * call.slabs_of_block) * kPiece};
  }
  if (lane == 0) {
    for (int i = 0; i < slots; ++i) mbarrier_init(full + uint32_t(i * 8), 33);
    mbarrier_fence_init();
  }
  __syncthreads();
  let_next_kernel_start();

  // Starts the copies of a turn into a slot: its weights; its columns (of lane b's block; nowhere: -1), then x.
  auto start_weights = [&](const Cursor& turn, int slot) {
    const int blocks = min(turn.end - turn.first, kBlocks);
    const uint32_t barrier = full + uint32_t(slot * 8);
    if (lane == 0) {
      mbarrier_expect(barrier, blocks * kPiece);
      mbarrier_arrive(barrier);
    }
    if (lane < blocks) {
      bulk_load(ring + uint32_t(slot * call.slot_bytes + lane * kPiece),
                items[turn.item].values + (turn.first + lane) * block_bytes, kPiece, barrier);
    }
  };
  auto column_of = [&](const Cursor& turn) -> int32_t {
    if (lane >= min(turn.end - turn.first, kBlocks)) return -1;
    const BlockSparsePattern& pattern = call.pattern[turn.item % LISTS];
    const int64_t column = index_at(pattern.col, turn.first + lane);
    return column >= 0 && column < (int64_t(1) << 30) / C && column * C < pattern.cols ? int32_t(column) : -1;
  };
  const Element* x = static_cast<const Element*>(call.input.data);
  auto start_x = [&](const Cursor& turn, int slot, int32_t column) {
    const int cols = int(call.pattern[turn.item % LISTS].cols);
    if (lane < kBlocks) {
      asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(headers + uint32_t(slot * 32 + lane * 4)), "r"(column) : "memory");
    }
    const uint32_t to = ring + uint32_t(slot * call.slot_bytes + kWeightBytes);
    const int chunk = lane % 16, within = chunk * 8 % C;
    const int feature = __shfl_sync(0xffffffffu, column, chunk * 8 / C) * C + within;
    for (int token = lane / 16; token < tokens; token += 2) {
      const bool there = feature >= 0 && feature < cols;
      copy_16(to + uint32_t(token * 256 + (chunk ^ (token & 1) << 2) * 16),
              x + token * call.input.token + (there ? feature : 0), there);
    }
    arrive_after_copies(full + uint32_t(slot * 8));
    __syncwarp();  // the columns, before any lane reads them
  };

  const int offset = of_team * kBlocks, step = call.team * kBlocks;
  Cursor ahead;
  bool more = true;
  Cursor firsts = ahead;
  for (int i = 0; i < slots; ++i) {
    more = more && ahead.next(items, count, offset, step);
    if (more) start_weights(ahead, i);
  }
  int32_t columns[kMostSlots];
#pragma unroll
  for (int i = 0; i < kMostSlots; ++i) {
    columns[i] = -1;
    if (i < slots && firsts.next(items, count, offset, step)) columns[i] = column_of(firsts);
  }
  int32_t column = -1;  // of the turn to start next
  more = more && ahead.next(items, count, offset, step);
  if (more) column = column_of(ahead);
  wait_for_kernel_before();
  Cursor turn;
#pragma unroll
  for (int i = 0; i < kMostSlots; ++i) {
    if (i < slots && turn.next(items, count, offset, step)) start_x(turn, i, columns[i]);
  }
  turn = Cursor();
  bool left = turn.next(items, count, offset, step);

  int slot = 0;
  uint32_t parity = 0;
  float* partial = reinterpret_cast<float*>(shared + layout.sums + warp * layout.sums_bytes);
  const uint32_t of_lane = ring + uint32_t((g * C + 8 * t % C) * 2 + (C == 16 ? t / 2 * kPiece : 0));
  const uint32_t x_of_lane = ring + uint32_t(kWeightBytes + g * 256);
  for (int item = 0; item < count; ++item) {
    float sums[2][GROUPS][4] = {};  // two chains of products
    const int cols = int(call.pattern[item % LISTS].cols);
    while (left && turn.item == item) {
      const uint32_t at = uint32_t(slot * call.slot_bytes);
      mbarrier_wait(full + uint32_t(slot * 8), parity);
      int32_t column_here = -1;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (C < 32 || 32 * j % C == 0) {
          const int block = C >= 32 ? 32 * j / C : 2 * j + t / 2;
          asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(column_here) : "r"(headers + uint32_t(slot * 32 + block * 4)));
        }
        const bool valid = column_here >= 0 && column_here * C + (32 * j + 8 * t) % C < cols;
        constexpr int kPerBlock = C >= 32 ? C / 32 : 1;
        const uint32_t from =
            of_lane + at + uint32_t(C >= 32 ? j / kPerBlock * kPiece + j % kPerBlock * 64 : 2 * j * kPiece);
        uint4 upper = load_chunk(from), lower = load_chunk(from + uint32_t(8 * C * 2));
        if (!valid) upper = lower = make_uint4(0, 0, 0, 0);
        const uint32_t a0[4] = {upper.x, lower.x, upper.y, lower.y};
        const uint32_t a1[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
        for (int group = 0; group < GROUPS; ++group) {
          uint4 of_token = make_uint4(0, 0, 0, 0);
          if (8 * group + g < tokens) {
            of_token = load_chunk(x_of_lane + at + uint32_t(group * 8 * 256 + ((4 * j + t) ^ (g & 1) << 2) * 16));
          }
          mma_m16n8k16<Element>(sums[0][group], a0, of_token.x, of_token.y);
          mma_m16n8k16<Element>(sums[1][group], a1, of_token.z, of_token.w);
        }
      }
      __syncwarp();
      if (more) {
        start_weights(ahead, slot);
        start_x(ahead, slot, column);
        more = ahead.next(items, count, offset, step);
        if (more) column = column_of(ahead);
      }
      if (++slot == slots) slot = 0, parity ^= 1;
      left = turn.next(items, count, offset, step);
    }
    // [list][token][row]
    const int list = item % LISTS, of_list = tokens * kSlabRows;
#pragma unroll
    for (int group = 0; group < GROUPS; ++group)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int token = 8 * group + 2 * t + e % 2;
        if (token < tokens) {
          partial[list * of_list + token * kSlabRows + g + e / 2 * 8] = sums[0][group][e] + sums[1][group][e];
        }
      }
    if (list != LISTS - 1) continue;
    auto team_sync = [&] {
      if (call.team == 1) {
        __syncwarp();
      } else {
        named_barrier_sync(1 + team, call.team * 32);
      }
    };
    team_sync();
    const int slab = first_slab + item / LISTS * stride, row = slab / call.slabs_of_block;
    const int first = row * call.pattern[0].block_rows + (slab - row * call.slabs_of_block) * kSlabRows;
    const float* of_warp0 = reinterpret_cast<const float*>(shared + layout.sums + team * call.team * layout.sums_bytes);
    for (int i = of_team * 32 + lane; i < of_list; i += call.team * 32) {
      const int token = i / kSlabRows;
      const int64_t feature = first + i % kSlabRows;
      if (feature >= call.out.features) continue;
      float sum = 0.f, gate = 0.f;
      for (int w = 0; w < call.team; ++w) {
        const float* of_warp = of_warp0 + w * (layout.sums_bytes / 4);
        sum += of_warp[i];
        if (LISTS == 2) gate += of_warp[of_list + i];
      }
      if constexpr (LISTS == 2) {
        sum *= to_float(from_float<Element>(activate(call.out.activation, gate)));
      } else {
        sum = finish<Element>(call.out, sum, token, feature);
      }
      Element* to = static_cast<Element*>(call.out.output.data);
      to[token * call.out.output.token + feature * call.out.output.feature] = from_float<Element>(sum);
    }
    team_sync();
  }
}

const char* refuses_weight(const BlockSparsePattern& w, const void* values) {
  if (w.block_rows % kSlabRows || w.block_cols < 16 || w.block_cols > kTurn || w.block_cols & (w.block_cols - 1)) {
    return "values: supported are blocks of multiples of 16 rows and 16, 32, 64 or 128 columns";
  }
  if (w.cols % 8) return "columns of W: supported are multiples of 8";
  if (std::max({w.cols, w.rows, w.nnz}) >= int64_t(1) << 30) return "weight: supported are below 2^30 rows and columns";
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

using StreamKernel = void (*)(StreamCall);

template <class Element, int C>
StreamKernel kernel_of(bool gated, bool many) {
  if (gated) return many ? stream_tokens<Element, C, 2, 2> : stream_tokens<Element, C, 1, 2>;
  return many ? stream_tokens<Element, C, 2, 1> : stream_tokens<Element, C, 1, 1>;
}
template <class Element>
StreamKernel kernel_of(int columns, bool gated, bool many) {
  if (columns == 128) return kernel_of<Element, 128>(gated, many);
  if (columns == 64) return kernel_of<Element, 64>(gated, many);
  return columns == 32 ? kernel_of<Element, 32>(gated, many) : kernel_of<Element, 16>(gated, many);
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
  const int lists = p.gate ? 2 : 1;
  call.slot_bytes = kWeightBytes + int(p.tokens) * 256;
  // Two kernels of an MLP share a multiprocessor; else one has it alone.
  call.slots = p.gate || p.follows ? (p.tokens > 4 ? 2 : 3) : p.tokens > 2 ? 3 : 5;
  // One slab for a warp, if there are as many; of more, two warps share one, so that all end at about the same time.
  const int64_t warps = int64_t(context.multiprocessors) * kWarps;
  call.team = 1;
  while (call.team < kWarps && 4 * int64_t(call.slabs) * call.team < 3 * warps) call.team *= 2;
  if (call.team == 1 && call.slabs > warps) call.team = 2;
  const int teams = kWarps / call.team, most = teams * (kMostItems / lists);
  const int ctas = std::max(std::min(context.multiprocessors, (call.slabs + teams - 1) / teams),
                            (call.slabs + most - 1) / most);
  const int bytes = Layout(call, lists).bytes;
  const StreamKernel kernel = p.dtype == DType::bf16
                                  ? kernel_of<__nv_bfloat16>(p.pattern.block_cols, p.gate, p.tokens > 8)
                                  : kernel_of<__half>(p.pattern.block_cols, p.gate, p.tokens > 8);
  const cudaError_t code = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (code != cudaSuccess) return status_of(code, "setting the product's shared memory");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(ctas));
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

// Sorts the lists of a panel by chunk (a counting sort, one CTA a panel, a warp a list), and packs the weights in that
// order. Entries out of range are left out. Ranks inside a list come from __match_any_sync, so the order is the same
// every time.
//
// Bound: latency for the sorting; memory for the packing, the stored weights read and written once.
#include "matmul/cuda_small_blocks.h"

#include "matmul/cuda_product.cuh"

namespace sparsekit::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int inclusive_scan(int value, int lane) {
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, value, step);
    if (lane >= step) value += other;
  }
  return value;
}

__global__ void __launch_bounds__(kThreads)
    sort_lists(const __grid_constant__ ProductCall call, const __grid_constant__ SmallBlocks blocks, bool transposed) {
  extern __shared__ int begins[];  // [lists][chunks]: counts, then where the chunk's entries begin; [chunks] ranks
  __shared__ int sums[kWarps];
  const int chunks = int(blocks.chunks), lists = blocks.lists;
  int* ranks = begins + lists * chunks;
  const int64_t panel = blockIdx.x, nnz = call.pattern.nnz;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  for (int i = int(threadIdx.x); i < lists * chunks; i += kThreads) begins[i] = 0;
  __syncthreads();

  // Block column of the contraction that an entry stands at, or -1.
  auto neighbour_of = [&](int64_t entry, int64_t end) -> int64_t {
    if (entry >= end) return -1;
    const int64_t neighbour = index_at(call.neighbour, entry);
    const int64_t place = transposed ? index_at(call.place, entry) : entry;
    return neighbour >= 0 && neighbour < call.neighbours && place >= 0 && place < nnz ? neighbour : -1;
  };
  auto extent_of = [&](int list) -> Extent {
    const int64_t at = panel * lists + list;
    if (at >= call.lists) return {0, 0};
    return list_extent(call.offsets, at, nnz);
  };
  for (int list = warp; list < lists; list += kWarps) {
    const Extent extent = extent_of(list);
    for (int64_t entry = extent.begin + lane; entry < extent.end; entry += 32) {
      const int64_t neighbour = neighbour_of(entry, extent.end);
      if (neighbour >= 0) atomicAdd(&begins[list * chunks + int(neighbour * call.inner_size / kSmallChunk)], 1);
    }
  }
  __syncthreads();
  int before = 0;
  for (int start = 0; start < chunks; start += kThreads) {
    const int chunk = start + int(threadIdx.x);
    bool any = false;
    for (int list = 0; chunk < chunks && list < lists; ++list) any |= begins[list * chunks + chunk] > 0;
    const unsigned votes = __ballot_sync(kAllLanes, any);
    if (lane == 0) sums[warp] = __popc(votes);
    __syncthreads();
    int rank = before + __popc(votes & ((1u << lane) - 1));
    for (int i = 0; i < kWarps; ++i) {
      if (i < warp) rank += sums[i];
      before += sums[i];
    }
    if (any) {
      ranks[chunk] = rank;
      blocks.used[panel * chunks + rank] = chunk;
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) blocks.counts[panel] = before;
  for (int list = warp; list < lists; list += kWarps) {
    int* begin = begins + list * chunks;
    int total = 0;
    for (int start = 0; start < chunks; start += 32) {
      const int chunk = start + lane, own = chunk < chunks ? begin[chunk] : 0;
      const int inclusive = inclusive_scan(own, lane);
      if (chunk < chunks) begin[chunk] = total + inclusive - own;
      total += __shfl_sync(kAllLanes, inclusive, 31);
    }
    if (lane == 0) blocks.lengths[panel * lists + list] = total * blocks.units;
    __syncwarp();
    const Extent extent = extent_of(list);
    for (int64_t from = extent.begin; from < extent.end; from += 32) {
      const int64_t entry = from + lane, neighbour = neighbour_of(entry, extent.end);
      const int inner = neighbour < 0 ? 0 : int(neighbour * call.inner_size);
      const int chunk = neighbour < 0 ? -1 : inner / kSmallChunk;
      const unsigned same = __match_any_sync(kAllLanes, chunk);
      const int rank = __popc(same & ((1u << lane) - 1));
      const int first = chunk < 0 ? 0 : begin[chunk];
      __syncwarp();
      if (chunk >= 0 && rank == 0) begin[chunk] = first + __popc(same);
      __syncwarp();
      if (chunk < 0) continue;
      const int64_t to = extent.begin + first + rank;
      blocks.entries[to] = {int32_t(transposed ? index_at(call.place, entry) : entry), inner};
      for (int unit = 0; unit < blocks.units; ++unit) {
        blocks.codes[to * blocks.units + unit] = 2 * ranks[chunk] + inner % kSmallChunk / 16 + unit;
      }
    }
  }
}

/// A warp packs one entry: the operand A of m16n8k16 for each unit and each 16 features.
__global__ void pack_weights(const __grid_constant__ ProductCall call, const __grid_constant__ SmallBlocks blocks,
                             bool transposed) {
  const int64_t at = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (at >= call.pattern.nnz) return;
  const int lane = int(threadIdx.x) % 32, columns = call.pattern.block_cols;
  const int2 entry = blocks.entries[at];
  // Where no entry was placed this is any number, and what is packed is not read.
  const bool good = entry.x >= 0 && entry.x < call.pattern.nnz;
  const uint16_t* block =
      static_cast<const uint16_t*>(call.values) + (good ? int64_t(entry.x) : 0) * call.list_size * call.inner_size;
  auto pair = [&](int feature, int inner) -> uint32_t {
    if (!good) return 0;
    const int64_t left = call.inner - entry.y - inner;
    if (left <= 0) return 0;
    const uint16_t* from = block + (transposed ? inner * columns + feature : feature * columns + inner);
    if (!transposed && left > 1) return *reinterpret_cast<const uint32_t*>(from);
    const uint32_t low = from[0], high = left > 1 ? from[transposed ? columns : 1] : 0;
    return low | high << 16;
  };
  for (int unit = 0; unit < blocks.units; ++unit) {
    for (int tile = 0; tile < blocks.tiles; ++tile) {
      const int feature = 16 * tile + lane / 4, inner = 16 * unit + lane % 4 * 2;
      blocks.fragments[((at * blocks.units + unit) * blocks.tiles + tile) * 32 + lane] = make_uint4(
          pair(feature, inner), pair(feature + 8, inner), pair(feature, inner + 8), pair(feature + 8, inner + 8));
    }
  }
}

}  // namespace

SmallBlocks small_blocks_of(const ProductCall& call) {
  SmallBlocks blocks;
  blocks.lists = kSmallFeatures / call.list_size;
  blocks.tiles = call.list_size / 16;
  blocks.units = call.inner_size / 16;
  blocks.panels = (call.lists + blocks.lists - 1) / blocks.lists;
  blocks.chunks = (call.neighbours * call.inner_size + kSmallChunk - 1) / kSmallChunk;
  return blocks;
}

size_t small_blocks_bytes(const SmallBlocks& b, int64_t nnz) {
  return size_t(nnz) * (size_t(b.units * b.tiles) * 512 + sizeof(int2) + size_t(b.units) * 4) +
         size_t(b.panels) * size_t(b.chunks + 1 + b.lists) * 4;
}

int small_blocks_shared_bytes(const SmallBlocks& blocks) { return int((blocks.lists + 1) * blocks.chunks * 4); }

Status make_small_blocks(SmallBlocks* blocks, const ProductCall& call, void* workspace, void* stream) {
  const int64_t nnz = call.pattern.nnz;
  blocks->fragments = static_cast<uint4*>(workspace);
  blocks->entries = reinterpret_cast<int2*>(blocks->fragments + nnz * blocks->units * blocks->tiles * 32);
  blocks->codes = reinterpret_cast<int32_t*>(blocks->entries + nnz);
  blocks->used = blocks->codes + nnz * blocks->units;
  blocks->counts = blocks->used + blocks->panels * blocks->chunks;
  blocks->lengths = blocks->counts + blocks->panels;
  const bool transposed = call.place.data != nullptr;
  const int bytes = small_blocks_shared_bytes(*blocks);
  const cudaError_t code = cudaFuncSetAttribute(reinterpret_cast<const void*>(sort_lists),
                                                cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (code != cudaSuccess) return status_of(code, "setting the shared memory of the sorting of lists");
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  sort_lists<<<unsigned(blocks->panels), kThreads, size_t(bytes), on>>>(call, *blocks, transposed);
  if (nnz > 0) pack_weights<<<unsigned((nnz + 7) / 8), 256, 0, on>>>(call, *blocks, transposed);
  return status_of(cudaGetLastError(), "launching the sorting of lists");
}

}  // namespace sparsekit::cuda

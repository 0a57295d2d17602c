// Lists of the true entries of a boolean map's rows, on the GPU: one warp per row.
//
// A lane reads 16 columns at once, twice, and turns them into 32 bits; a scan over the lanes, both halves in one word,
// says where its entries go. Lists of up to 256 entries are put together in shared memory and written as whole lines:
// entries straight to memory would be a store per entry. Bound: memory; 32,768 rows of 1,024 with lists of 128: 50 MB.
#include "selection/cuda_kernels.h"
#include "selection/cuda_support.cuh"

namespace sparsekit {
namespace cuda {
namespace {

constexpr int kWarps = 8, kStage = 256, kColumns = 16, kStep = 2 * kColumns * kWarp;

/// Bit i: byte i is not 0.
__device__ __forceinline__ uint32_t true_bytes(uint32_t word) {
  const uint32_t flags = (((word & 0x7f7f7f7fu) + 0x7f7f7f7fu) | word) >> 7 & 0x01010101u;
  return flags * 0x10204080u >> 28;  // the product lines the four bits up at the top
}

/// Bit i: column `column` + i is true, of 16; columns past the end are not.
template <bool ALIGNED>
__device__ __forceinline__ uint32_t true_columns(const uint8_t* row, int64_t column, int64_t columns) {
  uint32_t bits = 0;
  if (ALIGNED && column + kColumns <= columns) {
    const uint4 bytes = *reinterpret_cast<const uint4*>(row + column);
    bits = true_bytes(bytes.x) | true_bytes(bytes.y) << 4 | true_bytes(bytes.z) << 8 | true_bytes(bytes.w) << 12;
  } else {
    for (int i = 0; i < kColumns; ++i) bits |= uint32_t(column + i < columns && row[column + i]) << i;
  }
  return bits;
}

template <bool ALIGNED>
__global__ void __launch_bounds__(kWarps* kWarp) lists_from_bool(BlockListsFromBool a) {
  __shared__ __align__(16) int32_t stages[kWarps][kStage];
  const int64_t row = int64_t(blockIdx.x) * kWarps + warp_of();
  if (row >= a.rows) return;
  const int lane = lane_of();
  const auto* map = reinterpret_cast<const uint8_t*>(a.map) + row * a.columns;
  int32_t* indices = a.indices + row * a.capacity;
  const bool staged = a.capacity <= kStage;
  int32_t* to = staged ? stages[warp_of()] : indices;
  int64_t count = 0;
  for (int64_t first = 0; first < a.columns && count < a.capacity; first += kStep) {
    const int64_t column = first + kColumns * lane;
    const uint32_t near = true_columns<ALIGNED>(map, column, a.columns);
    const uint32_t far = true_columns<ALIGNED>(map, column + kStep / 2, a.columns);
    const uint32_t own = uint32_t(__popc(near)) | uint32_t(__popc(far)) << 16;  // 512 at most in either half
    const uint32_t through = warp_scan(own), all = __shfl_sync(kLanes, through, kWarp - 1);
    auto put = [&](uint32_t bits, int64_t at, int64_t base) {
      for (; bits && at < a.capacity; bits &= bits - 1) to[at++] = int32_t(base + __ffs(int(bits)) - 1);
    };
    put(near, count + ((through - own) & 0xffff), column);
    put(far, count + (all & 0xffff) + ((through - own) >> 16), column + kStep / 2);
    count += (all & 0xffff) + (all >> 16);
  }
  count = min(count, a.capacity);
  for (int64_t at = count + lane; at < a.capacity; at += kWarp) to[at] = -1;
  if (lane == 0) a.counts[row] = int32_t(count);
  if (!staged) return;
  __syncwarp();
  if (a.capacity % 4 == 0) {
    for (int at = lane; at < a.capacity / 4; at += kWarp) {
      reinterpret_cast<int4*>(indices)[at] = reinterpret_cast<const int4*>(to)[at];
    }
  } else {
    for (int at = lane; at < a.capacity; at += kWarp) indices[at] = to[at];
  }
}

}  // namespace
}  // namespace cuda

Status block_lists_from_bool(const BlockListsFromBool& a, const CudaContext& context) {
  const auto rows = cuda::ceil_div<int64_t>(a.rows, cuda::kWarps);
  if (a.columns > INT32_MAX || rows > INT32_MAX) {
    return error(Status::Kind::unsupported, "block_lists_from_bool: block_map has %lld rows of %lld; indices are int32",
                 (long long)a.rows, (long long)a.columns);
  }
  if (a.rows == 0) return {};
  const bool aligned = reinterpret_cast<uintptr_t>(a.map) % cuda::kColumns == 0 && a.columns % cuda::kColumns == 0;
  cuda::launch(aligned ? cuda::lists_from_bool<true> : cuda::lists_from_bool<false>, unsigned(rows),
               cuda::kWarps * cuda::kWarp, 0, static_cast<cudaStream_t>(context.stream), a);
  return cuda::launched("block_lists_from_bool");
}

}  // namespace sparsekit

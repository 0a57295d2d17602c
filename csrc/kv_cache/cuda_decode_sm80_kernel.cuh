// The packed decode kernel around PackedDecode (cuda_decode_sm80_packed.cuh), and the choice of its shape.
#pragma once

#include "kv_cache/cuda_decode_sm80.h"
#include "kv_cache/cuda_decode_sm80_packed.cuh"

namespace sparsekit::cuda {

/// Slot s of a head's states: share s of the quantized tokens; the last one: sinks and ring, in full precision. Those
/// CTAs are the last of the grid, and where there are no such tokens they are gone at once.
template <int BITS, int DIM, bool CHANNEL, bool HALVES>
__global__ void __launch_bounds__(kDecodeThreads, kDecodeResident) decode_packed(const __grid_constant__ Decode p) {
  using Kernel = PackedDecode<BITS, DIM, CHANNEL, HALVES>;
  extern __shared__ __align__(128) uint8_t shared[];
  const CtaPlace at = place_of_cta(p);
  const int64_t b = at.b, h = at.h;
  const int part = at.slot, first_row = at.first_row;
  const Lengths n = lengths_of(p.cache, b, h);
  if (part == p.splits) {  // rows are the sinks, then the ring
    const Cache& c = p.cache;
    const int rows = n.sinks + n.recent;
    if (rows == 0) {
      if (first_row + int(threadIdx.x) < p.rows && threadIdx.x < kColumns)
        p.states[p.state(b, h, part, first_row + threadIdx.x)] = make_float2(-kInfinity, 0.f);
      return;
    }
    auto number = [&](int i) { return i < n.sinks ? i : i + n.quantized; };
    auto offset = [&](int i, bool) {
      return DIM * (i < n.sinks ? c.sink_row(b, h, i) : c.ring_row(b, h, int64_t(n.quantized) + i - n.sinks));
    };
    const Share all = {0, (rows + 31) / 32};
    if (p.kept == DType::bf16) {
      attend_rows<__nv_bfloat16, DIM, 1>(p, b, h, part, first_row, n.total(), rows, number, all, c.key.window,
                                         c.value.window, offset, shared);
    } else {
      attend_rows<__half, DIM, 1>(p, b, h, part, first_row, n.total(), rows, number, all, c.key.window, c.value.window,
                                  offset, shared);
    }
    return;
  }
  const Share share = share_of((n.quantized + Kernel::kTokens - 1) / Kernel::kTokens, part, p.splits, kDecodeWarps);
  const uint32_t ring =
      shared_address(shared) + threadIdx.x / 32 * Kernel::kSlots * Kernel::slot_bytes(p.cache.key.format.group_size);
  Kernel(p, b, h, first_row, n, ring).run(share, part, reinterpret_cast<float*>(shared));
}

template <int BITS, int DIM, bool CHANNEL, bool HALVES>
PackedDecodeKernel packed_kernel_of(int group_size) {
  using Kernel = PackedDecode<BITS, DIM, CHANNEL, HALVES>;
  const size_t ring = size_t(kDecodeWarps) * Kernel::kSlots * Kernel::slot_bytes(group_size);
  const size_t window = size_t(kDecodeWarps) * 32 * DIM * 2;  // one tile of sinks or ring
  size_t bytes = ring > window ? ring : window;
  if (bytes < finish_bytes(DIM)) bytes = finish_bytes(DIM);
  return {reinterpret_cast<const void*>(&decode_packed<BITS, DIM, CHANNEL, HALVES>), bytes, Kernel::kTokens};
}

template <int BITS, int DIM>
PackedDecodeKernel packed_kernel_of(bool per_channel, int group_size) {
  constexpr bool kHalves = Codes<BITS>::kTokens == 64;
  if (!per_channel) return packed_kernel_of<BITS, DIM, false, false>(group_size);
  if (kHalves && group_size == 32) return packed_kernel_of<BITS, DIM, true, kHalves>(group_size);
  return packed_kernel_of<BITS, DIM, true, false>(group_size);
}

template <int BITS>
PackedDecodeKernel packed_kernel_of(int dim, bool per_channel, int group_size) {
  return dim == 64    ? packed_kernel_of<BITS, 64>(per_channel, group_size)
         : dim == 128 ? packed_kernel_of<BITS, 128>(per_channel, group_size)
                      : PackedDecodeKernel{};
}

}  // namespace sparsekit::cuda

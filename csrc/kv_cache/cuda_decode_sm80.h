// The packed decode kernels of one number of bits each: files cuda_decode_sm80_*.cu.
#pragma once

#include <cstddef>

namespace sparsekit {

/// CTAs of a multiprocessor that registers leave room for: warps wait for their own products most of the time.
constexpr int kDecodeResident = 4;

struct PackedDecodeKernel {
  const void* kernel = nullptr;
  size_t shared_bytes = 0;
  int tokens = 0;  // of a tile
};

PackedDecodeKernel decode_packed_fp8(int dim, bool per_channel, int group_size);
PackedDecodeKernel decode_packed_8(int dim, bool per_channel, int group_size);
PackedDecodeKernel decode_packed_4(int dim, bool per_channel, int group_size);
PackedDecodeKernel decode_packed_3(int dim, bool per_channel, int group_size);
PackedDecodeKernel decode_packed_2(int dim, bool per_channel, int group_size);

/// Plain caches of fp16 or bf16.
const void* decode_plain_kernel(int dim, bool bf16);
size_t decode_plain_shared_bytes(int dim);

}  // namespace sparsekit

// Decode attention over plain caches of fp16 or bf16, contiguous or paged: attend_rows of cuda_decode_sm80.cuh.
#include "kv_cache/cuda_decode_sm80.cuh"
#include "kv_cache/cuda_decode_sm80.h"

namespace sparsekit {
namespace {

using namespace sparsekit::cuda;

constexpr int kSlots = 3;  // 24 KB of a warp at 128 channels: 128 KB under way in the 8 warps of a multiprocessor

template <class Element, int DIM>
__global__ void __launch_bounds__(kDecodeThreads, 2) decode_plain(const __grid_constant__ Decode p) {
  extern __shared__ __align__(128) uint8_t shared[];
  const CtaPlace at = place_of_cta(p);
  const int64_t b = at.b, h = at.h;
  const Plain& c = p.plain;
  const int tokens = c.length(b);
  auto offset = [&](int token, bool value) -> int64_t {
    int64_t page = b, in_page = token;
    if (c.block_table) {
      page = c.page(b, token / c.page_size);
      in_page = token % c.page_size;
    }
    if (page < 0) return -1;
    return value ? page * c.value_page + h * c.value_head + in_page * c.value_token
                 : page * c.key_page + h * c.key_head + in_page * c.key_token;
  };
  const Share share = share_of((tokens + 31) / 32, at.slot, p.splits, 2 * kDecodeWarps);
  attend_rows<Element, DIM, kSlots>(
      p, b, h, at.slot, at.first_row, tokens, tokens, [](int i) { return i; }, share, c.key, c.value, offset, shared);
}

}  // namespace

const void* decode_plain_kernel(int dim, bool bf16) {
  if (dim == 64) {
    return bf16 ? reinterpret_cast<const void*>(&decode_plain<__nv_bfloat16, 64>)
                : reinterpret_cast<const void*>(&decode_plain<__half, 64>);
  }
  if (dim == 128) {
    return bf16 ? reinterpret_cast<const void*>(&decode_plain<__nv_bfloat16, 128>)
                : reinterpret_cast<const void*>(&decode_plain<__half, 128>);
  }
  return nullptr;
}

size_t decode_plain_shared_bytes(int dim) {
  const size_t ring = size_t(kDecodeWarps) * kSlots * 32 * dim * 2;
  return ring > finish_bytes(dim) ? ring : finish_bytes(dim);
}

}  // namespace sparsekit

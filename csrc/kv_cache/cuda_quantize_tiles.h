// Quantization of 16-bit rows by tiles: kernels of one element type each, in files cuda_quantize_bf16.cu and _f16.cu.
#pragma once

#include "kv_cache/cuda_append.cuh"

namespace sparsekit {
namespace cuda {

/// Rows of one tensor: all of x, or (flush) what an append takes out of the rings of a cache.
struct QuantizeTiles {
  Format format;
  uint32_t tiles;               // of a head, of 64 tokens (128: groups of 128 tokens)
  int32_t heads, tokens;        // heads of a sequence, tokens of x
  int64_t blocks, head_scales;  // of a head
  InputView x;
  uint8_t* codes;
  uint16_t *scales, *minima;
  bool flush;
  Append append;
};

inline int tile_tokens(const Format& f) { return f.per_channel && f.group_size == 128 ? 128 : 64; }

}  // namespace cuda

/// Whether rows of `dtype` at `x` are for these kernels: 16 bits, aligned to 16 bytes, no values per channel.
bool quantizes_tiles(const cuda::Format& format, DType dtype, const InputView& x);
/// Launches `tiles` * (all heads) CTAs per 128 channels.
Status quantize_tiles(const cuda::QuantizeTiles& tiles, DType dtype, int64_t all_heads, const CudaContext& context,
                      const char* what);

/// Null: no such kernel.
const void* quantize_kernel_bf16(int bits, bool per_channel, bool value_layout);
const void* quantize_kernel_f16(int bits, bool per_channel, bool value_layout);

}  // namespace sparsekit

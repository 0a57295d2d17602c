// quantize_kv and dequantize_kv on CUDA.
//
// Quantization: rows of 16 bits by cuda_quantize_rows.cuh. What that does not take: a CTA takes one tile (a key group
// of 32, 64 or 128 tokens; 64 tokens where groups lie inside a token) of 128 channels: cuda_quantize.cuh.
// Dequantization: a thread makes 4 neighbouring channels of a token; words that neighbours share come from L1. Both are
// bound by memory: bytes of x once, bytes of codes once.
#include <cuda_runtime.h>

#include "common/cuda/launch.h"
#include "common/cuda/mma.cuh"
#include "kv_cache/cuda_quantize.cuh"
#include "kv_cache/cuda_quantize_tiles.h"
#include "sparsekit/attention.h"

namespace sparsekit {
namespace {

using namespace sparsekit::cuda;

struct Quantize {
  Format format;
  DType dtype;
  int64_t heads, tokens, units, blocks, padded;  // padded: tokens in whole units, as scales have them
  InputView x;
  uint8_t* codes;
  uint16_t *scales, *minima;
};

template <int PER>
__global__ void __launch_bounds__(kQuantizeThreads, PER == 16 ? 1 : 2) quantize(const __grid_constant__ Quantize q) {
  __shared__ QuantizeShared shared;
  const int64_t head = blockIdx.x / q.units, start = blockIdx.x % q.units * (PER * kQuantizeWarps);
  const int count = int(min(q.tokens - start, int64_t(PER * kQuantizeWarps)));
  const int64_t first = head / q.heads * q.x.batch + head % q.heads * q.x.head + start * q.x.row,
                size = q.dtype == DType::f32 ? 4 : 2;
  const int64_t scale = head * q.format.scales(q.padded) + q.format.scales(start);
  const Place to = {q.codes + (head * q.blocks + start / kv_block) * q.format.block_bytes, q.scales + scale,
                    q.minima ? q.minima + scale : nullptr};
  float4 x[PER];
  load_tile<PER>(
      q.format, q.dtype, count, blockIdx.y,
      [&](int t) { return static_cast<const char*>(q.x.data) + (first + t * q.x.row) * size; }, x);
  quantize_tile<PER>(q.format, count, (count + kv_block - 1) / kv_block, blockIdx.y, x, to, shared);
}

struct Dequantize {
  Format format;
  int64_t heads, tokens, blocks, padded;
  const uint8_t* codes;
  const uint16_t *scales, *minima;
  OutputView x;
};

constexpr int kThreads = 256;

template <class Element>
__global__ void __launch_bounds__(kThreads) dequantize(const __grid_constant__ Dequantize q, int64_t count) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= count) return;
  const Format& f = q.format;
  const int d = int(at % (f.dim / 4)) * 4;
  const int64_t row = at / (f.dim / 4), head = row / q.tokens, token = row % q.tokens, unit = token / f.unit * f.unit;
  const int64_t scale = head * f.scales(q.padded) + f.scales(unit);
  const Place place = {const_cast<uint8_t*>(q.codes) + (head * q.blocks + unit / kv_block) * f.block_bytes,
                       const_cast<uint16_t*>(q.scales) + scale,
                       q.minima ? const_cast<uint16_t*>(q.minima) + scale : nullptr};
  Element* to =
      static_cast<Element*>(q.x.data) + head / q.heads * q.x.batch + head % q.heads * q.x.head + token * q.x.row + d;
#pragma unroll
  for (int c = 0; c < 4; ++c) to[c] = from_float<Element>(element_of(f, place, int(token - unit), d + c));
}

Status refuse_f64(DType dtype) {
  if (dtype != DType::f64) return {};
  return error(Status::Kind::unsupported, "x: float64; supported on CUDA: float32, float16, bfloat16");
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

bool quantizes_tiles(const Format& f, DType dtype, const InputView& x) {
  const bool aligned =
      reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.batch % 8 == 0 && x.head % 8 == 0 && x.row % 8 == 0;
  return aligned && (dtype == DType::bf16 || dtype == DType::f16) && !(f.per_channel && f.value_layout);
}

Status quantize_tiles(const QuantizeTiles& q, DType dtype, int64_t all_heads, const CudaContext& context,
                      const char* what) {
  const Format& f = q.format;
  const void* kernel = dtype == DType::f16 ? quantize_kernel_f16(f.bits, f.per_channel, f.value_layout)
                                           : quantize_kernel_bf16(f.bits, f.per_channel, f.value_layout);
  const int64_t ctas = all_heads * q.tiles;
  if (ctas > 0x7fffffff || int64_t(q.tiles) * tile_tokens(f) > 0x7fffffff)
    return error(Status::Kind::unsupported, "%s: %lld tiles of %d tokens; supported: 2^31 - 1", what, (long long)ctas,
                 tile_tokens(f));
  void* arguments[] = {const_cast<QuantizeTiles*>(&q)};
  return status_of(
      cudaLaunchKernel(kernel, dim3(unsigned(ctas), unsigned(ceil_div(f.dim, kSlice))),
                       dim3(unsigned(tile_tokens(f) * 2)), arguments, 0, static_cast<cudaStream_t>(context.stream)),
      what);
}

Status kv_quantize(const KvQuantize& a, const CudaContext& context) {
  Status status = kv_check(a.packing);
  if (status.ok()) status = refuse_f64(a.dtype);
  if (!status.ok()) return status;
  const int tile = a.packing.per_channel ? a.packing.group_size : 64;
  const Format format = format_of(a.packing, 0);
  if (a.batch * a.heads * a.tokens == 0) return {};
  if (quantizes_tiles(format, a.dtype, a.x) && a.tokens <= (1 << 30)) {
    QuantizeTiles q{};
    q.format = format;
    q.tiles = uint32_t(ceil_div(a.tokens, tile_tokens(format)));
    q.heads = int32_t(a.heads);
    q.tokens = int32_t(a.tokens);
    q.blocks = ceil_div(a.tokens, kv_block);
    q.head_scales = a.packing.scales(ceil_div(a.tokens, a.packing.unit()) * a.packing.unit());
    q.x = a.x;
    q.codes = a.codes;
    q.scales = a.scales;
    q.minima = a.minima;
    return quantize_tiles(q, a.dtype, a.batch * a.heads, context, "quantize_kv");
  }
  Quantize q;
  q.format = format;
  q.dtype = a.dtype;
  q.heads = a.heads;
  q.tokens = a.tokens;
  q.units = ceil_div(a.tokens, tile);
  q.blocks = ceil_div(a.tokens, kv_block);
  q.padded = ceil_div(a.tokens, a.packing.unit()) * a.packing.unit();
  q.x = a.x;
  q.codes = a.codes;
  q.scales = a.scales;
  q.minima = a.minima;
  const int64_t tiles = a.batch * a.heads * q.units;
  if (tiles > 0x7fffffff)
    return error(Status::Kind::unsupported, "x: %lld tiles of %d tokens; supported: 2^31 - 1", (long long)tiles, tile);
  const void* kernel = tile == 32   ? reinterpret_cast<const void*>(&quantize<4>)
                       : tile == 64 ? reinterpret_cast<const void*>(&quantize<8>)
                                    : reinterpret_cast<const void*>(&quantize<16>);
  void* arguments[] = {&q};
  return status_of(cudaLaunchKernel(kernel, dim3(unsigned(tiles), unsigned(ceil_div(a.packing.dim, kSlice))),
                                    dim3(kQuantizeThreads), arguments, 0, static_cast<cudaStream_t>(context.stream)),
                   "quantize_kv");
}

Status kv_dequantize(const KvDequantize& a, const CudaContext& context) {
  Status status = kv_check(a.packing);
  if (status.ok()) status = refuse_f64(a.dtype);
  if (!status.ok()) return status;
  Dequantize q;
  q.format = format_of(a.packing, 0);
  q.heads = a.heads;
  q.tokens = a.tokens;
  q.blocks = ceil_div(a.tokens, kv_block);
  q.padded = ceil_div(a.tokens, a.packing.unit()) * a.packing.unit();
  q.codes = a.codes;
  q.scales = a.scales;
  q.minima = a.minima;
  q.x = a.x;
  int64_t count = a.batch * a.heads * a.tokens * (a.packing.dim / 4);
  if (count == 0) return {};
  const int64_t blocks = ceil_div(count, kThreads);
  if (blocks > 0x7fffffff) return error(Status::Kind::unsupported, "codes: too many for one call");
  const void* kernel = a.dtype == DType::f32   ? reinterpret_cast<const void*>(&dequantize<float>)
                       : a.dtype == DType::f16 ? reinterpret_cast<const void*>(&dequantize<__half>)
                                               : reinterpret_cast<const void*>(&dequantize<__nv_bfloat16>);
  void* arguments[] = {&q, &count};
  return status_of(cudaLaunchKernel(kernel, dim3(unsigned(blocks)), dim3(kThreads), arguments, 0,
                                    static_cast<cudaStream_t>(context.stream)),
                   "dequantize_kv");
}

}  // namespace sparsekit

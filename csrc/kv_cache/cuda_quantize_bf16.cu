// Quantization of bf16 rows. See cuda_quantize_rows.cuh.
#include "kv_cache/cuda_quantize_tiles.cuh"

namespace sparsekit {

const void* quantize_kernel_bf16(int bits, bool per_channel, bool value_layout) {
  return cuda::quantize_kernel<__nv_bfloat16>(bits, per_channel, value_layout);
}

}  // namespace sparsekit

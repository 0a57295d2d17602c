// Packed decode: fp8 e4m3. See cuda_decode_sm80_packed.cuh.
#include "kv_cache/cuda_decode_sm80_kernel.cuh"

namespace sparsekit {

PackedDecodeKernel decode_packed_fp8(int dim, bool per_channel, int group_size) {
  return cuda::packed_kernel_of<kv_fp8>(dim, per_channel, group_size);
}

}  // namespace sparsekit

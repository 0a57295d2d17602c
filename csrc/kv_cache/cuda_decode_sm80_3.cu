// Packed decode: 3 bits. See cuda_decode_sm80_packed.cuh.
#include "kv_cache/cuda_decode_sm80_kernel.cuh"

namespace sparsekit {

PackedDecodeKernel decode_packed_3(int dim, bool per_channel, int group_size) {
  return cuda::packed_kernel_of<3>(dim, per_channel, group_size);
}

}  // namespace sparsekit

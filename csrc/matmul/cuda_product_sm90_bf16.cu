#include "matmul/cuda_product_sm90.cuh"

namespace sparsekit::cuda {

ProductKernel90 product_kernel_90_bf16(bool ta, bool tb, bool split, Mode mode) {
  return product_kernel_90_of<__nv_bfloat16>(ta, tb, split, mode);
}

}  // namespace sparsekit::cuda

#include "matmul/cuda_product_sm90.cuh"

namespace sparsekit::cuda {

ProductKernel90 product_kernel_90_f16(bool ta, bool tb, bool split, Mode mode) {
  return product_kernel_90_of<__half>(ta, tb, split, mode);
}

}  // namespace sparsekit::cuda

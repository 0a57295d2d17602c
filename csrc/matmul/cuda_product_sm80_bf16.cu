#include "matmul/cuda_product_sm80.cuh"

namespace sparsekit::cuda {

ProductKernel product_kernel_bf16(const ProductChoice& choice) { return product_kernel_16bit<__nv_bfloat16>(choice); }

}  // namespace sparsekit::cuda

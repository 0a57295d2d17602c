#include "matmul/cuda_product_sm80.cuh"

namespace sparsekit::cuda {

ProductKernel product_kernel_f16(const ProductChoice& choice) { return product_kernel_16bit<__half>(choice); }

}  // namespace sparsekit::cuda

// fp32 through three tf32 products. Two levels of sums: tiles of 64 x 64 at most.
#include "matmul/cuda_product_sm80.cuh"

namespace sparsekit::cuda {

ProductKernel product_kernel_f32(const ProductChoice& c) {
  if (!c.aligned) return product_kernel_of<ProductTile<float, 64, 32, 4, 1, 2, false>>(c.xt, c.wt);
  if (c.few) return product_kernel_of<ProductTile<float, 32, 64, 2, 2, 4, true>>(c.xt, c.wt);
  if (c.features <= 32) return product_kernel_of<ProductTile<float, 128, 32, 4, 2, 4, true>>(c.xt, c.wt);
  return product_kernel_of<ProductTile<float, 64, 64, 2, 2, 4, true>>(c.xt, c.wt);
}

}  // namespace sparsekit::cuda

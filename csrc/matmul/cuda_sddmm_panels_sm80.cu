#include "matmul/cuda_sddmm_panels_sm80.cuh"

namespace sparsekit::cuda {
namespace {

template <class Element>
SampledChoice choose(int rows, int cols) {
  if (rows == 16) {
    if (cols == 16) return {sampled_kernel<Element, 16, 16>, SampledBlock<Element, 16, 16>::kSlots};
    return {sampled_kernel<Element, 16, 32>, SampledBlock<Element, 16, 32>::kSlots};
  }
  if (cols == 16) return {sampled_kernel<Element, 32, 16>, SampledBlock<Element, 32, 16>::kSlots};
  return {sampled_kernel<Element, 32, 32>, SampledBlock<Element, 32, 32>::kSlots};
}

}  // namespace

SampledChoice sampled_kernel_of(DType dtype, int block_rows, int block_cols) {
  return dtype == DType::bf16 ? choose<__nv_bfloat16>(block_rows, block_cols) : choose<__half>(block_rows, block_cols);
}

}  // namespace sparsekit::cuda

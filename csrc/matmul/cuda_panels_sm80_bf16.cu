#include "matmul/cuda_panels_sm80.cuh"

namespace sparsekit::cuda {

PanelKernel panel_kernel_bf16(int list_size, int inner_size, bool wt) {
  return panel_kernel_of<__nv_bfloat16>(list_size, inner_size, wt);
}

}  // namespace sparsekit::cuda

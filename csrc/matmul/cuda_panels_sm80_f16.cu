#include "matmul/cuda_panels_sm80.cuh"

namespace sparsekit::cuda {

PanelKernel panel_kernel_f16(int list_size, int inner_size, bool wt) {
  return panel_kernel_of<__half>(list_size, inner_size, wt);
}

}  // namespace sparsekit::cuda

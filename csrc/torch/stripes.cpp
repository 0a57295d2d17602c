// The ops of stripe-sparse attention on the CPU.
#include "torch/stripes.h"

#include "torch/cpu.h"

namespace sparsekit {
namespace {

void check_column_lists(Tensor col_indices, Tensor col_counts, int64_t len_k, bool duplicates) {
  StripeTensors tensors;
  tensors.anchor = col_counts;
  tensors.set_stripes(col_indices, col_counts, /*group_size=*/1, /*sink=*/0, /*local=*/0);
  require(attention_check_columns(tensors.problem.stripes, len_k, duplicates));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CPU, m) {
  SPARSEKIT_REGISTER_STRIPES(m, Cpu);
  m.impl("check_column_lists", TORCH_BOX(check_column_lists));
}

}  // namespace sparsekit

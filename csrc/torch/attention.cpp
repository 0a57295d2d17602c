// The attention ops on the CPU.
#include "torch/attention.h"

#include "torch/cpu.h"

namespace sparsekit {

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CPU, m) { SPARSEKIT_REGISTER_ATTENTION(m, Cpu); }

}  // namespace sparsekit

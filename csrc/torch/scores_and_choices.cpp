// Scores, choices, lists and orders on the CPU.
#include "torch/choices.h"
#include "torch/cpu.h"
#include "torch/scores.h"

namespace sparsekit {

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CPU, m) {
  SPARSEKIT_REGISTER_SCORES(m, Cpu);
  SPARSEKIT_REGISTER_CHOICES(m, Cpu);
}

}  // namespace sparsekit

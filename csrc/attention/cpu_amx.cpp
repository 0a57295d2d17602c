// Block-sparse attention for AMX: the forward of bf16 on tiles (Sapphire Rapids and later). The algorithm is in
// cpu_forward.h, its loops on tiles in cpu_forward_amx.h; everything else is refused and left to AVX-512.
#include "common/cpu/simd_avx512_bf16.h"

#define SPARSEKIT_AMX_PRODUCT 1

#include "attention/cpu_forward.h"
#include "attention/cpu_implementations.h"

namespace sparsekit {
namespace {

const char* refuses(const AttentionProblem& problem, Direction direction, const ParallelFor&) {
  if (direction == Direction::backward) return "the backward has no tile kernel";
  if (problem.stripes.any()) return "stripes have no tile kernel";
  if (problem.dtype != DType::bf16) return "tiles multiply bfloat16 only";
  if (problem.head_dim % 32 != 0) return "the head dim must be a multiple of 32";
  if (problem.lists.block_q % 16 != 0) return "query blocks must be multiples of 16";
  if (problem.lists.block_k % 32 != 0) return "key blocks must be multiples of 32";
  return nullptr;
}

size_t workspace(const AttentionProblem&, Direction, const ParallelFor&) { return 0; }

Status backward(const AttentionBackward&, const ParallelFor&) {
  return error(Status::Kind::unsupported, "attention backward: no AMX kernel");
}

}  // namespace

const CpuAttention attention_cpu_amx = {"amx", refuses, workspace, run_forward, backward};

}  // namespace sparsekit

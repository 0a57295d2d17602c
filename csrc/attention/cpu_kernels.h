// The attention entry points of one instruction set: included by cpu_<isa>.cpp after its Simd.
//
// What they take: fp32 through FloatProduct; bf16 through Bf16Product where the set has it; else bf16 and fp16 are
// widened block by block and go the fp32 way. Everything has internal linkage (see csrc/common/cpu/README.md).
#pragma once

#include "attention/cpu_backward.h"
#include "attention/cpu_forward.h"
#include "attention/cpu_implementations.h"
#include "common/cpu/simd_math.h"

namespace sparsekit {
namespace {

const char* refuses(const AttentionProblem& problem, Direction, const ParallelFor&) {
  if (problem.dtype == DType::f64) return "float64 is taken by the reference only";
  if (problem.lists.block_q % 16 != 0 || problem.lists.block_k % 16 != 0) return "block sizes must be multiples of 16";
  if (problem.stripes.any()) return "columns are taken by the reference only";
  return nullptr;
}

size_t workspace(const AttentionProblem&, Direction, const ParallelFor&) { return 0; }

Status forward(const AttentionForward& problem, const ParallelFor& parallel) { return run_forward(problem, parallel); }

Status backward(const AttentionBackward& problem, const ParallelFor& parallel) {
  return run_backward(problem, parallel);
}

}  // namespace
}  // namespace sparsekit

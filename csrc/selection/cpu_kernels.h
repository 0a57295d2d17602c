// The entry points of one instruction set: included by cpu_<isa>.cpp after its Simd.
#pragma once

#include "selection/cpu_block_means.h"
#include "selection/cpu_choices.h"
#include "selection/implementations.h"

namespace sparsekit {
namespace {

static Status run_block_scores(const BlockScores& p, const ParallelFor& parallel) {
  if (p.reduce != BlockReduce::mean) return reference_block_scores(p, parallel);
  return p.dtype == DType::f32   ? block_means<DType::f32>(p, parallel)
         : p.dtype == DType::f16 ? block_means<DType::f16>(p, parallel)
                                 : block_means<DType::bf16>(p, parallel);
}

}  // namespace
}  // namespace sparsekit

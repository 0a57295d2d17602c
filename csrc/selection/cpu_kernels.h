// The entry points of one instruction set: included by cpu_<isa>.cpp after its Simd.
//
// Products are taken as attention takes them: fp32 through FloatProduct, bf16 through Bf16Product where the set has it,
// else 16-bit keys are widened segment by segment. Scores of bf16 are then exact but for fp32 rounding of the sum.
#pragma once

#include "selection/cpu_antidiagonals.h"
#include "selection/cpu_block_folds.h"
#include "selection/cpu_block_means_backward.h"
#include "selection/cpu_choices.h"
#include "selection/cpu_key_folds.h"
#include "selection/implementations.h"

namespace sparsekit {
namespace {

#ifdef SPARSEKIT_BF16_PRODUCT
using Bf16 = Bf16Product;
#else
using Bf16 = FloatProduct;
#endif

#define SPARSEKIT_BY_DTYPE(function)                                         \
  (p.dtype == DType::f32   ? function<FloatProduct, DType::f32>(p, parallel) \
   : p.dtype == DType::f16 ? function<FloatProduct, DType::f16>(p, parallel) \
                           : function<Bf16, DType::bf16>(p, parallel))

static Status run_block_scores(const BlockScores& p, const ParallelFor& parallel) {
  if (p.reduce != BlockReduce::mean) {
    Status status =
        p.reduce == BlockReduce::max ? SPARSEKIT_BY_DTYPE(block_max) : SPARSEKIT_BY_DTYPE(block_antidiagonals);
    if (!status.ok() || !p.q_similarity) return status;
  }
  // Means and similarities in one pass; the scores only where they are the means.
  return p.dtype == DType::f32   ? block_means<DType::f32>(p, parallel)
         : p.dtype == DType::f16 ? block_means<DType::f16>(p, parallel)
                                 : block_means<DType::bf16>(p, parallel);
}

/// Trained gates pool by the mean (SeerAttention); for the others the reference is there.
static Status run_block_scores_backward(const BlockScoresBackward& p, const ParallelFor& parallel) {
  if (p.reduce != BlockReduce::mean) return reference_block_scores_backward(p, parallel);
  return p.dtype == DType::f32   ? block_means_backward<DType::f32>(p, parallel)
         : p.dtype == DType::f16 ? block_means_backward<DType::f16>(p, parallel)
                                 : block_means_backward<DType::bf16>(p, parallel);
}

static Status run_row_scores(const RowScores& p, const ParallelFor& parallel) { return SPARSEKIT_BY_DTYPE(row_fold); }

static Status run_column_scores(const ColumnScores& p, const ParallelFor& parallel) {
  return SPARSEKIT_BY_DTYPE(column_fold);
}

static Status run_block_map(const AttentionBlockMap& p, const ParallelFor& parallel) {
  return SPARSEKIT_BY_DTYPE(block_map);
}

}  // namespace
}  // namespace sparsekit

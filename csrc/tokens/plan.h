// From an index to what each row of the result is made of (see rows.h), and what is wrong with an index.
#pragma once

#include <vector>

#include "tokens/rows.h"

namespace sparsekit {

/// A plan and the memory it points into.
struct OwnedPlan {
  RowPlan plan;
  std::vector<int32_t> offsets, rows;
  std::vector<float> coefficients;
  std::vector<double> coefficients_f64;
  std::vector<int32_t> targets;  // backward: where each entry went, also those of weight 0

  OwnedPlan() = default;
  OwnedPlan(const OwnedPlan&) = delete;
};

Status plan_gather(const GatherTokens& g, const ParallelFor& parallel, OwnedPlan* owned);

/// Also fills `totals`.
Status plan_scatter(const ScatterTokens& t, const ParallelFor& parallel, OwnedPlan* owned);

/// The rows of grad_out that make up each row of grad_in; reads `totals`.
Status plan_scatter_backward(const ScatterTokens& t, const ParallelFor& parallel, OwnedPlan* owned);

}  // namespace sparsekit

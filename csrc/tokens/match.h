// Between the two halves of bipartite_match.
#pragma once

#include "tokens/rows.h"

namespace sparsekit {

/// Fills task.best and task.target on the best kernels that take the metric (dispatch.cpp).
Status match_tokens_search(const NearestTask& task, const ParallelFor& parallel);

}  // namespace sparsekit

// In which order CTAs take the rows of the block lists.
#pragma once

#include "attention/cuda_stripes.h"
#include "sparsekit/attention.h"

namespace sparsekit::cuda {

/// Writes the list rows (batch, query head, query block) as CTAs should take them: order[i] = (b * heads_q + h) *
/// q_blocks
/// + m. Heads whose keys and values fit half the L2 cache together form a group; groups follow one another, and within
/// a group the rows with the longest lists come first, rows of about equal length in their own order. `order` holds
/// batch * heads_q * q_blocks entries. `counter`, where CTAs take rows as they go, is set to 0.
Status schedule_longest_first(const AttentionProblem& problem, int32_t* order, void* stream,
                              int32_t* counter = nullptr);

/// The same for backward, which walks key blocks: order[(b * heads_kv + h) * k_blocks + i] is the i-th key block that
/// the CTAs of (b, h) should take, the most often listed first. `offsets` is BlockTranspose::offsets.
Status schedule_keys_longest_first(const AttentionProblem& problem, const int32_t* offsets, int32_t* order,
                                   void* stream);

/// The same for the cells of a stripe plan: plan.order[i] is the i-th of its `cells` that CTAs should take;
/// plan.counter is set to 0.
Status schedule_cells_longest_first(const AttentionProblem& problem, const StripePlan& plan, void* stream);

}  // namespace sparsekit::cuda

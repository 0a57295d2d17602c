// The CPU implementations of scores and choices, one per instruction set; dispatch.cpp takes the first of its table
// that may run. A null entry: this set has no kernel of its own for it, a lower one answers.
#pragma once

#include "attention/sequences.h"
#include "sparsekit/selection.h"

namespace sparsekit {

/// Shares below this count as this: a block that is seen scores more than -inf, which would keep it from being chosen.
constexpr float least_share = 1.17549435e-38f;

/// The sequences of a problem, in memory to be freed; null where there is none left. Here, and not in the files of an
/// instruction set: the members of SequenceWalk are inline, so that the linker would keep any one of their copies.
Sequence* list_sequences(const AttentionProblem& problem, int64_t* count);

// Checks that read no tensor (check.cpp): head counts and head_dim; block sizes; also the stride; bounds of a choice.
Status check_heads(const AttentionProblem& problem);
Status check_blocks(const AttentionProblem& problem);
Status check_tiles(const BlockScores& arguments);
Status check_choice(const Choice& arguments);

struct CpuSelection {
  const char* name;  // the value of SPARSEKIT_ISA that forces it
  Status (*block_scores)(const BlockScores&, const ParallelFor&);
  Status (*block_scores_backward)(const BlockScoresBackward&, const ParallelFor&);
  Status (*column_scores)(const ColumnScores&, const ParallelFor&);
  Status (*row_scores)(const RowScores&, const ParallelFor&);
  Status (*attention_block_map)(const AttentionBlockMap&, const ParallelFor&);
  Status (*choose)(const Choice&, const ParallelFor&);
};

extern const CpuSelection selection_cpu_reference;  // *_reference.cpp: float64 sums, every valid problem
extern const CpuSelection selection_cpu_portable;   // cpu_portable.cpp
#ifdef SPARSEKIT_X86
extern const CpuSelection selection_cpu_avx2;         // cpu_avx2.cpp
extern const CpuSelection selection_cpu_avx512;       // cpu_avx512.cpp
extern const CpuSelection selection_cpu_avx512_bf16;  // cpu_avx512_bf16.cpp
#endif

Status reference_block_scores(const BlockScores& arguments, const ParallelFor& parallel);
Status reference_block_scores_backward(const BlockScoresBackward& arguments, const ParallelFor& parallel);
Status reference_column_scores(const ColumnScores& arguments, const ParallelFor& parallel);
Status reference_row_scores(const RowScores& arguments, const ParallelFor& parallel);
Status reference_attention_block_map(const AttentionBlockMap& arguments, const ParallelFor& parallel);
Status reference_choose(const Choice& arguments, const ParallelFor& parallel);

}  // namespace sparsekit

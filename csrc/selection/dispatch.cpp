// Checks the arguments of scores and choices and runs the first implementation of the table that the processor offers,
// SPARSEKIT_ISA allows and that has the kernel. The last entry, the reference, has all.
#include <cstdlib>

#include "attention/sequences.h"
#include "common/cpu/features.h"
#include "common/cpu/huge_pages.h"
#include "selection/implementations.h"

namespace sparsekit {
namespace {

using Kind = Status::Kind;

struct Entry {
  const CpuSelection* implementation;
  Isa isa;
};

constexpr Entry table[] = {
#ifdef SPARSEKIT_X86
    {&selection_cpu_avx512_bf16, Isa::avx512_bf16},
    {&selection_cpu_avx512, Isa::avx512},
    {&selection_cpu_avx2, Isa::avx2},
#endif
    {&selection_cpu_portable, Isa::portable},
    {&selection_cpu_reference, Isa::reference},
};

template <class Arguments>
Status run(Status (*CpuSelection::*kernel)(const Arguments&, const ParallelFor&), const Arguments& arguments, bool f64,
           const ParallelFor& parallel) {
  Isa limit;
  bool forced;
  if (const char* text = isa_limit(&limit, &forced)) return error(Kind::invalid_argument, "%s", text);
  for (const Entry& entry : table) {
    if (isa_refuses(entry.isa) || !(entry.implementation->*kernel)) continue;
    if (f64 && entry.isa != Isa::reference) continue;
    return (entry.implementation->*kernel)(arguments, parallel);
  }
  return error(Kind::unsupported, "no implementation runs here");  // not reached: the reference runs everywhere
}

/// Lists of a score that has none: walking the sequences counts blocks all the same.
BlockLists no_blocks() {
  BlockLists lists;
  lists.list_batch = 0;
  lists.block_q = lists.block_k = 1;
  lists.q_blocks = INT64_MAX;
  return lists;
}

/// What every score needs of its problem; the lists are not looked at.
Status check_problem(const AttentionProblem& problem) {
  Status status = check_heads(problem);
  if (!status.ok()) return status;
  AttentionProblem lengths = problem;  // the packed batch alone
  lengths.lists = no_blocks();
  return attention_check_lists(lengths, /*duplicates=*/false);
}

/// A packed batch's lengths, too.
Status check_all(const BlockScores& arguments) {
  Status status = check_tiles(arguments);
  return status.ok() ? check_problem(arguments) : status;
}

Status check_rows(const RowScores& arguments) {
  if (!arguments.rows) return {};
  int64_t batch = arguments.rows_batch ? arguments.batch : 1;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t r = 0; r < arguments.rows_count; ++r) {
      int32_t row = arguments.rows[b * arguments.rows_batch + r];
      if (row >= -1 && row < arguments.len_q) continue;
      return error(Kind::invalid_argument, "rows[%lld, %lld] is %d; supported: -1 (empty) or a row from 0 to %lld",
                   (long long)b, (long long)r, row, (long long)arguments.len_q - 1);
    }
  }
  return {};
}

}  // namespace

Sequence* list_sequences(const AttentionProblem& problem, int64_t* count) {
  *count = 0;
  for (SequenceWalk walk(problem); walk.valid(); walk.next()) ++*count;
  auto* sequences = static_cast<Sequence*>(std::malloc(size_t(*count + 1) * sizeof(Sequence)));
  int64_t at = 0;
  for (SequenceWalk walk(problem); sequences && walk.valid(); walk.next()) sequences[at++] = walk.current;
  return sequences;
}

Status block_scores(const BlockScores& arguments, const ParallelFor& parallel) {
  Status status = check_all(arguments);
  if (!status.ok()) return status;
  const int64_t scores = arguments.batch * arguments.heads_q * arguments.q_blocks * arguments.key_blocks;
  prefer_huge_pages(arguments.scores, size_t(scores) * (arguments.dtype == DType::f64 ? 8 : 4));
  return run(&CpuSelection::block_scores, arguments, arguments.dtype == DType::f64, parallel);
}

Status block_scores_backward(const BlockScoresBackward& arguments, const ParallelFor& parallel) {
  Status status = check_all(arguments);
  if (!status.ok()) return status;
  return run(&CpuSelection::block_scores_backward, arguments, arguments.dtype == DType::f64, parallel);
}

Status column_scores(const ColumnScores& given, const ParallelFor& parallel) {
  ColumnScores arguments = given;
  arguments.lists = no_blocks();
  Status status = check_problem(arguments);
  if (!status.ok()) return status;
  return run(&CpuSelection::column_scores, arguments, arguments.dtype == DType::f64, parallel);
}

Status row_scores(const RowScores& given, const ParallelFor& parallel) {
  RowScores arguments = given;
  arguments.lists = no_blocks();
  Status status = check_problem(arguments);
  if (status.ok()) status = check_rows(arguments);
  if (!status.ok()) return status;
  return run(&CpuSelection::row_scores, arguments, arguments.dtype == DType::f64, parallel);
}

Status attention_block_map(const AttentionBlockMap& arguments, const ParallelFor& parallel) {
  Status status = check_blocks(arguments);
  if (status.ok()) status = arguments.listed ? attention_check(arguments) : check_problem(arguments);
  if (status.ok() && arguments.listed) status = attention_check_lists(arguments, /*duplicates=*/false);
  if (!status.ok()) return status;
  return run(&CpuSelection::attention_block_map, arguments, arguments.dtype == DType::f64, parallel);
}

Status choose(const Choice& c, const ParallelFor& parallel) {
  Status status = check_choice(c);
  if (!status.ok()) return status;
  return run(&CpuSelection::choose, c, /*f64=*/false, parallel);
}

}  // namespace sparsekit

// Scores, choices, lists and orders on CUDA (the block-list ops are registered in attention_cuda.cpp).
#include "torch/choices.h"
#include "torch/cuda.h"
#include "torch/scores.h"

namespace sparsekit {
namespace {

struct CudaSelection {
  static void run(const BlockScores& s, const Tensor& t) {
    scratched(s, t, static_cast<Run<BlockScores>>(block_scores));
  }
  static void run(const BlockScoresBackward& s, const Tensor& t) {
    scratched(s, t, static_cast<Run<BlockScoresBackward>>(block_scores_backward));
  }
  static void run(const ColumnScores& s, const Tensor& t) {
    scratched(s, t, static_cast<Run<ColumnScores>>(column_scores));
  }
  static void run(const RowScores& s, const Tensor& t) { scratched(s, t, static_cast<Run<RowScores>>(row_scores)); }
  static void run(const AttentionBlockMap& m, const Tensor& t) {
    scratched(m, t, static_cast<Run<AttentionBlockMap>>(attention_block_map));
  }
  static void run(const Choice& c, const Tensor& t) { scratched(c, t, static_cast<Run<Choice>>(choose)); }
  static void run(const VerticalSlash& v, const Tensor& t) {
    scratched(v, t, static_cast<Run<VerticalSlash>>(vertical_slash_lists));
  }
  static void run(const UnionLists& u, const Tensor& t) { require(union_lists(u, CudaCall(t).context)); }
  static void run(const InversePermutation& p, const Tensor& t) {
    require(inverse_permutation(p, CudaCall(t).context));
  }
  static void run(const PermuteTokens& p, const Tensor& t) { require(permute_tokens(p, CudaCall(t).context)); }

 private:
  template <class Arguments>
  using Run = Status (*)(const Arguments&, const CudaContext&);

  template <class Arguments>
  static void scratched(const Arguments& arguments, const Tensor& tensor, Run<Arguments> function) {
    CudaCall call(tensor);
    require(function(arguments, call.with_workspace(selection_workspace(arguments, call.context))));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CUDA, m) {
  SPARSEKIT_REGISTER_SCORES(m, CudaSelection);
  SPARSEKIT_REGISTER_CHOICES(m, CudaSelection);
}

}  // namespace sparsekit

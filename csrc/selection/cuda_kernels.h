// The CUDA kernels of selection as dispatch_cuda.cpp calls them: arguments are checked, nothing is empty. Kernels are
// launched on the context's stream; the workspace has as many bytes as the function beside each says.
#pragma once

#include "sparsekit/selection.h"

namespace sparsekit::cuda {

constexpr int64_t kShortRow = 1024;  // rows up to here are chosen from by one warp each

struct ChoiceCall;
void choose_short_rows(const ChoiceCall& call, struct CUstream_st* stream);  // cuda_choices_short.cu

Status score_blocks(const BlockScores& arguments, const CudaContext& context);  // cuda_block_means.cu, cuda_scores.cu
size_t block_scores_workspace(const BlockScores& arguments, const CudaContext& context);
Status score_blocks_backward(const BlockScoresBackward& arguments, const CudaContext& context);
size_t block_scores_backward_workspace(const BlockScoresBackward& arguments, const CudaContext& context);
Status score_columns(const ColumnScores& arguments, const CudaContext& context);
size_t column_scores_workspace(const ColumnScores& arguments, const CudaContext& context);
// cuda_columns_sm80.cu: whether it takes the problem; what it returns says, per batch entry and on the device, whether
// it did (its rows stand at consecutive positions).
bool few_columns(const ColumnScores& arguments);
size_t few_columns_workspace(const ColumnScores& arguments, const CudaContext& context);
const int* score_few_columns(const ColumnScores& arguments, const CudaContext& context, void* workspace);
Status score_rows(const RowScores& arguments, const CudaContext& context);
size_t row_scores_workspace(const RowScores& arguments, const CudaContext& context);
Status pool_attention(const AttentionBlockMap& arguments, const CudaContext& context);
size_t block_map_workspace(const AttentionBlockMap& arguments, const CudaContext& context);

Status blocks_backward(const BlockScoresBackward& arguments, const CudaContext& context);  // by max, antidiagonal
size_t blocks_backward_workspace(const BlockScoresBackward& arguments);
Status score_block_means(const BlockScores& arguments, const CudaContext& context);

size_t choice_workspace(const Choice& arguments);
Status choose_rows(const Choice& arguments, const CudaContext& context);  // cuda_choices_long.cu

Status vertical_slash(const VerticalSlash& arguments, const CudaContext& context);  // cuda_builders.cu
size_t vertical_slash_workspace(const VerticalSlash& arguments);
Status union_of_lists(const UnionLists& arguments, const CudaContext& context);
Status invert(const InversePermutation& arguments, const CudaContext& context);
Status permute(const PermuteTokens& arguments, const CudaContext& context);

}  // namespace sparsekit::cuda

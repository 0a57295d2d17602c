// The op catalogue: every schema of torch.ops.sparsekit. Implementations register themselves in csrc/torch/<family>.cpp
// (CPU) and csrc/torch/attention_cuda.cpp (the CUDA library). Fake kernels, autograd, autocast and vmap rules are
// registered in python/sparsekit/_registrations/: the stable ABI has no C++ form of them.
//
// Shapes and semantics: include/sparsekit/<family>.h and docs/semantics.md.
#include <torch/csrc/stable/library.h>

// The lists of a BlockPattern, as every attention op takes them.
#define LISTS                                                                                      \
  "Tensor kv_num_blocks, Tensor kv_indices, Tensor? full_kv_num_blocks, Tensor? full_kv_indices, " \
  "Tensor? partial_bits, Tensor? partial_bits_index, int[2] block_size"
// The same where a call may have none, and its columns.
#define OPTIONAL_LISTS                                                                               \
  "Tensor? kv_num_blocks, Tensor? kv_indices, Tensor? full_kv_num_blocks, Tensor? full_kv_indices, " \
  "Tensor? partial_bits, Tensor? partial_bits_index, int[2] block_size"
#define STRIPES "Tensor col_indices, Tensor col_counts, int group_size, int sink, int local"
#define PACKED "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"
#define OPTIONS                                                                      \
  "float? scale=None, bool causal=False, int[2] window=[-1, -1], float softcap=0., " \
  "Tensor? key_bias=None, Tensor? sinks=None, Tensor? query_positions=None, "        \
  "Tensor? key_positions=None, Tensor? transpose_offsets=None, Tensor? transpose_slots=None"
// No "*" before the options, though callers name them: torch.library.register_autograd and register_vmap refuse schemas
// with keyword-only tensors.
#define FORWARD "Tensor query, Tensor key, Tensor value"
#define BACKWARD "Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse"
// grad_key_bias is [B, Hq, Sk] where asked for, grad_sinks [B, Hq] where sinks are given; else both are empty.
#define GRADIENTS "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_key_bias, Tensor grad_sinks)"

// What every block score and every choice takes.
#define BLOCK_SCORE_OPTIONS                                                                \
  "int[2] block_size, int reduce=0, bool causal=False, float? scale=None, int stride=16, " \
  "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, SymInt max_seqlen_k=0"
#define CHOICE_OPTIONS \
  "SymInt width, SymInt min_count=0, SymInt sink=0, SymInt local=0, Tensor? row_limit=None, bool return_mass=False"
#define CHOICE "(Tensor indices, Tensor counts, Tensor mass)"  // mass is empty unless asked for
#define WEIGHT "Tensor crow_indices, Tensor col_indices, SymInt features, bool transposed=False"
#define TRANSPOSE "Tensor? scales=None, Tensor? ccol_indices=None, Tensor? row_indices=None, Tensor? entries=None"
// The tensors of a KVCache (include/sparsekit/kv_cache.h); minima are empty where the format has none. format: key
// bits, value bits (-8: fp8 e4m3), group size, keys per channel, symmetric, page size, sinks, window.
#define CACHE                                                                                         \
  "Tensor key_codes, Tensor key_scales, Tensor key_minima, Tensor value_codes, Tensor value_scales, " \
  "Tensor value_minima, Tensor key_window, Tensor value_window, Tensor lengths, Tensor? block_table, int[] format"
#define MUTATED_CACHE                                                                                  \
  "Tensor(a!) key_codes, Tensor(b!) key_scales, Tensor(c!) key_minima, Tensor(d!) value_codes, "       \
  "Tensor(e!) value_scales, Tensor(f!) value_minima, Tensor(g!) key_window, Tensor(h!) value_window, " \
  "Tensor(i!) lengths, Tensor? block_table, int[] format"
#define DECODE                                                                                             \
  "float? scale=None, float softcap=0., Tensor? sinks=None, Tensor? key_bias=None, SymInt scores_length=0" \
  ") -> (Tensor out, Tensor lse, Tensor scores)"

STABLE_TORCH_LIBRARY(sparsekit, m) {
  // ---- attention
  m.def("block_sparse_attn(" FORWARD ", " LISTS ", " OPTIONS ") -> (Tensor out, Tensor lse)");
  m.def("block_sparse_attn_backward(" BACKWARD ", " LISTS ", " OPTIONS
        ", bool key_bias_grad=False, bool deterministic=False) -> " GRADIENTS);
  m.def("block_sparse_attn_varlen(" FORWARD ", " LISTS ", " PACKED ", " OPTIONS ") -> (Tensor out, Tensor lse)");
  m.def("block_sparse_attn_varlen_backward(" BACKWARD ", " LISTS ", " PACKED ", " OPTIONS
        ", bool key_bias_grad=False, bool deterministic=False) -> " GRADIENTS);
  m.def("merge_attention_states(Tensor[] outs, Tensor[] lses) -> (Tensor out, Tensor lse)");

  // ---- selection: block lists
  m.def("block_lists_from_bool(Tensor block_map, SymInt capacity) -> (Tensor counts, Tensor indices)");
  m.def(
      "transpose_block_lists(Tensor kv_num_blocks, Tensor kv_indices, Tensor? full_kv_num_blocks, "
      "Tensor? full_kv_indices, int[2] block_size, SymInt len_k, Tensor? cu_seqlens_q=None, "
      "Tensor? cu_seqlens_k=None) -> (Tensor offsets, Tensor slots)");
  // CPU only: raises with the first bad entry of the lists. sparsekit.check() brings lists of any device here.
  m.def("check_block_lists(" LISTS
        ", SymInt len_k, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
        "bool duplicates=True) -> ()");

  // reduce: 0 mean, 1 max, 2 antidiagonal; of rows and of the pooled map 0 sum, 1 max; of tokens 0 copy, 1 add, 2 mean.
  // (Numbers, as the stable ABI never frees a string.)
  // ---- selection: scores of blocks, columns and rows; the choice of the best; lists and orders built from it
  m.def("block_scores(Tensor query, Tensor key, " BLOCK_SCORE_OPTIONS
        ", bool self_similarity=False) -> (Tensor scores, Tensor q_similarity, Tensor k_similarity)");
  m.def("block_scores_backward(Tensor grad_scores, Tensor query, Tensor key, " BLOCK_SCORE_OPTIONS
        ") -> (Tensor grad_query, Tensor grad_key)");
  m.def(
      "column_scores(Tensor probe_query, Tensor key, Tensor probe_positions, bool causal=True, float? scale=None, "
      "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None) -> (Tensor columns, Tensor diagonals)");
  m.def(
      "row_scores(Tensor query, Tensor key, Tensor lse, Tensor? rows=None, int reduce=0, bool causal=False, "
      "float? scale=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None) -> Tensor");
  m.def(
      "attention_block_map(Tensor query, Tensor key, Tensor lse, Tensor? kv_num_blocks, Tensor? kv_indices, "
      "Tensor? full_kv_num_blocks, Tensor? full_kv_indices, Tensor? partial_bits, Tensor? partial_bits_index, "
      "int[2] block_size, int reduce=1, float? scale=None, bool causal=False, int[2] window=[-1, -1], "
      "float softcap=0., Tensor? key_bias=None, Tensor? query_positions=None, Tensor? key_positions=None, "
      "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, SymInt max_seqlen_k=0) -> Tensor");
  m.def("select_top_k(Tensor scores, Tensor? row_k, SymInt k, " CHOICE_OPTIONS ") -> " CHOICE);
  m.def("select_top_p(Tensor probs, Tensor? weights, Tensor? row_p, float p, bool by_head, " CHOICE_OPTIONS
        ") -> " CHOICE);
  m.def("select_threshold(Tensor scores, Tensor thresholds, " CHOICE_OPTIONS ") -> " CHOICE);
  m.def(
      "vertical_slash_lists(Tensor vertical, Tensor slash, int[2] block_size, SymInt len_q, SymInt len_k, "
      "SymInt capacity) -> (Tensor indices, Tensor counts, Tensor column_indices, Tensor column_counts)");
  m.def(
      "union_block_lists(Tensor indices, Tensor counts, SymInt heads, SymInt key_blocks, SymInt capacity) -> "
      "(Tensor indices, Tensor counts)");
  m.def("inverse_permutation(Tensor order, SymInt length) -> Tensor");
  m.def("permute_tokens(Tensor input, Tensor order) -> Tensor");
  // ---- attention: stripes
  m.def("stripe_sparse_attn(" FORWARD ", " STRIPES ", " OPTIONAL_LISTS ", " OPTIONS ") -> (Tensor out, Tensor lse)");
  m.def("stripe_sparse_attn_backward(" BACKWARD ", " STRIPES ", " OPTIONAL_LISTS ", " OPTIONS
        ", bool key_bias_grad=False, bool deterministic=False) -> " GRADIENTS);
  // CPU only, as check_block_lists.
  m.def("check_column_lists(Tensor col_indices, Tensor col_counts, SymInt len_k, bool duplicates=True) -> ()");
  // ---- matmul: block-sparse weights in the tensors of torch.sparse_bsr (int32 or int64 indices)
  // transposed=False: input W^T, with `features` rows of W. True: input W, with `features` columns of W; the pattern
  // seen from its columns (transpose_block_sparse) is built where it is not given. activation: 0 none, 1 relu, 2 gelu,
  // 3 gelu with tanh, 4 silu (an integer: the stable ABI's strings leak). scales [rows of W]: values are int8. tf32:
  // fp32 on CUDA may be rounded to TF32.
  m.def("block_sparse_linear(Tensor input, Tensor values, Tensor? bias, " WEIGHT ", int activation=0, " TRANSPOSE
        ", bool tf32=False) -> Tensor");
  m.def("block_sparse_mm(Tensor dense, Tensor values, " WEIGHT ", " TRANSPOSE ", bool tf32=False) -> Tensor");
  m.def(
      "block_sddmm(Tensor a, Tensor b, Tensor crow_indices, Tensor col_indices, int[2] block_size, bool tf32=False) -> "
      "Tensor");
  m.def(
      "block_sparse_mlp(Tensor input, Tensor? gate_values, Tensor up_values, Tensor down_values, "
      "Tensor? gate_crow_indices, Tensor? gate_col_indices, Tensor up_crow_indices, Tensor up_col_indices, "
      "Tensor down_crow_indices, Tensor down_col_indices, SymInt hidden_features, SymInt features, int activation=4, "
      "Tensor? gate_scales=None, Tensor? up_scales=None, Tensor? down_scales=None, "
      "bool tf32=False) -> Tensor");
  m.def(
      "transpose_block_sparse(Tensor crow_indices, Tensor col_indices, SymInt col_blocks) -> "
      "(Tensor ccol_indices, Tensor row_indices, Tensor entries)");
  // CPU only: raises with the first bad index.
  m.def("check_block_sparse(Tensor crow_indices, Tensor col_indices, SymInt col_blocks) -> ()");
  m.def("matmul_plan_cpu(ScalarType dtype, int[2] block_size) -> str");
  m.def("matmul_plan_cuda(ScalarType dtype, int[2] block_size, SymInt tokens, bool transposed=False) -> str");

  // ---- what would run: one line per implementation, "name: runs" or "name: the reason it refuses"
  m.def(
      "attention_plan_cpu(ScalarType dtype, int head_dim, int value_dim, int[2] block_size, bool backward=False, "
      "bool packed=False, int group_size=0) -> str");
  m.def(
      "attention_plan_cuda(ScalarType dtype, int head_dim, int value_dim, int[2] block_size, bool backward=False, "
      "bool packed=False, int group_size=0) -> str");
  m.def("cpu_features() -> str");

  // ---- tokens: dims count a batch dimension, which packed tensors (cu_seqlens) lack
  m.def(
      "gather_tokens(Tensor[] tensors, Tensor index, int[] dims, Tensor? cu_seqlens=None, "
      "Tensor? cu_seqlens_out=None, SymInt? length=None) -> Tensor[]");
  m.def(
      "scatter_tokens(Tensor[] tensors, Tensor? weights, Tensor[] base, Tensor index, int[] dims, SymInt length, "
      "int reduce=0, Tensor? cu_seqlens=None, Tensor? cu_seqlens_out=None) -> (Tensor[] out, Tensor totals)");
  m.def(
      "scatter_tokens_backward(Tensor[] grads, Tensor? grad_totals, Tensor[] tensors, Tensor? weights, Tensor[] outs, "
      "Tensor totals, Tensor index, int[] dims, SymInt rows, int reduce, Tensor? cu_seqlens=None, "
      "Tensor? cu_seqlens_out=None, bool weights_grad=False) -> (Tensor[] grad_tensors, Tensor grad_weights)");
  m.def(
      "bipartite_match(Tensor metric, SymInt r, Tensor? ragged_r=None, int protect=0, Tensor? counts=None) -> "
      "(Tensor source, Tensor destination, Tensor kept, Tensor row, Tensor counts)");
  m.def(
      "compact_kv(Tensor(a!)[] cache_tensors, Tensor keep_index, Tensor? block_table=None, Tensor(b!)? lengths=None, "
      "bool tokens_first=False) -> ()");
  m.def("tokens_plan_cpu(ScalarType dtype, bool match=False) -> str");
  m.def("tokens_plan_cuda(ScalarType dtype, bool match=False) -> str");
  // ---- kv_cache. scores is empty where scores_length is 0.
  m.def(
      "quantize_kv(Tensor x, int bits, int group_size, bool per_channel, bool symmetric, bool value_layout) -> "
      "(Tensor codes, Tensor scales, Tensor minima)");
  m.def(
      "dequantize_kv(Tensor codes, Tensor scales, Tensor minima, SymInt length, SymInt dim, ScalarType dtype, int "
      "bits, "
      "int group_size, bool per_channel, bool symmetric, bool value_layout) -> Tensor");
  m.def("kv_cache_append(" MUTATED_CACHE ", Tensor key, Tensor value, Tensor? counts=None) -> ()");
  m.def("kv_cache_crop(" MUTATED_CACHE ", Tensor limits) -> ()");
  m.def("kv_cache_compact(" MUTATED_CACHE ", Tensor keep) -> ()");
  m.def("decode_attention(Tensor query, " CACHE ", " DECODE);
  m.def(
      "decode_attention_plain(Tensor query, Tensor key, Tensor value, Tensor lengths, Tensor? block_table, "
      "bool tokens_first, " DECODE);
  m.def("decode_plan_cpu(ScalarType dtype, int head_dim, int value_dim) -> str");
  m.def(
      "decode_plan_cuda(ScalarType dtype, int head_dim, int value_dim, int bits=4, int group_size=64, "
      "bool per_channel=True) -> str");
}

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

  // ---- what would run: one line per implementation, "name: runs" or "name: the reason it refuses"
  m.def(
      "attention_plan_cpu(ScalarType dtype, int head_dim, int value_dim, int[2] block_size, bool backward=False, "
      "bool packed=False) -> str");
  m.def(
      "attention_plan_cuda(ScalarType dtype, int head_dim, int value_dim, int[2] block_size, bool backward=False, "
      "bool packed=False) -> str");
  m.def("cpu_features() -> str");

  // ---- tokens: dims count a batch dimension, which packed tensors (cu_seqlens) lack
  m.def(
      "gather_tokens(Tensor[] tensors, Tensor index, int[] dims, Tensor? cu_seqlens=None, "
      "Tensor? cu_seqlens_out=None, SymInt? length=None) -> Tensor[]");
  m.def(
      "scatter_tokens(Tensor[] tensors, Tensor? weights, Tensor[] base, Tensor index, int[] dims, SymInt length, "
      "str reduce=\"copy\", Tensor? cu_seqlens=None, Tensor? cu_seqlens_out=None) -> (Tensor[] out, Tensor totals)");
  m.def(
      "scatter_tokens_backward(Tensor[] grads, Tensor? grad_totals, Tensor[] tensors, Tensor? weights, Tensor[] outs, "
      "Tensor totals, Tensor index, int[] dims, SymInt rows, str reduce, Tensor? cu_seqlens=None, "
      "Tensor? cu_seqlens_out=None, bool weights_grad=False) -> (Tensor[] grad_tensors, Tensor grad_weights)");
  m.def(
      "bipartite_match(Tensor metric, SymInt r, Tensor? ragged_r=None, int protect=0, Tensor? counts=None) -> "
      "(Tensor source, Tensor destination, Tensor kept, Tensor row, Tensor counts)");
  m.def(
      "compact_kv(Tensor(a!)[] cache_tensors, Tensor keep_index, Tensor? block_table=None, Tensor(b!)? lengths=None, "
      "str layout=\"HND\") -> ()");
  m.def("tokens_plan_cpu(ScalarType dtype, bool match=False) -> str");
}

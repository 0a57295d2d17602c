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

  // ---- what would run: one line per implementation, "name: runs" or "name: the reason it refuses"
  m.def(
      "attention_plan_cpu(ScalarType dtype, int head_dim, int value_dim, int[2] block_size, bool backward=False, "
      "bool packed=False) -> str");
  m.def(
      "attention_plan_cuda(ScalarType dtype, int head_dim, int value_dim, int[2] block_size, bool backward=False, "
      "bool packed=False) -> str");
  m.def("cpu_features() -> str");

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
}

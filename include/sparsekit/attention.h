// Block-sparse attention, forward and backward: the torch-free C++ API.
//
//   score[i, j] = softcap(scale * q_i . k_j) + key_bias_j          softcap(x) = c * tanh(x / c)
//   out_i       = sum_j exp(score[i, j]) v_j / (sum_j exp(score[i, j]) + exp(sink)),   j over the keys row i sees
//   lse_i       = log sum_j exp(score[i, j])                        without the sink; -inf where row i sees no key
//
// Row i sees key j when the block (i / block_q, j / block_k) is in the partial list of its row and the packed bits,
// causality and window allow it, or when the block is in the full list (the caller vouches: bits, causality, window and
// positions are not applied). Keys past the end of the sequence are never seen. docs/semantics.md has every edge case.
#pragma once

#include <cstddef>

#include "sparsekit/parallel.h"
#include "sparsekit/status.h"
#include "sparsekit/types.h"

namespace sparsekit {

/// One list of key blocks per (batch, head, query block). Contiguous int32. An index of -1 is an empty slot.
struct BlockList {
  const int32_t* counts = nullptr;   // [list_batch, list_heads, q_blocks]; null: no such list
  const int32_t* indices = nullptr;  // [list_batch, list_heads, q_blocks, capacity]
  int32_t capacity = 0;
};

/// Which keys each query block attends to, in the tensors of FlexAttention's BlockMask.
struct BlockLists {
  BlockList partial;       // blocks that need masking (bits, causal, window)
  BlockList full;          // blocks that need none
  int64_t list_batch = 1;  // 1 or batch
  int64_t list_heads = 1;  // 1, heads_kv or heads_q
  int64_t q_blocks = 0;    // rows of the lists (varlen: of all sequences one after the other, each rounded up)
  int32_t block_q = 0, block_k = 0;

  // In-block masks, for the slots of the partial list that have one. Word w of row r covers keys 32w .. 32w+31.
  const int32_t* bits = nullptr;        // [bits_count, block_q, bits_words], bits_words = ceil(block_k / 32)
  const int32_t* bits_index = nullptr;  // [list_batch, list_heads, q_blocks, partial.capacity]; -1: no bits
  int64_t bits_count = 0;

  int64_t bits_words() const { return (block_k + 31) / 32; }
  /// Slots of one list row. Slot s < partial.capacity is partial entry s, any other is full entry s - partial.capacity.
  int64_t slots_per_row() const { return int64_t(partial.capacity) + full.capacity; }
  /// Row number (into counts) of query block `m` of query head `h` of batch `b`.
  int64_t row(int64_t b, int64_t h, int64_t m, int64_t heads_q) const {
    int64_t list_head = h / (heads_q / list_heads);
    return ((list_batch == 1 ? 0 : b) * list_heads + list_head) * q_blocks + m;
  }
};

/// The same lists seen from the keys, as CSR over key blocks: for key block n of a list head the entries
/// `slots[offsets[n] .. offsets[n + 1])`, each a forward slot number `m * slots_per_row + slot`, ascending.
/// Both arrays are laid out per (list_batch, list_heads); an entry's position is relative to its (batch, head).
struct BlockTranspose {
  const int32_t* offsets = nullptr;  // [list_batch, list_heads, k_blocks + 1]
  const int32_t* slots = nullptr;    // [list_batch, list_heads, q_blocks * slots_per_row]
};

/// Keys that rows see beside blocks ("stripes"): per group of query rows a list of key columns, and for every row the
/// first keys and the last ones before it. A row sees the union of what these and the blocks show it, each key once:
///
///   columns   key j of its group's list, where causality allows it
///   sink      keys at positions below `sink`, where causality allows it
///   local     keys at positions p - local + 1 .. p, where p is the row's position
///
/// Bits, window and full blocks are the blocks' alone. A column that a list names twice counts once on the CPU; it is
/// the caller's error (attention_check_columns finds it).
struct StripeLists {
  const int32_t* counts = nullptr;   // [list_batch, list_heads, groups]
  const int32_t* indices = nullptr;  // [list_batch, list_heads, groups, capacity], rows of key; -1: an empty slot
  int32_t capacity = 0;
  int32_t group_size = 0;  // query rows of a group; 0: the problem has no stripes, only blocks
  int64_t list_batch = 1;  // 1 or batch
  int64_t list_heads = 1;  // 1, heads_kv or heads_q
  int64_t groups = 0;      // ceil(len_q / group_size)
  int64_t sink = 0, local = 0;

  bool any() const { return group_size > 0; }
  /// Row number (into counts) of group `g` of query head `h` of batch `b`.
  int64_t row(int64_t b, int64_t h, int64_t g, int64_t heads_q) const {
    return ((list_batch == 1 ? 0 : b) * list_heads + h / (heads_q / list_heads)) * groups + g;
  }
};

/// Everything forward and backward share.
struct AttentionProblem {
  DType dtype = DType::f32;  // of query, key, value, out and their gradients
  int64_t batch = 0, heads_q = 0, heads_kv = 0;
  int64_t len_q = 0, len_k = 0;  // rows of query and of key; packed: of all sequences
  int32_t head_dim = 0, value_dim = 0;
  InputView query, key, value;

  BlockLists lists;     // with stripes both lists may be absent; block sizes are positive all the same
  StripeLists stripes;  // not in packed batches

  float scale = 1.f;
  float softcap = 0.f;                          // 0: none
  bool causal = false;                          // bottom right aligned: position of row i is i + len_k - len_q
  int64_t window_left = -1, window_right = -1;  // a row at p sees keys p - left .. p + right; -1: unlimited

  const float* key_bias = nullptr;                // [batch|1, heads_q|1, len_k], added to the score; -inf allowed
  int64_t key_bias_batch = 0, key_bias_head = 0;  // strides in elements, 0 where broadcast
  const float* sinks = nullptr;                   // [heads_q]
  const int32_t* query_positions = nullptr;       // [batch|1, len_q]
  const int32_t* key_positions = nullptr;         // [batch|1, len_k]
  int64_t query_positions_batch = 0, key_positions_batch = 0;

  // Packed batch: batch == 1, sequence s owns rows cu_seqlens[s] .. cu_seqlens[s + 1). Positions and bias are packed
  // too.
  const int32_t* cu_seqlens_q = nullptr;  // [sequences + 1]
  const int32_t* cu_seqlens_k = nullptr;
  int64_t sequences = 0;
  int64_t max_len_q = 0, max_len_k = 0;  // upper bounds of one sequence's length

  bool packed() const { return cu_seqlens_q != nullptr; }
  bool has_mask() const { return causal || window_left >= 0 || window_right >= 0; }
  /// Upper bound of the number of key blocks over all sequences: the length of the transposed lists.
  int64_t k_blocks() const {
    return packed() ? len_k / lists.block_k + sequences : (len_k + lists.block_k - 1) / lists.block_k;
  }
};

struct AttentionForward : AttentionProblem {
  OutputView out;             // [batch, heads_q, len_q, value_dim]
  float* lse = nullptr;       // [batch, heads_q, len_q], contiguous
  double* lse_f64 = nullptr;  // instead of lse where dtype is f64
};

/// Gradients. The caller passes lse and out as forward returned them; grad_lse may be null (zero).
struct AttentionBackward : AttentionProblem {
  InputView out, grad_out;
  const float* lse = nullptr;            // [batch, heads_q, len_q]
  const float* grad_lse = nullptr;       // [batch, heads_q, len_q] or null
  const double* grad_lse_f64 = nullptr;  // instead of grad_lse where dtype is f64 (lse is not read there)
  BlockTranspose transpose;              // not read where the problem has stripes
  bool deterministic = false;            // the CPU kernels always are

  OutputView grad_query, grad_key, grad_value;
  float* grad_key_bias = nullptr;  // [batch, heads_q, len_k] or null: per query head, the caller sums what it broadcast
  float* grad_sinks = nullptr;     // [batch, heads_q] or null: per batch, likewise
};

enum class Direction { forward, backward };

/// Where a CUDA kernel runs and the scratch it may use (`workspace` bytes as its implementation asked for).
struct CudaContext {
  void* stream = nullptr;  // cudaStream_t
  void* workspace = nullptr;
  size_t workspace_bytes = 0;
  int compute_capability = 0;  // 80, 90, ...
  int multiprocessors = 0;
};

/// One implementation of attention; `Context` is ParallelFor on the CPU and CudaContext on a GPU.
/// Dispatch takes the first of its table that does not refuse: dispatch.cpp (CPU), dispatch_cuda.cpp.
template <class Context>
struct AttentionImplementation {
  const char* name;  // as `info()` shows it; on the CPU also the value of SPARSEKIT_ISA that forces it
  /// Why it does not take this problem (a static string), or null if it does.
  const char* (*refuses)(const AttentionProblem& problem, Direction direction, const Context& context);
  /// Bytes of scratch the caller provides. CPU implementations return 0 and allocate for themselves.
  size_t (*workspace)(const AttentionProblem& problem, Direction direction, const Context& context);
  Status (*forward)(const AttentionForward& arguments, const Context& context);
  Status (*backward)(const AttentionBackward& arguments, const Context& context);
};

/// Checks the arguments that do not depend on list contents: shapes against each other, block sizes, dtypes.
Status attention_check(const AttentionProblem& problem);

/// Checks the contents of the lists and names the first bad entry: an index out of range, a count larger than the
/// list, and with `duplicates` a block that one row lists twice. Reads CPU memory.
Status attention_check_lists(const AttentionProblem& problem, bool duplicates);

/// The same for the lists of columns; of the problem's sizes it reads len_k. `duplicates`: also a column listed twice.
Status attention_check_columns(const StripeLists& stripes, int64_t len_k, bool duplicates);

/// What each implementation of the library says to a problem, best first: `reason` is null where it would run.
struct AttentionPlan {
  static constexpr int capacity = 8;
  struct Entry {
    const char* name;
    const char* reason;
  } entries[capacity];
  int count = 0;
};
AttentionPlan attention_plan(const AttentionProblem& problem, Direction direction, const ParallelFor& parallel);
AttentionPlan attention_plan(const AttentionProblem& problem, Direction direction, const CudaContext& context);

/// Bytes of `context.workspace` that the chosen CUDA implementation needs.
size_t attention_workspace(const AttentionProblem& problem, Direction direction, const CudaContext& context);

/// Runs the best CPU implementation. Checks arguments and lists first.
Status attention_forward(const AttentionForward& arguments, const ParallelFor& parallel);
Status attention_backward(const AttentionBackward& arguments, const ParallelFor& parallel);

/// Runs the best CUDA implementation on the context's stream, without a host sync. Checks the arguments; list entries
/// out of range are skipped and counts clamped on the device.
Status attention_forward(const AttentionForward& arguments, const CudaContext& context);
Status attention_backward(const AttentionBackward& arguments, const CudaContext& context);

/// Merges `count` states of the same rows, each a (out, lse) pair over other keys, into one:
/// lse = log sum exp(lse_s), out = sum exp(lse_s - lse) out_s; a row that no state saw keys for stays 0 and -inf.
struct AttentionMerge {
  DType dtype = DType::f32;
  int64_t count = 0, batch = 0, heads = 0, rows = 0;
  int32_t value_dim = 0;
  const InputView* outs = nullptr;     // [count] views of [batch, heads, rows, value_dim] (host array)
  const float* const* lses = nullptr;  // [count] pointers to contiguous [batch, heads, rows] (host array)
  OutputView out;
  float* lse = nullptr;
};
Status attention_merge(const AttentionMerge& arguments, const ParallelFor& parallel);
Status attention_merge(const AttentionMerge& arguments, const CudaContext& context);  // count <= 16

}  // namespace sparsekit

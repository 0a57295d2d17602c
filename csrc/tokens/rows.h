// The two loops that every mover is made of, and the search of the matcher: what an implementation provides.
//
//   combine   out[s, r] = base[s, r] + sum over the entries e of row r of coefficient_e in[s, row_e]
//   dots      sum += <a[s, row], in[s, k] - minus[s, row]>, per entry
//   nearest   the best odd-positioned token of each even-positioned one
//
// A gather is a combination with one entry per row; a scatter one whose entries were sorted by destination (plan.cpp);
// the gradient of either is the other. No std types here: files of every instruction set include this.
#pragma once

#include "sparsekit/tokens.h"

namespace sparsekit {

/// Which rows of the input each row of the result is made of. Entries of row r of sample s:
///   offsets:  [offsets[offset_base(s) + r], offsets[offset_base(s) + r + 1])
///   else:     per_row entries from (s * out_rows + r) * per_row on
/// Rows are numbers inside the sample; -1 is an entry without a row.
struct RowPlan {
  TokenRows from, to;
  const int32_t* offsets = nullptr;  // entries counted from the sample's first, s * sample_entries
  int64_t out_rows = 0;              // rows of a sample that have entries: a packed result has fewer
  int64_t per_row = 1;
  int64_t sample_entries = 0;
  const int32_t* rows = nullptr;
  const void* coefficients = nullptr;  // per entry: float, or double; null: 1
  bool coefficients_f64 = false;
  bool base_always = false;  // base is added to every row; else only rows without entries are base

  const int32_t* sample_offsets(int64_t s) const {
    return offsets ? offsets + (to.cu_seqlens ? to.cu_seqlens[s] + s : s * (to.rows + 1)) : nullptr;
  }
};

/// One tensor of a combination. `stream`: the result is larger than the caches, so write around them.
struct RowTask {
  const RowPlan* plan;
  TokenTensor in, base, out;  // base.data null: none
  bool stream;

  const char* in_row(int64_t s, int64_t o, int64_t r) const { return at(in, plan->from, s, o, r); }
  const char* base_row(int64_t s, int64_t o, int64_t r) const { return at(base, plan->to, s, o, r); }
  char* out_row(int64_t s, int64_t o, int64_t r) const { return const_cast<char*>(at(out, plan->to, s, o, r)); }

  static const char* at(const TokenTensor& t, const TokenRows& side, int64_t s, int64_t o, int64_t r) {
    const char* data = static_cast<const char*>(t.data) + o * t.outer;
    return side.cu_seqlens ? data + (side.cu_seqlens[s] + r) * t.row : data + s * t.sample + r * t.row;
  }
};

/// sums[e] += <grad[s, n_e], in[s, k] - (minus ? minus[s, n_e] : 0)> for the entries e = (k, m) of the samples' index.
struct DotTask {
  TokenRows from, to;
  const int32_t* rows;  // [samples, index_rows, per_row]; -1: no dot product
  int64_t index_rows, per_row;
  TokenTensor grad, in, minus;  // minus.data null: none
  void* sums;                   // [samples, index_rows, per_row]
  bool sums_f64;                // double instead of float: the reference only
};

/// best[s, i] and target[s, i] for the even-positioned tokens 2i of sample s that exist (ceil(count / 2) of them).
struct NearestTask {
  const MatchTokens* match;
  float* best;      // [samples, sources]: the cosine; -inf: similar to none (then target is the first candidate)
  int32_t* target;  // [samples, sources]: position of the destination
  int64_t sources;  // ceil(tokens / 2)

  int64_t count(int64_t s) const { return match->counts ? match->counts[s] : match->tokens; }
};

/// Scratch memory that a thread keeps from one item of a search to the next.
struct MatchMemory {
  char* data = nullptr;
  int64_t bytes = 0;
};
/// At least `bytes` of it, aligned to 64; null: there is none. (dispatch.cpp)
char* match_memory(MatchMemory* memory, int64_t bytes);

/// One instruction set. A null function: not of this file.
struct TokenKernels {
  const char* name;
  /// Rows [first, last) of (sample, outer).
  void (*combine)(const RowTask& task, int64_t s, int64_t o, int64_t first, int64_t last);
  void (*dots)(const DotTask& task, int64_t s, int64_t o, int64_t first, int64_t last);  // rows of the index
  /// Even-positioned tokens [first, last) (in pairs of positions) of sample s; false: no memory for the scratch.
  bool (*nearest)(const NearestTask& task, int64_t s, int64_t first, int64_t last, MatchMemory* memory);
  /// Why not, or null.
  const char* (*refuses_rows)(TokenType type, bool f64_coefficients);
  const char* (*refuses_match)(DType dtype);
};

extern const TokenKernels tokens_cpu_reference;  // reference.cpp: float64, takes everything
extern const TokenKernels tokens_cpu_portable;
#ifdef SPARSEKIT_X86
extern const TokenKernels tokens_cpu_avx2;
extern const TokenKernels tokens_cpu_avx512;
extern const TokenKernels tokens_cpu_avx512_bf16;
#endif

}  // namespace sparsekit

// y = x W^T for one to four tokens: bound by reading the weights once.
//
// Lanes run along the inner dimension, so that a vector of weights is used as it stands in memory, with a vector of x
// per token: blocks of whole vectors a row at a time (the last vector in part), narrower ones as many rows at once as a
// vector holds, beside x repeated. R x 1 blocks have rows in the lanes and a number of x broadcast. A strip of rows
// goes through a group of blocks, 32 KB of weights, with its sums in registers; meanwhile the next group is fetched, in
// the order of its addresses. Threads take block rows worth 64 KB.
//
// Bound: memory. A thread gets a vector of weights every 9 to 12 cycles, which leaves time for any block size; with
// tokens in the lanes, as for many of them, broadcasts took longer than that.
#pragma once

#include "matmul/cpu_product.h"

namespace sparsekit {
namespace {

constexpr int64_t most_few_tokens = 4, few_group_bytes = 32 << 10, few_item_bytes = 64 << 10;
constexpr int64_t few_columns_ahead = 4 << 10;
constexpr int64_t few_longest_chain = 128;  // of fp32 additions, see longest_chain

/// `count` neighbours of token `t` from feature `k` on, as fp32; zeros behind them.
SPARSEKIT_INLINE Simd::Float few_input(const BlockSparseProduct& p, int64_t t, int64_t k, int count) {
  const int64_t at = t * p.input.token + k * p.input.feature;
  if (p.input.feature == 1) return load_float(p.input.data, at, p.dtype, count);
  float lanes[Simd::lanes] = {};
  for (int i = 0; i < count; ++i)
    Simd::store_partial(lanes + i, load_float(p.input.data, at + i * p.input.feature, p.dtype, 1), 1);
  return Simd::load(lanes);
}

/// How weights of a dtype meet x: vectors of fp32, whatever the weights are,
template <DType dtype>
struct FewFloats {
  using Operand = Simd::Float;
  static constexpr int64_t vector = Simd::lanes, weight_bytes = dtype == DType::f32 ? 4 : 2, pair = 1;

  SPARSEKIT_INLINE Operand weight(const char* p) { return load_float(p, 0, dtype, Simd::lanes); }
  SPARSEKIT_INLINE Operand weight(const char* p, int64_t count) { return load_float(p, 0, dtype, int(count)); }
  SPARSEKIT_INLINE Operand x(const char* p) { return Simd::load(reinterpret_cast<const float*>(p)); }
  SPARSEKIT_INLINE Simd::Float madd(Operand a, Operand b, Simd::Float c) { return Simd::fma(a, b, c); }
  /// `count` features of token t from k on, as x; what is missing as zeros.
  SPARSEKIT_INLINE void arrange(const BlockSparseProduct& p, int64_t t, int64_t k, int count, char* to) {
    Simd::store(reinterpret_cast<float*>(to), few_input(p, t, k, count));
  }
};

#ifdef SPARSEKIT_BF16_PRODUCT
/// or pairs of bf16.
struct FewPairs {
  using Operand = Simd::Int;
  static constexpr int64_t vector = 2 * Simd::lanes, weight_bytes = 2, pair = 2;

  SPARSEKIT_INLINE Operand weight(const char* p) { return Simd::load_int(p); }
  SPARSEKIT_INLINE Operand weight(const char* p, int64_t count) {
    return load_bf16_pairs(reinterpret_cast<const uint16_t*>(p), int(count));
  }
  SPARSEKIT_INLINE Operand x(const char* p) { return Simd::load_int(p); }
  SPARSEKIT_INLINE Simd::Float madd(Operand a, Operand b, Simd::Float c) { return Bf16Product::madd(a, b, c); }
  SPARSEKIT_INLINE void arrange(const BlockSparseProduct& p, int64_t t, int64_t k, int count, char* to) {
    const uint16_t* from = static_cast<const uint16_t*>(p.input.data) + t * p.input.token + k * p.input.feature;
    if (p.input.feature == 1) return Simd::store_int(to, load_bf16_pairs(from, count));
    for (int i = 0; i < count; ++i) reinterpret_cast<uint16_t*>(to)[i] = from[i * p.input.feature];
  }
};
#endif

struct FewCall {
  const BlockSparseProduct* p = nullptr;
  const int32_t* slabs = nullptr;
  char* x = nullptr;      // [in_blocks][x_vectors][tokens] vectors; R x 1 blocks: fp32 [in_features][tokens]
  bool columns = false;   // R x 1 blocks
  int64_t tokens = 0;     // 1, 2 or 4: of three the fourth is zeros
  int64_t x_vectors = 0;  // of a block's row
  int64_t strips = 0;     // rows of a block, or vectors, each of them `repeat` rows
  int64_t repeat = 1;     // rows that stand in one vector
  int64_t edge = 0;       // columns of the last block that exist (times `repeat`)
  int64_t block_bytes = 0, group = 0;
  int64_t items = 0, threads = 1;
  ItemRange* ranges = nullptr;
  char* own = nullptr;  // sums of the first thread, [tokens][stride]; of the others `own_size` bytes on
  int64_t own_size = 0, stride = 0;

  int64_t first_block(int64_t item) const { return item * p->pattern.row_blocks() / items; }
};

/// Weights that are fetched while others are multiplied, as far as there are any.
struct Ahead {
  const char* at;
  const char* end;

  SPARSEKIT_INLINE void fetch(Ahead& a, int64_t bytes) {
    const char* to = a.end - a.at < bytes ? a.end : a.at + bytes;
    for (uintptr_t line = round_up(int64_t(uintptr_t(a.at)), 64); line < uintptr_t(to); line += 64)
      Simd::prefetch(reinterpret_cast<const void*>(line));
    a.at = to;
  }
};

/// Rows (or vectors) `strip` to `strip + rows` of the blocks `n` to `n + count`: added to sums[token][row].
template <class Kind, int rows, int tokens>
static void few_strip(const FewCall& call, int64_t strip, int64_t n, int64_t count, float* sums, int64_t stride,
                      Ahead& ahead) {
  const BlockSparsePattern& w = call.p->pattern;
  constexpr int64_t vector_bytes = Kind::vector * Kind::weight_bytes, x_bytes = Simd::lanes * 4;
  const int64_t row_bytes = call.repeat * w.block_cols * Kind::weight_bytes;
  const int64_t columns = call.repeat * w.block_cols, last = w.col_blocks() - 1;
  const char* weights = static_cast<const char*>(call.p->values) + n * call.block_bytes + strip * row_bytes;
  Simd::Float sum[rows][tokens];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) sum[i][t] = Simd::zero();
  for (int64_t b = 0; b < count; ++b, weights += call.block_bytes) {
    const int64_t slab = call.slabs[n + b];
    const int64_t left = slab == last ? call.edge : columns;
    const char* x = call.x + slab * call.x_vectors * tokens * x_bytes;
    const char* at = weights;
    Ahead::fetch(ahead, rows * row_bytes);
    int64_t k = 0;
    for (; k + Kind::vector <= left; k += Kind::vector, at += vector_bytes, x += tokens * x_bytes) {
      typename Kind::Operand xs[tokens];
#pragma GCC unroll 4
      for (int t = 0; t < tokens; ++t) xs[t] = Kind::x(x + t * x_bytes);
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
        const typename Kind::Operand weight = Kind::weight(at + i * row_bytes);
#pragma GCC unroll 4
        for (int t = 0; t < tokens; ++t) sum[i][t] = Kind::madd(weight, xs[t], sum[i][t]);
      }
    }
    if (k < left) {
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
        const typename Kind::Operand weight = Kind::weight(at + i * row_bytes, left - k);
#pragma GCC unroll 4
        for (int t = 0; t < tokens; ++t) sum[i][t] = Kind::madd(weight, Kind::x(x + t * x_bytes), sum[i][t]);
      }
    }
  }
  for (int i = 0; i < rows; ++i) {
    for (int t = 0; t < tokens; ++t) {
      float* to = sums + t * stride + (strip + i) * call.repeat;
      if (call.repeat == 1) {
        *to += Simd::sum(sum[i][t]);
        continue;
      }
      float lanes[Simd::lanes];
      Simd::store(lanes, sum[i][t]);
      const int64_t each = Simd::lanes / call.repeat;
      for (int64_t lane = 0; lane < Simd::lanes; ++lane) to[lane / each] += lanes[lane];
    }
  }
}

template <class Kind, int rows, int tokens>
static void few_strips(const FewCall& call, int64_t strip, int64_t n, int64_t count, float* sums, int64_t stride,
                       Ahead& ahead) {
  for (; strip + rows <= call.strips; strip += rows)
    few_strip<Kind, rows, tokens>(call, strip, n, count, sums, stride, ahead);
  if constexpr (rows > 1) few_strips<Kind, rows / 2, tokens>(call, strip, n, count, sums, stride, ahead);
}

/// One block row: sums[token][row].
template <class Kind, int tokens>
static void few_block_row(const FewCall& call, int64_t block, float* sums, int64_t stride) {
  const BlockSparsePattern& w = call.p->pattern;
  constexpr int rows = Simd::registers / 2 / tokens;
  const char* values = static_cast<const char*>(call.p->values);
  const int64_t first = w.crow[block], last = w.crow[block + 1];
  Ahead ahead = {values, values + w.nnz * call.block_bytes};
  for (int64_t n = first; n < last; n += call.group) {
    const int64_t count = smaller(call.group, last - n);
    ahead.at = values + (n + count) * call.block_bytes;
    few_strips<Kind, rows, tokens>(call, 0, n, count, sums, stride, ahead);
  }
}

/// One block row of R x 1 blocks: rows in the lanes. Four blocks have sums of their own, whose additions overlap.
template <class Kind, int tokens>
static void few_columns(const FewCall& call, int64_t block, float* sums, int64_t stride) {
  const BlockSparsePattern& w = call.p->pattern;
  const char* values = static_cast<const char*>(call.p->values);
  const float* x = reinterpret_cast<const float*>(call.x);
  const int64_t R = w.block_rows, first = w.crow[block], last = w.crow[block + 1];
  Ahead ahead = {values, values + w.nnz * call.block_bytes};
  for (int64_t n = first; n < last; n += 4 * few_longest_chain) {
    const int64_t count = smaller(4 * few_longest_chain, last - n);
    ahead.at = values + n * call.block_bytes + few_columns_ahead;
    for (int64_t r = 0; r < R; r += Simd::lanes) {
      const int valid = clamp_count(R - r, Simd::lanes);
      Simd::Float sum[4][tokens];
      for (auto& part : sum)
        for (Simd::Float& lane : part) lane = Simd::zero();
      const char* at = values + n * call.block_bytes + r * Kind::weight_bytes;
      const int32_t* column = call.slabs + n;
      const auto add = [&](Simd::Float(&to)[tokens], int64_t b) {
        const Simd::Float weight = Kind::weight(at + b * call.block_bytes, valid);
#pragma GCC unroll 4
        for (int t = 0; t < tokens; ++t)
          to[t] = Simd::fma(weight, Simd::set(x[column[b] * int64_t(tokens) + t]), to[t]);
      };
      int64_t b = 0;
      for (; b + 4 <= count; b += 4) {
        if (r == 0) Ahead::fetch(ahead, 4 * call.block_bytes);
        add(sum[0], b), add(sum[1], b + 1), add(sum[2], b + 2), add(sum[3], b + 3);
      }
      for (; b < count; ++b) add(sum[0], b);
      for (int t = 0; t < tokens; ++t) {
        float* to = sums + t * stride + r;
        const Simd::Float all = Simd::add(Simd::add(sum[0][t], sum[1][t]), Simd::add(sum[2][t], sum[3][t]));
        Simd::store_partial(to, Simd::add(Simd::load_partial(to, valid), all), valid);
      }
    }
  }
}

/// Sums [token][stride] of `features` features from `feature` on: bias and activation, and where they belong.
template <Activation activation>
static void finish_few(const BlockSparseProduct& p, int64_t feature, int64_t features, const float* sums,
                       int64_t stride) {
  for (int64_t t = 0; t < p.tokens; ++t) {
    for (int64_t i = 0; i < features; i += Simd::lanes) {
      const int count = clamp_count(features - i, Simd::lanes);
      Simd::Float y = Simd::load(sums + t * stride + i);
      if (p.bias) y = Simd::add(y, load_float(p.bias, feature + i, p.dtype, count));
      y = activate<activation>(y);
      if (p.output.feature == 1) {
        store_row(p, t, feature + i, y, count);
        continue;
      }
      float lanes[Simd::lanes];
      Simd::store(lanes, y);
      for (int n = 0; n < count; ++n) store_row(p, t, feature + i + n, Simd::set(lanes[n]), 1);
    }
  }
}

static void finish_few(const BlockSparseProduct& p, int64_t feature, int64_t features, const float* sums,
                       int64_t stride) {
  switch (p.activation) {
    case Activation::none: return finish_few<Activation::none>(p, feature, features, sums, stride);
    case Activation::relu: return finish_few<Activation::relu>(p, feature, features, sums, stride);
    case Activation::gelu: return finish_few<Activation::gelu>(p, feature, features, sums, stride);
    case Activation::gelu_tanh: return finish_few<Activation::gelu_tanh>(p, feature, features, sums, stride);
    case Activation::silu: return finish_few<Activation::silu>(p, feature, features, sums, stride);
  }
}

template <class Kind, int tokens>
static void few_worker(int64_t first, int64_t last, void* context) {
  FewCall& call = *static_cast<FewCall*>(context);
  const BlockSparseProduct& p = *call.p;
  const int64_t R = p.pattern.block_rows, stride = call.stride;
  for (int64_t i = first; i < last; ++i) {
    float* sums = reinterpret_cast<float*>(call.own + i * call.own_size);
    for (int64_t n = 0; n < call.threads; ++n) {
      ItemRange& range = call.ranges[(i + n) % call.threads];
      for (;;) {
        const int64_t item = __atomic_fetch_add(&range.next, 1, __ATOMIC_RELAXED);
        if (item >= range.end) break;
        const int64_t from = call.first_block(item), to = call.first_block(item + 1);
        memset(sums, 0, size_t(tokens * stride) * sizeof(float));
        for (int64_t block = from; block < to; ++block) {
          float* row = sums + (block - from) * R;
          if constexpr (Kind::pair == 1) {
            if (call.columns) {
              few_columns<Kind, tokens>(call, block, row, stride);
              continue;
            }
          }
          few_block_row<Kind, tokens>(call, block, row, stride);
        }
        finish_few(p, from * R, smaller(to * R, p.pattern.rows) - from * R, sums, stride);
      }
    }
  }
}

/// x as few_columns reads it: [feature][token].
static void arrange_columns(const FewCall& call) {
  const BlockSparseProduct& p = *call.p;
  float* x = reinterpret_cast<float*>(call.x);
  for (int64_t t = 0; t < p.tokens; ++t) {
    for (int64_t k = 0; k < p.pattern.cols; k += Simd::lanes) {
      const int count = clamp_count(p.pattern.cols - k, Simd::lanes);
      float lanes[Simd::lanes];
      Simd::store(lanes, few_input(p, t, k, count));
      for (int i = 0; i < count; ++i) x[(k + i) * call.tokens + t] = lanes[i];
    }
  }
}

/// x as few_strip reads it: vectors of a block, of all tokens; narrow blocks repeated.
template <class Kind>
static void arrange_vectors(const FewCall& call) {
  const BlockSparseProduct& p = *call.p;
  const int64_t C = p.pattern.block_cols, features = p.pattern.cols;
  char* to = call.x;
  for (int64_t block = 0; block < features; block += C) {
    for (int64_t k = 0; k < C; k += Kind::vector) {
      const int count = clamp_count(smaller(C - k, features - block - k), Kind::vector);
      for (int64_t t = 0; t < call.tokens; ++t, to += Simd::lanes * 4) {
        if (t >= p.tokens || count == 0) continue;
        Kind::arrange(p, t, block + k, count, to);
        const int64_t bytes = Simd::lanes * 4 / call.repeat;
        for (int64_t i = 1; i < call.repeat; ++i) memcpy(to + i * bytes, to, size_t(bytes));
      }
    }
  }
}

template <class Kind, int tokens>
static Status run_few(const BlockSparseProduct& p, const ParallelFor& parallel) {
  const BlockSparsePattern& w = p.pattern;
  const int64_t R = w.block_rows, C = w.block_cols;
  FewCall call;
  call.p = &p;
  call.tokens = tokens;
  call.block_bytes = R * C * Kind::weight_bytes;
  call.columns = C == 1;
  // Several rows in a vector, if blocks are whole vectors and the matrix whole blocks.
  if (C < Kind::vector && Kind::vector % C == 0 && R * C % Kind::vector == 0 && w.cols % C == 0)
    call.repeat = Kind::vector / C;
  call.strips = R / call.repeat;
  call.x_vectors = (C + Kind::vector - 1) / Kind::vector;
  call.edge = (w.cols - (w.col_blocks() - 1) * C) * call.repeat;
  call.group = larger(1, smaller(few_group_bytes / call.block_bytes, few_longest_chain / call.x_vectors));
  call.items = larger(1, smaller(w.row_blocks(), w.nnz * call.block_bytes / few_item_bytes));
  call.threads = smaller(larger(1, parallel.threads), call.items);
  call.stride = round_up((w.row_blocks() + call.items - 1) / call.items * R, Simd::lanes);
  Scratch scratch, own;
  own.reserve(tokens * call.stride * int64_t(sizeof(float)));
  call.own_size = own.size;
  const int64_t own_at = scratch.reserve(call.threads * own.size);
  const int64_t x_bytes =
      call.columns ? w.cols * tokens * 4 : w.col_blocks() * call.x_vectors * tokens * Simd::lanes * 4;
  const int64_t x_at = scratch.reserve(x_bytes), ranges_at = scratch.reserve(call.threads * int64_t(sizeof(ItemRange)));
  const int64_t slabs_at = scratch.reserve(w.col.wide ? w.nnz * 4 : 0);
  if (!scratch.allocate()) return error(Status::Kind::failed, "block-sparse product: out of memory");
  call.own = scratch.data + own_at;
  call.x = scratch.data + x_at;
  call.ranges = reinterpret_cast<ItemRange*>(scratch.data + ranges_at);
  for (int64_t i = 0; i < call.threads; ++i)
    call.ranges[i] = {i * call.items / call.threads, (i + 1) * call.items / call.threads};
  call.slabs = narrow(w.col, w.nnz, scratch.data + slabs_at);
  memset(call.x, 0, size_t(x_bytes));
  if (call.columns) {
    arrange_columns(call);
  } else {
    arrange_vectors<Kind>(call);
  }
  parallel(0, call.threads, 1, few_worker<Kind, tokens>, &call);
  scratch.release();
  return {};
}

template <class Kind>
static Status run_few(const BlockSparseProduct& p, const ParallelFor& parallel) {
  switch (p.tokens) {
    case 1: return run_few<Kind, 1>(p, parallel);
    case 2: return run_few<Kind, 2>(p, parallel);
    default: return run_few<Kind, 4>(p, parallel);
  }
}

/// Up to most_few_tokens, of any dtype but int8.
static Status run_few(const BlockSparseProduct& p, const ParallelFor& parallel) {
#ifdef SPARSEKIT_BF16_PRODUCT
  if (p.dtype == DType::bf16 && p.pattern.block_cols > 1) return run_few<FewPairs>(p, parallel);
#endif
  if (p.dtype == DType::bf16) return run_few<FewFloats<DType::bf16>>(p, parallel);
  if (p.dtype == DType::f16) return run_few<FewFloats<DType::f16>>(p, parallel);
  return run_few<FewFloats<DType::f32>>(p, parallel);
}

}  // namespace
}  // namespace sparsekit

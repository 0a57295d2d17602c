// The loops that take the time in the CPU forward: S^T = K Q^T, softmax down the columns, O^T += V^T P^T.
//
// Lanes are queries. A register tile of `keys` x `registers` scores multiplies vectors of packed queries with elements
// of key rows, which are broadcast from memory as they stand: K needs no packing, whatever its strides. O^T works the
// same way on V, whose rows were interleaved in panels of 16 columns, so that one panel is read from front to back.
//
// Per 16 scores at D = Dv = 128: 256 multiply-adds of fp32 (or 128 of bf16 pairs) against about 15 instructions of
// softmax.
#pragma once

#include "attention/cpu_pack.h"
#include "common/cpu/simd_math.h"

namespace sparsekit {
namespace {

constexpr float log2_e = 1.44269504088896341f, ln_2 = 0.693147180559945309f;

/// Rows (keys, or columns of V) of a register tile of `n` vectors of queries; 16 rows divide into such tiles and one of
/// what is left. Sums hide the latency of multiply-adds, 4 cycles twice per cycle (7 for bf16), with 8 to 16 of 32 or
/// 12 of 16 registers.
constexpr int tile_rows(int n) {
  return Simd::registers == 32 ? (n == 1 ? 16 : n == 2 ? 8 : 4) : n == 1 ? 8 : Simd::lanes == 8 ? 6 : 4;
}

/// Rows to bring into L2 while products run, a few lines per register tile: as many as a tile's loads hide.
struct Prefetch {
  struct Region {
    const char* row;
    int64_t stride;
    int32_t lines, rows;
  };
  Region regions[192];
  int count = 0, next = 0;
  int64_t lines = 0;         // of all regions
  int per_step = 0;          // lines of one register tile
  const char* at = nullptr;  // the row at hand
  int32_t left = 0;          // its lines

  void clear() { count = next = per_step = left = 0, lines = 0; }

  void add(const char* row, int64_t stride, int64_t bytes, int64_t rows) {
    if (rows <= 0 || count == int(sizeof regions / sizeof *regions)) return;
    if (stride == bytes) bytes *= rows, rows = 1;
    regions[count++] = {row, stride, int32_t((bytes + 63) / 64), int32_t(rows)};
    lines += regions[count - 1].lines * rows;
  }

  /// `steps` register tiles are about to run.
  void spread(int64_t steps) { per_step = int((lines + steps - 1) / larger(1, steps)); }

  SPARSEKIT_INLINE void step(Prefetch* f) {
    for (int n = f->per_step; n > 0; --n) {
      if (f->left == 0 && !f->next_row()) return;
      Simd::prefetch(f->at);
      f->at += 64;
      --f->left;
    }
  }

  __attribute__((noinline)) bool next_row() {
    if (next == count) {
      per_step = 0;
      return false;
    }
    Region& region = regions[next];
    at = region.row;
    left = region.lines;
    region.row += region.stride;
    if (--region.rows == 0) ++next;
    return true;
  }
};

/// Keys and values of a segment as the kernels read them.
struct LoadedSegment {
  KeySegment keys;
  const char* key = nullptr;  // first row of Product::Element, `key_stride` bytes apart
  int64_t key_stride = 0;
  const int32_t* rows = nullptr;  // of each key, counted from `key`; null: one after the other
  const void* values = nullptr;   // [value_dim / 16][padded / pair][16] Product::Element
  const float* bias = nullptr;    // [padded] times log2 e, or null
};

/// Rows of keys in a tile of scores: not 16, whose row pointers would not fit the registers.
constexpr int tile_keys(int n) { return tile_rows(n) < 8 ? tile_rows(n) : 8; }

/// scores[i][lane] = k_n+i . q_lane for `keys` keys; rows past the segment's end repeat its last key. `most` collects
/// the maximum.
template <class Product, int registers, int keys>
SPARSEKIT_INLINE void multiply_key_tile(const LoadedSegment& segment, int n, const typename Product::Element* query,
                                        int steps, float* scores, Simd::Float (&most)[registers]) {
  using Element = typename Product::Element;
  constexpr int width = registers * Simd::lanes;
  const Element* row[keys];
#pragma GCC unroll 8
  for (int i = 0; i < keys; ++i) {
    int at = n + i < segment.keys.count ? n + i : segment.keys.count - 1;
    const int64_t place = segment.rows ? segment.rows[at] : at;
    row[i] = reinterpret_cast<const Element*>(segment.key + place * segment.key_stride);
  }
  Simd::Float sum[keys][registers];
  Tile<Product>::template multiply_rows<keys, registers>(row, query, smaller(steps, score_chain), sum);
  for (int first = score_chain; first < steps; first += score_chain) {
#pragma GCC unroll 8
    for (int i = 0; i < keys; ++i) {
      row[i] += score_chain;
#pragma GCC unroll 4
      for (int j = 0; j < registers; ++j) Simd::store(scores + i * width + j * Simd::lanes, sum[i][j]);
    }
    query += score_chain * width;
    Tile<Product>::template multiply_rows<keys, registers>(row, query, smaller(steps - first, score_chain), sum);
#pragma GCC unroll 8
    for (int i = 0; i < keys; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < registers; ++j)
        sum[i][j] = Simd::add(Simd::load(scores + i * width + j * Simd::lanes), sum[i][j]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < keys; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < registers; ++j) {
      Simd::store(scores + i * width + j * Simd::lanes, sum[i][j]);
      most[j] = Simd::max(most[j], sum[i][j]);
    }
  }
}

/// scores[n][lane] = k_n . q_lane for the keys of a segment.
template <class Product, int registers>
static void multiply_keys(const LoadedSegment& segment, const typename Product::Element* queries, int steps,
                          float* scores, Simd::Float* most, Prefetch* prefetch) {
  constexpr int keys = tile_keys(registers), rest = 16 % keys, width = registers * Simd::lanes;
  Simd::Float highest[registers];
  for (int j = 0; j < registers; ++j) highest[j] = most[j];
  for (int end = 16, n = 0; end <= segment.keys.padded; end += 16) {
    for (; n + keys <= end; n += keys) {
      multiply_key_tile<Product, registers, keys>(segment, n, queries, steps, scores + n * width, highest);
      Prefetch::step(prefetch);
    }
    if constexpr (rest > 0) {
      multiply_key_tile<Product, registers, rest>(segment, n, queries, steps, scores + n * width, highest);
      Prefetch::step(prefetch);
      n += rest;
    }
  }
  for (int j = 0; j < registers; ++j) most[j] = highest[j];
}

/// How raw products become scores in units of log2: only where softcap, bias or a scale <= 0 ask for a pass of its own.
struct ScoreTransform {
  bool needed = false;
  float scale = 1.f, softcap = 0.f;
};

/// Transforms and masks the scores of one segment in place; `most` collects the maximum of what is seen.
template <int registers>
static void mask_scores(const ScoreTransform& transform, const LoadedSegment& segment, const PairMask& mask,
                        bool masked, float* scores, Simd::Float* most) {
  constexpr int width = registers * Simd::lanes;
  const Simd::Float unseen = Simd::set(-__builtin_inff());
  const Simd::Float scale =
      Simd::set(transform.softcap > 0 ? transform.scale / transform.softcap : transform.scale * log2_e);
  const Simd::Float cap = Simd::set(transform.softcap * log2_e);
  for (int j = 0; j < registers; ++j) {
    Simd::Float highest = most[j];
    for (int n = 0; n < segment.keys.padded; ++n) {
      float* at = scores + n * width + j * Simd::lanes;
      if (n >= segment.keys.count) {
        Simd::store(at, unseen);
        continue;
      }
      Simd::Float score = Simd::load(at);
      if (transform.needed) {
        score = Simd::mul(score, scale);
        if (transform.softcap > 0) score = Simd::mul(tanh(score), cap);
        if (segment.bias) score = Simd::add(score, Simd::set(segment.bias[n]));
      }
      if (masked) score = Simd::select(PairMask::lanes(mask, j, n), score, unseen);
      Simd::store(at, score);
      highest = Simd::max(highest, score);
    }
    most[j] = highest;
  }
}

/// Scores to weights in place (bf16 pairs: in half of it): p = 2^(unit * s - m) with the new maximum m of each column.
/// Updates m and the sums l; `rescale` receives what the old sums and outputs are to be multiplied with.
template <class Product, int registers>
static void softmax(float* scores, int keys, float unit, const Simd::Float* most, float* maximum, float* sum,
                    Simd::Float* rescale) {
  constexpr int width = registers * Simd::lanes, degree = Product::exp2_degree;
  const Simd::Float units = Simd::set(unit), nothing = Simd::set(-__builtin_inff());
#pragma GCC unroll 1
  for (int j = 0; j < registers; ++j) {
    Simd::Float old = Simd::load(maximum + j * Simd::lanes);
    Simd::Float now = Simd::max(old, Simd::mul(most[j], units));
    // A column that has seen no key keeps m = -inf; subtracting 0 instead makes its weights 2^-inf = 0 and not NaN.
    Simd::Float base = Simd::select(Simd::equal(now, nothing), Simd::zero(), now);
    Simd::Float scale = exp2<5>(Simd::sub(old, base));
    Simd::Float even = Simd::zero(), odd = Simd::zero();
    float* column = scores + j * Simd::lanes;
    for (int n = 0; n < keys; n += 2) {
      Simd::Float a = exp2<degree>(Simd::fms(Simd::load(column + n * width), units, base));
      Simd::Float b = exp2<degree>(Simd::fms(Simd::load(column + (n + 1) * width), units, base));
      even = Simd::add(even, a);
      odd = Simd::add(odd, b);
      if constexpr (Product::pair == 2) {
        Product::store(reinterpret_cast<typename Product::Element*>(column + n / 2 * width), Product::join(a, b));
      } else {
        Simd::store(column + n * width, a);
        Simd::store(column + (n + 1) * width, b);
      }
    }
    Simd::store(maximum + j * Simd::lanes, now);
    Simd::store(sum + j * Simd::lanes, Simd::fma(Simd::load(sum + j * Simd::lanes), scale, Simd::add(even, odd)));
    rescale[j] = scale;
  }
}

/// `columns` rows of outputs, one after the other; see multiply_values.
template <class Product, int registers, int columns>
SPARSEKIT_INLINE void multiply_value_tile(const PanelRun* runs, int count, const typename Product::Element* weights,
                                          const Simd::Float* rescale, bool fresh, float* outputs) {
  Simd::Float sum[columns][registers];
  Tile<Product>::template multiply_panel<columns, registers>(runs, count, weights, sum);
  if (!fresh) {
#pragma GCC unroll 16
    for (int i = 0; i < columns; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < registers; ++j)
        sum[i][j] = Simd::fma(rescale[j], Simd::load(outputs + (i * registers + j) * Simd::lanes), sum[i][j]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < columns; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < registers; ++j) Simd::store(outputs + (i * registers + j) * Simd::lanes, sum[i][j]);
}

/// outputs[d][lane] = outputs * rescale + sum over keys of values[d][key] * weights[key][lane], segment after segment;
/// `fresh`: there are no outputs yet. Sums begin at zero (as the softmax's do): carried on through 1,024 keys they had
/// three times dense attention's error.
template <class Product, int registers>
static void multiply_values(const LoadedSegment* const* segments, int count, const float* weights, int value_dim,
                            const Simd::Float* rescale, bool fresh, float* outputs, Prefetch* prefetch) {
  using Element = typename Product::Element;
  constexpr int columns = tile_rows(registers), rest = panel % columns, width = registers * Simd::lanes;
  const Element* weight = reinterpret_cast<const Element*>(weights);
  PanelRun runs[segment_keys / 16];
  for (int d = 0; d < value_dim; d += panel) {
    for (int s = 0; s < count; ++s) {
      const int64_t steps = segments[s]->keys.padded / Product::pair;
      runs[s] = {static_cast<const Element*>(segments[s]->values) + d * steps, steps};
    }
    auto next_columns = [&](int columns) {
      for (int s = 0; s < count; ++s) runs[s].a = static_cast<const Element*>(runs[s].a) + columns;
      outputs += columns * width;
      Prefetch::step(prefetch);
    };
    for (int column = 0; column + columns <= panel; column += columns) {
      multiply_value_tile<Product, registers, columns>(runs, count, weight, rescale, fresh, outputs);
      next_columns(columns);
    }
    if constexpr (rest > 0) {
      multiply_value_tile<Product, registers, rest>(runs, count, weight, rescale, fresh, outputs);
      next_columns(rest);
    }
  }
}

/// The loops of a product as the worker calls them. A product with loops of its own specialises this.
template <class Product>
struct ForwardLoops {
  using Element = typename Product::Element;
  struct Session {  // what a thread holds while it calls them
    void release() {}
  };
  static constexpr int key_rows = 16;              // segments are padded to a multiple of as many keys
  static constexpr int group_keys = segment_keys;  // that stay in L2 together, where blocks are as large
  static constexpr int usual_queries = 256;        // of an item
  static constexpr int score_floats = segment_keys * tile_lanes;

  /// What a tile of queries has summed.
  template <int registers>
  struct Outputs {
    float* sums;
    int value_dim;
    bool fresh;  // there are none yet

    void finish(float*, Prefetch*) {}
  };

  /// Calls of Prefetch::step for one tile of queries, `keys` keys, `steps` elements of a query.
  static int64_t register_tiles(int registers, int64_t keys, int64_t, int64_t value_dim) {
    return keys / tile_keys(registers) + ceil_div(keys, segment_keys) * (value_dim / tile_rows(registers));
  }

  template <int registers>
  SPARSEKIT_INLINE void multiply_keys(const LoadedSegment& segment, const Element* queries, int steps, float* scores,
                                      Simd::Float* most, Prefetch* prefetch) {
    sparsekit::multiply_keys<Product, registers>(segment, queries, steps, scores, most, prefetch);
  }

  /// Scores to weights, and what they weigh to outputs, maximum and sum of the tile.
  template <int registers>
  SPARSEKIT_INLINE void add_values(const LoadedSegment* const* segments, int count, float* scores, int keys, float unit,
                                   const Simd::Float (&most)[registers], float* maximum, float* sum,
                                   Outputs<registers>* outputs, Prefetch* prefetch) {
    Simd::Float rescale[registers];
    softmax<Product, registers>(scores, keys, unit, most, maximum, sum, rescale);
    multiply_values<Product, registers>(segments, count, scores, outputs->value_dim, rescale, outputs->fresh,
                                        outputs->sums, prefetch);
    outputs->fresh = false;
  }
};

}  // namespace
}  // namespace sparsekit

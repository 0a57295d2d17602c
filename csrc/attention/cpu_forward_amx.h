// The forward's loops on AMX tiles: bf16, S^T = K Q^T and O^T += V^T P^T by products of 16 x 32 and 32 x 16.
//
// The form is that of cpu_forward_kernels.h, queries in the lanes, because it suits tiles as it stands. Keys are a left
// operand, rows of 32 elements wherever they are: K needs no packing. Queries were packed in pairs, which is the layout
// of a right operand; so are the weights that the softmax writes. Only V is packed, to rows of columns, once per head.
// Register tiles are 2 x 2 tiles: four sums, and per step of 32 two left and two right operands.
//
// Per 16 scores at D = Dv = 128 the tile unit works 8 cycles (1,024 operations each) and the vector units about 6 (12
// instructions of softmax on two ports). Two hardware threads of a core overlap them, but share the unit and its loads:
// one thread alone hides the loads (7 ns a product, with and without), two do not (17 ns without, 26 with one load per
// product), and that bounds. So outputs stay out of the vector units: sums go on in tiles from what is in memory, and
// are rescaled only where a maximum has grown by more than 2^8 over the one that weights are relative to
// (FlashAttention-4's conditional rescaling).
#pragma once

#include "attention/cpu_forward_worker.h"
#include "common/cpu/tiles_amx.h"

namespace sparsekit {
namespace {

struct AmxProduct : Bf16Product {};

template <>
struct Rows<AmxProduct, DType::bf16> : Rows<Bf16Product, DType::bf16> {};

constexpr int tile_bytes = 1024;

/// Values as left operands: [column / 16][key / 32][16 columns][32 keys].
template <>
struct KeyValueLayout<AmxProduct, DType::bf16> {
  using Element = AmxProduct::Element;

  static bool keys_in_place(const AttentionProblem&) { return true; }
  static void pack_keys(const AttentionProblem&, int64_t, int64_t, const KeySegment&, Element*) {}
  static void pack_values(const AttentionProblem& p, int64_t b, int64_t kv_head, const KeySegment& s, Element* to) {
    const char* first = row_of<DType::bf16>(p.value, b, kv_head, s.key);
    const int64_t stride = p.value.row * 2;
    for (int n = 0; n < s.padded; n += 32, to += tile_bytes / 4, first += 32 * stride) {
      const int64_t beside = s.padded / 32 * (tile_bytes / 4);
      Element* tile = to;
      int64_t column = 0;
      for (; column + 32 <= p.value_dim && n + 32 <= s.count; column += 32, tile += 2 * beside) {
        pack_tiles<false>(first + column * 2, stride, tile, beside);
        pack_tiles<true>(first + column * 2, stride, tile, beside);
      }
      for (; column < p.value_dim; column += 16, tile += beside) {
        pack_partial_tile(first, stride, s.count - n, column, p.value_dim, tile);
      }
    }
  }

  /// Half of two tiles, of 32 columns of 32 rows: interleaving a pair of rows inside quarters of a vector takes one
  /// instruction, and leaves columns 8 l + 0 to 3 (4 to 7: `high`) in quarter l.
  template <bool high>
  SPARSEKIT_INLINE void pack_tiles(const char* first, int64_t stride, Element* tile, int64_t beside) {
    Simd::Int pairs[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      const Simd::Int even = Simd::load_int(first + 2 * i * stride);
      const Simd::Int odd = Simd::load_int(first + (2 * i + 1) * stride);
      pairs[i] = high ? _mm512_unpackhi_epi16(even, odd) : _mm512_unpacklo_epi16(even, odd);
    }
    Simd::transpose(pairs);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      const int column = i / 4 * 8 + i % 4 + (high ? 4 : 0);
      Simd::store_int(tile + column / 16 * beside + column % 16 * 16, pairs[i]);
    }
  }

  /// One tile of `rows` rows (at most 32), and as many of its 16 columns as `size` has; the rest is zero.
  __attribute__((noinline)) static void pack_partial_tile(const char* first, int64_t stride, int rows, int64_t column,
                                                          int64_t size, Element* tile) {
    Simd::Int pairs[16];
    for (int i = 0; i < 16; ++i) {
      const int row = 2 * i;
      const bool second = row + 1 < rows;
      pairs[i] = Simd::set_int(0);
      if (row < rows) {
        pairs[i] =
            Rows<Bf16Product, DType::bf16>::across(first + row * stride, second ? stride : 0, second, column, size);
      }
    }
    Simd::transpose(pairs);
    for (int i = 0; i < 16; ++i) Simd::store_int(tile + i * 16, pairs[i]);
  }

  static int64_t key_bytes(const AttentionProblem&) { return 0; }
  static int64_t value_bytes(const AttentionProblem& p) { return round_up(p.value_dim, 16) * 2; }
};

/// Tiles of one operand: where the first stands, the bytes from row to row, to the tile beside it, and to the next
/// step.
struct TileOperand {
  const char* at;
  int64_t row, beside, step;
};

template <>
struct ForwardLoops<AmxProduct> {
  using Element = AmxProduct::Element;
  using Session = Tiles::Session;
  static constexpr int key_rows = 32;
  static constexpr int group_keys = 4 * segment_keys;
  static constexpr int usual_queries = 128;
  // Scores of one segment, and behind them pairs of weights of a group: see Outputs.
  static constexpr int score_floats = segment_keys * tile_lanes + group_keys * tile_lanes / 2;

  static int64_t register_tiles(int registers, int64_t keys, int64_t steps, int64_t value_dim) {
    const int64_t columns = (registers + 1) / 2;
    return columns * (ceil_div(keys, 32) * (steps / 16) + ceil_div(value_dim, 32) * ceil_div(keys, 32));
  }

  /// Sums of `rows` x `columns` tiles (1 or 2 each), in tiles 0 to 3.
  template <int rows, int columns>
  SPARSEKIT_INLINE void clear() {
    Tiles::zero<0>();
    if constexpr (columns == 2) Tiles::zero<1>();
    if constexpr (rows == 2) Tiles::zero<2>();
    if constexpr (rows == 2 && columns == 2) Tiles::zero<3>();
  }
  template <int rows, int columns, bool stores>
  SPARSEKIT_INLINE void move(float* sums, int64_t row) {
    float* below = sums + 16 * row;
    const int64_t bytes = row * int64_t(sizeof(float));
    if constexpr (stores) {
      Tiles::store<0>(sums, bytes);
      if constexpr (columns == 2) Tiles::store<1>(sums + 16, bytes);
      if constexpr (rows == 2) Tiles::store<2>(below, bytes);
      if constexpr (rows == 2 && columns == 2) Tiles::store<3>(below + 16, bytes);
    } else {
      Tiles::load<0>(sums, bytes);
      if constexpr (columns == 2) Tiles::load<1>(sums + 16, bytes);
      if constexpr (rows == 2) Tiles::load<2>(below, bytes);
      if constexpr (rows == 2 && columns == 2) Tiles::load<3>(below + 16, bytes);
    }
  }
  template <int rows, int columns>
  SPARSEKIT_INLINE void add_products(TileOperand a, TileOperand& b, int64_t steps, Prefetch* prefetch) {
    for (; steps > 0; --steps) {
      Tiles::load<4>(a.at, a.row);
      Tiles::load<6>(b.at, b.row);
      if constexpr (columns == 2) Tiles::load<7>(b.at + b.beside, b.row);
      if constexpr (rows == 2) Tiles::load<5>(a.at + a.beside, a.row);
      Tiles::multiply<0, 4, 6>();
      if constexpr (columns == 2) Tiles::multiply<1, 4, 7>();
      if constexpr (rows == 2) Tiles::multiply<2, 5, 6>();
      if constexpr (rows == 2 && columns == 2) Tiles::multiply<3, 5, 7>();
      a.at += a.step;
      b.at += b.step;
      Prefetch::step(prefetch);
    }
  }

  /// scores[n][lane] = k_n . q_lane for 32 keys, or 16, that stand `row` bytes apart from `key` on.
  template <int rows, int registers>
  SPARSEKIT_INLINE void multiply_key_rows(const char* key, int64_t row, const Element* queries, int steps,
                                          float* scores, Prefetch* prefetch) {
    constexpr int width = registers * 16;
    const TileOperand a = {key, row, 16 * row, 64};
    auto columns_from = [&](int column, auto columns) {
      TileOperand b = {reinterpret_cast<const char*>(queries + column), width * 4, 64, 16 * width * 4};
      clear<rows, columns.value>();
      add_products<rows, columns.value>(a, b, steps / 16, prefetch);
      move<rows, columns.value, true>(scores + column, width);
    };
    int column = 0;
    for (; column + 32 <= width; column += 32) columns_from(column, Number<2>{});
    if constexpr (registers % 2 == 1) columns_from(column, Number<1>{});
  }

  template <int registers>
  static void multiply_keys(const LoadedSegment& segment, const Element* queries, int steps, float* scores,
                            Simd::Float*, Prefetch* prefetch) {
    constexpr int width = registers * 16;
    const int whole = segment.keys.count / 32 * 32;
    for (int n = 0; n < whole; n += 32) {
      multiply_key_rows<2, registers>(segment.key + n * segment.key_stride, segment.key_stride, queries, steps,
                                      scores + n * width, prefetch);
    }
    if (whole < segment.keys.count) multiply_last_keys<registers>(segment, whole, queries, steps, scores);
  }

  /// The keys from `n` on, up to 31 of them: rows past the segment's end repeat its last key. Their scores are masked
  /// afterwards, which also takes the maxima.
  template <int registers>
  __attribute__((noinline)) static void multiply_last_keys(const LoadedSegment& segment, int n, const Element* queries,
                                                           int steps, float* scores) {
    constexpr int width = registers * 16;
    for (; n < segment.keys.count; n += 16) {
      const TileOperand b = {reinterpret_cast<const char*>(queries), width * 4, 64, 16 * width * 4};
      clear<2, 2>();
      for (int step = 0; step < steps / 16; ++step) {
        alignas(64) char rows[tile_bytes];
        for (int i = 0; i < 16; ++i) {
          const int64_t key = smaller(n + i, segment.keys.count - 1);
          Simd::store_int(rows + i * 64, Simd::load_int(segment.key + key * segment.key_stride + step * 64));
        }
        const char* query = b.at + step * b.step;
        Tiles::load<4>(rows, 64);
        Tiles::load<5>(query, b.row);
        Tiles::multiply<0, 4, 5>();
        if constexpr (registers >= 2) {
          Tiles::load<6>(query + 64, b.row);
          Tiles::multiply<1, 4, 6>();
        }
        if constexpr (registers >= 3) {
          Tiles::load<7>(query + 128, b.row);
          Tiles::multiply<2, 4, 7>();
        }
        if constexpr (registers >= 4) {
          Tiles::load<5>(query + 192, b.row);
          Tiles::multiply<3, 4, 5>();
        }
      }
      Tiles::store<0>(scores + n * width, width * 4);
      if constexpr (registers >= 2) Tiles::store<1>(scores + n * width + 16, width * 4);
      if constexpr (registers >= 3) Tiles::store<2>(scores + n * width + 32, width * 4);
      if constexpr (registers >= 4) Tiles::store<3>(scores + n * width + 48, width * 4);
    }
  }

  /// Scores to pairs of weights, p = 2^(unit * s - base), where the base of a column is a maximum that may be behind by
  /// up to 8: weights reach 2^8, and outputs need no rescaling until then. Scores are read once, their maximum is taken
  /// on the way, and a column in which it turns out to be too far above the base is done again: that is rare behind the
  /// first keys, for which it is taken beforehand (a pass of its own costs 0.4 of the softmax). Returns whether any
  /// column's base moved; `rescale` receives what old sums and outputs are to be multiplied with.
  template <int registers>
  static bool softmax(const float* scores, int keys, float unit, Element* weights, float* bases, float* sum,
                      Simd::Float* rescale) {
    const Simd::Float units = Simd::set(unit), nothing = Simd::set(-__builtin_inff());
    bool moved = false;
#pragma GCC unroll 1
    for (int j = 0; j < registers; ++j) {
      constexpr int width = registers * 16;
      const float* column = scores + j * 16;
      const Simd::Float old = Simd::load(bases + j * 16);
      Simd::Float base = old, origin, total;
      if (Simd::equal(old, nothing)) {
        Simd::Float even = nothing, odd = nothing;
        for (int n = 0; n < keys; n += 2) {
          even = Simd::max(even, Simd::load(column + n * width));
          odd = Simd::max(odd, Simd::load(column + (n + 1) * width));
        }
        base = Simd::select(Simd::equal(old, nothing), Simd::mul(Simd::max(even, odd), units), old);
      }
      for (;;) {
        // A column that has seen no key keeps -inf; subtracting 0 instead makes its weights 2^-inf = 0 and not NaN.
        origin = Simd::select(Simd::equal(base, nothing), Simd::zero(), base);
        Simd::Float even = Simd::zero(), odd = Simd::zero(), even_peak = nothing, odd_peak = nothing;
        for (int n = 0; n < keys; n += 2) {
          Simd::Float a = Simd::load(column + n * width), b = Simd::load(column + (n + 1) * width);
          even_peak = Simd::max(even_peak, a);
          odd_peak = Simd::max(odd_peak, b);
          a = exp2<AmxProduct::exp2_degree>(Simd::fms(a, units, origin));
          b = exp2<AmxProduct::exp2_degree>(Simd::fms(b, units, origin));
          even = Simd::add(even, a);
          odd = Simd::add(odd, b);
          AmxProduct::store(weights + n / 2 * width + j * 16, AmxProduct::join(a, b));
        }
        total = Simd::add(even, odd);
        const Simd::Float peak = Simd::mul(Simd::max(even_peak, odd_peak), units);
        const Simd::Mask grew = Simd::less(Simd::add(base, Simd::set(8)), peak);
        if (!grew) break;
        base = Simd::select(grew, peak, base);
      }
      rescale[j] = Simd::set(1);
      if (Simd::less(old, base)) {
        moved = true;
        rescale[j] = exp2<5>(Simd::sub(old, origin));
        Simd::store(bases + j * 16, base);
      }
      Simd::store(sum + j * 16, Simd::fma(Simd::load(sum + j * 16), rescale[j], total));
    }
    return moved;
  }

  /// outputs[d][lane] += sum over keys of values[d][key] * weights[key][lane] for 32 columns d of V, or 16.
  template <int rows, int registers>
  SPARSEKIT_INLINE void multiply_value_rows(const LoadedSegment* const* segments, int count, int tile_row,
                                            const Element* weights, bool fresh, float* outputs, Prefetch* prefetch) {
    constexpr int width = registers * 16;
    auto columns_from = [&](int column, auto columns) {
      TileOperand b = {reinterpret_cast<const char*>(weights + column), width * 4, 64, 16 * width * 4};
      if (fresh) {
        clear<rows, columns.value>();
      } else {
        move<rows, columns.value, false>(outputs + column, width);
      }
      for (int s = 0; s < count; ++s) {
        const int64_t steps = segments[s]->keys.padded / 32, row_of_tiles = steps * tile_bytes;
        const TileOperand a = {static_cast<const char*>(segments[s]->values) + tile_row * row_of_tiles, 64,
                               row_of_tiles, tile_bytes};
        add_products<rows, columns.value>(a, b, steps, prefetch);
      }
      move<rows, columns.value, true>(outputs + column, width);
    };
    int column = 0;
    for (; column + 32 <= width; column += 32) columns_from(column, Number<2>{});
    if constexpr (registers % 2 == 1) columns_from(column, Number<1>{});
  }

  /// Weights wait until those of a whole group can be multiplied with values at once: loading and storing the sums
  /// every 128 keys were a third of what tiles moved.
  template <int registers>
  struct Outputs {
    static constexpr int width = registers * 16;
    float* sums;
    int value_dim;
    bool fresh;                         // there are none yet
    int count = 0, begin = 0, end = 0;  // segments that wait, and their keys
    const LoadedSegment* segments[group_keys / 16];

    Outputs(float* sums, int value_dim, bool fresh) : sums(sums), value_dim(value_dim), fresh(fresh) {}

    static Element* weights(float* scores) { return reinterpret_cast<Element*>(scores + segment_keys * tile_lanes); }

    void finish(float* scores, Prefetch* prefetch) {
      if (count == 0) return;
      const Element* from = weights(scores) + begin / 2 * width;
      int d = 0;
      for (; d + 32 <= value_dim; d += 32)
        multiply_value_rows<2, registers>(segments, count, d / 16, from, fresh, sums + d * width, prefetch);
      if (d < value_dim)
        multiply_value_rows<1, registers>(segments, count, d / 16, from, fresh, sums + d * width, prefetch);
      fresh = false;
      count = 0;
      begin = end;
    }
    void rescale(const Simd::Float (&factors)[registers]) {
      if (fresh) return;
      for (int d = 0; d < value_dim; ++d)
#pragma GCC unroll 4
        for (int j = 0; j < registers; ++j) {
          float* at = sums + d * width + j * 16;
          Simd::store(at, Simd::mul(Simd::load(at), factors[j]));
        }
    }
  };

  template <int registers>
  SPARSEKIT_INLINE void add_values(const LoadedSegment* const* segments, int count, float* scores, int keys, float unit,
                                   const Simd::Float (&)[registers], float* maximum, float* sum,
                                   Outputs<registers>* outputs, Prefetch* prefetch) {
    constexpr int width = registers * 16;
    if (outputs->end + keys > group_keys) {
      outputs->finish(scores, prefetch);
      outputs->begin = outputs->end = 0;
    }
    Simd::Float rescale[registers];
    Element* weights = outputs->weights(scores) + outputs->end / 2 * width;
    if (softmax<registers>(scores, keys, unit, weights, maximum, sum, rescale)) {
      outputs->finish(scores, prefetch);  // what waits is relative to the bases before
      outputs->rescale(rescale);
    }
    for (int i = 0; i < count; ++i) outputs->segments[outputs->count++] = segments[i];
    outputs->end += keys;
  }

 private:
  template <int n>
  struct Number {
    static constexpr int value = n;
  };
};

}  // namespace
}  // namespace sparsekit

// The most similar odd-positioned token of each even-positioned one, fp32 and fp16 metrics, where vpdpwssd exists.
//
//   a, b: rows of length 1, c: the mean of some destinations
//   <a, b> = <a - c, b - c> + <c, b - c> + <a, c>     the last term is the same for all destinations of a source
//   q(x) = round(unit (x - c) / |x - c|)              <q(a), q(b)> = unit^2 <a - c, b - c> / (|a - c| |b - c|) + e
//
// vpdpwssd multiplies pairs of 16-bit integers and sums them exactly, twice as many as an FMA takes of fp32. So rows
// are rounded to integers of one common length: a coordinate moves by half a unit, so |e| <= unit sqrt(dim) + dim / 4
// (Cauchy-Schwarz), and no sum leaves int32 (again). Destinations that may be the best by that bound are compared in
// fp32, whose own roundings the bound includes: the choice is that of comparing all in fp32. 1.2 of 288 are left of
// normal numbers (dim 1,024), 1.4 where cosines are 0.99 (layers move tokens together); without c that took twice
// as long as fp32. Where all are equal (a constant image), the second part alone costs what cpu_match.h does.
//
// Tiling: as cpu_match.h, but a block of destinations keeps its integers for all sources of the item; then the rows
// themselves in tiles of 4 sources x 6 destinations, sums along the lanes. Source: arXiv 2210.09461, section 3.
#pragma once

#include "tokens/cpu_match_tile.h"

namespace sparsekit {
namespace {

/// Products of pairs of int16, added to lanes that hold int32.
struct Int16Product {
  using Element __attribute__((may_alias)) = uint32_t;
  using Operand = Simd::Int;
  static constexpr int pair = 2;

  SPARSEKIT_INLINE Operand load(const Element* p) { return _mm512_loadu_si512(p); }
  SPARSEKIT_INLINE Operand broadcast(const Element* p) { return _mm512_set1_epi32(int32_t(*p)); }
  SPARSEKIT_INLINE Simd::Float madd(Operand a, Operand b, Simd::Float c) {
    asm("vpdpwssd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));  // in registers: see Simd::fma_registers
    return c;
  }
};

constexpr float unit = 32000.f;  // length of the rounded rows: 32,767 less what rounding adds to it
constexpr int64_t least_screened_dim = 96, most_screened_dim = 1 << 20;  // rounding adds at most 512
constexpr int64_t block_panels = 12;  // 576 destinations: 590 KB of integers with 256 sources
constexpr int dot_sources = 4, dot_targets = 6;

/// out[i * dot_targets + j] = <a[i], b[j]>: the same bits for a pair wherever in the tile it stands.
template <class Metric>
__attribute__((noinline)) void dot_tile(const typename Metric::Element* const (&a)[dot_sources],
                                        const typename Metric::Element* const (&b)[dot_targets], int64_t dim,
                                        float* out) {
  constexpr int pairs = dot_sources * dot_targets;
  Simd::Float sum[2 * Simd::lanes];
#pragma GCC unroll 32
  for (int i = 0; i < 2 * Simd::lanes; ++i) sum[i] = Simd::zero();
  for (int64_t d = 0; d < dim; d += Simd::lanes) {
    const int count = dim - d < Simd::lanes ? int(dim - d) : Simd::lanes;
    Simd::Float x[dot_sources];
#pragma GCC unroll 4
    for (int i = 0; i < dot_sources; ++i) x[i] = Metric::load(a[i] + d, count);
#pragma GCC unroll 6
    for (int j = 0; j < dot_targets; ++j) {
      Simd::Float y = Metric::load(b[j] + d, count);
#pragma GCC unroll 4
      for (int i = 0; i < dot_sources; ++i) {
        Simd::Float& s = sum[i * dot_targets + j];
        s = Simd::fma_registers(x[i], y, s);
      }
    }
  }
  static_assert(pairs <= 2 * Simd::lanes, "two vectors of results");
  Simd::Float low[Simd::lanes], high[Simd::lanes];
#pragma GCC unroll 16
  for (int i = 0; i < Simd::lanes; ++i) low[i] = sum[i], high[i] = sum[Simd::lanes + i];
  Simd::store(out, Simd::sum_each(low));
  Simd::store(out + Simd::lanes, Simd::sum_each(high));
}

enum class Screening { done, no_memory, unfit };

template <class Metric>
struct Screened {
  using Source = typename Metric::Element;
  using Element = Int16Product::Element;

  /// Of a row x: 1 / |x| (0: a row of zeros; NaN: not comparable), <c, x / |x|>, and |x / |x| - c|, never too small.
  struct Measure {
    float inverse, along, length;
  };

  const NearestTask& task;
  const int64_t sample, first, last;
  MatchMemory* memory;
  const int64_t dim = task.match->dim;
  const int64_t count = last - first, held = round_up(count, Simd::lanes);
  const int64_t steps = round_up(dim, 2 * Simd::lanes) / 2;  // pairs of a row
  const int64_t candidates = task.count(sample) / 2;         // destination j is token 2 j + 1
  // Bounds: of an integer, and of the roundings of fp32, in units of a cosine.
  const float integer_error = float(1.02 * unit * __builtin_sqrt(double(dim)) + 0.27 * double(dim));
  const float cosine_error = float((double(dim) / 8 + 64) * 0x1p-24);
  float center_square = 0.f;
  int32_t first_valid = -1;  // the first destination that is similar to anything
  int64_t active_count = 0;
  Element* packed = nullptr;    // destinations of a panel, [steps][panel]
  Element* sources = nullptr;   // [held / lanes][steps][lanes]
  int32_t* cosines = nullptr;   // of a block: [block_panels][held][panel]
  float* center = nullptr;      // [dim, rounded up]
  float* inverse = nullptr;     // of a block's destinations: Measure::inverse
  float* length = nullptr;      // Measure::length
  float* offset = nullptr;      // <c, b - c>
  uint16_t* valid = nullptr;    // of a block: lanes that hold a candidate
  Measure* measures = nullptr;  // of the sources
  float* best = nullptr;        // of the sources: the cosine but for the source's length
  int32_t* target = nullptr;    // of the sources: the token
  int32_t* active = nullptr;    // the sources that are similar to anything and not zero

  const Source* row(int64_t token) const {
    const InputView& view = task.match->metric;
    return static_cast<const Source*>(view.data) + view.offset(sample, 0, token);
  }

  static int lanes_of(int64_t left) { return left < Simd::lanes ? int(left < 0 ? 0 : left) : Simd::lanes; }

  /// c: the mean of up to 16 destinations from `begin` on. False, as everywhere below: the squares of a row leave fp32,
  /// which is the other search's affair.
  bool find_center(int64_t begin) {
    memset(center, 0, size_t(round_up(dim, 4 * Simd::lanes)) * 4);
    const int64_t among = candidates - begin, some = among < 16 ? among : 16;
    const Simd::Float share = Simd::set(some > 0 ? 1.f / float(some) : 0.f);
    for (int64_t i = 0; i < some; ++i) {
      const Source* x = row(2 * (begin + i * among / some) + 1);
      const RowNorm norm = norm_of<Metric>(x, dim);
      if (norm.exponent) return false;
      if (!(norm.inverse > 0)) continue;
      const Simd::Float scale = Simd::mul(share, Simd::set(norm.inverse));
      for (int64_t d = 0; d < dim; d += Simd::lanes) {
        Simd::store(center + d, Simd::fma(Metric::load(x + d, lanes_of(dim - d)), scale, Simd::load(center + d)));
      }
    }
    Simd::Float square = Simd::zero();
    for (int64_t d = 0; d < dim; d += Simd::lanes) {
      square = Simd::fma(Simd::load(center + d), Simd::load(center + d), square);
    }
    center_square = Simd::sum(square);
    return true;
  }

  /// Four vectors from d on, all of it or what is left of the row.
  template <bool whole>
  SPARSEKIT_INLINE void add_squares(const Source* x, const Source* next, const float* center, int64_t left,
                                    Simd::Float (&square)[4], Simd::Float (&along)[4]) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int64_t at = i * Simd::lanes;
      Simd::prefetch_near(next + at);
      Simd::Float value = Metric::load(x + at, whole ? Simd::lanes : lanes_of(left - at));
      square[i] = Simd::fma(value, value, square[i]);
      along[i] = Simd::fma(value, Simd::load(center + at), along[i]);
    }
  }

  /// `next`: a row to fetch meanwhile.
  bool measure(const Source* x, const Source* next, Measure* to) const {
    constexpr int64_t width = 4 * Simd::lanes;
    Simd::Float square[4], along[4];
    for (int i = 0; i < 4; ++i) square[i] = along[i] = Simd::zero();
    int64_t d = 0;
    for (; d + width <= dim; d += width) add_squares<true>(x + d, next + d, center + d, width, square, along);
    if (d < dim) add_squares<false>(x + d, next + d, center + d, dim - d, square, along);
    const float sum = Simd::sum(Simd::add(Simd::add(square[0], square[1]), Simd::add(square[2], square[3])));
    to->inverse = 1.f / __builtin_sqrtf(sum);
    if (!(sum > 0x1p-60f && sum < 0x1p+60f)) {
      const RowNorm norm = norm_of<Metric>(x, dim);
      if (norm.exponent) return false;
      to->inverse = norm.inverse;
    }
    to->along = Simd::sum(Simd::add(Simd::add(along[0], along[1]), Simd::add(along[2], along[3]))) * to->inverse;
    const float away = (to->inverse > 0 ? 1.f : 0.f) - 2 * to->along + center_square;
    const float least = (float(dim) / 64 + 32) * 0x1p-22f;  // what the roundings of `away` may amount to
    to->length = __builtin_sqrtf((away > 0 ? away : 0.f) + least);
    return true;
  }

  /// 32 elements from d on (or what is left of the row), less the center, as 16 pairs (d, d + 16) of integers.
  template <bool whole>
  SPARSEKIT_INLINE Simd::Int rounded(const Source* x, const float* center, int64_t left, Simd::Float inverse,
                                     Simd::Float scale) {
    Simd::Int half[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const int at = i * Simd::lanes;
      Simd::Float value = Metric::load(x + at, whole ? Simd::lanes : lanes_of(left - at));
      half[i] = _mm512_cvtps_epi32(Simd::mul(Simd::fms(value, inverse, Simd::load(center + at)), scale));
    }
    return _mm512_mask_blend_epi16(0xaaaaaaaa, half[0], _mm512_slli_epi32(half[1], 16));
  }

  template <bool whole>
  SPARSEKIT_INLINE void pack_step(const Source* const (&rows)[Simd::lanes], const Measure (&measures)[Simd::lanes],
                                  const float* center, int64_t d, int64_t left, Element* to, int64_t stride) {
    Simd::Int block[Simd::lanes];
#pragma GCC unroll 16
    for (int i = 0; i < Simd::lanes; ++i) {
      block[i] = rounded<whole>(rows[i] + d, center + d, left, Simd::set(measures[i].inverse),
                                Simd::set(unit / measures[i].length));
    }
    Simd::transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < Simd::lanes; ++i) Simd::store_int(to + i * stride, block[i]);
  }

  /// As many tokens as lanes, from `token` on in steps of two, to columns `to[step * stride + lane]`. Those that do not
  /// exist or are not comparable become anything.
  bool pack(int64_t token, int64_t tokens, Measure (&measures)[Simd::lanes], Element* to, int64_t stride) const {
    const Source* rows[Simd::lanes];
    Measure scales[Simd::lanes];
    for (int i = 0; i < Simd::lanes; ++i) {
      rows[i] = row(i < tokens ? token + 2 * i : 0);
      measures[i] = {__builtin_nanf(""), 0.f, 1.f};
      if (i < tokens && !measure(rows[i], row(token + 2 * (i + 1 < tokens ? i + 1 : i)), &measures[i])) return false;
      scales[i] = measures[i].inverse == measures[i].inverse ? measures[i] : Measure{0.f, 0.f, 1.f};
    }
    int64_t d = 0;
    constexpr int64_t width = 2 * Simd::lanes;
    for (; d + width <= dim; d += width) pack_step<true>(rows, scales, center, d, width, to + d / 2 * stride, stride);
    if (d < dim) pack_step<false>(rows, scales, center, d, dim - d, to + d / 2 * stride, stride);
    return true;
  }

  /// The integers of destinations [j0, j1) with all sources.
  bool multiply(int64_t j0, int64_t j1) {
    for (int64_t p = 0; j0 + p * panel < j1; ++p) {
      for (int v = 0; v < tile_vectors; ++v) {
        const int64_t at = p * panel + v * Simd::lanes, j = j0 + at;
        Measure rows[Simd::lanes];
        if (!pack(2 * j + 1, j1 - j, rows, packed + v * Simd::lanes, panel)) return false;
        uint32_t lanes = 0;
        for (int i = 0; i < Simd::lanes; ++i) {
          inverse[at + i] = rows[i].inverse;
          length[at + i] = rows[i].length;
          offset[at + i] = rows[i].along - center_square;
          lanes |= uint32_t(rows[i].inverse == rows[i].inverse) << i;
        }
        valid[at / Simd::lanes] = uint16_t(lanes);
        if (first_valid < 0 && lanes) first_valid = int32_t(2 * (j + __builtin_ctz(lanes)) + 1);
      }
      int32_t* to = cosines + p * held * panel;
      memset(to, 0, size_t(held * panel) * 4);
      for (int64_t begin = 0; begin < steps; begin += block_steps) {
        const int64_t length = steps - begin < block_steps ? steps - begin : block_steps;
        for (int64_t i = 0; i < held; i += tile_rows) {
          const Element* source =
              sources + i / Simd::lanes * Simd::lanes * steps + begin * Simd::lanes + i % Simd::lanes;
          multiply_tile<Int16Product>(source, packed + begin * panel, length, reinterpret_cast<float*>(to + i * panel));
        }
      }
    }
    return true;
  }

  /// The cosines of source i with a vector of destinations, but for <a, c>, times `scale` = unit^2 / |a - c|: at least,
  /// or (with a negative error) at most.
  Simd::Float at_least(int64_t i, int64_t vector, Simd::Float scale, Simd::Float error) const {
    const int32_t* from = cosines + (vector / tile_vectors * held + i) * panel + vector % tile_vectors * Simd::lanes;
    Simd::Float integer = Simd::sub(_mm512_cvtepi32_ps(Simd::load_int(from)), error);
    Simd::Float moved = Simd::mul(Simd::load(offset + vector * Simd::lanes), scale);
    return Simd::fma(Simd::load(length + vector * Simd::lanes), integer, moved);
  }

  /// The destinations from j0 on, `vectors` of them, that may be the best of one of dot_sources sources, in fp32.
  void choose(const int32_t* group, int64_t j0, int64_t vectors) {
    const Source* a[dot_sources];
    Simd::Float scale[dot_sources], threshold[dot_sources];
    for (int s = 0; s < dot_sources; ++s) {
      a[s] = row(2 * (first + group[s]));
      scale[s] = Simd::set(unit * unit / measures[group[s]].length);
      Simd::Float top = Simd::set(-__builtin_inff());
      for (int64_t v = 0; v < vectors; ++v) {
        Simd::Float least = at_least(group[s], v, scale[s], Simd::set(integer_error));
        top = _mm512_mask_max_ps(top, valid[v], top, least);
      }
      threshold[s] = Simd::fma(Simd::set(-2 * cosine_error), scale[s], Simd::set(Simd::largest(top)));
    }
    int64_t near[dot_targets];
    int found = 0;
    for (int64_t v = 0; v < vectors; ++v) {
      uint32_t lanes = 0;
      for (int s = 0; s < dot_sources; ++s) {
        Simd::Float most = at_least(group[s], v, scale[s], Simd::set(-integer_error));
        lanes |= _mm512_mask_cmp_ps_mask(valid[v], most, threshold[s], _CMP_GE_OQ);
      }
      for (; lanes; lanes &= lanes - 1) {
        near[found++] = v * Simd::lanes + __builtin_ctz(lanes);
        if (found == dot_targets) compare(group, a, j0, near, found), found = 0;
      }
    }
    if (found > 0) compare(group, a, j0, near, found);
  }

  /// Ascending, so that of equal ones the first stays.
  void compare(const int32_t* group, const Source* const (&a)[dot_sources], int64_t j0, const int64_t* near,
               int found) {
    const Source* b[dot_targets];
    for (int j = 0; j < dot_targets; ++j) b[j] = row(2 * (j0 + near[j < found ? j : 0]) + 1);
    alignas(64) float dots[2 * Simd::lanes];
    dot_tile<Metric>(a, b, dim, dots);
    for (int s = 0; s < dot_sources; ++s) {
      for (int j = 0; j < found; ++j) {
        const float cosine = dots[s * dot_targets + j] * inverse[near[j]];
        if (!(cosine > best[group[s]])) continue;
        best[group[s]] = cosine;
        target[group[s]] = int32_t(2 * (j0 + near[j]) + 1);
      }
    }
  }

  bool search() {
    const int64_t begin = task.match->protect / 2;
    if (!find_center(begin)) return false;
    for (int64_t i = 0; i < held; i += Simd::lanes) {
      Measure rows[Simd::lanes];
      if (!pack(2 * (first + i), count - i, rows, sources + i * steps, Simd::lanes)) return false;
      memcpy(measures + i, rows, sizeof rows);
    }
    for (int64_t i = 0; i < count; ++i) {
      best[i] = -__builtin_inff();
      if (measures[i].inverse > 0) active[active_count++] = int32_t(i);
    }
    for (int64_t i = active_count; i % dot_sources; ++i) active[i] = active[active_count - 1];
    for (int64_t j0 = begin; j0 < candidates; j0 += block_panels * panel) {
      const int64_t j1 = candidates - j0 < block_panels * panel ? candidates : j0 + block_panels * panel;
      if (!multiply(j0, j1)) return false;
      const int64_t vectors = (j1 - j0 + Simd::lanes - 1) / Simd::lanes;
      for (int64_t i = 0; i < active_count; i += dot_sources) choose(active + i, j0, vectors);
    }
    return true;
  }

  Screening run() {
    if (dim > most_screened_dim) return Screening::unfit;
    constexpr int64_t targets = block_panels * panel;
    char* scratch = nullptr;
    for (int pass = 0; pass < 2; ++pass) {  // how much, then where
      int64_t used = 0;
      auto take = [&](auto*& piece, int64_t elements) {
        if (scratch) piece = reinterpret_cast<__typeof__(piece)>(scratch + used);
        used += round_up(elements * int64_t(sizeof *piece), 64);
      };
      take(packed, steps * panel);
      take(sources, held * steps);
      take(cosines, held * targets);
      take(center, round_up(dim, 4 * Simd::lanes));
      take(inverse, targets);
      take(length, targets);
      take(offset, targets);
      take(valid, targets / Simd::lanes);
      take(measures, held);
      take(best, held);
      take(target, held);
      take(active, held);
      if (pass == 0) scratch = match_memory(memory, used);
      if (!scratch) return Screening::no_memory;
    }
    if (!search()) return Screening::unfit;
    for (int64_t i = 0; i < count; ++i) finish(i);
    return Screening::done;
  }

  void finish(int64_t i) {
    const int64_t to = sample * task.sources + first + i;
    const float inverse = measures[i].inverse;
    if (inverse > 0 && first_valid >= 0) {
      task.best[to] = best[i] * inverse;
      task.target[to] = target[i];
    } else {
      const bool zero = inverse == 0 && first_valid >= 0;  // similarity 0 to all, of which the first is chosen
      task.best[to] = zero ? 0.f : -__builtin_inff();
      task.target[to] = zero ? first_valid : int32_t(task.match->protect | 1);
    }
  }
};

}  // namespace
}  // namespace sparsekit

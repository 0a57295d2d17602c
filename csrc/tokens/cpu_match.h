// The most similar odd-positioned token of each even-positioned one, over any Simd and Product.
//
//   best[i] = max_j <m_2i, m_2j+1> / (|m_2i| |m_2j+1|),   target[i] = the first j that reaches it
//
// Tiling: destinations stand in the lanes. A panel of `panel` of them is packed once, [dim][panel], and every source of
// the item walks it, `tile_rows` at a time, with all sums of the tile in registers; the tile's cosines are compared
// with the best so far and dropped, so no matrix of similarities exists. Bound: multiply-adds (N^2 dim / 4 of them for
// N tokens); packing costs about 1 / 100 of that at 288 sources. Source: bipartite soft matching, Token Merging (arXiv
// 2210.09461), section 3.
#pragma once

#include <cstring>

#include "tokens/cpu_match_tile.h"
#ifdef __AVX512VNNI__
#include "tokens/cpu_match_screened.h"
#endif

namespace sparsekit {
namespace {

template <class Metric>
struct Nearest {
  using Product = typename Metric::Product;
  using Element = typename Product::Element;
  using Source = typename Metric::Element;
  static constexpr int pair = Product::pair;

  const NearestTask& task;
  const int64_t sample, first, last;  // sources
  MatchMemory* memory;
  const int64_t dim = task.match->dim, steps = (dim + pair - 1) / pair;  // steps: Product elements of a row
  Element* packed = nullptr;                                             // destinations [steps][panel]
  Element* sources = nullptr;  // [(last - first) / lanes, rounded up][steps][lanes]
  Source* scaled = nullptr;    // [lanes][dim]
  RowNorm* norms = nullptr;    // [last - first]
  float* best = nullptr;       // [last - first, rounded up to lanes][lanes]
  float* place = nullptr;      // the same: positions of the best, as bits
  float* sums = nullptr;       // [last - first, rounded up to lanes][panel]
  alignas(64) float inverse[panel] = {};
  alignas(64) float bias[panel] = {};  // -inf where a lane holds no candidate
  alignas(64) int32_t position[panel] = {};

  const Source* row(int64_t token) const {
    const InputView& view = task.match->metric;
    return static_cast<const Source*>(view.data) + view.offset(sample, 0, token);
  }

  /// The row as it is multiplied: where its length asks for it, a scaled copy in place `i`.
  const Source* operand_row(const Source* from, const RowNorm& norm, int i) {
    return norm.exponent ? scaled_row<Metric>(from, dim, norm.exponent, scaled + i * dim) : from;
  }

  /// As many rows as lanes to columns `to[step * stride + lane]`; null: zeros.
  void pack_rows(const Source* const (&rows)[Simd::lanes], Element* to, int64_t stride) {
    constexpr int taken = Simd::lanes * pair;
    for (int64_t d = 0; d < dim; d += taken) {
      const int wanted = dim - d < taken ? int(dim - d) : taken, elements = (wanted + pair - 1) / pair;
      Simd::Int block[Simd::lanes];
      for (int i = 0; i < Simd::lanes; ++i) {
        block[i] = rows[i] ? Metric::operand(rows[i] + d, wanted) : Simd::set_int(0);
      }
      Simd::transpose(block);
      for (int i = 0; i < elements; ++i) Simd::store_int(to + (d / pair + i) * stride, block[i]);
    }
  }

  /// Destinations 2(j0 + i) + 1 of i < count to the columns of the panel.
  void pack_panel(int64_t j0, int count) {
    for (int v = 0; v < tile_vectors; ++v) {
      const Source* rows[Simd::lanes] = {};
      for (int i = 0; i < Simd::lanes; ++i) {
        const int at = v * Simd::lanes + i;
        const int64_t token = 2 * (j0 + at) + 1;
        position[at] = int32_t(token);
        inverse[at] = 0.f;
        bias[at] = at < count && token >= task.match->protect ? 0.f : -__builtin_inff();
        if (at >= count) continue;
        RowNorm norm = norm_of<Metric>(row(token), dim);
        inverse[at] = norm.inverse;
        rows[i] = operand_row(row(token), norm, i);
      }
      pack_rows(rows, packed + v * Simd::lanes, panel);
    }
  }

  void pack_sources(int64_t count) {
    for (int64_t i0 = 0; i0 < count; i0 += Simd::lanes) {
      const Source* rows[Simd::lanes] = {};
      for (int i = 0; i < Simd::lanes && i0 + i < count; ++i) {
        const Source* from = row(2 * (first + i0 + i));
        norms[i0 + i] = norm_of<Metric>(from, dim);
        rows[i] = operand_row(from, norms[i0 + i], i);
      }
      pack_rows(rows, sources + i0 * steps, Simd::lanes);
    }
  }

  /// The cosines of source `i` (but for its own length) with the panel, against the best so far.
  void compare(int64_t i) {
    Simd::Float top = Simd::load(best + i * Simd::lanes), where = Simd::load(place + i * Simd::lanes);
#pragma GCC unroll 3
    for (int v = 0; v < tile_vectors; ++v) {
      const int lane = v * Simd::lanes;
      Simd::Float sum = Simd::load(sums + i * panel + lane);
      Simd::Float cosine = Simd::fma(sum, Simd::load(inverse + lane), Simd::load(bias + lane));
      Simd::Mask better = Simd::less(top, cosine);  // not where either is NaN; of equal ones the first stays
      top = Simd::select(better, cosine, top);
      where = Simd::select(better, Simd::as_float(Simd::load_int(position + lane)), where);
    }
    Simd::store(best + i * Simd::lanes, top);
    Simd::store(place + i * Simd::lanes, where);
  }

  bool run() {
    const int64_t candidates = task.count(sample) / 2, count = last - first, held = round_up(count, Simd::lanes);
    const int64_t element = sizeof(Element);
    const int64_t bytes[] = {steps * panel * element,
                             held * steps * element,
                             Simd::lanes * dim * element,
                             count * int64_t(sizeof(RowNorm)),
                             held * Simd::lanes * 4,
                             held * Simd::lanes * 4,
                             held * panel * 4};
    int64_t at[8] = {};
    for (int i = 0; i < 7; ++i) at[i + 1] = at[i] + round_up(bytes[i], 64);
    char* scratch = match_memory(memory, at[7]);
    if (!scratch) return false;
    packed = reinterpret_cast<Element*>(scratch + at[0]);
    sources = reinterpret_cast<Element*>(scratch + at[1]);
    scaled = reinterpret_cast<Source*>(scratch + at[2]);
    norms = reinterpret_cast<RowNorm*>(scratch + at[3]);
    best = reinterpret_cast<float*>(scratch + at[4]);
    place = reinterpret_cast<float*>(scratch + at[5]);
    sums = reinterpret_cast<float*>(scratch + at[6]);
    for (int64_t i = 0; i < held * Simd::lanes; ++i) best[i] = -__builtin_inff();
    pack_sources(count);
    for (int64_t j0 = 0; j0 < candidates; j0 += panel) {
      pack_panel(j0, candidates - j0 < panel ? int(candidates - j0) : panel);
      memset(sums, 0, size_t(held * panel) * 4);
      for (int64_t begin = 0; begin < steps; begin += block_steps) {
        const int64_t length = steps - begin < block_steps ? steps - begin : block_steps;
        for (int64_t i = 0; i < held; i += tile_rows) {
          const Element* source =
              sources + i / Simd::lanes * Simd::lanes * steps + begin * Simd::lanes + i % Simd::lanes;
          multiply_tile<Product>(source, packed + begin * panel, length, sums + i * panel);
        }
      }
      for (int64_t i = 0; i < count; ++i) compare(i);
    }
    for (int64_t i = 0; i < count; ++i) finish(i);
    return true;
  }

  /// The best lane of source `i`; of equal ones the first position.
  void finish(int64_t i) {
    const int64_t to = sample * task.sources + first + i;
    float top = -__builtin_inff();
    int32_t chosen = int32_t(task.match->protect | 1);  // the first candidate, where none is similar
    for (int lane = 0; lane < Simd::lanes && norms[i].inverse == norms[i].inverse; ++lane) {
      float value = best[i * Simd::lanes + lane];
      if (value == -__builtin_inff()) continue;
      int32_t at;
      memcpy(&at, place + i * Simd::lanes + lane, 4);
      if (value > top || (value == top && at < chosen)) {
        top = value;
        chosen = at;
      }
    }
    task.best[to] = top * norms[i].inverse;
    if (top == -__builtin_inff()) task.best[to] = top;
    task.target[to] = chosen;
  }
};

template <class Metric>
bool search(const NearestTask& task, int64_t s, int64_t first, int64_t last, MatchMemory* memory) {
#ifdef __AVX512VNNI__
  if (Metric::Product::pair == 1 && task.match->dim >= least_screened_dim) {
    Screening found = Screened<Metric>{task, s, first, last, memory}.run();
    if (found != Screening::unfit) return found == Screening::done;
  }
#endif
  return Nearest<Metric>{task, s, first, last, memory}.run();
}

static bool nearest(const NearestTask& task, int64_t s, int64_t first, int64_t last, MatchMemory* memory) {
  switch (task.match->dtype) {
    case DType::f32: return search<MetricF32>(task, s, first, last, memory);
    case DType::f16: return search<MetricF16>(task, s, first, last, memory);
    case DType::bf16: return search<MetricBf16>(task, s, first, last, memory);
    default: return true;  // refused
  }
}

static const char* refuses_match(DType dtype) {
  return dtype == DType::f64 ? "float64 runs on the reference" : nullptr;
}

}  // namespace
}  // namespace sparsekit

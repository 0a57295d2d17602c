// Packing: a matrix [inner, lanes] of any 16- or 32-bit dtype, with either dimension contiguous, into panels
//
//   to[panel][step][width]      step: one Product::Element of the inner dimension, lanes of the panel side by side
//
// and weights of other dtypes to elements, block by block. What lies outside the matrix reads as 0 and is not touched.
#pragma once

#include "matmul/cpu_tiles.h"

namespace sparsekit {
namespace {

/// `count` (0 to Simd::lanes) neighbours of `data` from element `at` on, as fp32.
SPARSEKIT_INLINE Simd::Float load_float(const void* data, int64_t at, DType dtype, int count) {
  if (dtype == DType::f32) {
    const float* p = static_cast<const float*>(data) + at;
    return count == Simd::lanes ? Simd::load(p) : Simd::load_partial(p, count);
  }
  const uint16_t* p = static_cast<const uint16_t*>(data) + at;
  if (dtype == DType::bf16) return count == Simd::lanes ? Simd::load_bf16(p) : Simd::load_bf16_partial(p, count);
  return count == Simd::lanes ? Simd::load_f16(p) : Simd::load_f16_partial(p, count);
}

SPARSEKIT_INLINE void store_float(void* data, int64_t at, DType dtype, Simd::Float a, int count) {
  if (dtype == DType::f32) {
    float* p = static_cast<float*>(data) + at;
    return count == Simd::lanes ? Simd::store(p, a) : Simd::store_partial(p, a, count);
  }
  uint16_t* p = static_cast<uint16_t*>(data) + at;
#ifdef SPARSEKIT_BF16_PRODUCT
  if (dtype == DType::bf16 && count == Simd::lanes)
    return Bf16Product::store_neighbours(reinterpret_cast<Bf16Product::Element*>(p), a);
#endif
  if (dtype == DType::bf16)
    return count == Simd::lanes ? Simd::store_bf16(p, a) : Simd::store_bf16_partial(p, a, count);
  return count == Simd::lanes ? Simd::store_f16(p, a) : Simd::store_f16_partial(p, a, count);
}

SPARSEKIT_INLINE int clamp_count(int64_t count, int64_t most) {
  return int(count < 0 ? 0 : count > most ? most : count);
}

/// x * factor to the nearest integer (ties to even; below 2^22): adding 1.5 * 2^23 leaves no bits for a fraction. The
/// product is rounded first, on every instruction set: GCC would fuse it with the addition where it can.
SPARSEKIT_INLINE Simd::Float round_scaled(Simd::Float x, Simd::Float factor) {
  const Simd::Float magic = Simd::set(12582912.f);
  Simd::Float product = Simd::mul(x, factor);
#ifdef __x86_64__
  asm("" : "+v"(product));
#else
  asm("" : "+w"(product));
#endif
  return Simd::sub(Simd::add(product, magic), magic);
}

/// A matrix to be packed. One of the strides is 1 (in elements).
struct PackSource {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t lanes = 0, inner = 0, lane_stride = 0, inner_stride = 0;
  const float* rounding = nullptr;      // [lanes rounded up to panels] factors: x is rounded to integers after them
  const float* inner_factor = nullptr;  // [inner]: x is multiplied with
};

/// `count` elements of the source from (lane, inner k) on, along the inner dimension (else along the lanes), as fp32.
template <bool along_inner>
SPARSEKIT_INLINE Simd::Float load_source(const PackSource& s, int64_t lane, int64_t k, int64_t count) {
  const int n = clamp_count(count, Simd::lanes);
  Simd::Float x = load_float(s.data, lane * s.lane_stride + k * s.inner_stride, s.dtype, n);
  if (s.inner_factor)
    x = Simd::mul(x, along_inner ? Simd::load_partial(s.inner_factor + k, n) : Simd::set(s.inner_factor[k]));
  if (s.rounding)
    x = round_scaled(x, along_inner ? Simd::set(s.rounding[lane]) : Simd::load_partial(s.rounding + lane, n));
  return x;
}

/// What a Product packs: `steps` of one lane from inner index k on, and lanes of one step; whole_lanes, as many of
/// `count` lanes of one step as it takes faster than that, says how many.
template <class Product>
struct Packer;

template <>
struct Packer<FloatProduct> {
  SPARSEKIT_INLINE Simd::Int steps(const PackSource& s, int64_t lane, int64_t k) {
    return Simd::as_int(load_source<true>(s, lane, k, s.inner - k));
  }
  SPARSEKIT_INLINE Simd::Int lanes(const PackSource& s, int64_t lane, int64_t k) {
    return Simd::as_int(load_source<false>(s, lane, k, s.lanes - lane));
  }
  SPARSEKIT_INLINE int64_t whole_lanes(const PackSource&, int64_t, int64_t, int64_t, float*) { return 0; }
};

#ifdef SPARSEKIT_BF16_PRODUCT
template <>
struct Packer<Bf16Product> {
  SPARSEKIT_INLINE const uint16_t* at(const PackSource& s, int64_t lane, int64_t k) {
    return static_cast<const uint16_t*>(s.data) + lane * s.lane_stride + k * s.inner_stride;
  }
  SPARSEKIT_INLINE Simd::Int steps(const PackSource& s, int64_t lane, int64_t k) {
    return load_bf16_pairs(at(s, lane, k), clamp_count(s.inner - k, 2 * Simd::lanes));
  }
  SPARSEKIT_INLINE Simd::Int lanes(const PackSource& s, int64_t lane, int64_t k) {
    const int count = clamp_count(s.lanes - lane, Simd::lanes);
    return interleave_bf16(at(s, lane, k), at(s, lane, k + 1), count, k + 1 < s.inner);
  }
  SPARSEKIT_INLINE int64_t whole_lanes(const PackSource& s, int64_t lane, int64_t k, int64_t count,
                                       Bf16Product::Element* to) {
    int64_t j = 0;
    for (; j + 2 * Simd::lanes <= count && k + 1 < s.inner; j += 2 * Simd::lanes) {
      Simd::Int low, high;
      interleave_bf16(Simd::load_int(at(s, lane + j, k)), Simd::load_int(at(s, lane + j, k + 1)), &low, &high);
      Simd::store_int(to + j, low);
      Simd::store_int(to + j + Simd::lanes, high);
    }
    return j;
  }
};
#endif

/// Packs `lanes` lanes from `lane` on (those that exist), steps `first` to `last`, into to[step][width].
template <class Product>
static void pack_panel(const PackSource& s, int64_t lane, int64_t lanes, int64_t first, int64_t last,
                       typename Product::Element* to, int64_t width) {
  constexpr int64_t pair = Product::pair;
  const int64_t end = smaller(lane + lanes, s.lanes);
  PackSource part = s;
  part.lanes = end;
  if (s.inner_stride != 1) {  // row by row: neighbours are lanes
    for (int64_t k = first; k < last; ++k) {
      typename Product::Element* row = to + k * width;
      int64_t j = Packer<Product>::whole_lanes(part, lane, k * pair, smaller(width, end - lane), row);
      for (; j < width; j += Simd::lanes) {
        const bool exists = lane + j < end && k * pair < s.inner;
        Simd::store_int(row + j, exists ? Packer<Product>::lanes(part, lane + j, k * pair) : Simd::set_int(0));
      }
    }
    return;
  }
  const char* data = static_cast<const char*>(s.data);
  const int64_t element = s.dtype == DType::f32 ? 4 : 2, ahead = 4 * Simd::lanes;  // rows are many streams for hardware
  for (int64_t j = 0; j < width; j += Simd::lanes) {
    for (int64_t k = first; k < last; k += Simd::lanes) {
      Simd::Int r[Simd::lanes];
      for (int i = 0; i < Simd::lanes; ++i) {
        const bool exists = lane + j + i < end && k * pair < s.inner;
        r[i] = exists ? Packer<Product>::steps(part, lane + j + i, k * pair) : Simd::set_int(0);
        if (exists && k + ahead < last)
          Simd::prefetch(data + ((lane + j + i) * s.lane_stride + (k + ahead) * pair) * element);
      }
      Simd::transpose(r);
      const int count = int(smaller(Simd::lanes, last - k));
      for (int i = 0; i < count; ++i) Simd::store_int(to + (k + i) * width + j, r[i]);
    }
  }
}

/// Brings a part, `from` to `to` of `of`, of the rows that a panel will be packed from towards the processor.
static void prefetch_source(const PackSource& s, int64_t lane, int64_t lanes, int64_t from, int64_t to, int64_t of) {
  if (s.inner_stride != 1) return;
  const int64_t element = s.dtype == DType::f32 ? 4 : 2, row = s.inner * element;
  for (int64_t i = lane; i < smaller(lane + lanes, s.lanes); ++i) {
    const char* data = static_cast<const char*>(s.data) + i * s.lane_stride * element;
    for (int64_t at = row * from / of; at < row * to / of; at += 64) Simd::prefetch(data + at);
  }
}

template <class Product>
struct PackCall {
  PackSource source;
  typename Product::Element* to = nullptr;
  int64_t panel_lanes = 0, width = 0, steps = 0;  // of a panel
  int64_t parts = 0;                              // pieces of `part_steps` that a panel is cut into
  static constexpr int64_t part_steps = 512;
};

template <class Product>
static void pack_parts(int64_t first, int64_t last, void* context) {
  const PackCall<Product>& call = *static_cast<const PackCall<Product>*>(context);
  for (int64_t i = first; i < last; ++i) {
    const int64_t panel = i / call.parts, from = i % call.parts * call.part_steps;
    pack_panel<Product>(call.source, panel * call.panel_lanes, call.panel_lanes, from,
                        smaller(from + call.part_steps, call.steps), call.to + panel * call.steps * call.width,
                        call.width);
  }
}

/// Packs all panels.
template <class Product>
static void pack(PackCall<Product>* call, const ParallelFor& parallel) {
  const int64_t panels = (call->source.lanes + call->panel_lanes - 1) / call->panel_lanes;
  call->parts = (call->steps + call->part_steps - 1) / call->part_steps;
  parallel(0, panels * call->parts, 4, pack_parts<Product>, call);
}

/// fp32 of `count` weights.
SPARSEKIT_INLINE void widen(const void* values, int64_t at, bool int8, DType dtype, int64_t count, float* to) {
  if (int8) {
    const int8_t* from = static_cast<const int8_t*>(values) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = float(from[i]);
    return;
  }
  for (int64_t i = 0; i < count; i += Simd::lanes)
    Simd::store(to + i, load_float(values, at + i, dtype, clamp_count(count - i, Simd::lanes)));
}

/// A block of weights as pairs or quadruples of the inner dimension, of which `valid` numbers count. Without `down`
/// they lie side by side already; else rows r, r + 1 of the block are interleaved.
template <class Product, bool down>
static void stage_pairs(const void* values, int64_t at, int64_t R, int64_t C, int64_t valid,
                        typename Product::Element* to) {
  constexpr int64_t bytes = 4 / Product::pair;
  const char* from = static_cast<const char*>(values) + at * bytes;
  if constexpr (!down) {
    memcpy(to, from, size_t(R * C * bytes));
    if (valid == C) return;
    for (int64_t r = 0; r < R; ++r)
      memset(reinterpret_cast<char*>(to) + (r * C + valid) * bytes, 0, size_t((C - valid) * bytes));
  } else {
#ifdef SPARSEKIT_BF16_PRODUCT
    static_assert(Product::pair == 2, "only pairs are interleaved");
    for (int64_t r = 0; r < R; r += 2) {
      const uint16_t* even = reinterpret_cast<const uint16_t*>(from) + r * C;
      int64_t c = 0;
      for (; c + 2 * Simd::lanes <= C && r + 1 < valid; c += 2 * Simd::lanes) {
        Simd::Int low, high;
        interleave_bf16(Simd::load_int(even + c), Simd::load_int(even + C + c), &low, &high);
        Simd::store_int(to + r / 2 * C + c, low);
        Simd::store_int(to + r / 2 * C + c + Simd::lanes, high);
      }
      if (C == Simd::lanes && r + 1 < valid) {  // both rows in one vector
        const Simd::Int order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                                 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        Simd::store_int(to + r / 2 * C, _mm512_permutexvar_epi16(order, Simd::load_int(even)));
        continue;
      }
      for (; c < C; c += Simd::lanes) {
        const int count = r < valid ? clamp_count(C - c, Simd::lanes) : 0;
        Simd::Int pairs = interleave_bf16(even + c, even + C + c, count, r + 1 < valid);
        Simd::store_partial(reinterpret_cast<float*>(to) + r / 2 * C + c, Simd::as_float(pairs),
                            clamp_count(C - c, Simd::lanes));
      }
    }
#endif
  }
}

}  // namespace
}  // namespace sparsekit

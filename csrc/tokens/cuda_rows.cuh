// What the kernels of the movers share: from a place in a result to the row of a tensor, on the device.
//
// Results are walked as one flat range of vectors (16 bytes where everything is aligned to that, else less): vector v
// is column v % vectors of row v / vectors, and that is row r of (sample, outer). So rows of any size fill every lane,
// and neighbouring lanes write neighbouring addresses. The divisions are multiplications (Divider); where there are
// 2^31 vectors or more they are 64-bit divisions.
//
// Nothing that index tensors hold leads out of bounds: an entry that names no token is none (-1), cu_seqlens are
// clamped to the rows that exist.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "sparsekit/tokens.h"

namespace sparsekit::cuda {

constexpr int kRowThreads = 256;
constexpr int64_t kStreamBytes = 32 << 20;  // results beyond this leave the cache as soon as they can
constexpr int kMostTensors = 12;            // of one launch: kernel arguments are at most 4 KB

/// n / divisor for 0 <= n < 2^31 as a multiplication, an addition and a shift (Granlund and Montgomery 1994).
struct Divider {
  uint32_t divisor = 1, multiplier = 1, shift = 0;

  Divider() = default;
  explicit Divider(int64_t d) : divisor(d < 1 || d > INT32_MAX ? 1u : uint32_t(d)) {
    while ((uint64_t(1) << shift) < divisor) ++shift;
    multiplier = uint32_t((uint64_t(1) << 32) * ((uint64_t(1) << shift) - divisor) / divisor + 1);
  }
  __device__ __forceinline__ uint32_t divide(uint32_t n) const { return (__umulhi(n, multiplier) + n) >> shift; }
};

/// One side of a movement as kernels take it.
struct Side {
  const int32_t* cu_seqlens = nullptr;
  int64_t rows = 0, samples = 0;

  Side() = default;
  explicit Side(const TokenRows& from) : cu_seqlens(from.cu_seqlens), rows(from.rows), samples(from.samples) {}

  __device__ __forceinline__ int64_t bound(int64_t s) const {
    const int64_t at = __ldg(cu_seqlens + s);
    return at < 0 ? 0 : at > rows ? rows : at;
  }
  /// The first row of sample s and how many it has.
  __device__ __forceinline__ int64_t begin(int64_t s) const { return cu_seqlens ? bound(s) : 0; }
  __device__ __forceinline__ int64_t count(int64_t s) const {
    if (!cu_seqlens) return rows;
    const int64_t n = bound(s + 1) - bound(s);
    return n < 0 ? 0 : n;
  }
  /// The sample that packed row `row` belongs to, or -1: the last one that begins at or before it and ends after it.
  __device__ int64_t sample_of(int64_t row) const {
    int64_t low = 0, high = samples;  // the answer, if any, is below high
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (bound(middle) <= row) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low < samples && bound(low) <= row && row < bound(low + 1) ? low : -1;
  }
};

/// Entry i of an index of int32 or int64 as an int32; whatever lies outside [0, limit) is -1.
__device__ __forceinline__ int32_t token_at(const void* data, bool wide, int64_t i, int64_t limit) {
  const int64_t value =
      wide ? __ldg(static_cast<const long long*>(data) + i) : __ldg(static_cast<const int32_t*>(data) + i);
  return value < 0 || value >= limit ? -1 : int32_t(value);
}

/// A tensor's memory and strides in bytes.
struct Rows {
  char* data = nullptr;
  int64_t sample = 0, outer = 0, row = 0;

  Rows() = default;
  explicit Rows(const TokenTensor& t)
      : data(static_cast<char*>(t.data)), sample(t.sample), outer(t.outer), row(t.row) {}

  __device__ __forceinline__ char* at(const Side& side, int64_t s, int64_t o, int64_t r) const {
    return data + o * outer + (side.cu_seqlens ? (side.begin(s) + r) * row : s * sample + r * row);
  }
};

/// How the flat range of a result is cut into rows. `rows`: of a sample; packed: of all samples.
struct Shape {
  Divider vectors, rows, outers;
  int64_t vectors_wide = 1, rows_wide = 1, outers_wide = 1;
  int64_t total = 0;  // vectors
  int64_t first_block = 0;

  Shape() = default;
  /// `per_row`: vectors of a row (or chunks of them).
  Shape(const TokenTensor& out, const Side& to, int64_t per_row)
      : vectors(per_row),
        rows(to.rows),
        outers(out.outers),
        vectors_wide(per_row),
        rows_wide(to.rows),
        outers_wide(out.outers),
        total((to.cu_seqlens ? 1 : to.samples) * out.outers * to.rows * vectors_wide) {}
};

/// Where vector v of a result stands. `sample` -1: a row of a packed result that belongs to no sample.
struct Place {
  int64_t sample, outer, row;  // row: of the sample; without a sample: of the packed tensor
  int64_t flat;                // the row among those of all samples, whatever the outer: sample * rows + row
  uint32_t column;             // vectors
};

/// The place of row `row` of a result. Int: uint32_t where the range is below 2^31, else uint64_t.
template <class Int>
__device__ __forceinline__ Place place_of_row(const Shape& shape, const Side& to, Int row) {
  Int slice, sample;
  if constexpr (sizeof(Int) == 4) {
    slice = shape.rows.divide(row);
    sample = shape.outers.divide(slice);
  } else {
    slice = row / Int(shape.rows_wide);
    sample = slice / Int(shape.outers_wide);
  }
  Place place;
  place.column = 0;
  place.outer = int64_t(slice - sample * Int(shape.outers_wide));
  place.row = int64_t(row - slice * Int(shape.rows_wide));
  place.sample = int64_t(sample);
  place.flat = place.sample * to.rows + place.row;
  if (to.cu_seqlens) {
    place.sample = to.sample_of(place.row);
    if (place.sample >= 0) place.row -= to.begin(place.sample);
  }
  return place;
}

/// The place of vector v.
template <class Int>
__device__ __forceinline__ Place place_of(const Shape& shape, const Side& to, Int v) {
  const Int row = sizeof(Int) == 4 ? Int(shape.vectors.divide(uint32_t(v))) : v / Int(shape.vectors_wide);
  Place place = place_of_row<Int>(shape, to, row);
  place.column = uint32_t(v - row * Int(shape.vectors_wide));
  return place;
}

/// The row of a base at a place of the result: it is as the result, rows without a sample too.
__device__ __forceinline__ const char* base_row(const Rows& base, const Side& to, const Place& place) {
  return base.data + place.outer * base.outer +
         (to.cu_seqlens ? place.flat * base.row : place.sample * base.sample + place.row * base.row);
}

/// The part of a launch that this block belongs to.
template <class Part>
__device__ __forceinline__ int part_of_block(const Part* parts, int count) {
  int i = 0;
  while (i + 1 < count && int64_t(blockIdx.x) >= parts[i + 1].shape.first_block) ++i;
  return i;
}

/// The widest vector (at most 16 bytes) that all rows of the tensors consist of and are aligned to.
inline int vector_bytes(std::initializer_list<const TokenTensor*> tensors) {
  uint64_t bits = 16;
  for (const TokenTensor* t : tensors) {
    if (!t || !t->data) continue;
    bits |= uint64_t(reinterpret_cast<uintptr_t>(t->data)) | uint64_t(t->sample) | uint64_t(t->outer) |
            uint64_t(t->row) | uint64_t(t->row_bytes());
  }
  return int(bits & ~(bits - 1));
}

}  // namespace sparsekit::cuda

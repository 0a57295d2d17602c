// Elements of a payload on the device: packs of them, and to and from the type they are added in.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "tokens/cuda_memory.cuh"

namespace sparsekit::cuda {

template <class Element, int Width>
struct alignas(sizeof(Element) * Width) Pack {
  Element at[Width];
};

/// Through the read-only path, as one load of 16 bytes that leaves nothing in L1.
template <class Values>
__device__ __forceinline__ Values load_once(const Values* from) {
  Values values;
  if constexpr (sizeof(Values) == 16) {
    const uint4 bits = load_16_once(from);
    memcpy(&values, &bits, sizeof values);
  } else {
    values = *from;
  }
  return values;
}

/// `stream`: nobody reads it soon.
template <class Values>
__device__ __forceinline__ void store_result(Values* to, const Values& values, bool stream) {
  if constexpr (sizeof(Values) == 16) {
    uint4 bits;
    memcpy(&bits, &values, sizeof bits);
    if (stream) {
      __stcs(reinterpret_cast<uint4*>(to), bits);
    } else {
      *reinterpret_cast<uint4*>(to) = bits;
    }
  } else {
    *to = values;
  }
}

template <class Sum, class Element>
__device__ __forceinline__ Sum widen(Element x) {
  if constexpr (sizeof(Element) == 2) {
    return Sum(float(x));
  } else if constexpr (sizeof(Sum) == 8 && Element(0.5f) == Element(0)) {
    return Sum(int64_t(x));  // an integer in uint64_t: its sign is extended
  } else {
    return Sum(x);
  }
}

template <class Element, class Sum>
__device__ __forceinline__ Element narrow(Sum x) {
  return Element(x);
}
template <>
__device__ __forceinline__ __half narrow<__half, float>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16, float>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half narrow<__half, double>(double x) {
  return __double2half(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16, double>(double x) {
  return __double2bfloat16(x);
}

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }
__device__ __forceinline__ uint64_t multiply_add(uint64_t a, uint64_t b, uint64_t c) { return a * b + c; }

}  // namespace sparsekit::cuda

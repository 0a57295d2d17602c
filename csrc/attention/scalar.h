// Reads and writes single elements of any dtype in float64: for code that is written to be read, not to be fast.
#pragma once

#include <cmath>
#include <cstdint>

#include "sparsekit/attention.h"

namespace sparsekit {

static inline double half_to_double(uint16_t bits) {
  int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  double magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                     : exponent     ? std::ldexp(1024 + mantissa, exponent - 25)
                                    : std::ldexp(mantissa, -24);
  return bits & 0x8000 ? -magnitude : magnitude;
}

/// Rounds to `digits` significant bits, ties to even, with denormals below 2^`least_exponent`.
static inline double round_to(double value, int digits, int least_exponent) {
  if (value == 0 || !std::isfinite(value)) return value;
  int exponent;
  std::frexp(value, &exponent);
  int unit = exponent - digits > least_exponent ? exponent - digits : least_exponent;
  return std::ldexp(std::nearbyint(std::ldexp(value, -unit)), unit);
}

static inline uint16_t double_to_half(double value) {
  uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return 0x7e00;
  double magnitude = std::fabs(round_to(value, 11, -24));
  if (magnitude > 65504) return sign | 0x7c00;
  if (magnitude < std::ldexp(1, -14)) return sign | uint16_t(std::ldexp(magnitude, 24));
  int exponent;
  double fraction = std::frexp(magnitude, &exponent);  // in [0.5, 1)
  return sign | uint16_t((exponent + 14) << 10) | uint16_t(std::ldexp(fraction, 11) - 1024);
}

static inline double load(const void* data, int64_t at, DType dtype) {
  switch (dtype) {
    case DType::f64: return static_cast<const double*>(data)[at];
    case DType::f32: return static_cast<const float*>(data)[at];
    case DType::f16: return half_to_double(static_cast<const uint16_t*>(data)[at]);
    case DType::bf16: {
      uint32_t bits = uint32_t(static_cast<const uint16_t*>(data)[at]) << 16;
      float value;
      static_assert(sizeof value == sizeof bits, "float is 32 bits wide");
      __builtin_memcpy(&value, &bits, sizeof value);
      return value;
    }
  }
  return 0;
}

static inline void store(void* data, int64_t at, DType dtype, double value) {
  switch (dtype) {
    case DType::f64: static_cast<double*>(data)[at] = value; break;
    case DType::f32: static_cast<float*>(data)[at] = float(value); break;
    case DType::f16: static_cast<uint16_t*>(data)[at] = double_to_half(value); break;
    case DType::bf16: {
      float rounded = float(round_to(value, 8, -133));
      uint32_t bits;
      __builtin_memcpy(&bits, &rounded, sizeof bits);
      static_cast<uint16_t*>(data)[at] = std::isnan(value) ? 0x7fc0 : uint16_t(bits >> 16);
      break;
    }
  }
}

}  // namespace sparsekit

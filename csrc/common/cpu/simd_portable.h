// Simd in GCC's vector extensions: 4 lanes of fp32; SSE2 on x86-64, NEON on ARM. See README.md for the rules.
#pragma once

#include <cstdint>

#define SPARSEKIT_INLINE static inline __attribute__((always_inline))

namespace sparsekit {
namespace {

struct Simd {
  static constexpr int lanes = 4;
  static constexpr int registers = 16;
  typedef float Float __attribute__((vector_size(16)));
  typedef int32_t Int __attribute__((vector_size(16)));
  using Mask = Int;  // all ones or all zeros per lane

  // ---- memory. `_partial` touches the first `count` (0 to lanes) elements only; the others read as 0.
  SPARSEKIT_INLINE Float load(const float* p) {
    Float a;
    __builtin_memcpy(&a, p, sizeof a);
    return a;
  }
  SPARSEKIT_INLINE Float load_partial(const float* p, int count) {
    Float a = {};
    for (int i = 0; i < count; ++i) a[i] = p[i];
    return a;
  }
  SPARSEKIT_INLINE void store(float* p, Float a) { __builtin_memcpy(p, &a, sizeof a); }
  SPARSEKIT_INLINE void store_partial(float* p, Float a, int count) {
    for (int i = 0; i < count; ++i) p[i] = a[i];
  }
  SPARSEKIT_INLINE Int load_int(const void* p) {
    Int a;
    __builtin_memcpy(&a, p, sizeof a);
    return a;
  }
  SPARSEKIT_INLINE Int load_int_partial(const void* p, int count) {
    Int a = {};
    for (int i = 0; i < count; ++i) a[i] = static_cast<const int32_t*>(p)[i];
    return a;
  }
  SPARSEKIT_INLINE void store_int(void* p, Int a) { __builtin_memcpy(p, &a, sizeof a); }

  // 16-bit elements, widened to fp32 and rounded back (to nearest even).
  SPARSEKIT_INLINE Float load_bf16_partial(const uint16_t* p, int count) {
    Int a = {};
    for (int i = 0; i < count; ++i) a[i] = int32_t(uint32_t(p[i]) << 16);
    return as_float(a);
  }
  SPARSEKIT_INLINE Float load_bf16(const uint16_t* p) { return load_bf16_partial(p, lanes); }
  SPARSEKIT_INLINE void store_bf16_partial(uint16_t* p, Float a, int count) {
    Int bits = as_int(a);
    Int rounded = bits + (((bits >> 16) & 1) + 0x7fff);
    rounded = select_int(a == a, rounded, set_int(0x7fc00000));
    for (int i = 0; i < count; ++i) p[i] = uint16_t(uint32_t(rounded[i]) >> 16);
  }
  SPARSEKIT_INLINE void store_bf16(uint16_t* p, Float a) { store_bf16_partial(p, a, lanes); }
  // fp16: shifting the bits under an fp32 exponent leaves a factor of 2^112, also for denormals.
  SPARSEKIT_INLINE Float load_f16_partial(const uint16_t* p, int count) {
    Int a = {};
    for (int i = 0; i < count; ++i) a[i] = p[i];
    Int magnitude = (a & 0x7fff) << 13;
    Int special = as_int(as_float(magnitude) * set(0x1p112f));  // exact: no fp16 value overflows
    Int not_finite = magnitude >= set_int(0x7c00 << 13);
    return as_float(select_int(not_finite, magnitude | 0x7f800000, special) | ((a & 0x8000) << 16));
  }
  SPARSEKIT_INLINE Float load_f16(const uint16_t* p) { return load_f16_partial(p, lanes); }
  SPARSEKIT_INLINE uint16_t round_f16(float a) {
    uint32_t bits, sign;
    __builtin_memcpy(&bits, &a, sizeof bits);
    sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return 0x7e00;
    if (bits >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and more round to infinity
    if (bits < 0x38800000) {  // denormal: adding 0.5 leaves units of 2^-24 in the mantissa
      float magnitude;
      __builtin_memcpy(&magnitude, &bits, sizeof bits);
      magnitude += 0.5f;
      __builtin_memcpy(&bits, &magnitude, sizeof bits);
      return uint16_t(sign | (bits - 0x3f000000));
    }
    return uint16_t(sign | ((bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13));
  }
  SPARSEKIT_INLINE void store_f16_partial(uint16_t* p, Float a, int count) {
    for (int i = 0; i < count; ++i) p[i] = round_f16(a[i]);
  }
  SPARSEKIT_INLINE void store_f16(uint16_t* p, Float a) { store_f16_partial(p, a, lanes); }
  template <class T>
  SPARSEKIT_INLINE void hold(T&) {}  // see simd_avx512.h; there are no broadcast operands here
  SPARSEKIT_INLINE Float fma_registers(Float a, Float b, Float c) { return a * b + c; }  // see simd_avx512.h
  SPARSEKIT_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
  SPARSEKIT_INLINE void prefetch_near(const void* p) { __builtin_prefetch(p); }

  // ---- arithmetic
  SPARSEKIT_INLINE Float zero() { return Float{}; }
  SPARSEKIT_INLINE Float set(float a) { return Float{a, a, a, a}; }
  SPARSEKIT_INLINE Float add(Float a, Float b) { return a + b; }
  SPARSEKIT_INLINE Float sub(Float a, Float b) { return a - b; }
  SPARSEKIT_INLINE Float mul(Float a, Float b) { return a * b; }
  SPARSEKIT_INLINE Float div(Float a, Float b) { return a / b; }
  SPARSEKIT_INLINE Float max(Float a, Float b) { return select(a > b, a, b); }  // b where either is NaN
  SPARSEKIT_INLINE Float min(Float a, Float b) { return select(a < b, a, b); }
  SPARSEKIT_INLINE Float fma(Float a, Float b, Float c) { return a * b + c; }
  SPARSEKIT_INLINE Float fms(Float a, Float b, Float c) { return a * b - c; }
  SPARSEKIT_INLINE Float fnma(Float a, Float b, Float c) { return c - a * b; }
  SPARSEKIT_INLINE float sum(Float a) { return (a[0] + a[2]) + (a[1] + a[3]); }
  /// Lane i: the sum of all lanes of a[i].
  SPARSEKIT_INLINE Float sum_each(const Float (&a)[lanes]) {
    Int rows[lanes] = {as_int(a[0]), as_int(a[1]), as_int(a[2]), as_int(a[3])};
    transpose(rows);
    return (as_float(rows[0]) + as_float(rows[2])) + (as_float(rows[1]) + as_float(rows[3]));
  }
  SPARSEKIT_INLINE float largest(Float a) {
    float x = a[0] > a[1] ? a[0] : a[1], y = a[2] > a[3] ? a[2] : a[3];
    return x > y ? x : y;
  }
  SPARSEKIT_INLINE Float abs(Float a) { return as_float(as_int(a) & INT32_MAX); }
  SPARSEKIT_INLINE Float copy_sign(Float magnitude, Float sign) {
    return as_float((as_int(magnitude) & INT32_MAX) | (as_int(sign) & INT32_MIN));
  }

  // ---- masks
  SPARSEKIT_INLINE Int set_int(int32_t a) { return Int{a, a, a, a}; }
  SPARSEKIT_INLINE Int select_int(Mask mask, Int yes, Int no) { return (yes & mask) | (no & ~mask); }
  SPARSEKIT_INLINE Mask less(Float a, Float b) { return a < b; }
  SPARSEKIT_INLINE Mask equal(Float a, Float b) { return a == b; }
  SPARSEKIT_INLINE Mask at_most(Int a, Int b) { return a <= b; }
  SPARSEKIT_INLINE Mask both(Mask a, Mask b) { return a & b; }
  /// Lanes whose integer has bit `bit` set.
  SPARSEKIT_INLINE Mask bit_set(Int a, int bit) { return (a & set_int(int32_t(1u << bit))) != 0; }
  SPARSEKIT_INLINE Float select(Mask mask, Float yes, Float no) {
    return as_float(select_int(mask, as_int(yes), as_int(no)));
  }

  // ---- exponentials: x = floor(x) + fraction. `scale_by_exp2(p, x)` is 0 below -126, also at -inf.
  SPARSEKIT_INLINE Int floor_int(Float x) {
    x = max(set(-127.f), min(set(127.f), x));
    Int n = __builtin_convertvector(x, Int);             // towards 0
    return n + (__builtin_convertvector(n, Float) > x);  // true is -1
  }
  SPARSEKIT_INLINE Float fraction(Float x) {
    x = max(set(-127.f), x);
    return x - __builtin_convertvector(floor_int(x), Float);
  }
  SPARSEKIT_INLINE Float scale_by_exp2(Float p, Float x) {  // p * 2^floor(x)
    Int scaled = as_int(p) + (floor_int(x) << 23);
    scaled = select_int(x == x, scaled, as_int(p));
    return as_float(scaled & ~(x < set(-126.f)));
  }

  /// Rows to columns of a 4 x 4 matrix of 32-bit elements.
  SPARSEKIT_INLINE void transpose(Int (&r)[lanes]) {
    Int a = __builtin_shuffle(r[0], r[1], Int{0, 4, 1, 5}), b = __builtin_shuffle(r[0], r[1], Int{2, 6, 3, 7});
    Int c = __builtin_shuffle(r[2], r[3], Int{0, 4, 1, 5}), d = __builtin_shuffle(r[2], r[3], Int{2, 6, 3, 7});
    r[0] = __builtin_shuffle(a, c, Int{0, 1, 4, 5});
    r[1] = __builtin_shuffle(a, c, Int{2, 3, 6, 7});
    r[2] = __builtin_shuffle(b, d, Int{0, 1, 4, 5});
    r[3] = __builtin_shuffle(b, d, Int{2, 3, 6, 7});
  }
  SPARSEKIT_INLINE Int as_int(Float a) {
    Int b;
    __builtin_memcpy(&b, &a, sizeof b);
    return b;
  }
  SPARSEKIT_INLINE Float as_float(Int a) {
    Float b;
    __builtin_memcpy(&b, &a, sizeof b);
    return b;
  }
};

}  // namespace
}  // namespace sparsekit

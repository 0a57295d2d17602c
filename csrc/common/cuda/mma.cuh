// Tensor-core products of one warp (mma.sync), and the conversions around them.
//
// m16n8k16, 16-bit operands, fp32 accumulators; lane l, g = l / 4, t = l % 4:
//   A (16 x 16, row)  a0: (g, 2t..2t+1)   a1: (g + 8, 2t..)   a2: (g, 2t + 8..)   a3: (g + 8, 2t + 8..)
//   B (16 x 8, col)   b0: (k = 2t..2t+1, n = g)   b1: (k = 2t + 8.., n = g)
//   C (16 x 8)        c0, c1: (g, 2t), (g, 2t + 1)   c2, c3: (g + 8, 2t), (g + 8, 2t + 1)
// So two neighbouring C tiles, rounded to 16 bits, are the A operand of the next product: P never leaves registers.
//
// m16n8k8, tf32 operands (fp32 bits, 10 bits of mantissa used):
//   A  a0: (g, t)  a1: (g + 8, t)  a2: (g, t + 4)  a3: (g + 8, t + 4)     B  b0: (k = t, n = g)  b1: (k = t + 4, n = g)
// fp32-accurate products split x = big + small, both tf32, and add three products (big*small, small*big, big*big): what
// is dropped is 2^-22 of the product (CUTLASS calls it 3xTF32).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace sparsekit::cuda {

/// c += a b, for Element = __nv_bfloat16 or __half. The sum that goes in and the one that comes out are separate
/// operands: where c is zero, the zero register goes in and nothing has to be cleared first.
template <class Element>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                            uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};\n"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};\n"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

__device__ __forceinline__ void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};\n"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

/// x as the sum of two tf32 numbers (in fp32 registers). An infinite or NaN x stays in `big`; `small` is then 0, since
/// inf - inf would turn an infinite product into NaN.
struct Tf32Pair {
  uint32_t big, small;
};
__device__ __forceinline__ Tf32Pair split_tf32(float x) {
  Tf32Pair pair;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(pair.big) : "f"(x));
  const float rest = x - __uint_as_float(pair.big);
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(pair.small) : "f"(fabsf(x) < 3.3e38f ? rest : 0.f));
  return pair;
}

/// c += a b in fp32 accuracy: three tf32 products, the small ones first. Their sum is added outside the tensor core,
/// which truncates when it accumulates: over 700 keys that bias reached 5e-6 of the result, ten times fp32's own error.
__device__ __forceinline__ void mma_m16n8k8_f32(float (&c)[4], const Tf32Pair (&a)[4], const Tf32Pair (&b)[2]) {
  const uint32_t big[4] = {a[0].big, a[1].big, a[2].big, a[3].big};
  const uint32_t small[4] = {a[0].small, a[1].small, a[2].small, a[3].small};
  float product[4] = {0.f, 0.f, 0.f, 0.f};
  mma_m16n8k8_tf32(product, small, b[0].big, b[1].big);
  mma_m16n8k8_tf32(product, big, b[0].small, b[1].small);
  mma_m16n8k8_tf32(product, big, b[0].big, b[1].big);
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] += product[i];
}

/// Two fp32 numbers rounded to 16 bits, `low` in the lower half: the order of consecutive columns.
template <class Element>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

/// One element as fp32, and back.
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(float x) { return x; }
template <class Element>
__device__ __forceinline__ Element from_float(float x);
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}

}  // namespace sparsekit::cuda

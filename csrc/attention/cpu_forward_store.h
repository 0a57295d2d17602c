// What the CPU forwards of blocks and of stripes do alike at their ends: a bias as it is added to scores, and outputs
// back to rows.
#pragma once

#include "attention/cpu_forward_kernels.h"

namespace sparsekit {
namespace {

/// Of key_bias, in units of log 2. The lowest finite bias stays finite: a row that sees only such keys weighs them
/// evenly.
SPARSEKIT_INLINE float scaled_bias(float bias) {
  float scaled = bias * log2_e;
  return scaled < -__FLT_MAX__ && bias >= -__FLT_MAX__ ? -__FLT_MAX__ : scaled;
}

/// out = O / (l + 2^(sink - m)) and lse of a tile of heads `head` and following; transposed back to rows.
template <DType dtype>
static void store_outputs(const AttentionForward& p, const QueryTile& tile, int64_t batch, int64_t first_head,
                          const float* maximum, const float* sum, const float* outputs) {
  constexpr int lanes = Simd::lanes;
  const int width = tile.width();
  alignas(64) float factor[tile_lanes] = {}, log_sum[tile_lanes];
  char* out[tile_lanes];
  for (int j = 0; j < width; j += lanes) Simd::store(log_sum + j, log(Simd::load(sum + j)));
  for (int i = 0; i < tile.rows; ++i) {
    const int64_t head = first_head + i / tile.queries, query = tile.query + i % tile.queries;
    bool empty = sum[i] == 0;
    float total = sum[i];
    if (p.sinks) total += __builtin_exp2f(p.sinks[head] * log2_e - maximum[i]);
    factor[i] = empty ? 0 : 1 / total;
    float lse = empty ? -__builtin_inff() : maximum[i] * ln_2 + log_sum[i];
    if (maximum[i] == -__FLT_MAX__) lse = maximum[i];  // a bias that scaled_bias kept finite
    p.lse[(batch * p.heads_q + head) * p.len_q + query] = lse;
    out[i] = static_cast<char*>(p.out.data) + p.out.offset(batch, head, query) * (dtype == DType::f32 ? 4 : 2);
  }
  for (int j = 0; j < width; j += lanes) {
    const Simd::Float factors = Simd::load(factor + j);
    const Simd::Mask empty = Simd::equal(factors, Simd::zero());
#ifdef SPARSEKIT_BF16_PRODUCT
    if constexpr (dtype == DType::bf16) {  // rounded first, there is half as much to transpose
      for (int64_t d = 0; d < p.value_dim; d += 2 * lanes) {
        Simd::Int block[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
          block[i] = Simd::set_int(0);
          if (d + lanes >= p.value_dim && i >= lanes / 2) continue;  // behind the padded outputs
          const float* at = outputs + (d + 2 * i) * width + j;
          const Simd::Float even = Simd::select(empty, Simd::zero(), Simd::mul(Simd::load(at), factors));
          const Simd::Float odd = Simd::select(empty, Simd::zero(), Simd::mul(Simd::load(at + width), factors));
          block[i] = round_bf16_pairs(even, odd);
        }
        Simd::transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
          if (j + i < tile.rows)
            store_bf16_pairs(out[j + i] + 2 * d, block[i], int(smaller(p.value_dim - d, 2 * lanes)));
        }
      }
      continue;
    }
#endif
    for (int64_t d = 0; d < p.value_dim; d += lanes) {
      Simd::Int block[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        Simd::Float value = Simd::mul(Simd::load(outputs + (d + i) * width + j), factors);
        block[i] = Simd::as_int(Simd::select(empty, Simd::zero(), value));
      }
      Simd::transpose(block);
      int count = int(smaller(p.value_dim - d, lanes));
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        if (j + i < tile.rows) {
          store_row<dtype>(out[j + i], d, count, Simd::as_float(block[i]));
        }
      }
    }
  }
}

}  // namespace
}  // namespace sparsekit

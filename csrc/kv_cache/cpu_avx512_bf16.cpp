// Decode attention for AVX-512 with BF16 and VNNI: rows of bf16 through vdpbf16ps (cpu_bf16_rows.h), packed codes
// through vpdpbusd (cpu_vnni.h), both bound by memory; everything else (fp16 and fp32 rows, fp8, queries in fp32) as in
// cpu_decode.h.
#include "common/cpu/simd_avx512_bf16.h"

#include "kv_cache/cpu_bf16_rows.h"
#include "kv_cache/cpu_decode.h"
#include "kv_cache/cpu_vnni.h"

namespace sparsekit {
namespace {

/// Queries in fp32 are promised fp32 accuracy, which 15-bit factors do not have.
bool takes_codes(const DecodeAttention& p, const KvPacking& packing) {
  return p.dtype != DType::f32 && packing.bits != kv_fp8 && packing.dim <= 256;
}

struct FastKernels {
  const DecodeSplit& split;
  const Workspace& w;
  bool bf16_keys = false, bf16_values_fit = false, key_codes = false, value_codes = false;
  KeyState key_state;
  uint16_t* query;  // bf16 [rows][head_dim, rounded up to 32]

  FastKernels(const DecodeSplit& split, const Workspace& w)
      : split(split),
        w(w),
        key_state(split.problem->cache ? split.problem->cache->key : KvPacking(), reinterpret_cast<int8_t*>(w.more)) {
    const DecodeAttention& p = *split.problem;
    DType rows = p.plain ? p.plain->dtype : p.cache->dtype;
    bf16_keys = rows == DType::bf16 && p.dtype == DType::bf16;
    bf16_values_fit = rows == DType::bf16 && p.value_dim % 32 == 0;
    if (p.cache) {
      key_codes = takes_codes(p, p.cache->key);
      value_codes = takes_codes(p, p.cache->value);
    }
    query = reinterpret_cast<uint16_t*>(w.more + VnniScratch::floats(p) - Workspace::rows(p) * (p.head_dim / 2 + 16));
    int32_t padded = (p.head_dim + 31) / 32 * 32;
    for (int32_t r = 0; bf16_keys && r < split.rows; ++r) {
      for (int32_t d = 0; d < padded; ++d) {
        query[r * padded + d] = d < p.head_dim ? float_to_bf16(split.query[int64_t(r) * p.head_dim + d]) : 0;
      }
    }
  }

  /// The next chunk where it is known and of the same kind: this one's streams go on there.
  static const DecodeChunk* after(const DecodeChunk* chunk, const DecodeChunk* next) {
    return next && next->quantized == chunk->quantized ? next : nullptr;
  }

  void scores(const DecodeChunk& chunk, const DecodeChunk* following) {
    const DecodeChunk* next = after(&chunk, following);
    if (!chunk.quantized) {
      if (!bf16_keys) return plain_scores(split, chunk, w);
      switch (split.problem->head_dim) {
        case 64: return bf16_scores<2>(split, chunk, next, query, w);
        case 128: return bf16_scores<4>(split, chunk, next, query, w);
        default: return bf16_scores<0>(split, chunk, next, query, w);
      }
    }
    if (!key_codes) return quantized_scores(split, chunk, w);
    switch (split.problem->cache->key.bits) {
      case 8: return vnni_scores<8>(split, chunk, next, key_state, w);
      case 4: return vnni_scores<4>(split, chunk, next, key_state, w);
      case 3: return vnni_scores<3>(split, chunk, next, key_state, w);
      default: return vnni_scores<2>(split, chunk, next, key_state, w);
    }
  }

  void values(const DecodeChunk& chunk, const DecodeChunk* following) const {
    const DecodeChunk* next = after(&chunk, following);
    if (!chunk.quantized) {
      return bf16_values_fit ? bf16_values(split, chunk, next, w) : plain_values(split, chunk, w);
    }
    if (!value_codes) return quantized_values(split, chunk, w);
    switch (split.problem->cache->value.bits) {
      case 8: return vnni_values<8>(split, chunk, next, w);
      case 4: return vnni_values<4>(split, chunk, next, w);
      case 3: return vnni_values<3>(split, chunk, next, w);
      default: return vnni_values<2>(split, chunk, next, w);
    }
  }
};

int64_t scratch(const DecodeAttention& p) { return Workspace::floats(p) + VnniScratch::floats(p); }

}  // namespace

const DecodeKernel decode_avx512_bf16 = {"avx512_bf16", refuses_dims, scratch, run_split<FastKernels>};

}  // namespace sparsekit

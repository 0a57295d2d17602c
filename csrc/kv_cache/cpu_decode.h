// One split of decode attention over any Simd: for each chunk of up to 128 tokens
//   x[r][t] = log2e * (softcap(scale * q_r . k_t) + bias)      x = -inf where row r does not see token t
//   m' = max(m, max x), w = 2^(x - m'), acc = acc 2^(m - m') + sum_t w v_t
// Keys and values are brought to fp32 tiles of 32 tokens in L1 (quantized keys as [dim][32], so that tokens are the
// lanes), which every query row of the key head shares. Bound by the conversion: about 6 instructions per vector of
// elements. The AVX-512 BF16 build replaces the two products where it can do better (cpu_avx512_bf16.cpp).
#pragma once

#include "common/cpu/simd_math.h"
#include "kv_cache/decode.h"
#include "kv_cache/packing.h"

namespace sparsekit {
namespace {

constexpr float infinity = __builtin_inff();

/// Scratch of one split.
struct Workspace {
  float* tile;     // [32][max(head_dim, value_dim)]
  float* x;        // [rows][128] of the chunk at hand, of run(p) chunks
  uint8_t* codes;  // [32][max dim]
  float* more;     // what a kernel adds
  static int64_t tile_floats(const DecodeAttention& p) {
    return int64_t(kv_block) * (p.head_dim > p.value_dim ? p.head_dim : p.value_dim);
  }
  static int64_t rows(const DecodeAttention& p) { return p.heads_q / p.heads_kv * p.len_q; }
  /// Chunks whose keys are read before the first one's values: scores of 32 KB at most. Processors prefetch along one
  /// stream; with turns from keys to values every 128 tokens they lost it all the time.
  static int32_t run(const DecodeAttention& p) {
    int64_t fit = 64 / rows(p);
    return fit < 1 ? 1 : fit < split_chunks ? int32_t(fit) : split_chunks;
  }
  static int64_t floats(const DecodeAttention& p) {
    return tile_floats(p) + run(p) * rows(p) * chunk_tokens + tile_floats(p) / 4;
  }
  Workspace(const DecodeSplit& split) {
    const DecodeAttention& p = *split.problem;
    tile = split.scratch;
    x = tile + tile_floats(p);
    codes = reinterpret_cast<uint8_t*>(x + run(p) * rows(p) * chunk_tokens);
    more = split.scratch + floats(p);
  }
};

SPARSEKIT_INLINE Simd::Float load_any(const void* row, int32_t at, DType dtype) {
  if (dtype == DType::bf16) return Simd::load_bf16(static_cast<const uint16_t*>(row) + at);
  if (dtype == DType::f16) return Simd::load_f16(static_cast<const uint16_t*>(row) + at);
  return Simd::load(static_cast<const float*>(row) + at);
}

// ---- products over fp32 tiles

/// x[r][t] = q_r . k_t for rows in full precision.
void plain_scores(const DecodeSplit& split, const DecodeChunk& chunk, const Workspace& w) {
  const DecodeAttention& p = *split.problem;
  DType dtype = p.plain ? p.plain->dtype : p.cache->dtype;
  for (int32_t t = 0; t < chunk.count; ++t) {
    for (int32_t d = 0; d < p.head_dim; d += Simd::lanes) Simd::store(w.tile + d, load_any(chunk.key[t], d, dtype));
    for (int32_t r = 0; r < split.rows; ++r) {
      const float* query = split.query + int64_t(r) * p.head_dim;
      Simd::Float even = Simd::zero(), odd = Simd::zero();
      for (int32_t d = 0; d < p.head_dim; d += 2 * Simd::lanes) {
        even = Simd::fma(Simd::load(query + d), Simd::load(w.tile + d), even);
        if (d + Simd::lanes < p.head_dim) {
          odd = Simd::fma(Simd::load(query + d + Simd::lanes), Simd::load(w.tile + d + Simd::lanes), odd);
        }
      }
      w.x[int64_t(r) * chunk_tokens + t] = Simd::sum(Simd::add(even, odd));
    }
  }
}

/// acc_r += sum_t x[r][t] v_t over a tile [count][value_dim].
void add_values(const DecodeSplit& split, const float* tile, const float* x, int32_t count, int32_t value_dim) {
  for (int32_t r = 0; r < split.rows; ++r) {
    const float* weight = x + int64_t(r) * chunk_tokens;
    for (int32_t d = 0; d < value_dim; d += 4 * Simd::lanes) {
      int32_t vectors = (value_dim - d) / Simd::lanes < 4 ? (value_dim - d) / Simd::lanes : 4;
      float* acc = split.acc + int64_t(r) * value_dim + d;
      Simd::Float sum[4];
      for (int32_t v = 0; v < vectors; ++v) sum[v] = Simd::load(acc + v * Simd::lanes);
      for (int32_t t = 0; t < count; ++t) {
        if (weight[t] == 0) continue;  // a token that the row does not see reaches nothing, not even NaN
        Simd::Float factor = Simd::set(weight[t]);
        const float* row = tile + int64_t(t) * value_dim + d;
        for (int32_t v = 0; v < vectors; ++v) sum[v] = Simd::fma(factor, Simd::load(row + v * Simd::lanes), sum[v]);
      }
      for (int32_t v = 0; v < vectors; ++v) Simd::store(acc + v * Simd::lanes, sum[v]);
    }
  }
}

void plain_values(const DecodeSplit& split, const DecodeChunk& chunk, const Workspace& w) {
  const DecodeAttention& p = *split.problem;
  DType dtype = p.plain ? p.plain->dtype : p.cache->dtype;
  for (int32_t first = 0; first < chunk.count; first += kv_block) {
    int32_t count = chunk.count - first < kv_block ? chunk.count - first : kv_block;
    for (int32_t t = 0; t < count; ++t) {
      for (int32_t d = 0; d < p.value_dim; d += Simd::lanes) {
        Simd::store(w.tile + int64_t(t) * p.value_dim + d, load_any(chunk.value[first + t], d, dtype));
      }
    }
    add_values(split, w.tile, w.x + first, count, p.value_dim);
  }
}

/// A block as fp32 [32][dim].
void dequantize_block(const KvPacking& p, const uint8_t* block, const uint16_t* scales, const uint16_t* minima,
                      uint8_t* codes, float* tile) {
  unpack_block(p, block, codes);
  if (!p.per_channel || p.bits == kv_fp8) {
    for (int32_t t = 0; t < kv_block; ++t) dequantize_row(p, codes + t * p.dim, t, scales, minima, tile + t * p.dim);
    return;
  }
  for (int32_t d = 0; d < p.dim; d += Simd::lanes) {
    Simd::Float scale = Simd::load_f16(scales + d);
    Simd::Float minimum = minima ? Simd::load_f16(minima + d) : Simd::mul(scale, Simd::set(-float(1 << (p.bits - 1))));
    for (int32_t t = 0; t < kv_block; ++t) {
      float code[Simd::lanes];
      for (int32_t i = 0; i < Simd::lanes; ++i) code[i] = float(codes[t * p.dim + d + i]);
      Simd::store(tile + t * p.dim + d, Simd::add(Simd::mul(Simd::load(code), scale), minimum));
    }
  }
}

void quantized_scores(const DecodeSplit& split, const DecodeChunk& chunk, const Workspace& w) {
  const DecodeAttention& p = *split.problem;
  for (int32_t block = 0; block * kv_block < chunk.count; ++block) {
    dequantize_block(p.cache->key, chunk.key_codes[block], chunk.key_scales[block], chunk.key_minima[block], w.codes,
                     w.tile);
    for (int32_t r = 0; r < split.rows; ++r) {
      const float* query = split.query + int64_t(r) * p.head_dim;
      for (int32_t t = 0; t < kv_block; ++t) {
        Simd::Float sum = Simd::zero();
        for (int32_t d = 0; d < p.head_dim; d += Simd::lanes) {
          sum = Simd::fma(Simd::load(query + d), Simd::load(w.tile + t * p.head_dim + d), sum);
        }
        w.x[int64_t(r) * chunk_tokens + block * kv_block + t] = Simd::sum(sum);
      }
    }
  }
}

void quantized_values(const DecodeSplit& split, const DecodeChunk& chunk, const Workspace& w) {
  const DecodeAttention& p = *split.problem;
  for (int32_t block = 0; block * kv_block < chunk.count; ++block) {
    dequantize_block(p.cache->value, chunk.value_codes[block], chunk.value_scales[block], chunk.value_minima[block],
                     w.codes, w.tile);
    add_values(split, w.tile, w.x + block * kv_block, kv_block, p.value_dim);
  }
}

// ---- the softmax step

/// The row's new maximum: what it has summed shrinks.
SPARSEKIT_INLINE void raise_maximum(const DecodeSplit& split, int32_t r, float largest) {
  float shrink = split.largest[r] == -infinity ? 0.f : __builtin_exp2f(split.largest[r] - largest);
  int32_t dim = split.problem->value_dim;
  float* acc = split.acc + int64_t(r) * dim;
  for (int32_t d = 0; d < dim; d += Simd::lanes)
    Simd::store(acc + d, Simd::mul(Simd::load(acc + d), Simd::set(shrink)));
  split.total[r] *= shrink;
  split.largest[r] = largest;
}

SPARSEKIT_INLINE float largest_lane(Simd::Float x, float largest) {
  alignas(64) float lane[Simd::lanes];
  Simd::store(lane, x);
  for (int32_t i = 0; i < Simd::lanes; ++i) largest = lane[i] > largest ? lane[i] : largest;
  return largest;
}

/// Products of a chunk to scores in units of log2, in place: scale, softcap, bias, mask. Returns the largest: -inf
/// where the row sees none, NaN where one is.
float scale_row(const DecodeSplit& split, const DecodeChunk& chunk, int32_t r, float* x) {
  const DecodeAttention& p = *split.problem;
  constexpr int32_t lanes = Simd::lanes;
  const float log2e = 1.44269504f;
  int64_t visible = split.limit(r) - chunk.first;
  int32_t seen = visible < 0 ? 0 : visible < chunk.count ? int32_t(visible) : chunk.count;
  Simd::Float most = Simd::set(-infinity), check = Simd::zero();
  if (p.softcap == 0 && !p.key_bias && !p.scores) {
    Simd::Float scale = Simd::set(p.scale * log2e);
    for (int32_t t = 0; t < seen; t += lanes) Simd::store(x + t, Simd::mul(Simd::load(x + t), scale));
  } else {
    for (int32_t t = 0; t < seen; t += lanes) {
      Simd::Float s = Simd::mul(Simd::load(x + t), Simd::set(p.scale));
      if (p.softcap > 0) s = Simd::mul(tanh(Simd::mul(s, Simd::set(1.f / p.softcap))), Simd::set(p.softcap));
      Simd::store(x + t, s);
    }
    if (const float* bias = split.bias(r)) {
      int64_t end = p.bias_length - chunk.first < seen ? p.bias_length - chunk.first : seen;
      for (int32_t t = 0; t < end; ++t) {
        float b = bias[chunk.first + t];
        x[t] = b == -infinity ? -infinity : x[t] + b;
      }
    }
    if (float* scores = split.scores(r)) {
      for (int32_t t = 0; t < seen && chunk.first + t < p.scores_length; ++t) scores[chunk.first + t] = x[t];
    }
    for (int32_t t = 0; t < seen; t += lanes) Simd::store(x + t, Simd::mul(Simd::load(x + t), Simd::set(log2e)));
  }
  for (int32_t t = seen; t < chunk_tokens; ++t) x[t] = -infinity;
  for (int32_t t = 0; t < seen; t += lanes) {
    Simd::Float s = Simd::load(x + t);
    most = Simd::max(s, most);                  // the other operand where s is NaN,
    check = Simd::fma(s, Simd::zero(), check);  // so NaN is looked for: also -inf * 0
  }
  if (Simd::sum(check) != 0) {  // NaN: of a score, or of a masked one
    for (int32_t t = 0; t < seen; ++t) {
      if (x[t] != x[t]) return x[t];
    }
  }
  return largest_lane(most, -infinity);
}

/// Scores of row r in `count` chunks, `size` floats apart, to weights; grows the row's maximum, shrinks what it has
/// summed. One maximum for all chunks: a step per chunk waited for its own maximum each time.
void softmax_row(const DecodeSplit& split, const DecodeChunk* chunks, int64_t count, int64_t size, int32_t r,
                 float* scores) {
  float largest = split.largest[r];
  for (int64_t i = 0; i < count; ++i) {
    float found = scale_row(split, chunks[i], r, scores + i * size);
    if (found > largest || found != found) largest = found;
  }
  if (largest == -infinity) {  // no key yet
    for (int64_t i = 0; i < count; ++i) {
      for (int32_t t = 0; t < chunk_tokens; ++t) scores[i * size + t] = 0;
    }
    return;
  }
  if (largest != split.largest[r]) raise_maximum(split, r, largest);
  Simd::Float base = Simd::set(largest), total = Simd::zero();
  for (int64_t i = 0; i < count; ++i) {
    float* x = scores + i * size;
    for (int32_t t = 0; t < chunk_tokens; t += Simd::lanes) {
      Simd::Float weight = exp2<5>(Simd::sub(Simd::load(x + t), base));
      total = Simd::add(total, weight);
      Simd::store(x + t, weight);
    }
  }
  split.total[r] += Simd::sum(total);
}

/// The walk over a split's chunks. `Kernels` has the two products over a chunk; `next` is the chunk behind it
/// or null: what to prefetch.
template <class Kernels>
void run_split(const DecodeSplit& split) {
  const DecodeAttention& p = *split.problem;
  Workspace w(split);
  for (int64_t i = 0; i < int64_t(split.rows) * p.value_dim; ++i) split.acc[i] = 0;
  for (int32_t r = 0; r < split.rows; ++r) split.largest[r] = -infinity, split.total[r] = 0;
  Kernels kernels(split, w);
  float* scores = w.x;
  int64_t size = int64_t(split.rows) * chunk_tokens;
  DecodeChunk chunks[split_chunks + 1];
  for (int64_t first = split.first_chunk, count; first < split.last_chunk; first += count) {
    int64_t left = split.last_chunk - first, known = 0;
    count = Workspace::run(p) < left ? Workspace::run(p) : left;
    for (; known < left && known <= count; ++known) {
      decode_chunk(p, split.batch, split.head, first + known, &chunks[known]);
    }
    for (int64_t i = 0; i < count; ++i) {
      w.x = scores + i * size;
      kernels.scores(chunks[i], i + 1 < known ? &chunks[i + 1] : nullptr);
    }
    for (int32_t r = 0; r < split.rows; ++r) {
      softmax_row(split, chunks, count, size, r, scores + int64_t(r) * chunk_tokens);
    }
    for (int64_t i = 0; i < count; ++i) {
      w.x = scores + i * size;
      kernels.values(chunks[i], i + 1 < known ? &chunks[i + 1] : nullptr);
    }
  }
}

struct FloatKernels {
  const DecodeSplit& split;
  const Workspace& w;
  FloatKernels(const DecodeSplit& split, const Workspace& w) : split(split), w(w) {}
  void scores(const DecodeChunk& chunk, const DecodeChunk*) const {
    chunk.quantized ? quantized_scores(split, chunk, w) : plain_scores(split, chunk, w);
  }
  void values(const DecodeChunk& chunk, const DecodeChunk*) const {
    chunk.quantized ? quantized_values(split, chunk, w) : plain_values(split, chunk, w);
  }
};

[[maybe_unused]] const char* refuses_dims(const DecodeAttention& p) {
  return p.head_dim % Simd::lanes != 0 || p.value_dim % Simd::lanes != 0 ? "head dims must be multiples of the vector"
                                                                         : nullptr;
}

}  // namespace
}  // namespace sparsekit

// Decode attention in float64, written to be read: the scores of a chunk, one online softmax step, the values.
#include <cmath>
#include <vector>

#include "kv_cache/decode.h"
#include "kv_cache/packing.h"

namespace sparsekit {
namespace {

/// Rows [count][dim] of a chunk's keys or values, dequantized.
std::vector<float> rows_of(const DecodeAttention& p, const DecodeChunk& chunk, bool value) {
  int32_t dim = value ? p.value_dim : p.head_dim;
  std::vector<float> rows(int64_t(chunk.count) * dim);
  if (!chunk.quantized) {
    DType dtype = p.plain ? p.plain->dtype : p.cache->dtype;
    for (int32_t t = 0; t < chunk.count; ++t) {
      load_row(value ? chunk.value[t] : chunk.key[t], 0, dtype, dim, &rows[int64_t(t) * dim]);
    }
    return rows;
  }
  const KvPacking& packing = value ? p.cache->value : p.cache->key;
  std::vector<uint8_t> codes(kv_block * dim);
  for (int32_t t = 0; t < chunk.count; ++t) {
    int32_t block = t / kv_block;
    if (t % kv_block == 0)
      unpack_block(packing, value ? chunk.value_codes[block] : chunk.key_codes[block], codes.data());
    dequantize_row(packing, &codes[t % kv_block * dim], t % kv_block,
                   value ? chunk.value_scales[block] : chunk.key_scales[block],
                   value ? chunk.value_minima[block] : chunk.key_minima[block], &rows[int64_t(t) * dim]);
  }
  return rows;
}

void run(const DecodeSplit& split) {
  const DecodeAttention& p = *split.problem;
  constexpr double log2e = 1.4426950408889634;
  for (int32_t r = 0; r < split.rows; ++r) {
    const float* query = split.query + int64_t(r) * p.head_dim;
    double largest = -INFINITY, total = 0;
    std::vector<double> acc(p.value_dim);
    DecodeChunk chunk;
    for (int64_t index = split.first_chunk; index < split.last_chunk; ++index) {
      decode_chunk(p, split.batch, split.head, index, &chunk);
      std::vector<float> keys = rows_of(p, chunk, false), values = rows_of(p, chunk, true);
      for (int32_t t = 0; t < chunk.count; ++t) {
        int64_t token = chunk.first + t;
        if (token >= split.limit(r)) break;
        double score = 0;
        for (int32_t d = 0; d < p.head_dim; ++d) score += double(query[d]) * keys[int64_t(t) * p.head_dim + d];
        score *= p.scale;
        if (p.softcap > 0) score = p.softcap * std::tanh(score / p.softcap);
        if (split.bias(r) && token < p.bias_length) {
          float bias = split.bias(r)[token];
          score =
              bias == -INFINITY ? -INFINITY : score + bias;  // a key that is masked out reaches nothing, not even NaN
        }
        if (split.scores(r) && token < p.scores_length) split.scores(r)[token] = float(score);
        if (score == -INFINITY) continue;
        double x = score * log2e;
        if (x > largest || std::isnan(x)) {
          double shrink = std::exp2(largest - x);
          for (double& a : acc) a *= shrink;
          total *= shrink;
          largest = x;
        }
        double weight = std::exp2(x - largest);
        total += weight;
        for (int32_t d = 0; d < p.value_dim; ++d) acc[d] += weight * values[int64_t(t) * p.value_dim + d];
      }
    }
    for (int32_t d = 0; d < p.value_dim; ++d) split.acc[int64_t(r) * p.value_dim + d] = float(acc[d]);
    split.largest[r] = float(largest);
    split.total[r] = float(total);
  }
}

const char* refuses(const DecodeAttention&) { return nullptr; }
int64_t scratch(const DecodeAttention&) { return 0; }

}  // namespace

const DecodeKernel decode_reference = {"reference", refuses, scratch, run};

}  // namespace sparsekit

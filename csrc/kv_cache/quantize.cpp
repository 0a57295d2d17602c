// kv_quantize and kv_dequantize: a unit of tokens (32, or a per-channel group) at a time, parallel over heads and
// units. The bytes of x are read once and those of the codes written once; the arithmetic is that of packing.h.
#include <vector>

#include "kv_cache/blocks.h"

namespace sparsekit {

Status kv_quantize(const KvQuantize& arguments, const ParallelFor& parallel) {
  Status status = kv_check(arguments.packing);
  if (!status.ok()) return status;
  auto body = [](int64_t first, int64_t last, void* context) {
    const auto& q = *static_cast<const KvQuantize*>(context);
    const KvPacking& p = q.packing;
    int64_t unit = p.unit(), units = ceil_div(q.tokens, unit), blocks = ceil_div(q.tokens, kv_block);
    std::vector<float> x(unit * p.dim);
    std::vector<uint8_t> codes(unit * p.dim);
    for (int64_t at = first; at < last; ++at) {
      int64_t head = at / units, start = at % units * unit;
      int32_t count = int32_t(q.tokens - start < unit ? q.tokens - start : unit);
      for (int32_t t = 0; t < count; ++t) {
        load_row(q.x.data, q.x.offset(head / q.heads, head % q.heads, start + t), q.dtype, p.dim, &x[t * p.dim]);
      }
      int64_t scale = head * p.scales(ceil_div(q.tokens, unit) * unit) + p.scales(start);
      quantize_unit(p, x.data(), count, codes.data(), q.scales + scale, q.minima ? q.minima + scale : nullptr);
      for (int64_t block = start / kv_block; block < blocks && block * kv_block < start + unit; ++block) {
        pack_block(p, &codes[(block * kv_block - start) * p.dim], q.codes + (head * blocks + block) * p.block_bytes());
      }
    }
  };
  int64_t units = ceil_div(arguments.tokens, arguments.packing.unit());
  parallel(0, arguments.batch * arguments.heads * units, 4, body, const_cast<KvQuantize*>(&arguments));
  return {};
}

Status kv_dequantize(const KvDequantize& arguments, const ParallelFor& parallel) {
  Status status = kv_check(arguments.packing);
  if (!status.ok()) return status;
  auto body = [](int64_t first, int64_t last, void* context) {
    const auto& q = *static_cast<const KvDequantize*>(context);
    const KvPacking& p = q.packing;
    int64_t unit = p.unit(), blocks = ceil_div(q.tokens, kv_block);
    std::vector<uint8_t> codes(kv_block * p.dim);
    std::vector<float> row(p.dim);
    for (int64_t at = first; at < last; ++at) {
      int64_t head = at / blocks, start = at % blocks * kv_block;
      unpack_block(p, q.codes + at * p.block_bytes(), codes.data());
      int64_t scale = head * p.scales(ceil_div(q.tokens, unit) * unit) + p.scales(start / unit * unit);
      for (int64_t t = start; t < start + kv_block && t < q.tokens; ++t) {
        dequantize_row(p, &codes[(t - start) * p.dim], int32_t(t % unit), q.scales + scale,
                       q.minima ? q.minima + scale : nullptr, row.data());
        store_row(q.x.data, q.x.offset(head / q.heads, head % q.heads, t), q.dtype, p.dim, row.data());
      }
    }
  };
  int64_t blocks = ceil_div(arguments.tokens, kv_block);
  parallel(0, arguments.batch * arguments.heads * blocks, 8, body, const_cast<KvDequantize*>(&arguments));
  return {};
}

}  // namespace sparsekit

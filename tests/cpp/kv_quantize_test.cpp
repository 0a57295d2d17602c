// Packing of keys and values through the API without torch: what goes through it and back is off by no more than
// sparsekit/kv_cache.h promises. Every buffer has exactly its size, so that a sanitizer sees the first byte too many.
#include "sparsekit/kv_cache.h"

#include <algorithm>

#include "numpy/thread_pool.h"
#include "problem.h"

namespace sparsekit::testing {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int32_t all_bits[] = {8, 4, 3, 2, kv_fp8};

/// Quantizes and back; every element must come back within what the header promises.
void check_round_trip(const KvPacking& p, DType dtype, int64_t tokens, Random& random) {
  const int64_t batch = 2, heads = 2, padded = ceil_div(tokens, p.unit()) * p.unit();
  const int64_t blocks = batch * heads * ceil_div(tokens, kv_block), scale_count = batch * heads * p.scales(padded);
  Tensor x(dtype, batch, heads, tokens, p.dim), y(DType::f32, batch, heads, tokens, p.dim);
  x.randomize(random), y.fill(-77);
  std::vector<uint8_t> codes(size_t(blocks * p.block_bytes()), 0xee);
  std::vector<uint16_t> scales(size_t(scale_count), 0xeeee), minima(size_t(p.has_minima() ? scale_count : 0), 0xeeee);
  KvQuantize call;
  call.packing = p, call.dtype = dtype, call.batch = batch, call.heads = heads, call.tokens = tokens;
  call.x = x.input(), call.codes = codes.data(), call.scales = scales.data();
  call.minima = p.has_minima() ? minima.data() : nullptr;
  CHECK_OK(kv_quantize(call, thread_pool(2)));
  KvDequantize back;
  back.packing = p, back.batch = batch, back.heads = heads, back.tokens = tokens;
  back.codes = codes.data(), back.scales = scales.data(), back.minima = call.minima, back.x = y.output();
  CHECK_OK(kv_dequantize(back, thread_pool(2)));

  const int64_t groups = p.per_channel ? p.dim : p.groups_per_token(), rows = p.per_channel ? p.group_size : 1;
  const double steps = p.bits == kv_fp8 ? 448 : (1 << p.bits) - 1;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t first = 0; first < tokens; first += rows) {
        const int64_t last = std::min(first + rows, tokens);
        std::vector<double> low(size_t(groups), INFINITY), high(size_t(groups), -INFINITY);
        auto group_of = [&](int64_t d) { return size_t(p.per_channel ? d : d / p.group_size); };
        for (int64_t t = first; t < last; ++t)
          for (int64_t d = 0; d < p.dim; ++d) {
            double &least = low[group_of(d)], &most = high[group_of(d)], one = x.get(b, h, t, d);
            least = std::min(least, one), most = std::max(most, one);
          }
        for (int64_t t = first; t < last; ++t)
          for (int64_t d = 0; d < p.dim; ++d) {
            const double least = low[group_of(d)], most = high[group_of(d)], one = x.get(b, h, t, d);
            const double magnitude = std::max(std::fabs(least), std::fabs(most));
            double bound;
            if (p.bits == kv_fp8) {
              bound = std::max(std::fabs(one) / 16, magnitude / 448 * 0x1p-10) + magnitude * 0x1p-11;
            } else {
              const double scale = p.symmetric ? magnitude / ((1 << (p.bits - 1)) - 1) : (most - least) / steps;
              bound = scale / 2 + scale * steps * 0x1p-11 + (p.symmetric ? 0 : std::fabs(least) * 0x1p-11);
            }
            bound += (steps + 1) * 0x1p-24 + 1e-5 * magnitude;
            const double error = std::fabs(y.get(b, h, t, d) - one);
            CHECK(error <= bound, "%d bits, dim %d, groups of %d, per channel %d: token %d of %d is off by %g, not %g",
                  p.bits, p.dim, p.group_size, p.per_channel, int(t), int(tokens), error, bound);
          }
      }
}

TEST(kv_round_trips_are_bounded) {
  Random random(60);
  constexpr int32_t dims[] = {32, 96, 64, 160, 16, 80};  // the last two: not for 3 bits
  int turn = 0;
  for (int32_t bits : all_bits)
    for (int32_t group_size : {32, 64, 128})
      for (bool per_channel : {false, true})
        for (bool value_layout : {false, true})
          for (int64_t tokens : {1, 31, 33, 200}) {
            KvPacking p;
            p.bits = bits, p.group_size = group_size, p.per_channel = per_channel, p.value_layout = value_layout;
            p.symmetric = random() % 2, p.dim = dims[turn % (bits == 3 ? 4 : 6)];
            check_round_trip(p, DType(++turn % 3), tokens, random);
          }
}

}  // namespace
}  // namespace sparsekit::testing

// The attention kernel on AMX tiles, on any processor with AVX-512 BF16: compiled a second time, with the tiles'
// operations emulated. Where the processor has tiles, its results are the emulation's, bit for bit.
#include <cstring>

#include "attention/cpu_implementations.h"
#include "numpy/thread_pool.h"
#include "problem.h"

namespace sparsekit {
extern const CpuAttention attention_cpu_amx_emulated;
}

namespace sparsekit::testing {
namespace {

Shape tile_shape() {
  Shape shape;
  shape.dtype = DType::bf16;
  return shape;
}

std::vector<char> bytes_of(const Problem& problem) {
  std::vector<char> bytes(problem.out.bytes.get(), problem.out.bytes.get() + problem.out.size() * 2);
  const char* lse = reinterpret_cast<const char*>(problem.lse.data());
  bytes.insert(bytes.end(), lse, lse + problem.lse.size() * sizeof(float));
  return bytes;
}

void check(Problem& problem, const char* about) {
  if (!isa_offered(Isa::avx512_bf16)) return;
  const AttentionForward call = problem.forward();
  const char* reason = attention_cpu_amx_emulated.refuses(call, Direction::forward, thread_pool(1));
  CHECK(!reason, "%s: refuses: %s", about, reason);
  if (reason) return;
  std::vector<double> out, lse;
  problem.expected(&out, &lse);
  CHECK_OK(attention_cpu_amx_emulated.forward(call, thread_pool(2)));
  const double worst = difference(problem, out, lse);
  CHECK(worst < 0.06, "%s: %g", about, worst);
#ifndef SPARSEKIT_AMX_EMULATION
  if (!isa_offered(Isa::amx)) return;
  const std::vector<char> emulated = bytes_of(problem);
  CHECK_OK(attention_cpu_amx.forward(problem.forward(), thread_pool(2)));
  CHECK(bytes_of(problem) == emulated, "%s: tiles and their emulation differ; tiles from the answer by %g", about,
        difference(problem, out, lse));
#endif
}

TEST(amx_head_dims) {
  unsigned seed = 2000;
  for (auto [dim, value_dim] : {std::pair{32, 32}, {64, 64}, {96, 80}, {128, 128}, {192, 128}, {256, 256}, {64, 7}}) {
    Random random(++seed);
    Shape shape = tile_shape();
    shape.head_dim = dim, shape.value_dim = value_dim;
    Problem problem(shape, random);
    check(problem, (std::to_string(dim) + ", " + std::to_string(value_dim)).c_str());
  }
}

TEST(amx_blocks_and_ragged_lengths) {
  unsigned seed = 2100;
  for (auto [block_q, block_k] : {std::pair{16, 32}, {32, 64}, {48, 96}, {128, 128}, {64, 256}, {256, 160}}) {
    for (auto [len_q, len_k] : {std::pair{17, 1}, {20, 300}, {130, 33}, {200, 257}, {300, 48}}) {
      Random random(++seed);
      Shape shape = tile_shape();
      shape.block_q = block_q, shape.block_k = block_k, shape.len_q = len_q, shape.len_k = len_k;
      shape.causal = seed % 2;
      Problem problem(shape, random);
      check(problem, ("seed " + std::to_string(seed)).c_str());
    }
  }
}

TEST(amx_masks_bias_sinks_softcap) {
  unsigned seed = 2200;
  for (bool positions : {false, true}) {
    for (bool packed : {false, true}) {
      for (float softcap : {0.f, 3.f}) {
        Random random(++seed);
        Shape shape = tile_shape();
        shape.heads_q = 4, shape.heads_kv = 2, shape.bits = shape.causal = shape.key_bias = shape.sinks = true;
        shape.window_left = 40, shape.positions = positions, shape.softcap = softcap;
        if (packed) shape.lens_q = {40, 1, 0, 65}, shape.lens_k = {100, 33, 20, 64};
        Problem problem(shape, random);
        check(problem, ("seed " + std::to_string(seed)).c_str());
      }
    }
  }
}

/// Scores that grow along the keys: every block moves the maximum on, so that outputs are rescaled each time.
TEST(amx_rescales_where_scores_grow) {
  Random random(2300);
  Shape shape = tile_shape();
  shape.len_q = 200, shape.len_k = 640;
  Problem problem(shape, random);
  for (int64_t h = 0; h < shape.heads_q; ++h)
    for (int64_t i = 0; i < shape.len_q; ++i) problem.query.set(0, h, i, 0, double(i % 7));
  for (int64_t j = 0; j < shape.len_k; ++j) problem.key.set(0, 0, j, 0, double(j / 8));
  check(problem, "growing scores");
}

TEST(amx_is_bitwise_the_same_on_any_number_of_threads) {
  if (!isa_offered(Isa::avx512_bf16)) return;
  Random random(2400);
  Shape shape = tile_shape();
  shape.batch = 2, shape.len_q = shape.len_k = 300;
  Problem problem(shape, random);
  std::vector<char> first;
  for (int threads : {1, 2, 3, 7}) {
    CHECK_OK(attention_cpu_amx_emulated.forward(problem.forward(), thread_pool(threads)));
    if (first.empty()) first = bytes_of(problem);
    CHECK(bytes_of(problem) == first, "%d threads", threads);
  }
}

TEST(amx_refuses_with_a_reason) {
  Random random(2500);
  auto reason = [&](auto change) {
    Shape shape = tile_shape();
    change(shape);
    Problem problem(shape, random);
    return attention_cpu_amx_emulated.refuses(problem.forward(), Direction::forward, thread_pool(1));
  };
  CHECK(!reason([](Shape&) {}), "refuses what it should take");
  CHECK(reason([](Shape& s) { s.dtype = DType::f16; }), "fp16");
  CHECK(reason([](Shape& s) { s.head_dim = 80; }), "head dim 80");
  CHECK(reason([](Shape& s) { s.block_k = 16; }), "16 keys");
  CHECK(reason([](Shape& s) { s.block_q = 8; }), "8 queries");
  Shape shape = tile_shape();
  Problem problem(shape, random);
  CHECK(attention_cpu_amx_emulated.refuses(problem.forward(), Direction::backward, thread_pool(1)), "backward");
}

}  // namespace
}  // namespace sparsekit::testing

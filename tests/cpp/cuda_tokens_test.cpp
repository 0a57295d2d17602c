// The token kernels on CUDA through the C++ API: every kernel once, on small problems in exact buffers, for
// compute-sanitizer (see cuda_test.cpp). Values are small integers in fp32, so sums are exact in any order.
#include <cuda_runtime_api.h>

#include <list>

#include "sparsekit/attention.h"
#include "sparsekit/tokens.h"
#include "testing.h"

namespace sparsekit::testing {
namespace {

class Card {
 public:
  Card() { context.compute_capability = 80, context.multiprocessors = 1; }
  ~Card() {
    for (void* memory : memory_) cudaFree(memory);
  }
  template <class T>
  T* make(size_t count) {
    void* memory = nullptr;
    CHECK(cudaMalloc(&memory, count ? count * sizeof(T) : 1) == cudaSuccess, "no device memory");
    memory_.push_back(memory);
    return static_cast<T*>(memory);
  }
  template <class T>
  T* copy(const std::vector<T>& from) {
    T* to = make<T>(from.size());
    cudaMemcpy(to, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice);
    return to;
  }
  template <class T>
  std::vector<T> back(const void* from, size_t count) {
    std::vector<T> to(count);
    cudaError_t code = cudaMemcpy(to.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost);
    CHECK(code == cudaSuccess, "%s", cudaGetErrorString(code));
    return to;
  }
  const CudaContext& with(size_t bytes) {
    context.workspace = make<char>(bytes);
    context.workspace_bytes = bytes;
    return context;
  }

  CudaContext context;

 private:
  std::list<void*> memory_;
};

TokenTensor view_of(float* data, int64_t rows, int64_t inner) {
  TokenTensor tensor;
  tensor.data = data;
  tensor.row = inner * 4, tensor.outer = tensor.sample = rows * tensor.row;
  tensor.inner = inner, tensor.element_size = 4, tensor.type = TokenType::f32;
  return tensor;
}

std::vector<float> integers(Random& random, int64_t count) {
  std::vector<float> values;
  for (int64_t i = 0; i < count; ++i) values.push_back(float(int(random() % 17) - 8));
  return values;
}

/// Scatters and their gradients: `entries` of each of two samples to `rows` rows, some indices bad.
void check_scatter(TokenReduce reduce, int64_t entries, int64_t rows, int64_t inner, unsigned seed) {
  Random random(seed);
  Card card;
  const int64_t samples = 2;
  const std::vector<float> src = integers(random, samples * entries * inner);
  std::vector<int32_t> index;
  for (int64_t e = 0; e < samples * entries; ++e) {
    index.push_back(random() % 9 == 0 ? int32_t(random()) : int32_t(random() % uint32_t(random() % 3 ? rows : 1)));
  }
  TokenTensor in = view_of(card.copy(src), entries, inner),
              out = view_of(card.make<float>(size_t(samples * rows * inner)), rows, inner);
  ScatterTokens t;
  t.reduce = reduce;
  t.index.data = card.copy(index);
  t.index.rows = t.from.rows = entries;
  t.from.samples = t.to.samples = samples;
  t.to.rows = rows;
  const std::vector<float> weights(size_t(samples * entries), 2.f);
  t.weights = reduce == TokenReduce::copy ? nullptr : card.copy(weights);
  t.in = &in, t.out = &out, t.tensors = 1;
  t.totals = card.make<float>(size_t(samples * rows));
  CHECK_OK(scatter_tokens(t, card.with(scatter_tokens_workspace(t))));
  const std::vector<float> got = card.back<float>(out.data, size_t(samples * rows * inner));
  const std::vector<float> totals = card.back<float>(t.totals, size_t(samples * rows));

  std::vector<float> want(got.size(), 0.f), counts(totals.size(), 0.f);
  auto row_of = [&](int64_t e) {
    return index[size_t(e)] < 0 || index[size_t(e)] >= rows ? -1 : e / entries * rows + index[size_t(e)];
  };
  for (int64_t e = 0; e < samples * entries; ++e) {
    if (row_of(e) < 0) continue;
    counts[size_t(row_of(e))] += reduce == TokenReduce::copy ? 1.f : 2.f;
    for (int64_t d = 0; d < inner; ++d) {
      float& sum = want[size_t(row_of(e) * inner + d)];
      sum = reduce == TokenReduce::copy ? src[size_t(e * inner + d)] : sum + 2.f * src[size_t(e * inner + d)];
    }
  }
  double worst = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    float total = counts[i / size_t(inner)];
    float expected = reduce == TokenReduce::mean && total != 0.f ? want[i] / total : want[i];
    worst = std::fmax(worst, std::fabs(double(got[i]) - expected));
  }
  CHECK(worst < 1e-3, "largest error %g", worst);
  CHECK(totals == counts, "totals differ");

  TokenTensor grad_in = view_of(card.make<float>(src.size()), entries, inner);
  ScatterTokensBackward b;
  b.forward = t;
  b.grad_out = &out;
  b.grad_in = &grad_in;
  b.grad_weights = reduce == TokenReduce::copy ? nullptr : card.make<float>(size_t(samples * entries));
  CHECK_OK(scatter_tokens_backward(b, card.with(scatter_tokens_backward_workspace(b))));
  const std::vector<float> grads = card.back<float>(grad_in.data, src.size());
  for (int64_t e = 0; e < samples * entries && reduce == TokenReduce::add; ++e) {
    float expected = row_of(e) < 0 ? 0.f : 2.f * got[size_t(row_of(e) * inner)];
    CHECK(grads[size_t(e * inner)] == expected, "entry %lld: %g for %g", (long long)e, grads[size_t(e * inner)],
          expected);
  }
}

TEST(cuda_scatter_tokens) {
  for (TokenReduce reduce : {TokenReduce::copy, TokenReduce::add, TokenReduce::mean}) {
    check_scatter(reduce, 37, 12, 8, 1);
    check_scatter(reduce, 37, 12, 5, 2);
    check_scatter(reduce, 5000, 2100, 4, 3);
  }
}

TEST(cuda_gather_tokens) {
  Random random(4);
  for (int64_t inner : {1, 3, 8}) {
    Card card;
    const std::vector<float> x = integers(random, 2 * 9 * inner);
    std::vector<int32_t> index;
    for (int i = 0; i < 2 * 13; ++i) index.push_back(int32_t(random() % 14) - 3);
    TokenTensor in = view_of(card.copy(x), 9, inner),
                out = view_of(card.make<float>(size_t(2 * 13 * inner)), 13, inner);
    GatherTokens g;
    g.index.data = card.copy(index);
    g.index.rows = g.to.rows = 13;
    g.from.rows = 9;
    g.from.samples = g.to.samples = 2;
    g.in = &in, g.out = &out, g.tensors = 1;
    CHECK_OK(gather_tokens(g, card.context));
    const std::vector<float> got = card.back<float>(out.data, size_t(2 * 13 * inner));
    for (int64_t k = 0; k < 26; ++k) {
      int32_t n = index[size_t(k)];
      float want = n < 0 || n >= 9 ? 0.f : x[size_t((k / 13 * 9 + n) * inner)];
      CHECK(got[size_t(k * inner)] == want, "row %lld: %g for %g", (long long)k, got[size_t(k * inner)], want);
    }
  }
}

TEST(cuda_match_tokens) {
  for (int64_t tokens : {5, 150, 577}) {
    for (float odd : {1.f, 1e30f}) {  // a length whose square leaves fp32: the exact search
      Random random(5);
      Card card;
      std::vector<float> metric = integers(random, 3 * tokens * 12);
      metric[3] = odd;
      MatchTokens m;
      m.metric.data = card.copy(metric);
      m.metric.row = 12, m.metric.batch = 12 * tokens;
      m.samples = 3, m.tokens = tokens, m.dim = 12, m.protect = 1;
      m.r = m.pair_capacity = tokens / 4;
      m.kept_capacity = tokens - m.r;
      m.source = card.make<int32_t>(size_t(3 * m.r));
      m.destination = card.make<int32_t>(size_t(3 * m.r));
      m.kept = card.make<int32_t>(size_t(3 * m.kept_capacity));
      m.row = card.make<int32_t>(size_t(3 * tokens));
      m.new_counts = card.make<int32_t>(3);
      CHECK_OK(match_tokens(m, card.with(match_tokens_workspace(m, card.context))));
      const auto row = card.back<int32_t>(m.row, size_t(3 * tokens));
      const auto source = card.back<int32_t>(m.source, size_t(3 * m.r));
      const auto destination = card.back<int32_t>(m.destination, size_t(3 * m.r));
      for (int64_t i = 0; i < 3 * m.r; ++i) {
        const int64_t s = i / m.r, from = source[size_t(i)], to = destination[size_t(i)];
        CHECK(from % 2 == 0 && to % 2 == 1 && from > 0, "pair %lld", (long long)i);
        CHECK(row[size_t(s * tokens + from)] == row[size_t(s * tokens + to)], "pair %lld is not merged", (long long)i);
      }
    }
  }
}

TEST(cuda_compact_rows) {
  for (int64_t width : {3, 8, 100}) {
    Random random(6);
    Card card;
    const int64_t rows = 700;
    const std::vector<float> cache = integers(random, 2 * rows * width);
    std::vector<int32_t> keep(2 * 400);
    for (int64_t j = 0; j < 800; ++j) keep[size_t(j)] = int32_t(j % 400 + j % 400 / 2);
    CompactRows c;
    c.keep.data = card.copy(keep);
    c.keep.rows = 400;
    c.samples = 2, c.heads = 1, c.capacity = rows;
    c.lengths = card.copy(std::vector<int32_t>{700, 300});
    CompactRows::Cache tensor{card.copy(cache), rows * width * 4, rows * width * 4, width * 4, width * 4};
    c.caches = &tensor, c.tensors = 1;
    CHECK_OK(compact_rows(c, card.with(compact_rows_workspace(c))));
    const auto got = card.back<float>(tensor.data, cache.size());
    const auto lengths = card.back<int32_t>(c.lengths, 2);
    CHECK(lengths[0] == 400 && lengths[1] == 200, "%d, %d rows", lengths[0], lengths[1]);
    for (int64_t r = 0; r < 2 * rows; ++r) {
      const int64_t s = r / rows, j = r % rows, from = j < lengths[size_t(s)] ? keep[size_t(s * 400 + j)] : j;
      CHECK(got[size_t(r * width)] == cache[size_t((s * rows + from) * width)], "row %lld", (long long)r);
    }
  }
}

}  // namespace
}  // namespace sparsekit::testing

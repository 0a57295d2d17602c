// Tokens through the API without torch: gathers, scatters and their gradients against loops, matching, compaction. Odd
// sizes and exact buffers, so that a sanitizer sees the first byte too many.
#include <memory>

#include "numpy/thread_pool.h"
#include "sparsekit/tokens.h"
#include "testing.h"

namespace sparsekit::testing {
namespace {

/// [samples, outer, rows, inner] floats, contiguous, with no byte to spare.
struct Tokens {
  int64_t samples, outers, rows, inner;
  std::unique_ptr<float[]> data;

  Tokens(int64_t s, int64_t o, int64_t r, int64_t i, Random* random = nullptr)
      : samples(s), outers(o), rows(r), inner(i), data(new float[size_t(s * o * r * i)]) {
    std::normal_distribution<float> normal;
    for (int64_t at = 0; at < s * o * r * i; ++at) data[size_t(at)] = random ? normal(*random) : -77.f;
  }
  float& at(int64_t s, int64_t o, int64_t r, int64_t i) {
    return data[size_t(((s * outers + o) * rows + r) * inner + i)];
  }
  TokenTensor view() {
    TokenTensor tensor;
    tensor.data = data.get();
    tensor.row = inner * 4, tensor.outer = rows * tensor.row, tensor.sample = outers * tensor.outer;
    tensor.outers = outers, tensor.inner = inner, tensor.element_size = 4, tensor.type = TokenType::f32;
    return tensor;
  }
};

std::vector<int32_t> random_index(Random& random, int64_t count, int64_t tokens) {
  std::vector<int32_t> index;
  for (int64_t k = 0; k < count; ++k) index.push_back(int32_t(random() % unsigned(tokens + 1)) - 1);
  return index;
}

TokenIndex index_of(const std::vector<int32_t>& index, int64_t samples) {
  TokenIndex view;
  view.data = index.data();
  view.rows = int64_t(index.size()) / samples;
  return view;
}

TEST(gather_takes_the_named_rows) {
  for_each_isa([](const char* isa) {
    Random random(3);
    for (int64_t inner : {1, 15, 16, 33, 200}) {
      const int64_t samples = 3, rows = 7, count = 11;
      Tokens in(samples, 2, rows, inner, &random), out(samples, 2, count, inner);
      std::vector<int32_t> index = random_index(random, samples * count, rows);
      TokenTensor from = in.view(), to = out.view();
      GatherTokens call;
      call.index = index_of(index, samples);
      call.from.samples = call.to.samples = samples, call.from.rows = rows, call.to.rows = count;
      call.in = &from, call.out = &to, call.tensors = 1;
      CHECK_OK(gather_tokens(call, thread_pool(2)));
      for (int64_t s = 0; s < samples; ++s)
        for (int64_t o = 0; o < 2; ++o)
          for (int64_t k = 0; k < count; ++k)
            for (int64_t i = 0; i < inner; ++i) {
              const int32_t n = index[size_t(s * count + k)];
              CHECK(out.at(s, o, k, i) == (n < 0 ? 0.f : in.at(s, o, n, i)), "%s inner %d", isa, int(inner));
            }
    }
  });
}

TEST(scatter_and_its_gradients_match_loops) {
  for_each_isa([](const char* isa) {
    Random random(4);
    for (TokenReduce reduce : {TokenReduce::copy, TokenReduce::add, TokenReduce::mean}) {
      for (int64_t inner : {1, 17, 64, 131}) {
        const int64_t samples = 2, rows = 13, length = 5;
        const bool weighted = reduce != TokenReduce::copy, mean = reduce == TokenReduce::mean;
        Tokens in(samples, 1, rows, inner, &random), out(samples, 1, length, inner), grad_in(samples, 1, rows, inner);
        Tokens grad(samples, 1, length, inner, &random);
        std::vector<int32_t> index = random_index(random, samples * rows, length);
        std::vector<float> weights, totals(size_t(samples * length)), grad_weights(size_t(samples * rows), -7.f);
        for (int64_t e = 0; e < samples * rows; ++e) weights.push_back(float(random() % 4));
        TokenTensor from = in.view(), to = out.view(), back = grad_in.view(), down = grad.view();
        ScatterTokensBackward call;
        ScatterTokens& scatter = call.forward;
        scatter.reduce = reduce, scatter.index = index_of(index, samples);
        scatter.weights = weighted ? weights.data() : nullptr;
        scatter.from.samples = scatter.to.samples = samples, scatter.from.rows = rows, scatter.to.rows = length;
        scatter.in = &from, scatter.out = &to, scatter.tensors = 1, scatter.totals = totals.data();
        CHECK_OK(scatter_tokens(scatter, thread_pool(2)));
        call.grad_out = &down, call.grad_in = &back;
        call.grad_weights = weighted ? grad_weights.data() : nullptr;
        CHECK_OK(scatter_tokens_backward(call, thread_pool(2)));
        for (int64_t s = 0; s < samples; ++s) {
          for (int64_t n = 0; n < length; ++n) {
            double total = 0;
            int64_t last = -1;
            for (int64_t k = 0; k < rows; ++k) {
              if (index[size_t(s * rows + k)] != n) continue;
              total += weighted ? weights[size_t(s * rows + k)] : 1;
              last = k;
            }
            CHECK(totals[size_t(s * length + n)] == float(total), "%s totals", isa);
            for (int64_t i = 0; i < inner; ++i) {
              double want = reduce == TokenReduce::copy && last >= 0 ? in.at(s, 0, last, i) : 0;
              for (int64_t k = 0; k < rows && weighted; ++k) {
                if (index[size_t(s * rows + k)] != n || (mean && total == 0)) continue;
                want += double(weights[size_t(s * rows + k)]) * in.at(s, 0, k, i) / (mean ? total : 1);
              }
              CHECK(std::fabs(out.at(s, 0, n, i) - want) < 1e-4, "%s: %g, %g wanted", isa, out.at(s, 0, n, i), want);
            }
            for (int64_t k = 0; k < rows; ++k) {
              if (index[size_t(s * rows + k)] != n) continue;
              double share = !weighted ? double(k == last) : weights[size_t(s * rows + k)];
              if (mean) share = total == 0 ? 0 : share / total;
              double dot = 0;
              for (int64_t i = 0; i < inner; ++i) {
                const float got = grad_in.at(s, 0, k, i);
                CHECK(std::fabs(got - share * grad.at(s, 0, n, i)) < 1e-5, "%s grad %g", isa, got);
                dot += double(grad.at(s, 0, n, i)) * (in.at(s, 0, k, i) - (mean ? out.at(s, 0, n, i) : 0));
              }
              if (mean) dot = total == 0 ? 0 : dot / total;
              if (!weighted) continue;
              const float got = grad_weights[size_t(s * rows + k)];
              CHECK(std::fabs(got - dot) < 1e-3, "%s grad of a weight %g, %g wanted", isa, got, dot);
            }
          }
        }
      }
    }
  });
}

TEST(match_finds_the_copies) {
  for_each_isa([](const char* isa) {
    Random random(5);
    std::normal_distribution<float> normal;
    for (int64_t dim : {1, 3, 16, 31, 257}) {
      const int64_t samples = 2, tokens = 53, r = 9;
      std::unique_ptr<float[]> metric(new float[size_t(samples * tokens * dim)]);
      for (int64_t i = 0; i < samples * tokens * dim; ++i) metric[size_t(i)] = normal(random);
      // Nine even tokens are multiples of odd ones: similarity 1, more than any other pair has (but for dim 1).
      for (int64_t s = 0; s < samples; ++s)
        for (int64_t p = 0; p < r; ++p)
          for (int64_t i = 0; i < dim; ++i) {
            metric[size_t((s * tokens + 4 * p + 2) * dim + i)] = 3 * metric[size_t((s * tokens + 2 * p + 1) * dim + i)];
          }
      std::vector<int32_t> source(size_t(samples * r), -9), destination(source), row(size_t(samples * tokens), -9);
      std::vector<int32_t> kept(size_t(samples * (tokens - r)), -9), counts(size_t(samples), -9);
      MatchTokens call;
      call.metric.data = metric.get(), call.metric.batch = tokens * dim, call.metric.row = dim;
      call.samples = samples, call.tokens = tokens, call.dim = dim, call.r = r;
      call.pair_capacity = r, call.kept_capacity = tokens - r;
      call.source = source.data(), call.destination = destination.data(), call.kept = kept.data();
      call.row = row.data(), call.new_counts = counts.data();
      CHECK_OK(match_tokens(call, thread_pool(2)));
      for (int64_t s = 0; s < samples; ++s) {
        CHECK(counts[size_t(s)] == tokens - r, "%s", isa);
        for (int64_t p = 0; p < r && dim > 1; ++p) {
          CHECK(source[size_t(s * r + p)] == 4 * p + 2, "%s dim %d: source %d", isa, int(dim),
                source[size_t(s * r + p)]);
          CHECK(destination[size_t(s * r + p)] == 2 * p + 1, "%s dim %d", isa, int(dim));
        }
        for (int64_t n = 0; n < tokens; ++n) CHECK(row[size_t(s * tokens + n)] >= 0, "%s token %d", isa, int(n));
      }
    }
  });
}

TEST(token_calls_refuse_bad_indices) {
  Tokens in(1, 1, 4, 3), out(1, 1, 2, 3);
  TokenTensor from = in.view(), to = out.view();
  for (int32_t bad : {4, -2, INT32_MAX, INT32_MIN}) {
    std::vector<int32_t> index = {0, bad};
    GatherTokens call;
    call.index = index_of(index, 1);
    call.from.samples = call.to.samples = 1, call.from.rows = 4, call.to.rows = 2;
    call.in = &from, call.out = &to, call.tensors = 1;
    Status status = gather_tokens(call, thread_pool(1));
    CHECK(!status.ok() && std::string(status.message).find("index[0, 1] is") == 0, "%s", status.message);
  }
}

}  // namespace
}  // namespace sparsekit::testing

// The selection kernels on CUDA through the C++ API: every kernel once, on small problems in exact buffers, for
// compute-sanitizer (see cuda_test.cpp). Results are held to the twins by the Python tests; here to what holds of any.
#include <cuda_runtime_api.h>

#include <list>

#include "sparsekit/selection.h"
#include "testing.h"

namespace sparsekit::testing {
namespace {

class Card {
 public:
  Card() { context.compute_capability = 80, context.multiprocessors = 3; }
  ~Card() {
    for (void* memory : memory_) cudaFree(memory);
  }
  template <class T>
  T* make(int64_t count) {
    void* memory = nullptr;
    CHECK(cudaMalloc(&memory, count ? size_t(count) * sizeof(T) : 1) == cudaSuccess, "no device memory");
    memory_.push_back(memory);
    return static_cast<T*>(memory);
  }
  template <class T>
  T* copy(const std::vector<T>& from) {
    T* to = make<T>(int64_t(from.size()));
    cudaMemcpy(to, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice);
    return to;
  }
  template <class T>
  std::vector<T> back(const void* from, int64_t count) {
    std::vector<T> to(static_cast<size_t>(count));
    cudaError_t code = cudaMemcpy(to.data(), from, to.size() * sizeof(T), cudaMemcpyDeviceToHost);
    CHECK(code == cudaSuccess, "%s", cudaGetErrorString(code));
    return to;
  }
  /// Runs `function` with the scratch it asks for.
  template <class Arguments>
  void run(const Arguments& arguments, Status (*function)(const Arguments&, const CudaContext&)) {
    context.workspace_bytes = selection_workspace(arguments, context);
    context.workspace = make<char>(int64_t(context.workspace_bytes));
    CHECK_OK(function(arguments, context));
  }

  CudaContext context;

 private:
  std::list<void*> memory_;
};

TEST(cuda_choices) {
  Random random(1);
  for (int64_t columns : {7, 300, 2000, 40000}) {
    for (int rule = 0; rule < 4; ++rule) {
      Card card;
      Choice c;
      c.heads = 2, c.rows = 2, c.columns = columns;
      std::vector<float> scores(size_t(4 * columns));
      for (float& score : scores) score = random() % 9 ? float(random() % 1000) / 999.f : -INFINITY;
      c.scores = card.copy(scores);
      c.rule = rule == 0 ? ChoiceRule::top_k : rule == 1 ? ChoiceRule::threshold : ChoiceRule::top_p;
      c.by_head = rule == 3;
      c.width = columns < 900 ? columns : 900;
      c.k = columns / 50 + 2, c.p = 0.4, c.sink = 1, c.local = 2;
      c.thresholds = card.copy(std::vector<float>(4, 0.9f));
      c.indices = card.make<int32_t>(4 * c.width), c.counts = card.make<int32_t>(4), c.mass = card.make<float>(4);
      card.run(c, choose);
      const auto indices = card.back<int32_t>(c.indices, 4 * c.width), counts = card.back<int32_t>(c.counts, 4);
      for (int64_t row = 0; row < 4; ++row) {
        CHECK(counts[size_t(row)] >= 1 && counts[size_t(row)] <= c.width, "count %d", counts[size_t(row)]);
        for (int64_t s = 0; s < c.width; ++s) {
          const int32_t index = indices[size_t(row * c.width + s)];
          const bool used = s < counts[size_t(row)];
          CHECK(used ? index >= 0 && index < columns && scores[size_t(row * columns + index)] > -INFINITY : index == -1,
                "slot %lld is %d", (long long)s, index);
          CHECK(!used || s == 0 || index > indices[size_t(row * c.width + s - 1)], "slot %lld descends", (long long)s);
        }
      }
    }
  }
}

template <class Problem>
void set_problem(Card& card, Problem& p, DType dtype, int64_t len_q, int64_t len_k, int32_t dim, unsigned seed) {
  Random random(seed);
  p.dtype = dtype, p.batch = 1, p.heads_q = 4, p.heads_kv = 2, p.len_q = len_q, p.len_k = len_k;
  p.head_dim = p.value_dim = dim, p.scale = 0.2f, p.causal = true;
  p.lists.block_q = p.lists.block_k = 32;
  auto fill = [&](InputView& view, int64_t heads, int64_t rows) {
    std::vector<uint16_t> bits(size_t(heads * rows * dim * (dtype == DType::f32 ? 2 : 1)));
    for (size_t i = 0; i < bits.size(); ++i) bits[i] = uint16_t(0x3e80 + random() % 256 + (random() % 2 << 15));
    view = {card.copy(bits), heads * rows * dim, rows * dim, dim};
  };
  fill(p.query, p.heads_q, len_q);
  fill(p.key, p.heads_kv, len_k);
}

TEST(cuda_block_scores) {
  for (DType dtype : {DType::f32, DType::bf16}) {
    for (int reduce = 0; reduce < 6; ++reduce) {
      Card card;
      BlockScoresBackward s;
      set_problem(card, s, dtype, 100, reduce < 3 ? 132 : 111, reduce < 3 ? 24 : 5, 2);
      s.reduce = BlockReduce(reduce % 3), s.stride = 8;
      s.q_blocks = 4, s.key_blocks = (s.len_k + 31) / 32;
      s.scores = card.make<float>(4 * s.q_blocks * s.key_blocks);
      card.run<BlockScores>(s, block_scores);
      const auto scores = card.back<float>(s.scores, 4 * s.q_blocks * s.key_blocks);
      CHECK(std::isfinite(scores[0]), "the first block is seen");
      s.grad_scores = card.copy(std::vector<float>(scores.size(), 1.f));
      s.grad_query = {card.make<float>(4 * s.len_q * s.head_dim), 0, s.len_q * s.head_dim, s.head_dim};
      s.grad_key = {card.make<float>(2 * s.len_k * s.head_dim), 0, s.len_k * s.head_dim, s.head_dim};
      card.run<BlockScoresBackward>(s, block_scores_backward);
      if (dtype == DType::f32) {
        for (float x : card.back<float>(s.grad_key.data, 2 * s.len_k * s.head_dim)) CHECK(std::isfinite(x), "%g", x);
      }
    }
  }
}

TEST(cuda_rows_columns_and_the_map) {
  for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (int scattered = 0; scattered < 2; ++scattered) {
      Card card;
      ColumnScores s;
      set_problem(card, s, dtype, 40, 700, 64, 3);
      std::vector<int32_t> positions;
      for (int32_t i = 0; i < 40; ++i) positions.push_back(scattered ? i * 17 : 660 + i);
      s.query_positions = card.copy(positions);
      s.columns = card.make<float>(4 * 700), s.diagonals = card.make<float>(4 * 700);
      card.run(s, column_scores);
      for (const void* of : {s.columns, s.diagonals}) {
        double sum = 0;
        for (float x : card.back<float>(of, 4 * 700)) sum += x;
        CHECK(std::fabs(sum - 160) < 1e-2, "shares of 160 rows sum to %g", sum);
      }
    }
    Card card;
    RowScores r;
    set_problem(card, r, dtype, 100, 150, 40, 4);
    r.lse = card.copy(std::vector<float>(400, 3.f));
    r.rows = card.copy(std::vector<int32_t>{3, -1, 99, 2000000000, -5}), r.rows_count = 5;
    r.scores = card.make<float>(4 * 150);
    card.run(r, row_scores);
    AttentionBlockMap m;
    set_problem(card, m, dtype, 100, 150, 40, 4);
    m.lse = r.lse, m.q_blocks = 4, m.key_blocks = 5;
    m.map = card.make<float>(4 * 20);
    card.run(m, attention_block_map);
    for (float x : card.back<float>(m.map, 4 * 20)) CHECK(x >= 0, "%g", x);
  }
}

TEST(cuda_builders) {
  Card card;
  VerticalSlash v;
  v.heads = 2, v.len_q = 90, v.len_k = 120, v.block_q = v.block_k = 16, v.vertical_count = 5, v.slash_count = 3;
  v.capacity = 4;
  v.vertical = card.copy(std::vector<int32_t>{3, 3, 119, -1, 2000000000, 1, 2, 3, 4, -7});
  v.slash = card.copy(std::vector<int32_t>{0, 50, -9, 119, 2000000000, 1});
  v.counts = card.make<int32_t>(12), v.indices = card.make<int32_t>(48);
  v.column_counts = card.make<int32_t>(12), v.column_indices = card.make<int32_t>(60);
  card.run(v, vertical_slash_lists);
  UnionLists u;
  u.heads = 1, u.group = 2, u.rows = 6, u.capacity_in = 4, u.capacity = 8, u.key_blocks = 8;
  u.counts_in = v.counts, u.indices_in = v.indices;
  u.counts = card.make<int32_t>(6), u.indices = card.make<int32_t>(48);
  CHECK_OK(union_lists(u, card.context));
  for (int32_t n : card.back<int32_t>(u.indices, 48)) CHECK(n >= -1 && n < 8, "%d", n);
  InversePermutation p;
  p.lists = 1, p.count = 5, p.length = 4;
  p.order = card.copy(std::vector<int32_t>{2, 0, -1, 77, 3}), p.inverse = card.make<int32_t>(4);
  CHECK_OK(inverse_permutation(p, card.context));
  CHECK(card.back<int32_t>(p.inverse, 4) == (std::vector<int32_t>{1, -1, 0, 4}), "inverse");
  PermuteTokens t;
  t.batch = t.heads = t.order_heads = 1, t.len_in = 4, t.len_out = 5, t.row_bytes = 3;
  t.input = card.copy(std::vector<char>(12, 1)), t.out = card.make<char>(15);
  t.input_row = t.out_row = 3, t.order = p.order;
  CHECK_OK(permute_tokens(t, card.context));
  CHECK(card.back<char>(t.out, 15)[0] == 1 && card.back<char>(t.out, 15)[9] == 0, "moved rows");
  cudaDeviceSynchronize();
}

}  // namespace
}  // namespace sparsekit::testing

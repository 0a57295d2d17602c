// Scores and choices through the torch-free API, on every instruction set against the reference, with buffers of
// exactly their size: a sanitizer sees every access past an end.
#include <cmath>
#include <cstdlib>

#include "common/cpu/features.h"
#include "numpy/thread_pool.h"
#include "problem.h"
#include "sparsekit/selection.h"

namespace sparsekit::testing {
namespace {

/// Calls body for every instruction set of this machine, the reference first.
template <class Body>
void on_every_isa(Body body) {
  for (int isa = 0; isa < isa_count; ++isa) {
    if (!isa_offered(Isa(isa))) continue;
    setenv("SPARSEKIT_ISA", isa_name(Isa(isa)), 1);
    body(isa_name(Isa(isa)));
  }
  unsetenv("SPARSEKIT_ISA");
}

struct Chosen {
  std::vector<int32_t> indices, counts;
  std::vector<float> mass;
};

Chosen run(Choice choice) {
  const size_t rows = size_t(choice.heads * choice.rows);
  Chosen result{std::vector<int32_t>(rows * size_t(choice.width), -9), std::vector<int32_t>(rows, -9),
                std::vector<float>(rows, -9)};
  choice.indices = result.indices.data(), choice.counts = result.counts.data(), choice.mass = result.mass.data();
  CHECK_OK(choose(choice, thread_pool(2)));
  return result;
}

TEST(choices_are_the_same_on_every_instruction_set) {
  Random random(30);
  for (int64_t columns : {1, 15, 16, 17, 100, 1000, 20000}) {
    for (int kind = 0; kind < 3; ++kind) {
      Choice choice;
      choice.heads = 2, choice.rows = 2, choice.columns = columns;
      std::vector<float> scores(size_t(4 * columns));
      for (float& score : scores) {
        score = kind == 0 ? float(random() % 5) : kind == 1 ? float(random() % 100003) / 1e5f : -INFINITY;
        if (kind == 1 && random() % 7 == 0) score = random() % 2 ? NAN : -INFINITY;
      }
      choice.scores = scores.data();
      choice.width = columns > 300 ? 300 : columns;
      choice.k = columns / 3, choice.p = 0.7, choice.sink = columns > 3, choice.local = columns > 3;
      for (int rule = 0; rule < 4; ++rule) {
        std::vector<float> thresholds(4, 0.5f);
        choice.rule = rule == 0 ? ChoiceRule::top_k : rule == 1 ? ChoiceRule::threshold : ChoiceRule::top_p;
        choice.by_head = rule == 3;
        choice.thresholds = thresholds.data();
        Chosen want;
        on_every_isa([&](const char* isa) {
          Chosen got = run(choice);
          if (want.counts.empty()) want = got;
          CHECK(got.indices == want.indices && got.counts == want.counts, "%s, rule %d, %d columns, kind %d", isa, rule,
                int(columns), kind);
        });
      }
    }
  }
}

void check_close(const std::vector<float>& got, const std::vector<float>& want, const char* what, const char* isa) {
  for (size_t i = 0; i < got.size(); ++i) {
    bool same = got[i] == want[i] || std::fabs(got[i] - want[i]) <= 1e-4 * (1 + std::fabs(want[i]));
    CHECK(same, "%s on %s: element %d is %g, %g wanted", what, isa, int(i), got[i], want[i]);
  }
}

TEST(scores_agree_on_every_instruction_set) {
  for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (bool packed : {false, true}) {
      Random random(40 + unsigned(dtype));
      Shape shape;
      shape.dtype = dtype, shape.causal = true, shape.heads_q = 4, shape.heads_kv = 2, shape.head_dim = 24;
      shape.value_dim = 24, shape.block_q = 32, shape.block_k = 16;
      if (packed) shape.lens_q = {40, 0, 33}, shape.lens_k = {64, 20, 51};
      Problem problem(shape, random);
      AttentionProblem base = problem.forward();
      base.lists.full = base.lists.partial = {};
      const int64_t len_q = base.len_q, len_k = base.len_k, heads = base.batch * base.heads_q;
      std::vector<float> lse(size_t(heads * len_q));
      for (float& x : lse) x = 3 + float(random() % 100) / 50;
      std::vector<int32_t> positions(static_cast<size_t>(len_q));
      for (int64_t i = 0; i < len_q; ++i) positions[size_t(i)] = int32_t(i + 5);
      std::vector<std::vector<float>> want;
      on_every_isa([&](const char* isa) {
        std::vector<std::vector<float>> got;
        BlockScores scores;
        static_cast<AttentionProblem&>(scores) = base;
        scores.q_blocks = packed ? len_q / 32 + base.sequences : (len_q + 31) / 32;
        scores.key_blocks = ((packed ? base.max_len_k : len_k) + 15) / 16;
        scores.stride = 8;
        for (BlockReduce reduce : {BlockReduce::mean, BlockReduce::max, BlockReduce::antidiagonal}) {
          got.emplace_back(size_t(heads * scores.q_blocks * scores.key_blocks));
          got.emplace_back(size_t(heads * scores.q_blocks));
          got.emplace_back(size_t(base.batch * base.heads_kv * base.k_blocks()));
          scores.reduce = reduce;
          scores.scores = got[got.size() - 3].data();
          scores.q_similarity = got[got.size() - 2].data();
          scores.k_similarity = got.back().data();
          CHECK_OK(block_scores(scores, thread_pool(2)));
        }
        ColumnScores columns;
        static_cast<AttentionProblem&>(columns) = base;
        columns.query_positions = positions.data();
        got.emplace_back(size_t(heads * len_k));
        got.emplace_back(size_t(heads * len_k));
        columns.columns = got[got.size() - 2].data();
        columns.diagonals = got.back().data();
        CHECK_OK(column_scores(columns, thread_pool(2)));
        RowScores rows;
        static_cast<AttentionProblem&>(rows) = base;
        rows.lse = lse.data();
        got.emplace_back(size_t(heads * len_k));
        rows.scores = got.back().data();
        CHECK_OK(row_scores(rows, thread_pool(2)));
        AttentionBlockMap map;
        static_cast<AttentionProblem&>(map) = base;
        map.lse = lse.data(), map.q_blocks = scores.q_blocks, map.key_blocks = scores.key_blocks;
        got.emplace_back(size_t(heads * map.q_blocks * map.key_blocks));
        map.map = got.back().data();
        CHECK_OK(attention_block_map(map, thread_pool(2)));
        if (want.empty()) want = got;
        for (size_t i = 0; i < got.size(); ++i) check_close(got[i], want[i], packed ? "packed score" : "score", isa);
      });
    }
  }
}

}  // namespace
}  // namespace sparsekit::testing

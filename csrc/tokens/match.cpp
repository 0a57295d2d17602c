// Bipartite soft matching: the search (dispatch.cpp), then the r best pairs of each sample and the rows they leave.
// Ties go to the lower position, so a match is the same on every machine that computes the same cosines.
#include "tokens/match.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace sparsekit {
namespace {

using Kind = Status::Kind;

/// Ascending for descending cosines, then for ascending positions.
uint64_t rank_of(float cosine, int64_t position) {
  uint32_t bits;
  if (cosine == 0) cosine = 0;  // -0 is 0
  std::memcpy(&bits, &cosine, sizeof bits);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;  // ascending with the value
  return uint64_t(~bits) << 32 | uint64_t(position);
}

int64_t pairs_of(const MatchTokens& m, int64_t s, int64_t count) {
  int64_t wanted = !m.ragged_r       ? m.r
                   : m.ragged_r_wide ? static_cast<const int64_t*>(m.ragged_r)[s]
                                     : static_cast<const int32_t*>(m.ragged_r)[s];
  int64_t most = count > m.protect ? (count - m.protect) / 2 : 0;
  return std::max<int64_t>(0, std::min(wanted, most));
}

Status check(const MatchTokens& m) {
  if (m.tokens > INT32_MAX) {
    return error(Kind::unsupported, "metric: found %lld tokens; supported: at most 2^31 - 1", (long long)m.tokens);
  }
  for (int64_t s = 0; s < m.samples; ++s) {
    if (m.counts && (m.counts[s] < 0 || m.counts[s] > m.tokens)) {
      return error(Kind::invalid_argument, "counts[%lld] is %d; supported: 0 to metric's %lld tokens", (long long)s,
                   m.counts[s], (long long)m.tokens);
    }
    int64_t r = !m.ragged_r       ? m.r
                : m.ragged_r_wide ? static_cast<const int64_t*>(m.ragged_r)[s]
                                  : static_cast<const int32_t*>(m.ragged_r)[s];
    if (r >= 0) continue;
    return error(Kind::invalid_argument, "r[%lld] is %lld; supported: 0 and more", (long long)s, (long long)r);
  }
  return {};
}

void write_sample(const MatchTokens& m, const NearestTask& found, int64_t s, std::vector<uint64_t>* ranks,
                  std::vector<int32_t>* merged) {
  const int64_t count = found.count(s), r = pairs_of(m, s, count);
  ranks->clear();
  for (int64_t i = (m.protect + 1) / 2; 2 * i < count; ++i) {
    ranks->push_back(rank_of(found.best[s * found.sources + i], 2 * i));
  }
  if (r < int64_t(ranks->size())) std::nth_element(ranks->begin(), ranks->begin() + r, ranks->end());
  merged->assign(size_t(count), -1);
  for (int64_t i = 0; i < r; ++i) {
    int64_t position = int64_t((*ranks)[size_t(i)] & 0xffffffffu);
    (*merged)[size_t(position)] = found.target[s * found.sources + position / 2];
  }
  int32_t* source = m.source + s * m.pair_capacity;
  int32_t* destination = m.destination + s * m.pair_capacity;
  int32_t* kept = m.kept + s * m.kept_capacity;
  int32_t* row = m.row + s * m.tokens;
  int64_t pairs = 0, rows = 0;
  for (int64_t n = 0; n < count; ++n) {
    if ((*merged)[size_t(n)] < 0) {
      row[n] = int32_t(rows);
      kept[rows++] = int32_t(n);
    } else {
      source[pairs] = int32_t(n);
      destination[pairs++] = (*merged)[size_t(n)];
    }
  }
  for (int64_t n = 0; n < count; ++n) {
    if ((*merged)[size_t(n)] >= 0) row[n] = row[(*merged)[size_t(n)]];
  }
  m.new_counts[s] = int32_t(rows);
  for (int64_t n = count; n < m.tokens; ++n) row[n] = -1;
  for (; rows < m.kept_capacity; ++rows) kept[rows] = -1;
  for (; pairs < m.pair_capacity; ++pairs) source[pairs] = destination[pairs] = -1;
}

}  // namespace

Status match_tokens(const MatchTokens& m, const ParallelFor& parallel) {
  Status status = check(m);
  if (!status.ok()) return status;
  NearestTask task{&m, nullptr, nullptr, (m.tokens + 1) / 2};
  std::vector<float> best(size_t(m.samples * task.sources));
  std::vector<int32_t> target(best.size());
  task.best = best.data();
  task.target = target.data();
  status = match_tokens_search(task, parallel);
  if (!status.ok()) return status;
  struct Context {
    const MatchTokens& m;
    const NearestTask& task;
  } context{m, task};
  auto body = [](int64_t first, int64_t last, void* opaque) {
    const Context& c = *static_cast<const Context*>(opaque);
    std::vector<uint64_t> ranks;
    std::vector<int32_t> merged;
    for (int64_t s = first; s < last; ++s) write_sample(c.m, c.task, s, &ranks, &merged);
  };
  parallel(0, m.samples, 1, body, &context);
  return {};
}

}  // namespace sparsekit

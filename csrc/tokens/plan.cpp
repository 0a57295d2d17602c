// Plans: O(rows + entries), against rows of hundreds of bytes each. A scatter's entries are put in order of their
// destination by counting: stable, so the order of the sums is that of the sources.
#include "tokens/plan.h"

#include <atomic>

namespace sparsekit {
namespace {

using Kind = Status::Kind;

Status check_side(const char* name, const TokenRows& side) {
  if (side.rows > INT32_MAX) {
    return error(Kind::unsupported, "tensors: found %lld tokens; supported: at most 2^31 - 1", (long long)side.rows);
  }
  for (int64_t s = 0; side.cu_seqlens && s <= side.samples; ++s) {
    int64_t previous = s ? side.cu_seqlens[s - 1] : 0, at = side.cu_seqlens[s];
    if (at < previous || at > side.rows || (s == 0 && at != 0)) {
      return error(
          Kind::invalid_argument,
          "%s[%lld] is %lld; supported: 0 first, then ascending to at most the %lld rows of the packed tensors", name,
          (long long)s, (long long)at, (long long)side.rows);
    }
  }
  return {};
}

/// Runs `body(s)` for every sample on any thread; the first sample (in order) whose body returned false, or -1.
template <class Body>
int64_t for_each_sample(int64_t samples, const ParallelFor& parallel, const Body& body) {
  struct Context {
    const Body& body;
    std::atomic<int64_t> bad;
  } context{body, {samples}};
  parallel(
      0, samples, 1,
      [](int64_t first, int64_t last, void* opaque) {
        Context& c = *static_cast<Context*>(opaque);
        for (int64_t s = first; s < last; ++s) {
          if (c.body(s)) continue;
          int64_t seen = c.bad.load();
          while (s < seen && !c.bad.compare_exchange_weak(seen, s)) continue;
        }
      },
      &context);
  return context.bad.load() < samples ? context.bad.load() : -1;
}

/// What is wrong with sample `s`, whose index holds something outside [-1, limit).
Status bad_index(const TokenIndex& index, int64_t s, int64_t rows, int64_t limit) {
  for (int64_t e = 0; e < rows * index.per_row; ++e) {
    int64_t value = index.at(s * index.rows * index.per_row + e);
    if (value >= -1 && value < limit) continue;
    long long k = e / index.per_row, m = e % index.per_row;
    char place[64];
    std::snprintf(place, sizeof place, index.per_row > 1 ? "%lld, %lld, %lld" : "%lld, %lld", (long long)s, k, m);
    return error(Kind::invalid_argument, "index[%s] is %lld; supported: -1 (none) or a token from 0 to %lld", place,
                 (long long)value, (long long)limit - 1);
  }
  return error(Kind::failed, "index changed while it was read");
}

Status too_few_rows(const char* cu_name, int64_t s, int64_t count, int64_t rows) {
  return error(Kind::invalid_argument, "%s: sample %lld has %lld rows; supported: at most the %lld of index", cu_name,
               (long long)s, (long long)count, (long long)rows);
}

Status check_sides(const TokenIndex& index, const TokenRows& from, const TokenRows& to, const TokenRows& indexed,
                   const char* indexed_name) {
  Status status = check_side("cu_seqlens", from);
  if (status.ok()) status = check_side("cu_seqlens_out", to);
  for (int64_t s = 0; status.ok() && indexed.cu_seqlens && s < indexed.samples; ++s) {
    if (indexed.count(s) > index.rows) return too_few_rows(indexed_name, s, indexed.count(s), index.rows);
  }
  return status;
}

/// The index as int32, checked: -1 or below `limits.count(s)`. Entries of rows that a packed `indexed` side lacks
/// become -1. In place where it is int32 and nothing of it is left out.
Status narrow_index(const TokenIndex& index, const TokenRows& indexed, const TokenRows& limits,
                    const ParallelFor& parallel, std::vector<int32_t>* memory, const int32_t** rows) {
  const int64_t entries = index.rows * index.per_row;
  const bool copies = index.wide || indexed.cu_seqlens;
  if (copies) memory->resize(size_t(indexed.samples * entries));
  *rows = copies ? memory->data() : static_cast<const int32_t*>(index.data);
  int64_t bad = for_each_sample(indexed.samples, parallel, [&](int64_t s) {
    const int64_t limit = limits.count(s), first = s * entries;
    const int64_t used = (indexed.cu_seqlens ? indexed.count(s) : index.rows) * index.per_row;
    bool good = true;
    if (!copies) {
      const int32_t* narrow = *rows + first;
      for (int64_t e = 0; e < used; ++e) good &= narrow[e] >= -1 && narrow[e] < limit;
      return good;
    }
    for (int64_t e = 0; e < used; ++e) {
      int64_t value = index.at(first + e);
      good &= value >= -1 && value < limit;
      (*memory)[size_t(first + e)] = int32_t(value);
    }
    for (int64_t e = used; e < entries; ++e) (*memory)[size_t(first + e)] = -1;
    return good;
  });
  if (bad < 0) return {};
  int64_t used = indexed.cu_seqlens ? indexed.count(bad) : index.rows;
  return bad_index(index, bad, used, limits.count(bad));
}

struct Weights {
  const void* data;
  bool f64;
  double at(int64_t e) const {
    if (!data) return 1;
    return f64 ? static_cast<const double*>(data)[e] : static_cast<const float*>(data)[e];
  }
};

int64_t first_total(const TokenRows& to, int64_t s) { return to.cu_seqlens ? to.cu_seqlens[s] : s * to.rows; }

double total_at(const ScatterTokens& t, int64_t at) {
  return t.weights_f64 ? static_cast<const double*>(t.totals)[at] : static_cast<const float*>(t.totals)[at];
}

}  // namespace

Status plan_gather(const GatherTokens& g, const ParallelFor& parallel, OwnedPlan* owned) {
  Status status = check_sides(g.index, g.from, g.to, g.to, "cu_seqlens_out");
  if (!status.ok()) return status;
  RowPlan& plan = owned->plan;
  plan.from = g.from;
  plan.to = g.to;
  plan.out_rows = plan.sample_entries = g.index.rows;
  return narrow_index(g.index, g.to, g.from, parallel, &owned->rows, &plan.rows);
}

Status plan_scatter(const ScatterTokens& t, const ParallelFor& parallel, OwnedPlan* owned) {
  Status status = check_sides(t.index, t.from, t.to, t.from, "cu_seqlens");
  std::vector<int32_t> memory;
  const int32_t* targets = nullptr;
  if (status.ok()) status = narrow_index(t.index, t.from, t.to, parallel, &memory, &targets);
  if (!status.ok()) return status;

  const int64_t samples = t.to.samples, entries = t.index.rows * t.index.per_row;
  const bool copy = t.reduce == TokenReduce::copy, mean = t.reduce == TokenReduce::mean;
  const Weights weights{t.weights, t.weights_f64};
  const bool weighted = weights.data || mean;
  RowPlan& plan = owned->plan;
  plan.from = t.from;
  plan.to = t.to;
  plan.base_always = t.reduce == TokenReduce::add;
  plan.out_rows = t.to.rows;
  if (t.to.cu_seqlens) {
    plan.out_rows = 0;
    for (int64_t s = 0; s < samples; ++s) plan.out_rows = t.to.count(s) > plan.out_rows ? t.to.count(s) : plan.out_rows;
  }
  owned->offsets.assign(size_t(t.to.cu_seqlens ? t.to.rows + samples : samples * (t.to.rows + 1)), 0);
  owned->rows.resize(size_t(samples * entries));
  if (weighted && t.weights_f64) owned->coefficients_f64.resize(size_t(samples * entries));
  if (weighted && !t.weights_f64) owned->coefficients.resize(size_t(samples * entries));
  plan.offsets = owned->offsets.data();
  plan.rows = owned->rows.data();
  plan.sample_entries = entries;
  plan.coefficients_f64 = t.weights_f64;
  if (weighted) {
    plan.coefficients = t.weights_f64 ? static_cast<const void*>(owned->coefficients_f64.data())
                                      : static_cast<const void*>(owned->coefficients.data());
  }
  // Rows of a packed result that belong to no sample received nothing.
  int64_t used = t.to.cu_seqlens ? t.to.cu_seqlens[samples] : 0;
  for (int64_t n = used; t.to.cu_seqlens && n < t.to.rows; ++n) {
    if (t.weights_f64) {
      static_cast<double*>(t.totals)[n] = 0;
    } else {
      static_cast<float*>(t.totals)[n] = 0;
    }
  }

  for_each_sample(samples, parallel, [&](int64_t s) {
    const int64_t rows = t.to.count(s), first = s * entries, total_first = first_total(t.to, s);
    int32_t* offsets = const_cast<int32_t*>(plan.sample_offsets(s));
    std::vector<double> totals(size_t(rows), 0.);
    for (int64_t e = 0; e < entries; ++e) {
      if (targets[first + e] >= 0) totals[size_t(targets[first + e])] += weights.at(first + e);
    }
    for (int64_t n = 0; n < rows; ++n) {
      if (t.weights_f64) {
        static_cast<double*>(t.totals)[total_first + n] = totals[size_t(n)];
      } else {
        static_cast<float*>(t.totals)[total_first + n] = float(totals[size_t(n)]);
      }
    }
    auto counts = [&](int64_t e) {  // whether an entry reaches its destination
      int64_t n = targets[first + e];
      return n >= 0 && weights.at(first + e) != 0 && !(mean && totals[size_t(n)] == 0);
    };
    for (int64_t e = 0; e < entries; ++e) {
      if (!counts(e)) continue;
      int32_t& count = offsets[targets[first + e] + 1];
      count = copy ? 1 : count + 1;
    }
    // offsets[n + 1] counts row n, becomes its start, and ends, advanced by the placing, as its end.
    int32_t start = 0;
    for (int64_t n = 1; n <= rows; ++n) {
      int32_t count = offsets[n];
      offsets[n] = start;
      start += count;
    }
    if (copy) {  // the highest position is placed last, over the others
      std::vector<int32_t> last(size_t(rows), -1);
      for (int64_t e = 0; e < entries; ++e) {
        if (targets[first + e] >= 0) last[size_t(targets[first + e])] = int32_t(e / t.index.per_row);
      }
      for (int64_t n = 0; n < rows; ++n) {
        if (last[size_t(n)] >= 0) owned->rows[size_t(first + offsets[n + 1]++)] = last[size_t(n)];
      }
      return true;
    }
    for (int64_t e = 0; e < entries; ++e) {
      if (!counts(e)) continue;
      int64_t n = targets[first + e], to = first + offsets[n + 1]++;
      owned->rows[size_t(to)] = int32_t(e / t.index.per_row);
      if (!weighted) continue;
      double c = mean ? weights.at(first + e) / totals[size_t(n)] : weights.at(first + e);
      if (t.weights_f64) {
        owned->coefficients_f64[size_t(to)] = c;
      } else {
        owned->coefficients[size_t(to)] = float(c);
      }
    }
    return true;
  });
  return {};
}

Status plan_scatter_backward(const ScatterTokens& t, const ParallelFor& parallel, OwnedPlan* owned) {
  Status status = check_sides(t.index, t.from, t.to, t.from, "cu_seqlens");
  std::vector<int32_t> memory;
  const int32_t* targets = nullptr;
  if (status.ok()) status = narrow_index(t.index, t.from, t.to, parallel, &memory, &targets);
  if (!status.ok()) return status;

  const int64_t samples = t.to.samples, entries = t.index.rows * t.index.per_row;
  const bool copy = t.reduce == TokenReduce::copy, mean = t.reduce == TokenReduce::mean;
  const Weights weights{t.weights, t.weights_f64};
  const bool weighted = weights.data || mean;
  RowPlan& plan = owned->plan;
  plan.from = t.to;  // the gradient flows back: rows of grad_out make up rows of grad_in
  plan.to = t.from;
  plan.out_rows = t.index.rows;
  plan.per_row = t.index.per_row;
  plan.sample_entries = entries;
  plan.coefficients_f64 = t.weights_f64;
  owned->rows.assign(targets, targets + samples * entries);
  owned->targets = owned->rows;
  plan.rows = owned->rows.data();
  if (weighted && t.weights_f64) owned->coefficients_f64.resize(size_t(samples * entries));
  if (weighted && !t.weights_f64) owned->coefficients.resize(size_t(samples * entries));
  if (weighted) {
    plan.coefficients = t.weights_f64 ? static_cast<const void*>(owned->coefficients_f64.data())
                                      : static_cast<const void*>(owned->coefficients.data());
  }
  for_each_sample(samples, parallel, [&](int64_t s) {
    const int64_t first = s * entries, total_first = first_total(t.to, s);
    int32_t* rows = owned->rows.data() + first;
    if (copy) {
      std::vector<int64_t> last(size_t(t.to.count(s)), -1);
      for (int64_t e = 0; e < entries; ++e) {
        if (rows[e] >= 0) last[size_t(rows[e])] = e;
      }
      for (int64_t e = 0; e < entries; ++e) {
        if (rows[e] >= 0 && last[size_t(rows[e])] != e) rows[e] = -1;
      }
      return true;
    }
    for (int64_t e = 0; weighted && e < entries; ++e) {
      if (rows[e] < 0) continue;
      double w = weights.at(first + e), total = mean ? total_at(t, total_first + rows[e]) : 1;
      if (w == 0 || total == 0) {
        rows[e] = -1;
      } else if (t.weights_f64) {
        owned->coefficients_f64[size_t(first + e)] = w / total;
      } else {
        owned->coefficients[size_t(first + e)] = float(w / total);
      }
    }
    return true;
  });
  return {};
}

}  // namespace sparsekit

// The choice of the best entries, written to be read: every row is sorted.
//
// A rule first says how many entries a row takes; then the row takes its sinks, its local ones and the best others.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "attention/scalar.h"
#include "selection/implementations.h"

namespace sparsekit {
namespace {

struct Entry {
  float value;  // what it is ordered by
  int64_t row, column;
};

struct Row {
  std::vector<Entry> forced, others;  // others: best first
  std::vector<float> values;          // of every column

  int64_t eligible() const { return int64_t(forced.size() + others.size()); }
};

bool better(const Entry& a, const Entry& b) {
  if (a.value != b.value) return a.value > b.value;
  return a.row != b.row ? a.row < b.row : a.column < b.column;
}

Row read_row(const Choice& c, int64_t head, int64_t r) {
  Row row;
  int64_t number = head * c.rows + r;
  int64_t limit = c.row_limit ? std::clamp<int64_t>(c.row_limit[number], 0, c.columns) : c.columns;
  const float* weights = c.weights ? c.weights + head * c.weights_head + r * c.weights_row : nullptr;
  for (int64_t j = 0; j < c.columns; ++j) {
    float value = float(load(c.scores, number * c.columns + j, c.dtype));
    if (weights) value *= weights[j];
    row.values.push_back(value);
    if (j >= limit || std::isnan(value) || value == -INFINITY) continue;
    (j < c.sink || j >= limit - c.local ? row.forced : row.others).push_back({value, r, j});
  }
  std::sort(row.others.begin(), row.others.end(), better);
  return row;
}

/// Masses in whole units, so that their sums are exact.
class Masses {
 public:
  Masses(float largest, int64_t entries) {
    int exponent = 0, bits = 0;
    std::frexp(std::min(std::max(largest, 0.f), std::numeric_limits<float>::max()), &exponent);
    while (int64_t(1) << bits < entries) ++bits;
    shift_ = 52 - bits - exponent;
  }
  double of(const Entry& entry) const {
    float mass = std::min(std::max(entry.value, 0.f), std::numeric_limits<float>::max());
    return std::nearbyint(std::ldexp(double(mass), shift_));
  }

 private:
  int shift_;
};

/// How many of `others` (best first) top-p takes. `forced` and `others` are those of a row, or of all rows of a head.
int64_t fewest(const std::vector<Entry>& forced, const std::vector<Entry>& others, double p, int64_t entries) {
  if (p >= 1) {
    return std::find_if(others.begin(), others.end(), [](const Entry& e) { return !(e.value > 0); }) - others.begin();
  }
  float largest = 0;
  for (const Entry& entry : forced) largest = std::max(largest, entry.value);
  for (const Entry& entry : others) largest = std::max(largest, entry.value);
  Masses masses(largest, entries);
  double sum = 0, total = 0;
  for (const Entry& entry : forced) sum += masses.of(entry);
  total = sum;
  for (const Entry& entry : others) total += masses.of(entry);
  double wanted = std::max(p, 0.) * total;
  int64_t count = 0;
  while (sum < wanted) sum += masses.of(others[size_t(count++)]);
  return count;
}

void emit(const Choice& c, int64_t number, const Row& row, int64_t others) {
  int64_t forced = int64_t(row.forced.size());
  int64_t count = std::min({std::max(forced + others, c.min_count), c.width, row.eligible()});
  std::vector<int64_t> columns;
  for (const Entry& entry : row.forced) columns.push_back(entry.column);
  for (int64_t i = 0; i < count - forced; ++i) columns.push_back(row.others[size_t(i)].column);
  std::sort(columns.begin(), columns.end());
  double mass = 0;
  c.counts[number] = int32_t(columns.size());
  for (int64_t slot = 0; slot < c.width; ++slot) {
    bool used = slot < int64_t(columns.size());
    c.indices[number * c.width + slot] = used ? int32_t(columns[size_t(slot)]) : -1;
    if (used) mass += row.values[size_t(columns[size_t(slot)])];
  }
  if (c.mass) c.mass[number] = float(mass);
}

void choose_row(const Choice& c, int64_t number) {
  Row row = read_row(c, number / c.rows, number % c.rows);
  int64_t forced = int64_t(row.forced.size()), others = 0;
  if (c.rule == ChoiceRule::top_k) {
    others = std::max<int64_t>((c.row_k ? c.row_k[number] : c.k) - forced, 0);
  } else if (c.rule == ChoiceRule::top_p) {
    others = fewest(row.forced, row.others, c.row_p ? double(c.row_p[number]) : c.p, c.columns);
  } else {
    while (others < int64_t(row.others.size()) && row.others[size_t(others)].value >= c.thresholds[number]) ++others;
  }
  emit(c, number, row, others);
}

/// top-p over all rows of a head together.
void choose_head(const Choice& c, int64_t head) {
  std::vector<Row> rows;
  std::vector<Entry> forced, others;
  for (int64_t r = 0; r < c.rows; ++r) {
    rows.push_back(read_row(c, head, r));
    forced.insert(forced.end(), rows.back().forced.begin(), rows.back().forced.end());
    others.insert(others.end(), rows.back().others.begin(), rows.back().others.end());
  }
  std::sort(others.begin(), others.end(), better);
  others.resize(size_t(fewest(forced, others, c.row_p ? double(c.row_p[head]) : c.p, c.rows * c.columns)));
  std::vector<int64_t> counts(size_t(c.rows), 0);
  for (const Entry& entry : others) ++counts[size_t(entry.row)];
  for (int64_t r = 0; r < c.rows; ++r) emit(c, head * c.rows + r, rows[size_t(r)], counts[size_t(r)]);
}

}  // namespace

Status reference_choose(const Choice& arguments, const ParallelFor& parallel) {
  auto rows = [](int64_t first, int64_t last, void* context) {
    for (int64_t at = first; at < last; ++at) choose_row(*static_cast<const Choice*>(context), at);
  };
  auto heads = [](int64_t first, int64_t last, void* context) {
    for (int64_t at = first; at < last; ++at) choose_head(*static_cast<const Choice*>(context), at);
  };
  void* context = const_cast<Choice*>(&arguments);
  if (arguments.by_head) {
    parallel(0, arguments.heads, 1, heads, context);
  } else {
    parallel(0, arguments.heads * arguments.rows, 16, rows, context);
  }
  return {};
}

}  // namespace sparsekit

// Keeps some rows of a cache, in place. Rows only move towards the beginning (the list of kept rows ascends), so one
// pass from the front never writes what it still has to read. Everything is checked before anything moves.
#include <cstring>
#include <vector>

#include "sparsekit/tokens.h"

namespace sparsekit {
namespace {

using Kind = Status::Kind;

struct Walk {
  const CompactRows& c;

  /// Entry j of the list of sample s and keep head h.
  int64_t keep(int64_t s, int64_t h, int64_t j) const { return c.keep.at((s * c.keep_heads + h) * c.keep.rows + j); }

  int64_t limit(int64_t s, int64_t h) const { return c.lengths ? c.lengths[s * c.keep_heads + h] : c.capacity; }

  /// Entries before the first -1.
  int64_t count(int64_t s, int64_t h) const {
    int64_t j = 0;
    while (j < c.keep.rows && keep(s, h, j) >= 0) ++j;
    return j;
  }

  char* row(const CompactRows::Cache& cache, int64_t s, int64_t h, int64_t token) const {
    char* data = static_cast<char*>(cache.data) + h * cache.head;
    if (!c.block_table) return data + s * cache.sample + token * cache.row;
    int64_t page = c.block_table[s * c.table_pages + token / c.page_size];
    return data + page * cache.sample + token % c.page_size * cache.row;
  }

  Status check(int64_t s, int64_t h) const {
    char place[80];
    auto at = [&](int64_t j) {
      if (c.keep_heads > 1) {
        std::snprintf(place, sizeof place, "keep_index[%lld, %lld, %lld]", (long long)s, (long long)h, (long long)j);
      } else {
        std::snprintf(place, sizeof place, "keep_index[%lld, %lld]", (long long)s, (long long)j);
      }
      return place;
    };
    if (limit(s, h) < 0 || limit(s, h) > c.capacity) {
      return error(Kind::invalid_argument, "lengths[%lld] is %lld; supported: 0 to the cache's %lld rows", (long long)s,
                   (long long)limit(s, h), (long long)c.capacity);
    }
    int64_t previous = -1;
    bool ended = false;
    for (int64_t j = 0; j < c.keep.rows; ++j) {
      int64_t token = keep(s, h, j);
      if (token == -1) {
        ended = true;
      } else if (token < -1 || token >= limit(s, h)) {
        return error(Kind::invalid_argument, "%s is %lld; supported: -1 (end) or a row in use, 0 to %lld", at(j),
                     (long long)token, (long long)limit(s, h) - 1);
      } else if (ended || token <= previous) {
        return error(Kind::invalid_argument, "%s is %lld after %lld; supported: ascending rows, then -1", at(j),
                     (long long)token, (long long)(ended ? -1 : previous));
      } else {
        previous = token;
      }
    }
    // Every page up to that of the last kept row is read or written.
    for (int64_t page = 0; c.block_table && previous >= 0 && page <= previous / c.page_size; ++page) {
      int64_t number = c.block_table[s * c.table_pages + page];
      if (number < 0 || number >= c.pages) {
        return error(Kind::invalid_argument, "block_table[%lld, %lld] is %lld; supported: a page from 0 to %lld",
                     (long long)s, (long long)page, (long long)number, (long long)c.pages - 1);
      }
    }
    return {};
  }

  void move(int64_t s, int64_t h) const {
    const int64_t list = c.keep_heads > 1 ? h : 0, kept = count(s, list);
    for (int64_t i = 0; i < c.tensors; ++i) {
      const CompactRows::Cache& cache = c.caches[i];
      for (int64_t j = 0; j < kept; ++j) {
        int64_t token = keep(s, list, j);
        if (token != j) std::memcpy(row(cache, s, h, j), row(cache, s, h, token), size_t(cache.row_bytes));
      }
    }
  }
};

}  // namespace

Status compact_rows(const CompactRows& arguments, const ParallelFor& parallel) {
  Walk walk{arguments};
  for (int64_t s = 0; s < arguments.samples; ++s) {
    for (int64_t h = 0; h < arguments.keep_heads; ++h) {
      Status status = walk.check(s, h);
      if (!status.ok()) return status;
    }
  }
  auto body = [](int64_t first, int64_t last, void* context) {
    const Walk& w = *static_cast<const Walk*>(context);
    for (int64_t at = first; at < last; ++at) w.move(at / w.c.heads, at % w.c.heads);
  };
  if (arguments.heads > 0) parallel(0, arguments.samples * arguments.heads, 1, body, &walk);
  for (int64_t list = 0; arguments.lengths && list < arguments.samples * arguments.keep_heads; ++list) {
    arguments.lengths[list] = int32_t(walk.count(list / arguments.keep_heads, list % arguments.keep_heads));
  }
  return {};
}

}  // namespace sparsekit

// Lists out of lists, on the CPU: vertical and slash lines to blocks and columns, the union over a group of heads, the
// inverse of a permutation, and the move of rows that follows one.
//
// Blocks are marked in a bitmap of one bit per key block, which sorts them and drops duplicates: per row O(entries +
// blocks / 64). Rows are moved whole; one head's rows go in list order, which memory reads no faster than at random.
#include <algorithm>
#include <climits>
#include <cstring>
#include <vector>

#include "attention/sequences.h"
#include "sparsekit/selection.h"

namespace sparsekit {
namespace {

using Kind = Status::Kind;

template <class Arguments, void (*one)(const Arguments&, int64_t)>
Status for_each(const Arguments& arguments, int64_t count, const ParallelFor& parallel) {
  auto body = [](int64_t first, int64_t last, void* context) {
    for (int64_t at = first; at < last; ++at) one(*static_cast<const Arguments*>(context), at);
  };
  parallel(0, count, 1, body, const_cast<Arguments*>(&arguments));
  return {};
}

class Bitmap {
 public:
  explicit Bitmap(int64_t size) : words_(size_t(size + 63) / 64) {}
  void clear() { std::fill(words_.begin(), words_.end(), 0); }
  void set(int64_t at) { words_[size_t(at / 64)] |= uint64_t(1) << at % 64; }
  bool operator[](int64_t at) const { return words_[size_t(at / 64)] >> at % 64 & 1; }

  /// Writes the first `capacity` set bits, ascending, -1 behind them; those that do not fit are cleared.
  int32_t emit(int32_t* to, int64_t capacity) {
    int64_t count = 0;
    for (size_t w = 0; w < words_.size(); ++w) {
      for (uint64_t left = words_[w]; left; left &= left - 1) {
        if (count < capacity) {
          to[count++] = int32_t(w * 64) + __builtin_ctzll(left);
        } else {
          words_[w] &= ~(left & -left);
        }
      }
    }
    std::fill(to + count, to + capacity, -1);
    return int32_t(count);
  }

 private:
  std::vector<uint64_t> words_;
};

/// An error naming the first entry that is neither -1 nor in 0 .. end - 1. Entries of row r past counts[r] are not
/// read.
Status check_entries(const char* name, const int32_t* entries, int64_t rows, int64_t capacity, int64_t end,
                     const int32_t* counts = nullptr) {
  for (int64_t r = 0; r < rows; ++r) {
    int64_t count = counts ? counts[r] : capacity;
    if (count < 0 || count > capacity) {
      return error(Kind::invalid_argument, "counts: row %lld has %lld; supported: 0 to %lld, the last size of %s",
                   (long long)r, (long long)count, (long long)capacity, name);
    }
    for (int64_t s = 0; s < count; ++s) {
      int32_t entry = entries[r * capacity + s];
      if (entry >= -1 && entry < end) continue;
      return error(Kind::invalid_argument, "%s: entry %lld of row %lld is %d; supported: -1 (empty) or 0 to %lld", name,
                   (long long)s, (long long)r, entry, (long long)end - 1);
    }
  }
  return {};
}

void vertical_slash_head(const VerticalSlash& a, int64_t head) {
  int64_t q_blocks = ceil_div(a.len_q, a.block_q), origin = a.len_k - a.len_q;
  Bitmap blocks(ceil_div(a.len_k, a.block_k));
  std::vector<int32_t> columns(a.vertical + head * a.vertical_count, a.vertical + (head + 1) * a.vertical_count);
  std::sort(columns.begin(), columns.end());
  columns.erase(std::unique(columns.begin(), columns.end()), columns.end());
  for (int64_t m = 0; m < q_blocks; ++m) {
    int64_t first = m * a.block_q + origin, last = std::min(a.len_q, (m + 1) * a.block_q) - 1 + origin;
    int64_t row = head * q_blocks + m;
    blocks.clear();
    for (int64_t s = 0; s < a.slash_count; ++s) {
      int64_t distance = a.slash[head * a.slash_count + s];
      if (distance < 0 || last < distance) continue;
      for (int64_t n = std::max<int64_t>(first - distance, 0) / a.block_k; n <= (last - distance) / a.block_k; ++n) {
        blocks.set(n);
      }
    }
    a.counts[row] = blocks.emit(a.indices + row * a.capacity, a.capacity);
    int32_t* to = a.column_indices + row * a.vertical_count;
    int64_t count = 0;
    for (int32_t column : columns) {
      if (column >= 0 && column <= last && !blocks[column / a.block_k]) to[count++] = column;
    }
    std::fill(to + count, to + a.vertical_count, -1);
    a.column_counts[row] = int32_t(count);
  }
}

void union_head(const UnionLists& u, int64_t head) {
  Bitmap blocks(u.key_blocks);
  for (int64_t m = 0; m < u.rows; ++m) {
    blocks.clear();
    for (int64_t h = head * u.group; h < (head + 1) * u.group; ++h) {
      int64_t row = h * u.rows + m;
      for (int64_t s = 0; s < u.counts_in[row]; ++s) {
        int32_t entry = u.indices_in[row * u.capacity_in + s];
        if (entry >= 0) blocks.set(entry);
      }
    }
    int64_t row = head * u.rows + m;
    u.counts[row] = blocks.emit(u.indices + row * u.capacity, u.capacity);
  }
}

void permute_head(const PermuteTokens& p, int64_t at) {
  int64_t b = at / p.heads, h = at % p.heads, list = h / (p.heads / p.order_heads);
  const int32_t* order = p.order + b * p.order_batch + list * p.len_out;
  const char* input = p.input + b * p.input_batch + h * p.input_head;
  char* out = p.out + b * p.out_batch + h * p.out_head;
  for (int64_t i = 0; i < p.len_out; ++i, out += p.out_row) {
    if (i + 8 < p.len_out && order[i + 8] >= 0) __builtin_prefetch(input + order[i + 8] * p.input_row);
    if (order[i] >= 0) {
      std::memcpy(out, input + order[i] * p.input_row, size_t(p.row_bytes));
    } else {
      std::memset(out, 0, size_t(p.row_bytes));
    }
  }
}

}  // namespace

Status vertical_slash_lists(const VerticalSlash& a, const ParallelFor& parallel) {
  if (a.block_q <= 0 || a.block_k <= 0) {
    return error(Kind::invalid_argument, "block_size is (%d, %d); supported: positive sizes", a.block_q, a.block_k);
  }
  Status status = check_entries("vertical", a.vertical, a.heads, a.vertical_count, a.len_k);
  if (status.ok()) status = check_entries("slash", a.slash, a.heads, a.slash_count, a.len_k);
  return status.ok() ? for_each<VerticalSlash, vertical_slash_head>(a, a.heads, parallel) : status;
}

Status union_lists(const UnionLists& u, const ParallelFor& parallel) {
  Status status =
      check_entries("indices", u.indices_in, u.heads * u.group * u.rows, u.capacity_in, u.key_blocks, u.counts_in);
  return status.ok() ? for_each<UnionLists, union_head>(u, u.heads, parallel) : status;
}

Status inverse_permutation(const InversePermutation& p, const ParallelFor&) {
  Status status = check_entries("order", p.order, p.lists, p.count, p.length);
  if (!status.ok()) return status;
  std::fill(p.inverse, p.inverse + p.lists * p.length, -1);
  for (int64_t list = 0; list < p.lists; ++list) {
    int32_t* inverse = p.inverse + list * p.length;
    for (int64_t i = 0; i < p.count; ++i) {
      int32_t token = p.order[list * p.count + i];
      if (token < 0) continue;
      if (inverse[token] >= 0) {
        return error(Kind::invalid_argument,
                     "order: entries %d and %lld of row %lld are both %d; supported: each token "
                     "once",
                     inverse[token], (long long)i, (long long)list, token);
      }
      inverse[token] = int32_t(i);
    }
  }
  return {};
}

Status permute_tokens(const PermuteTokens& p, const ParallelFor& parallel) {
  int64_t lists = p.order_heads * (p.order_batch ? p.batch : 1);
  Status status = check_entries("order", p.order, lists, p.len_out, p.len_in);
  return status.ok() ? for_each<PermuteTokens, permute_head>(p, p.batch * p.heads, parallel) : status;
}

}  // namespace sparsekit

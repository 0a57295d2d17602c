// Patterns of block-sparse weights: checked, and transposed (seen from the columns). O(blocks).
#include <initializer_list>
#include <type_traits>

#include "sparsekit/matmul.h"

namespace sparsekit {
namespace {

/// The first of `count` numbers outside [0, limit), or -1. One pass without branches finds that all are good: a number
/// that is not makes itself or what is left to the limit negative.
template <class Int>
int64_t first_outside(const Int* numbers, int64_t count, int64_t limit) {
  using Unsigned = std::make_unsigned_t<Int>;
  constexpr int64_t chunk = 4096;
  constexpr int64_t largest = int64_t(Unsigned(-1) / 2);
  const Unsigned most = Unsigned(limit - 1 < largest ? limit - 1 : largest);
  for (int64_t first = 0; first < count; first += chunk) {
    int64_t last = first + chunk < count ? first + chunk : count;
    Unsigned outside = 0;
    for (int64_t i = first; i < last; ++i) outside |= Unsigned(numbers[i]) | (most - Unsigned(numbers[i]));
    if (Int(outside) >= 0) continue;
    for (int64_t i = first; i < last; ++i)
      if (numbers[i] < 0 || int64_t(numbers[i]) >= limit) return i;
  }
  return -1;
}

Status check_range(const IndexArray& numbers, int64_t count, int64_t limit, const char* name) {
  int64_t bad = numbers.wide ? first_outside(static_cast<const int64_t*>(numbers.data), count, limit)
                             : first_outside(static_cast<const int32_t*>(numbers.data), count, limit);
  if (bad < 0) return {};
  return error(Status::Kind::invalid_argument, "%s[%lld] is %lld; supported: 0 to %lld", name, (long long)bad,
               (long long)numbers[bad], (long long)limit - 1);
}

Status check_offsets(const IndexArray& offsets, int64_t count, int64_t nnz, const char* name) {
  if (offsets[0] != 0) {
    return error(Status::Kind::invalid_argument, "%s[0] is %lld; supported: 0", name, (long long)offsets[0]);
  }
  for (int64_t i = 0; i < count; ++i) {
    if (offsets[i + 1] >= offsets[i] && offsets[i + 1] <= nnz) continue;
    return error(Status::Kind::invalid_argument, "%s[%lld] is %lld after %lld; supported: ascending up to %lld blocks",
                 name, (long long)i + 1, (long long)offsets[i + 1], (long long)offsets[i], (long long)nnz);
  }
  if (offsets[count] != nnz) {
    return error(Status::Kind::invalid_argument, "%s ends with %lld; supported: the number of blocks, %lld", name,
                 (long long)offsets[count], (long long)nnz);
  }
  return {};
}

template <class Int>
void transpose(const TransposeBlockSparse& t) {
  const BlockSparsePattern& p = t.pattern;
  Int *ccol = static_cast<Int*>(t.ccol), *row = static_cast<Int*>(t.row), *entry = static_cast<Int*>(t.entry);
  const int64_t columns = p.col_blocks();
  // ccol[j + 1] counts column j, becomes its start, and ends, advanced by the placing, as its end.
  for (int64_t j = 0; j <= columns; ++j) ccol[j] = 0;
  for (int64_t i = 0; i < p.nnz; ++i) ++ccol[p.col[i] + 1];
  Int start = 0;
  for (int64_t j = 1; j <= columns; ++j) {
    Int count = ccol[j];
    ccol[j] = start;
    start += count;
  }
  for (int64_t r = 0; r < p.row_blocks(); ++r) {
    for (int64_t i = p.crow[r]; i < p.crow[r + 1]; ++i) {
      Int at = ccol[p.col[i] + 1]++;
      row[at] = Int(r);
      entry[at] = Int(i);
    }
  }
}

}  // namespace

Status block_sparse_check(const BlockSparsePattern& p) {
  if (p.rows < 0 || p.cols < 0 || p.nnz < 0) {
    return error(Status::Kind::invalid_argument, "weight has shape [%lld, %lld] and %lld blocks; supported: 0 and more",
                 (long long)p.rows, (long long)p.cols, (long long)p.nnz);
  }
  for (int32_t size : {p.block_rows, p.block_cols}) {
    if (size >= 1 && size <= 1024) continue;
    return error(Status::Kind::unsupported, "values has blocks of %d x %d; supported: 1 to 1024 each", p.block_rows,
                 p.block_cols);
  }
  Status status = check_offsets(p.crow, p.row_blocks(), p.nnz, "crow_indices");
  return status.ok() ? check_range(p.col, p.nnz, p.col_blocks(), "col_indices") : status;
}

Status block_sparse_check_transpose(const BlockSparsePattern& p, const BlockSparseTranspose& t) {
  Status status = check_offsets(t.ccol, p.col_blocks(), p.nnz, "ccol_indices");
  if (status.ok()) status = check_range(t.row, p.nnz, p.row_blocks(), "row_indices");
  return status.ok() ? check_range(t.entry, p.nnz, p.nnz, "entries") : status;
}

Status transpose_block_sparse(const TransposeBlockSparse& arguments, const ParallelFor&) {
  Status status = block_sparse_check(arguments.pattern);
  if (!status.ok()) return status;
  if (arguments.pattern.col.wide) {
    transpose<int64_t>(arguments);
  } else {
    transpose<int32_t>(arguments);
  }
  return {};
}

}  // namespace sparsekit

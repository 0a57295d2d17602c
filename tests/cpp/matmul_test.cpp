// Block-sparse products through the API without torch: every instruction set against the reference, on ragged shapes,
// repeated and missing blocks, NaN in the padding of blocks. Every buffer has exactly its size, so that a sanitizer
// sees the first byte too many.
#include "sparsekit/matmul.h"

#include <memory>

#include "attention/scalar.h"
#include "numpy/thread_pool.h"
#include "testing.h"

namespace sparsekit::testing {
namespace {

enum class Order { tokens, features, padded };  // what is contiguous; padded: tokens with a gap behind each

/// [tokens, features] whose last byte is that of the last element.
struct Matrix {
  DType dtype;
  int64_t tokens, features, token, feature, size;
  std::unique_ptr<char[]> bytes;

  Matrix(DType type, int64_t t, int64_t f, Order order) : dtype(type), tokens(t), features(f) {
    token = order == Order::features ? 1 : order == Order::padded ? f + 3 : f;
    feature = order == Order::features ? t : 1;
    size = t && f ? (t - 1) * token + (f - 1) * feature + 1 : 0;
    bytes.reset(new char[size_t(size * size_of(type))]);
  }
  void fill(double x) {
    for (int64_t i = 0; i < size; ++i) store(bytes.get(), i, dtype, x);
  }
  void randomize(Random& random) {
    std::normal_distribution<double> normal;
    fill(-77);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t f = 0; f < features; ++f) store(bytes.get(), t * token + f * feature, dtype, normal(random));
  }
  double get(int64_t t, int64_t f) const { return load(bytes.get(), t * token + f * feature, dtype); }
  TokensView<const void*> input() const { return {bytes.get(), token, feature}; }
  TokensView<void*> output() { return {bytes.get(), token, feature}; }
};

/// int32 or int64 numbers.
struct Indices {
  bool wide;
  std::vector<int32_t> narrow_numbers;
  std::vector<int64_t> wide_numbers;

  Indices(const std::vector<int64_t>& numbers, bool w) : wide(w) {
    if (wide) wide_numbers = numbers;
    if (!wide) narrow_numbers.assign(numbers.begin(), numbers.end());
  }
  void* data() { return wide ? static_cast<void*>(wide_numbers.data()) : narrow_numbers.data(); }
  IndexArray view() { return {data(), wide}; }
};

struct BlockShape {
  int32_t rows, cols;
};
constexpr BlockShape block_shapes[] = {{1, 1},   {1, 16},  {4, 1},   {16, 1}, {8, 8},
                                       {16, 16}, {64, 64}, {32, 16}, {3, 5},  {2, 20}};

/// A random weight: rows without blocks, with as many as there are columns and more, columns in any order.
struct Weight {
  BlockSparsePattern pattern;
  std::unique_ptr<Indices> crow, col, ccol, row, entry;
  std::unique_ptr<char[]> values;
  std::vector<float> scales;

  /// int8 where `quantized`. What stands beyond rows and cols is NaN, or -128.
  Weight(BlockShape shape, int64_t rows, int64_t cols, int density, bool wide, DType dtype, bool quantized,
         Random& random) {
    pattern.rows = rows, pattern.cols = cols, pattern.block_rows = shape.rows, pattern.block_cols = shape.cols;
    std::vector<int64_t> starts = {0}, columns;
    const int64_t limit = pattern.col_blocks();
    for (int64_t i = 0; i < pattern.row_blocks(); ++i) {
      const int64_t count = !limit        ? 0
                            : density > 1 ? limit + 1
                            : density     ? int64_t(random() % unsigned(limit + 1))
                                          : 0;
      for (int64_t n = 0; n < count; ++n) columns.push_back(int64_t(random() % unsigned(limit)));
      starts.push_back(int64_t(columns.size()));
    }
    pattern.nnz = int64_t(columns.size());
    crow.reset(new Indices(starts, wide)), col.reset(new Indices(columns, wide));
    pattern.crow = crow->view(), pattern.col = col->view();
    std::vector<int64_t> unset(columns.size(), -9);
    ccol.reset(new Indices(std::vector<int64_t>(size_t(limit) + 1, -9), wide));
    row.reset(new Indices(unset, wide)), entry.reset(new Indices(unset, wide));
    const int64_t elements = pattern.nnz * shape.rows * shape.cols;
    values.reset(new char[size_t(elements * (quantized ? 1 : size_of(dtype)))]);
    std::normal_distribution<double> normal;
    int64_t at = 0;
    for (int64_t i = 0; i < pattern.row_blocks(); ++i)
      for (int64_t p = starts[size_t(i)]; p < starts[size_t(i) + 1]; ++p)
        for (int32_t r = 0; r < shape.rows; ++r)
          for (int32_t c = 0; c < shape.cols; ++c, ++at) {
            const bool padding = i * shape.rows + r >= rows || columns[size_t(p)] * shape.cols + c >= cols;
            if (quantized) {
              values[size_t(at)] = char(padding ? -128 : int(random() % 255) - 127);
            } else {
              store(values.get(), at, dtype, padding ? NAN : normal(random));
            }
          }
    if (!quantized) return;
    scales.resize(size_t(rows));
    for (float& scale : scales) scale = float(random() % 100 + 1) * 2e-4f;
  }

  BlockSparseTranspose transpose() {
    TransposeBlockSparse call;
    call.pattern = pattern, call.ccol = ccol->data(), call.row = row->data(), call.entry = entry->data();
    CHECK_OK(transpose_block_sparse(call, thread_pool(2)));
    return {ccol->view(), row->view(), entry->view()};
  }
};

double tolerance(DType dtype, double want) {
  const double unit = dtype == DType::bf16 ? 0x1p-7 : dtype == DType::f16 ? 0x1p-10 : 0;
  return unit * std::fabs(want) + 3e-5 * (1 + std::fabs(want)) + (dtype == DType::f32 ? 0 : 1e-4);
}

/// The first place where two matrices differ by more than rounding, gaps included; or -1.
int64_t first_difference(const Matrix& got, const Matrix& want) {
  for (int64_t i = 0; i < got.size; ++i) {
    const double a = load(got.bytes.get(), i, got.dtype), b = load(want.bytes.get(), i, want.dtype);
    if (a == b || (std::isnan(a) && std::isnan(b))) continue;
    if (!(std::fabs(a - b) <= tolerance(got.dtype, b))) return i;
  }
  return -1;
}

/// One product on every instruction set.
void check_product(BlockShape shape, DType dtype, bool quantized, bool transposed, Order in, Order out, int64_t rows,
                   int64_t cols, int64_t tokens, Random& random) {
  Weight weight(shape, rows, cols, int(random() % 8) ? 1 + int(random() % 3 == 0) : 0, random() % 2, dtype, quantized,
                random);
  const int64_t inner = transposed ? rows : cols, features = transposed ? cols : rows;
  Matrix input(dtype, tokens, inner, in), factor(dtype, tokens, features, out), bias(dtype, 1, features, Order::tokens);
  input.randomize(random), factor.randomize(random), bias.randomize(random);
  const bool in_place = random() % 3 == 0, spoiled = tokens && inner && random() % 5 == 0;
  if (spoiled) store(input.bytes.get(), 0, dtype, random() % 2 ? NAN : INFINITY);  // token 0
  BlockSparseProduct call;
  call.pattern = weight.pattern, call.values = weight.values.get();
  call.scales = quantized ? weight.scales.data() : nullptr;
  call.transposed = transposed, call.dtype = dtype, call.tokens = tokens, call.input = input.input();
  if (transposed) call.transpose = weight.transpose();
  if (random() % 2) call.bias = bias.bytes.get();
  if (!spoiled) call.activation = Activation(random() % 5);
  if (random() % 2 || in_place) call.factor = factor.input();
  std::unique_ptr<Matrix> want;
  for_each_isa([&](const char* isa) {
    std::unique_ptr<Matrix> got(new Matrix(dtype, tokens, features, out));
    got->fill(-77);
    if (in_place) std::copy(factor.bytes.get(), factor.bytes.get() + factor.size * size_of(dtype), got->bytes.get());
    call.output = got->output();
    if (in_place) call.factor = got->input();
    CHECK_OK(block_sparse_product(call, thread_pool(2)));
    if (!want) want = std::move(got);
    if (!got) return;
    const int64_t at = first_difference(*got, *want);
    CHECK(at < 0,
          "%s, %d x %d blocks, %s%s, %d x %d, %d tokens, transposed %d, orders %d %d, activation %d, factor %d: "
          "element %d is %g, %g wanted",
          isa, shape.rows, shape.cols, name(dtype), quantized ? " int8" : "", int(rows), int(cols), int(tokens),
          transposed, int(in), int(out), int(call.activation), call.factor.data != nullptr, int(at),
          load(got->bytes.get(), at, dtype), load(want->bytes.get(), at, dtype));
  });
}

TEST(products_agree_on_every_instruction_set) {
  Random random(50);
  constexpr int64_t token_counts[] = {1, 3, 17, 16, 33, 0, 70, 5};
  for (BlockShape shape : block_shapes)
    for (DType dtype : {DType::f32, DType::bf16, DType::f16})
      for (bool quantized : {false, true})
        for (bool transposed : {false, true})
          for (Order in : {Order::tokens, Order::features, Order::padded})
            for (Order out : {Order::tokens, Order::features}) {
              const int64_t rows = 1 + int64_t(random() % unsigned(2 * shape.rows + 20));
              const int64_t cols = 1 + int64_t(random() % unsigned(2 * shape.cols + 20));
              check_product(shape, dtype, quantized, transposed, in, out == Order::tokens && rows % 2 ? in : out, rows,
                            cols, token_counts[random() % (rows * cols > 4096 ? 6 : 8)], random);
            }
}

TEST(products_without_rows_columns_or_blocks) {
  Random random(51);
  for (BlockShape shape : {BlockShape{1, 1}, {4, 1}, {16, 16}})
    for (bool quantized : {false, true})
      for (bool transposed : {false, true})
        for (auto [rows, cols] : {std::pair<int64_t, int64_t>{0, 33}, {33, 0}, {0, 0}})
          check_product(shape, DType::bf16, quantized, transposed, Order::tokens, Order::tokens, rows, cols, 17,
                        random);
}

/// Many tokens and blocks per row: the tiles that small problems never fill.
TEST(products_of_several_tiles) {
  Random random(52);
  for (BlockShape shape : {BlockShape{1, 16}, {4, 1}, {16, 16}, {64, 64}})
    for (DType dtype : {DType::f32, DType::bf16})
      for (bool quantized : {false, true})
        for (Order order : {Order::tokens, Order::features})
          check_product(shape, dtype, quantized, order == Order::features && !quantized, order, order, 83, 131, 100,
                        random);
}

TEST(sddmm_agrees_on_every_instruction_set) {
  Random random(53);
  for (BlockShape shape : block_shapes)
    for (DType dtype : {DType::f32, DType::bf16, DType::f16})
      for (Order a_order : {Order::tokens, Order::features})
        for (Order b_order : {Order::tokens, Order::features})
          for (int64_t inner : {0, 1, 5, 33, 70}) {
            const int64_t rows = 1 + int64_t(random() % unsigned(2 * shape.rows + 9));
            const int64_t cols = 1 + int64_t(random() % unsigned(2 * shape.cols + 9));
            Weight weight(shape, rows, cols, 1, random() % 2, dtype, false, random);
            Matrix a(dtype, rows, inner, a_order), b(dtype, inner, cols, b_order);
            a.randomize(random), b.randomize(random);
            BlockSddmm call;
            call.pattern = weight.pattern, call.dtype = dtype, call.inner = inner;
            call.a = a.bytes.get(), call.a_row = a.token, call.a_inner = a.feature;
            call.b = b.bytes.get(), call.b_inner = b.token, call.b_col = b.feature;
            std::unique_ptr<Matrix> want;
            for_each_isa([&](const char* isa) {
              std::unique_ptr<Matrix> got(
                  new Matrix(dtype, weight.pattern.nnz, int64_t(shape.rows) * shape.cols, Order::tokens));
              got->fill(NAN);
              call.values = got->bytes.get();
              CHECK_OK(block_sddmm(call, thread_pool(2)));
              if (!want) want = std::move(got);
              if (!got) return;
              const int64_t at = first_difference(*got, *want);
              CHECK(at < 0, "%s, %d x %d blocks, %s, %d x %d x %d: element %d is %g, %g wanted", isa, shape.rows,
                    shape.cols, name(dtype), int(rows), int(inner), int(cols), int(at),
                    load(got->bytes.get(), at, dtype), load(want->bytes.get(), at, dtype));
            });
          }
}

TEST(transpose_finds_every_block_under_its_column) {
  Random random(54);
  for (bool wide : {false, true})
    for (auto [rows, cols] : {std::pair<int64_t, int64_t>{1, 1}, {40, 200}, {200, 40}, {0, 5}, {5, 0}}) {
      Weight weight({8, 4}, rows, cols, 2, wide, DType::f32, false, random);
      BlockSparseTranspose t = weight.transpose();
      const BlockSparsePattern& p = weight.pattern;
      CHECK_OK(block_sparse_check_transpose(p, t));
      std::vector<int> seen(size_t(p.nnz), 0);
      for (int64_t j = 0; j < p.col_blocks(); ++j)
        for (int64_t at = t.ccol[j]; at < t.ccol[j + 1]; ++at) {
          const int64_t block = t.entry[at], row = t.row[at];
          ++seen[size_t(block)];
          CHECK(p.col[block] == j && p.crow[row] <= block && block < p.crow[row + 1], "block %d", int(block));
          CHECK(at == t.ccol[j] || t.row[at - 1] <= row, "column %d: rows descend", int(j));
        }
      for (int64_t i = 0; i < p.nnz; ++i) CHECK(seen[size_t(i)] == 1, "block %d: %d times", int(i), seen[size_t(i)]);
    }
}

TEST(products_refuse_bad_indices) {
  Random random(55);
  for (bool wide : {false, true})
    for (int64_t bad : {int64_t(-1), int64_t(9), int64_t(INT32_MAX)})
      for (bool in_crow : {false, true}) {
        Weight weight({8, 8}, 40, 72, 2, wide, DType::f32, false, random);
        Indices& damaged = in_crow ? *weight.crow : *weight.col;
        if (wide) damaged.wide_numbers[2] = bad;
        if (!wide) damaged.narrow_numbers[2] = int32_t(bad);
        Matrix input(DType::f32, 3, 72, Order::tokens), output(DType::f32, 3, 40, Order::tokens);
        BlockSparseProduct call;
        call.pattern = weight.pattern, call.values = weight.values.get(), call.tokens = 3;
        call.input = input.input(), call.output = output.output();
        const Status status = block_sparse_product(call, thread_pool(1));
        const std::string start = in_crow ? "crow_indices[2] is" : "col_indices[2] is";
        CHECK(!status.ok() && std::string(status.message).find(start) == 0, "%s", status.message);
      }
}

}  // namespace
}  // namespace sparsekit::testing

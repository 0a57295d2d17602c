// The block-sparse products on CUDA through the C++ API: every kernel once, on small problems in exact buffers, for
// compute-sanitizer (see cuda_test.cpp). Values are small integers, so sums are exact in any order.
#include <cuda_runtime_api.h>

#include <cstring>
#include <list>

#include "sparsekit/attention.h"
#include "sparsekit/matmul.h"
#include "testing.h"

namespace sparsekit::testing {
namespace {

class Card {
 public:
  explicit Card(int compute_capability) {
    context.compute_capability = compute_capability, context.multiprocessors = 1;
  }
  ~Card() {
    for (void* memory : memory_) cudaFree(memory);
  }
  void* make(size_t bytes) {
    void* memory = nullptr;
    CHECK(cudaMalloc(&memory, bytes ? bytes : 1) == cudaSuccess, "no device memory");
    cudaMemset(memory, 0xff, bytes);
    memory_.push_back(memory);
    return memory;
  }
  template <class T>
  void* copy(const std::vector<T>& from) {
    void* to = make(from.size() * sizeof(T));
    cudaMemcpy(to, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice);
    return to;
  }
  const CudaContext& with(size_t bytes) {
    context.workspace = make(bytes);
    context.workspace_bytes = bytes;
    return context;
  }
  CudaContext context;

 private:
  std::list<void*> memory_;
};

/// Numbers of a dtype (bf16 or fp32), and as floats.
struct Numbers {
  DType dtype;
  std::vector<float> floats;

  Numbers(DType type, size_t count) : dtype(type), floats(count) {}
  Numbers(DType type, Random& random, size_t count) : Numbers(type, count) {
    for (float& x : floats) x = float(int(random() % 5) - 2);
  }
  void* on(Card& card) const {
    if (dtype == DType::f32) return card.copy(floats);
    std::vector<uint16_t> halves;
    for (float x : floats) {
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      halves.push_back(uint16_t(bits >> 16));
    }
    return card.copy(halves);
  }
  void fetch(const void* from) {
    std::vector<uint16_t> halves(dtype == DType::f32 ? 0 : floats.size());
    void* to = dtype == DType::f32 ? static_cast<void*>(floats.data()) : halves.data();
    const cudaError_t code = cudaMemcpy(to, from, floats.size() * size_t(size_of(dtype)), cudaMemcpyDeviceToHost);
    CHECK(code == cudaSuccess, "%s", cudaGetErrorString(code));
    for (size_t i = 0; i < halves.size(); ++i) {
      const uint32_t bits = uint32_t(halves[i]) << 16;
      std::memcpy(&floats[i], &bits, 4);
    }
  }
};

/// x W^T, x W and the sampled product of a weight of `rows` x `cols`, half of whose blocks are stored; `bad`: every
/// fifth column leads nowhere.
void check(int card_of, DType dtype, int64_t rows, int64_t cols, int R, int C, int64_t tokens, bool bad) {
  Random random(unsigned(rows + 7 * cols + tokens));
  Card card(card_of);
  BlockSparsePattern p;
  p.rows = rows, p.cols = cols, p.block_rows = R, p.block_cols = C;
  std::vector<int32_t> crow = {0}, col;
  for (int64_t i = 0; i < p.row_blocks(); ++i) {
    for (int64_t j = 0; j < p.col_blocks(); ++j) {
      if (random() % 2) col.push_back(bad && random() % 5 == 0 ? int32_t(random()) | 0x8000 : int32_t(j));
    }
    crow.push_back(int32_t(col.size()));
  }
  p.nnz = int64_t(col.size());
  p.crow.data = card.copy(crow), p.col.data = card.copy(col);
  const Numbers values(dtype, random, size_t(p.nnz * R * C)), x(dtype, random, size_t(tokens * cols)),
      y(dtype, random, size_t(tokens * rows));
  std::vector<float> dense(size_t(rows * cols));
  for (int64_t i = 0; i < p.row_blocks(); ++i) {
    for (int64_t b = crow[size_t(i)]; b < crow[size_t(i + 1)]; ++b) {
      for (int64_t r = 0; r < R; ++r) {
        for (int64_t c = 0; c < C; ++c) {
          const int64_t row = i * R + r, column = col[size_t(b)] * int64_t(C) + c;
          if (row >= rows || col[size_t(b)] < 0 || column >= cols) continue;
          dense[size_t(row * cols + column)] += values.floats[size_t((b * R + r) * C + c)];
        }
      }
    }
  }
  void *on_values = values.on(card), *on_x = x.on(card), *on_y = y.on(card);

  TransposeBlockSparse transpose;
  transpose.pattern = p;
  transpose.ccol = card.make(size_t(p.col_blocks() + 1) * 4);
  transpose.row = card.make(size_t(p.nnz) * 4), transpose.entry = card.make(size_t(p.nnz) * 4);
  CHECK_OK(transpose_block_sparse(transpose, card.with(transpose_block_sparse_workspace(transpose))));

  for (bool transposed : {false, true}) {
    const int64_t inner = transposed ? rows : cols, features = transposed ? cols : rows;
    Numbers out(dtype, size_t(tokens * features));
    BlockSparseProduct product;
    product.pattern = p;
    product.values = on_values;
    product.dtype = dtype;
    product.tokens = tokens;
    product.transposed = transposed;
    product.transpose.ccol.data = transpose.ccol;
    product.transpose.row.data = transpose.row, product.transpose.entry.data = transpose.entry;
    product.input = {transposed ? on_y : on_x, inner, 1};
    product.output = {card.make(out.floats.size() * size_t(size_of(dtype))), features, 1};
    CHECK_OK(block_sparse_product(product, card.with(block_sparse_product_workspace(product, card.context))));
    out.fetch(product.output.data);
    int wrong = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t n = 0; n < features; ++n) {
        float sum = 0;
        for (int64_t k = 0; k < inner; ++k) {
          sum += (transposed ? y : x).floats[size_t(t * inner + k)] *
                 dense[size_t(transposed ? k * cols + n : n * cols + k)];
        }
        wrong += std::fabs(out.floats[size_t(t * features + n)] - sum) > std::fabs(sum) / 128;
      }
    }
    CHECK(wrong == 0, "%d of %lld numbers, %d x %d, %lld tokens, transposed %d", wrong, (long long)(tokens * features),
          R, C, (long long)tokens, transposed);
  }

  Numbers sampled(dtype, values.floats.size());
  BlockSddmm sddmm;
  sddmm.pattern = p;
  sddmm.dtype = dtype;
  sddmm.inner = tokens;
  sddmm.a = on_y, sddmm.a_row = 1, sddmm.a_inner = rows;
  sddmm.b = on_x, sddmm.b_inner = cols, sddmm.b_col = 1;
  sddmm.values = card.make(sampled.floats.size() * size_t(size_of(dtype)));
  CHECK_OK(block_sddmm(sddmm, card.with(block_sddmm_workspace(sddmm, card.context))));
  sampled.fetch(sddmm.values);
  int wrong = 0;
  for (int64_t i = 0; i < p.row_blocks(); ++i) {
    for (int64_t b = crow[size_t(i)]; b < crow[size_t(i + 1)]; ++b) {
      for (int64_t r = 0; r < R; ++r) {
        for (int64_t c = 0; c < C; ++c) {
          const int64_t row = i * R + r, column = col[size_t(b)] * int64_t(C) + c;
          float sum = 0;
          for (int64_t t = 0; t < tokens && row < rows && col[size_t(b)] >= 0 && column < cols; ++t) {
            sum += y.floats[size_t(t * rows + row)] * x.floats[size_t(t * cols + column)];
          }
          wrong += std::fabs(sampled.floats[size_t((b * R + r) * C + c)] - sum) > std::fabs(sum) / 128;
        }
      }
    }
  }
  CHECK(wrong == 0, "%d of %zu sampled numbers, %d x %d, %lld tokens", wrong, sampled.floats.size(), R, C,
        (long long)tokens);
}

TEST(cuda_products) {
  for (bool bad : {false, true}) {
    check(80, DType::bf16, 40, 48, 8, 8, 5, bad);        // few tokens
    check(80, DType::bf16, 136, 200, 64, 64, 50, bad);   // steps of one block row
    check(80, DType::bf16, 264, 136, 16, 16, 300, bad);  // panels
    check(80, DType::bf16, 264, 128, 32, 32, 300, bad);
    check(80, DType::f32, 72, 100, 32, 16, 40, bad);
    check(80, DType::f32, 41, 37, 5, 3, 20, bad);  // number by number
  }
}

TEST(cuda_products_on_hopper) {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (major != 9) return;
  for (bool bad : {false, true}) {
    check(90, DType::bf16, 264, 200, 16, 16, 300, bad);  // few blocks of a panel, and beyond the matrix
    check(90, DType::bf16, 1056, 96, 32, 32, 130, bad);
    check(90, DType::bf16, 136, 200, 16, 64, 16, bad);  // few tokens
    check(90, DType::bf16, 384, 1024, 128, 128, 1, bad);
    check(90, DType::bf16, 256, 192, 64, 64, 100, bad);
    check(90, DType::bf16, 256, 384, 128, 128, 100, bad);
  }
}

}  // namespace
}  // namespace sparsekit::testing

// Rows that are sums of rows: scatter_tokens that adds or averages, merge_tokens, and the gradient of a gather.
//
//   out[s, o, r] = base[s, o, r] + sum over the entries e of row r of coefficient_e in[s, o, row_e]
//
// A row of one entry with coefficient 1 and no base is a copy, bit for bit; one without entries is base, or zeros.
//
// Tiling: as in cuda_move.cu, a thread owns the same vector of a result's row for all entries and adds them in their
// order, in registers: no atomics, the same bits in every run. kEntries entries of kVectors rows are in flight at a
// time. Bound: memory, each row of the input and of the result moves once; the entries' numbers come from L1, where
// the lanes of a row share them. Source: segmented reduction over a sorted index (torch_scatter's segment_csr).
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdlib>
#include <initializer_list>

#include "tokens/cuda_implementations.h"
#include "tokens/cuda_launch.h"
#include "tokens/cuda_numbers.cuh"
#include "tokens/cuda_rows.cuh"

namespace sparsekit::cuda {
namespace {

int variant(const char* name) { return getenv(name) ? atoi(getenv(name)) : 0; }

struct Part {
  Shape shape;
  Rows in, base, out;
  TokenType type;
  bool vectors;  // of 16 bytes; else single elements
};

struct Sums {
  Side from, to;
  const int32_t* begin;
  const int32_t* count;
  int64_t index_rows, per_row;
  const int32_t* rows;
  const void* coefficients;
  bool coefficients_f64, base_always;
  int tensors;
  Part part[kMostTensors];
};

template <class Sum>
__device__ __forceinline__ Sum coefficient_at(const Sums& a, int64_t entry) {
  if (!a.coefficients) return Sum(1);
  return a.coefficients_f64 ? Sum(__ldg(static_cast<const double*>(a.coefficients) + entry))
                            : Sum(__ldg(static_cast<const float*>(a.coefficients) + entry));
}

/// Sum: what a row is added in (float; double; uint64_t for integers, which wrap). Width: elements of a vector.
template <class Element, class Sum, int Width, class Int, int kVectors, int kEntries>
__device__ void sum_part(const Sums& a, const Part& part, int64_t block) {
  using Values = Pack<Element, Width>;
  const Int start = Int(block) * Int(kVectors * kRowThreads) + threadIdx.x;
  Values* to[kVectors];
  const char* in[kVectors];          // the rows of the sample, at this column
  const Values* base[kVectors];
  int64_t first[kVectors], limit[kVectors];
  int32_t count[kVectors], found[kVectors];
  bool same[kVectors];  // one entry so far, with coefficient 1
  Values only[kVectors];
  Sum sum[kVectors][Width];
  int32_t most = 0;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const Int v = start + Int(i) * kRowThreads;
    to[i] = nullptr;
    base[i] = nullptr;
    in[i] = nullptr;
    count[i] = found[i] = 0;
    first[i] = limit[i] = 0;
    same[i] = false;
#pragma unroll
    for (int d = 0; d < Width; ++d) sum[i][d] = Sum(0);
    if (v >= Int(part.shape.total)) continue;
    const Place at = place_of<Int>(part.shape, a.to, v);
    to[i] = reinterpret_cast<Values*>(part.out.data) + v;
    if (part.base.data) base[i] = reinterpret_cast<const Values*>(base_row(part.base, a.to, at)) + at.column;
    if (at.sample < 0) continue;
    limit[i] = a.from.count(at.sample);
    in[i] = part.in.at(a.from, at.sample, at.outer, 0) + at.column * sizeof(Values);
    if (a.per_row > 0) {
      first[i] = (at.sample * a.index_rows + at.row) * a.per_row;
      count[i] = at.row < a.index_rows ? int32_t(a.per_row) : 0;
    } else {
      first[i] = __ldg(a.begin + at.flat);
      count[i] = __ldg(a.count + at.flat);
    }
    most = max(most, count[i]);
    if (!a.base_always || !base[i] || count[i] == 0) continue;
    const Values under = *base[i];
#pragma unroll
    for (int d = 0; d < Width; ++d) sum[i][d] = widen<Sum>(under.at[d]);
  }
  for (int32_t e = 0; e < most; e += kEntries) {
    Values value[kEntries][kVectors];
    Sum c[kEntries][kVectors];
    bool used[kEntries][kVectors];
#pragma unroll
    for (int u = 0; u < kEntries; ++u) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        used[u][i] = false;
        if (e + u >= count[i]) continue;
        const int64_t entry = first[i] + e + u;
        const int64_t row = __ldg(a.rows + entry);
        c[u][i] = coefficient_at<Sum>(a, entry);
        if (row < 0 || row >= limit[i]) continue;
        used[u][i] = true;
        value[u][i] = load_once(reinterpret_cast<const Values*>(in[i] + row * part.in.row));
      }
    }
#pragma unroll
    for (int u = 0; u < kEntries; ++u) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        if (!used[u][i]) continue;
        same[i] = found[i] == 0 && c[u][i] == Sum(1);
        if (found[i]++ == 0) only[i] = value[u][i];
#pragma unroll
        for (int d = 0; d < Width; ++d) sum[i][d] = multiply_add(c[u][i], widen<Sum>(value[u][i].at[d]), sum[i][d]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (!to[i]) continue;
    Values result;
    if (found[i] == 0) {
      result = base[i] ? *base[i] : Values();
    } else if (same[i] && !(a.base_always && base[i])) {
      result = only[i];
    } else {
#pragma unroll
      for (int d = 0; d < Width; ++d) result.at[d] = narrow<Element>(sum[i][d]);
    }
    *to[i] = result;
  }
}

template <class Element, class Sum, class Int, int kVectors, int kEntries>
__device__ __forceinline__ void sum_either(const Sums& a, const Part& part, int64_t block) {
  if (part.vectors) {
    sum_part<Element, Sum, 16 / sizeof(Element), Int, kVectors, kEntries>(a, part, block);
  } else {
    sum_part<Element, Sum, 1, Int, kVectors, kEntries>(a, part, block);
  }
}

/// Sums in fp32.
template <class Int, int kVectors, int kEntries, int kBlocks>
__global__ void __launch_bounds__(kRowThreads, kBlocks) sum_f32(const __grid_constant__ Sums a) {
  const Part& part = a.part[part_of_block(a.part, a.tensors)];
  const int64_t block = int64_t(blockIdx.x) - part.shape.first_block;
  switch (part.type) {
    case TokenType::f32: return sum_either<float, float, Int, kVectors, kEntries>(a, part, block);
    case TokenType::f16: return sum_either<__half, float, Int, kVectors, kEntries>(a, part, block);
    default: return sum_either<__nv_bfloat16, float, Int, kVectors, kEntries>(a, part, block);
  }
}

/// Sums in float64 and of integers.
template <class Int>
__global__ void __launch_bounds__(kRowThreads) sum_wide(const __grid_constant__ Sums a) {
  const Part& part = a.part[part_of_block(a.part, a.tensors)];
  const int64_t block = int64_t(blockIdx.x) - part.shape.first_block;
  switch (part.type) {
    case TokenType::f64: return sum_either<double, double, Int, 2, 2>(a, part, block);
    case TokenType::f32: return sum_either<float, double, Int, 2, 2>(a, part, block);
    case TokenType::f16: return sum_either<__half, double, Int, 2, 2>(a, part, block);
    case TokenType::bf16: return sum_either<__nv_bfloat16, double, Int, 2, 2>(a, part, block);
    case TokenType::i32: return sum_either<int32_t, uint64_t, Int, 2, 2>(a, part, block);
    default: return sum_either<long long, uint64_t, Int, 2, 2>(a, part, block);
  }
}

bool in_f32(const DevicePlan& plan, TokenType type) {
  return !plan.coefficients_f64 && (type == TokenType::f32 || type == TokenType::f16 || type == TokenType::bf16);
}

Status launch(const Sums& sums, int64_t blocks, bool narrow, bool wide, const CudaContext& context) {
  if (blocks > INT32_MAX) {
    return error(Status::Kind::unsupported, "tensors: the result has %lld KB; CUDA takes 16 TB", (long long)blocks * 8);
  }
  using Kernel = void (*)(Sums);
  const int v = variant("TS");
  Kernel kernel = !narrow   ? (wide ? sum_wide<uint64_t> : sum_wide<uint32_t>)
                  : wide    ? sum_f32<uint64_t, 2, 2, 1>
                  : v == 12 ? sum_f32<uint32_t, 1, 2, 1>
                  : v == 14 ? sum_f32<uint32_t, 1, 4, 1>
                  : v == 21 ? sum_f32<uint32_t, 2, 1, 1>
                  : v == 41 ? sum_f32<uint32_t, 4, 1, 1>
                  : v == 42 ? sum_f32<uint32_t, 4, 2, 1>
                  : v == 23 ? sum_f32<uint32_t, 2, 2, 3>
                  : v == 13 ? sum_f32<uint32_t, 1, 2, 4>
                            : sum_f32<uint32_t, 2, 2, 1>;
  if (blocks > 0) start(kernel, unsigned(blocks), kRowThreads, 0, context.stream, sums);
  return started("adding tokens");
}

}  // namespace

Status sum_rows(const DevicePlan& plan, const TokenTensor* in, const TokenTensor* base, const TokenTensor* out,
                int64_t tensors, const CudaContext& context) {
  for (int64_t i = 0; i < tensors; ++i) {
    if (out[i].type != TokenType::bytes) continue;
    return error(Status::Kind::unsupported,
                 "tensors[%lld]: this dtype cannot be summed; supported: float32, float16, bfloat16, float64, int32, "
                 "int64",
                 (long long)i);
  }
  for (bool narrow : {true, false}) {
    Sums sums{Side(plan.from), Side(plan.to),     plan.begin,           plan.count,       plan.index_rows, plan.per_row,
              plan.rows,       plan.coefficients, plan.coefficients_f64, plan.base_always, 0,               {}};
    int64_t blocks = 0;
    const int64_t kBlockVectors = (narrow && variant("TS") ? variant("TS") / 10 : 2) * kRowThreads;
    bool wide = false;
    for (int64_t i = 0; i < tensors; ++i) {
      if (in_f32(plan, out[i].type) != narrow) continue;
      Part part;
      part.type = out[i].type;
      part.vectors = vector_bytes({&in[i], base ? &base[i] : nullptr, &out[i]}) == 16;
      part.shape = Shape(out[i], sums.to, part.vectors ? 16 : out[i].element_size);
      part.shape.first_block = blocks;
      part.in = Rows(in[i]);
      if (base) part.base = Rows(base[i]);
      part.out = Rows(out[i]);
      if (part.shape.total == 0) continue;
      blocks += (part.shape.total + kBlockVectors - 1) / kBlockVectors;
      wide |= part.shape.total > INT32_MAX - 8 * kRowThreads;
      sums.part[sums.tensors++] = part;
      if (sums.tensors < kMostTensors) continue;
      Status status = launch(sums, blocks, narrow, wide, context);
      if (!status.ok()) return status;
      sums.tensors = 0;
      blocks = 0;
      wide = false;
    }
    Status status = sums.tensors > 0 ? launch(sums, blocks, narrow, wide, context) : Status{};
    if (!status.ok()) return status;
  }
  return {};
}

}  // namespace sparsekit::cuda

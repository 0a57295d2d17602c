// Rows that are sums of rows: scatter_tokens that adds or averages, merge_tokens, and the gradient of a gather.
//
//   out[s, o, r] = base[s, o, r] + sum over the entries e of row r of coefficient_e in[s, o, row_e]
//
// A row of one entry with coefficient 1 and no base is a copy, bit for bit; one without entries is base, or zeros.
//
// Tiling: a group of up to 32 lanes owns kVectors vectors each of one row of the result, reads the row's entries once
// for all of them and adds in their order, in registers: no atomics, the same bits in every run. kEntries rows are in
// flight at a time. Rows without entries, and copies, take a short way. Bound: memory, each row of the input and of the
// result moves once; with a vector per thread it was bound by the address arithmetic and by occupancy (122 registers),
// at a third of a copy. Source: segmented reduction over a sorted index (torch_scatter's segment_csr).
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <initializer_list>

#include "tokens/cuda_implementations.h"
#include "tokens/cuda_launch.h"
#include "tokens/cuda_numbers.cuh"
#include "tokens/cuda_rows.cuh"

namespace sparsekit::cuda {
namespace {

// Of the shapes tried on an H200 (kVectors kEntries blocks per multiprocessor, so registers) 2 2 4 is the fastest: two
// rows of 8 KB into one at 0.79 of a copy, where 4 2 2 had 0.64, 4 1 3 0.58 and 2 4 3 0.55.
constexpr int kVectors = 2;  // of 16 bytes per lane
constexpr int kEntries = 2;
constexpr int kBlocks = 4;

struct Part {
  Shape shape;  // `vectors` are groups' chunks here
  Rows in, base, out;
  TokenType type;
  bool wide;      // vectors of 16 bytes; else single elements
  bool stream;    // the result is larger than the cache
  int vectors;    // of a row
  int log_group;  // of the lanes that share a row
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
template <class Element, class Sum, int Width, class Int>
__device__ __forceinline__ void sum_part(const Sums& a, const Part& part, int64_t block) {
  using Values = Pack<Element, Width>;
  const Int unit = (Int(block) * Int(kRowThreads) + threadIdx.x) >> part.log_group;
  if (unit >= Int(part.shape.total)) return;
  const Int row =
      sizeof(Int) == 4 ? Int(part.shape.vectors.divide(uint32_t(unit))) : unit / Int(part.shape.vectors_wide);
  const int group = 1 << part.log_group;
  const int column = int(unit - row * Int(part.shape.vectors_wide)) * group * kVectors + (threadIdx.x & (group - 1));
  const int left = part.vectors - column;  // vector i of this thread exists where i * group < left
  const Place at = place_of_row<Int>(part.shape, a.to, row);
  Values* to = reinterpret_cast<Values*>(part.out.data) + int64_t(row) * part.vectors + column;
  const Values* base =
      part.base.data ? reinterpret_cast<const Values*>(base_row(part.base, a.to, at)) + column : nullptr;

  int64_t first = 0;
  int32_t count = 0, limit = 0;
  const char* in = nullptr;  // the rows of the sample, at this column
  if (at.sample >= 0) {
    limit = int32_t(a.from.count(at.sample));
    in = part.in.at(a.from, at.sample, at.outer, 0) + int64_t(column) * sizeof(Values);
    if (a.per_row > 0) {
      first = (at.sample * a.index_rows + at.row) * a.per_row;
      count = at.row < a.index_rows ? int32_t(a.per_row) : 0;
    } else {
      first = __ldg(a.begin + at.flat);
      count = __ldg(a.count + at.flat);
    }
  }
  const bool under = a.base_always && base;
  const Values* copied = count == 0 ? base : nullptr;
  bool copies = count == 0;
  if (count == 1 && !under) {
    const int64_t source = __ldg(a.rows + first);
    copies = coefficient_at<Sum>(a, first) == Sum(1);
    copied = source < 0 || source >= limit ? base : reinterpret_cast<const Values*>(in + source * part.in.row);
  }
  if (copies) {
    Values value[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      value[i] = Values();
      if (copied && i * group < left) value[i] = load_once(copied + i * group);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (i * group < left) store_result(to + i * group, value[i], part.stream);
    }
    return;
  }

  Sum sum[kVectors][Width];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    Values value = Values();
    if (under && i * group < left) value = load_once(base + i * group);
#pragma unroll
    for (int d = 0; d < Width; ++d) sum[i][d] = widen<Sum>(value.at[d]);
  }
  bool found = false;
  for (int32_t e = 0; e < count; e += kEntries) {
    Values value[kEntries][kVectors];
    Sum c[kEntries];
    int64_t source[kEntries];
#pragma unroll
    for (int u = 0; u < kEntries; ++u) {
      source[u] = e + u < count ? __ldg(a.rows + first + e + u) : -1;
      c[u] = e + u < count ? coefficient_at<Sum>(a, first + e + u) : Sum(0);
    }
#pragma unroll
    for (int u = 0; u < kEntries; ++u) {
      if (source[u] >= limit) source[u] = -1;
      const Values* from = reinterpret_cast<const Values*>(in + source[u] * part.in.row);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        value[u][i] = Values();
        if (source[u] >= 0 && i * group < left) value[u][i] = load_once(from + i * group);
      }
    }
#pragma unroll
    for (int u = 0; u < kEntries; ++u) {
      if (source[u] < 0) continue;
      found = true;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
#pragma unroll
        for (int d = 0; d < Width; ++d) sum[i][d] = multiply_add(c[u], widen<Sum>(value[u][i].at[d]), sum[i][d]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (i * group >= left) continue;
    Values result = Values();
    if (found) {
#pragma unroll
      for (int d = 0; d < Width; ++d) result.at[d] = narrow<Element>(sum[i][d]);
    } else if (base) {
      result = load_once(base + i * group);
    }
    store_result(to + i * group, result, part.stream);
  }
}

template <class Element, class Sum, class Int>
__device__ __forceinline__ void sum_either(const Sums& a, const Part& part, int64_t block) {
  if (part.wide) {
    sum_part<Element, Sum, 16 / sizeof(Element), Int>(a, part, block);
  } else {
    sum_part<Element, Sum, 1, Int>(a, part, block);
  }
}

/// Sums in fp32.
template <class Int>
__global__ void __launch_bounds__(kRowThreads, kBlocks) sum_f32(const __grid_constant__ Sums a) {
  const Part& part = a.part[part_of_block(a.part, a.tensors)];
  const int64_t block = int64_t(blockIdx.x) - part.shape.first_block;
  switch (part.type) {
    case TokenType::f32: return sum_either<float, float, Int>(a, part, block);
    case TokenType::f16: return sum_either<__half, float, Int>(a, part, block);
    default: return sum_either<__nv_bfloat16, float, Int>(a, part, block);
  }
}

/// Sums in float64 and of integers.
template <class Int>
__global__ void __launch_bounds__(kRowThreads) sum_wide(const __grid_constant__ Sums a) {
  const Part& part = a.part[part_of_block(a.part, a.tensors)];
  const int64_t block = int64_t(blockIdx.x) - part.shape.first_block;
  switch (part.type) {
    case TokenType::f64: return sum_either<double, double, Int>(a, part, block);
    case TokenType::f32: return sum_either<float, double, Int>(a, part, block);
    case TokenType::f16: return sum_either<__half, double, Int>(a, part, block);
    case TokenType::bf16: return sum_either<__nv_bfloat16, double, Int>(a, part, block);
    case TokenType::i32: return sum_either<int32_t, uint64_t, Int>(a, part, block);
    default: return sum_either<long long, uint64_t, Int>(a, part, block);
  }
}

bool in_f32(const DevicePlan& plan, TokenType type) {
  return !plan.coefficients_f64 && (type == TokenType::f32 || type == TokenType::f16 || type == TokenType::bf16);
}

Status launch(const Sums& sums, int64_t blocks, bool narrow, bool wide, const CudaContext& context) {
  if (blocks > INT32_MAX) {
    return error(Status::Kind::unsupported, "tensors: the result has %lld KB; CUDA takes 16 TB", (long long)blocks * 8);
  }
  auto* kernel =
      narrow ? (wide ? sum_f32<uint64_t> : sum_f32<uint32_t>) : (wide ? sum_wide<uint64_t> : sum_wide<uint32_t>);
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
    Sums sums{Side(plan.from),       Side(plan.to),    plan.begin, plan.count,
              plan.index_rows,       plan.per_row,     plan.rows,  plan.coefficients,
              plan.coefficients_f64, plan.base_always, 0,          {}};
    int64_t blocks = 0;
    bool wide = false;
    for (int64_t i = 0; i < tensors; ++i) {
      if (in_f32(plan, out[i].type) != narrow) continue;
      Part part;
      part.type = out[i].type;
      part.wide = vector_bytes({&in[i], base ? &base[i] : nullptr, &out[i]}) == 16;
      const int64_t vectors = part.wide ? out[i].row_bytes() / 16 : out[i].inner;
      if (vectors > INT32_MAX / 2) {
        return error(Status::Kind::unsupported,
                     "tensors[%lld]: rows of %lld bytes; CUDA sums rows of up to 2^30 elements", (long long)i,
                     (long long)out[i].row_bytes());
      }
      part.vectors = int(vectors);
      part.log_group = 0;
      while (part.log_group < 5 && (kVectors << part.log_group) < vectors) ++part.log_group;
      const int64_t chunk = kVectors << part.log_group, chunks = (vectors + chunk - 1) / chunk;
      part.shape = Shape(out[i], sums.to, chunks);
      part.shape.first_block = blocks;
      part.in = Rows(in[i]);
      if (base) part.base = Rows(base[i]);
      part.out = Rows(out[i]);
      part.stream = part.shape.total / std::max<int64_t>(1, chunks) * out[i].row_bytes() > kStreamBytes;
      if (part.shape.total == 0) continue;
      const int64_t own = ((part.shape.total << part.log_group) + kRowThreads - 1) / kRowThreads;
      blocks += own;
      wide |= own * kRowThreads > INT32_MAX;
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

// Rows that are copies of rows: gather_tokens, a scatter that copies, and the gradients of sums.
//
//   out[s, o, r] = in[s, o, index[s, r]], else base[s, o, r], else 0        any number of tensors, one launch
//
// Tiling: a block owns kVectors x 128 consecutive vectors of one result; a thread's vectors are 128 apart, so each of
// its loads and stores is coalesced with its neighbours'. All index entries are fetched first, then all rows, then all
// are stored: kVectors rows in flight per thread. Bound: memory, each row is read once and written once; L2, which
// serves half of all accesses from its far half and so looks up 1.5 times the bytes, is 90 % busy then (H200). What
// counts is how soon the loads start, and how many warps there are: plain results have a kernel of 32 registers, all
// 2,048 threads. Ordinary loads and stores: asked to leave L2 first (st.cs, ld with L1::no_allocate) either is 2 to 3 %
// slower, as are copies through shared memory by TMA. A table of the tensors travels as a kernel argument, so nothing
// is copied to the device before the launch.
#include <initializer_list>

#include "tokens/cuda_implementations.h"
#include "tokens/cuda_launch.h"
#include "tokens/cuda_rows.cuh"

namespace sparsekit::cuda {
namespace {

constexpr int kThreads = 128;  // 256: 5 % slower
constexpr int kVectors = 2;
constexpr int64_t kBlockVectors = kVectors * kThreads;

struct Part {
  Shape shape;
  Rows in, base, out;
  int vector_bytes;
};

struct Moves {
  Side from, to;
  const void* index;
  bool wide, flat;
  int64_t index_rows;
  int tensors;
  Part part[kMostTensors];
};

/// Where a vector stands and the index entry of its row. Entries are asked for, for all vectors of a thread, before any
/// is looked at: widening one (its sign) would wait for it.
struct Source {
  Place at;
  int64_t token;  // of an int32 index: its bits, the upper ones 0
};

/// kPlain: neither packed nor with a base.
template <bool kPlain, class Int>
__device__ __forceinline__ Source find_token(const Moves& a, const Part& part, Int v) {
  Source source;
  source.token = -1;
  source.at = place_of<Int>(part.shape, kPlain ? Side() : a.to, v);
  if constexpr (kPlain) source.at.flat = source.at.sample * a.to.rows + source.at.row;
  if (source.at.sample < 0 || source.at.row >= a.index_rows) return source;
  const int64_t entry = a.flat ? source.at.flat : source.at.sample * a.index_rows + source.at.row;
  source.token = a.wide ? __ldg(static_cast<const long long*>(a.index) + entry)
                        : int64_t(__ldg(static_cast<const uint32_t*>(a.index) + entry));
  return source;
}

template <bool kPlain, class Vector>
__device__ __forceinline__ const Vector* vector_of(const Moves& a, const Part& part, const Source& source) {
  const Place& at = source.at;
  const int64_t token = a.wide ? source.token : int32_t(source.token);
  const char* row = nullptr;
  if constexpr (kPlain) {
    if (token < 0 || token >= a.from.rows) return nullptr;
    row = part.in.data + at.outer * part.in.outer + at.sample * part.in.sample + token * part.in.row;
  } else if (at.sample >= 0 && token >= 0 && token < a.from.count(at.sample)) {
    row = part.in.at(a.from, at.sample, at.outer, token);
  } else if (part.base.data) {
    row = base_row(part.base, a.to, at);
  } else {
    return nullptr;
  }
  return reinterpret_cast<const Vector*>(row) + at.column;
}

template <bool kPlain, class Vector, class Int>
__device__ __forceinline__ void move_part(const Moves& a, const Part& part, int64_t block) {
  const Int first = Int(block) * Int(kBlockVectors) + threadIdx.x, total = Int(part.shape.total);
  Source source[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const Int v = first + Int(i) * kThreads;
    source[i] = find_token<kPlain, Int>(a, part, v < total ? v : total - 1);
  }
  Vector value[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const Vector* from = vector_of<kPlain, Vector>(a, part, source[i]);
    value[i] = from ? *from : Vector();
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const Int v = first + Int(i) * kThreads;
    if (v < total) reinterpret_cast<Vector*>(part.out.data)[v] = value[i];
  }
}

/// Blocks of a multiprocessor: as many as the kernel's registers allow without spilling any.
constexpr int blocks_of(bool plain, size_t int_bytes) { return plain ? 16 : int_bytes == 4 ? 12 : 10; }

template <bool kPlain, class Int>
__global__ void __launch_bounds__(kThreads, blocks_of(kPlain, sizeof(Int))) move(const __grid_constant__ Moves a) {
  const Part& part = a.part[part_of_block(a.part, a.tensors)];
  const int64_t block = int64_t(blockIdx.x) - part.shape.first_block;
  if (part.vector_bytes == 16) return move_part<kPlain, uint4, Int>(a, part, block);  // no jump through a table
  switch (part.vector_bytes) {
    case 8: return move_part<kPlain, uint2, Int>(a, part, block);
    case 4: return move_part<kPlain, uint32_t, Int>(a, part, block);
    case 2: return move_part<kPlain, unsigned short, Int>(a, part, block);
    default: return move_part<kPlain, unsigned char, Int>(a, part, block);
  }
}

Status launch(const Moves& moves, int64_t blocks, bool wide, const CudaContext& context) {
  if (blocks > INT32_MAX) {
    return error(Status::Kind::unsupported, "tensors: the result has %lld KB; CUDA takes 8 TB", (long long)blocks * 4);
  }
  bool plain = !moves.from.cu_seqlens && !moves.to.cu_seqlens;
  for (int i = 0; i < moves.tensors; ++i) plain &= !moves.part[i].base.data;
  auto* kernel = wide ? move<false, uint64_t> : plain ? move<true, uint32_t> : move<false, uint32_t>;
  if (blocks > 0) start(kernel, unsigned(blocks), kThreads, 0, context.stream, moves);
  return started("moving tokens");
}

}  // namespace

Status move_rows(const DevicePlan& plan, const TokenTensor* in, const TokenTensor* base, const TokenTensor* out,
                 int64_t tensors, const CudaContext& context) {
  Moves moves{Side(plan.from), Side(plan.to), plan.index, plan.wide, plan.flat, plan.index_rows, 0, {}};
  int64_t blocks = 0;
  bool wide = false;
  for (int64_t i = 0; i < tensors; ++i) {
    Part part;
    part.vector_bytes = vector_bytes({&in[i], base ? &base[i] : nullptr, &out[i]});
    part.shape = Shape(out[i], moves.to, out[i].row_bytes() / part.vector_bytes);
    part.shape.first_block = blocks;
    part.in = Rows(in[i]);
    if (base) part.base = Rows(base[i]);
    part.out = Rows(out[i]);
    if (part.shape.total == 0) continue;
    blocks += (part.shape.total + kBlockVectors - 1) / kBlockVectors;
    wide |= part.shape.total > INT32_MAX - kBlockVectors;
    moves.part[moves.tensors++] = part;
    if (moves.tensors < kMostTensors && i + 1 < tensors) continue;
    Status status = launch(moves, blocks, wide, context);
    if (!status.ok()) return status;
    moves.tensors = 0;
    blocks = 0;
    wide = false;
  }
  return moves.tensors > 0 ? launch(moves, blocks, wide, context) : Status{};
}

}  // namespace sparsekit::cuda

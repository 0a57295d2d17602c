// Rows that are copies of rows: gather_tokens, a scatter that copies, and the gradients of sums.
//
//   out[s, o, r] = in[s, o, index[s, r]], else base[s, o, r], else 0        any number of tensors, one launch
//
// Tiling: a block owns kVectors x 128 consecutive vectors of one result; a thread's vectors are 128 apart, so each of
// its loads and stores is coalesced with its neighbours'. All index entries are fetched first, then all rows, then all
// are stored: kVectors rows in flight per thread. Bound: memory, each row is read once and written once. A table of the
// tensors travels as a kernel argument, so nothing is copied to the device before the launch.
#include <initializer_list>

#include "tokens/cuda_implementations.h"
#include "tokens/cuda_launch.h"
#include "tokens/cuda_memory.cuh"
#include "tokens/cuda_rows.cuh"

namespace sparsekit::cuda {
namespace {

constexpr int kThreads = 128;  // 256: 3 % slower
constexpr int kVectors = 2;
constexpr int64_t kBlockVectors = kVectors * kThreads;

template <class Vector>
__device__ __forceinline__ Vector load_vector(const Vector* from) {
  if constexpr (sizeof(Vector) == 16) {
    return load_16_once(from);
  } else {
    return __ldg(from);
  }
}

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

template <class Vector, class Int, bool kStream>
__device__ __forceinline__ void move_part(const Moves& a, const Part& part, int64_t block) {
  const Int first = Int(block) * Int(kBlockVectors) + threadIdx.x;
  const char* from[kVectors];
  Vector* to[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const Int v = first + Int(i) * kThreads;
    from[i] = nullptr;
    to[i] = nullptr;
    if (v >= Int(part.shape.total)) continue;
    const Place at = place_of<Int>(part.shape, a.to, v);
    to[i] = reinterpret_cast<Vector*>(part.out.data) + v;
    int32_t source = -1;
    if (at.sample >= 0 && at.row < a.index_rows) {
      const int64_t entry = a.flat ? at.flat : at.sample * a.index_rows + at.row;
      source = token_at(a.index, a.wide, entry, a.from.count(at.sample));
    }
    if (source >= 0) {
      from[i] = part.in.at(a.from, at.sample, at.outer, source) + at.column * sizeof(Vector);
    } else if (part.base.data) {
      from[i] = base_row(part.base, a.to, at) + at.column * sizeof(Vector);
    }
  }
  Vector value[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    value[i] = Vector();
    if (from[i]) value[i] = load_vector(reinterpret_cast<const Vector*>(from[i]));
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (!to[i]) continue;
    if constexpr (kStream) {
      __stcs(to[i], value[i]);
    } else {
      *to[i] = value[i];
    }
  }
}

/// kStream: the results are larger than the cache. (Asked per store it cost 5 registers, and an eighth of the warps.)
template <class Int, bool kStream>
__global__ void __launch_bounds__(kThreads) move(const __grid_constant__ Moves a) {
  const Part& part = a.part[part_of_block(a.part, a.tensors)];
  const int64_t block = int64_t(blockIdx.x) - part.shape.first_block;
  switch (part.vector_bytes) {
    case 16: return move_part<uint4, Int, kStream>(a, part, block);
    case 8: return move_part<uint2, Int, kStream>(a, part, block);
    case 4: return move_part<uint32_t, Int, kStream>(a, part, block);
    case 2: return move_part<unsigned short, Int, kStream>(a, part, block);
    default: return move_part<unsigned char, Int, kStream>(a, part, block);
  }
}

Status launch(const Moves& moves, int64_t blocks, int64_t bytes, bool wide, const CudaContext& context) {
  if (blocks > INT32_MAX) {
    return error(Status::Kind::unsupported, "tensors: the result has %lld KB; CUDA takes 8 TB", (long long)blocks * 4);
  }
  auto* kernel = wide ? move<uint64_t, true> : bytes > kStreamBytes ? move<uint32_t, true> : move<uint32_t, false>;
  if (blocks > 0) start(kernel, unsigned(blocks), kThreads, 0, context.stream, moves);
  return started("moving tokens");
}

}  // namespace

Status move_rows(const DevicePlan& plan, const TokenTensor* in, const TokenTensor* base, const TokenTensor* out,
                 int64_t tensors, const CudaContext& context) {
  Moves moves{Side(plan.from), Side(plan.to), plan.index, plan.wide, plan.flat, plan.index_rows, 0, {}};
  int64_t blocks = 0, bytes = 0;
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
    bytes += part.shape.total * part.vector_bytes;
    wide |= part.shape.total > INT32_MAX - kBlockVectors;
    moves.part[moves.tensors++] = part;
    if (moves.tensors < kMostTensors && i + 1 < tensors) continue;
    Status status = launch(moves, blocks, bytes, wide, context);
    if (!status.ok()) return status;
    moves.tensors = 0;
    blocks = bytes = 0;
    wide = false;
  }
  return moves.tensors > 0 ? launch(moves, blocks, bytes, wide, context) : Status{};
}

}  // namespace sparsekit::cuda

// Rows that are copies of rows: gather_tokens, a scatter that copies, and the gradients of sums.
//
//   out[s, o, r] = in[s, o, index[s, r]], else base[s, o, r], else 0        any number of tensors, one launch
//
// Tiling: a block owns kVectors x 256 consecutive vectors of one result; a thread's vectors are 256 apart, so each of its
// loads and stores is coalesced with its neighbours'. All index entries are fetched first, then all rows, then all are
// stored: kVectors rows in flight per thread. Bound: memory, each row is read once and written once. A table of the
// tensors travels as a kernel argument, so nothing is copied to the device before the launch.
#include <cstdlib>
#include <initializer_list>

#include "tokens/cuda_implementations.h"
#include "tokens/cuda_launch.h"
#include "tokens/cuda_rows.cuh"

namespace sparsekit::cuda {
namespace {

int variant(const char* name) { return getenv(name) ? atoi(getenv(name)) : 0; }

template <class Vector>
__device__ __forceinline__ Vector load_hint(const Vector* from) {
  if constexpr (sizeof(Vector) == 16) {
    Vector v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
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

template <class Vector, class Int, int kVectors, int kHint>
__device__ __forceinline__ void move_part(const Moves& a, const Part& part, int64_t block) {
  const Int first = Int(block) * Int(kVectors * kRowThreads) + threadIdx.x;
  const char* from[kVectors];
  Vector* to[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const Int v = first + Int(i) * kRowThreads;
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
    if (from[i]) value[i] = kHint ? load_hint(reinterpret_cast<const Vector*>(from[i])) : __ldg(reinterpret_cast<const Vector*>(from[i]));
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (!to[i]) continue;
    if (kHint == 2) __stcs(to[i], value[i]); else *to[i] = value[i];
  }
}

template <class Int, int kVectors, int kHint>
__global__ void __launch_bounds__(kRowThreads) move(const __grid_constant__ Moves a) {
  const Part& part = a.part[part_of_block(a.part, a.tensors)];
  const int64_t block = int64_t(blockIdx.x) - part.shape.first_block;
  switch (part.vector_bytes) {
    case 16: return move_part<uint4, Int, kVectors, kHint>(a, part, block);
    case 8: return move_part<uint2, Int, kVectors, kHint>(a, part, block);
    case 4: return move_part<uint32_t, Int, kVectors, kHint>(a, part, block);
    case 2: return move_part<unsigned short, Int, kVectors, kHint>(a, part, block);
    default: return move_part<unsigned char, Int, kVectors, kHint>(a, part, block);
  }
}

Status launch(const Moves& moves, int64_t blocks, bool wide, const CudaContext& context) {
  if (blocks > INT32_MAX) {
    return error(Status::Kind::unsupported, "tensors: the result has %lld KB; CUDA takes 32 TB", (long long)blocks * 16);
  }
  using Kernel = void (*)(Moves);
  const int v = variant("TV"), h = variant("TH");
  Kernel kernel = wide     ? move<uint64_t, 4, 0>
                  : v == 2 ? (h == 2 ? move<uint32_t, 2, 2> : h == 1 ? move<uint32_t, 2, 1> : move<uint32_t, 2, 0>)
                  : v == 8 ? (h == 2 ? move<uint32_t, 8, 2> : h == 1 ? move<uint32_t, 8, 1> : move<uint32_t, 8, 0>)
                           : (h == 2 ? move<uint32_t, 4, 2> : h == 1 ? move<uint32_t, 4, 1> : move<uint32_t, 4, 0>);
  if (blocks > 0) start(kernel, unsigned(blocks), kRowThreads, 0, context.stream, moves);
  return started("moving tokens");
}

}  // namespace

Status move_rows(const DevicePlan& plan, const TokenTensor* in, const TokenTensor* base, const TokenTensor* out,
                 int64_t tensors, const CudaContext& context) {
  Moves moves{Side(plan.from), Side(plan.to), plan.index, plan.wide, plan.flat, plan.index_rows, 0, {}};
  int64_t blocks = 0;
  const int64_t kBlockVectors = (variant("TV") ? variant("TV") : 4) * kRowThreads;
  bool wide = false;
  for (int64_t i = 0; i < tensors; ++i) {
    Part part;
    part.vector_bytes = vector_bytes({&in[i], base ? &base[i] : nullptr, &out[i]});
    part.shape = Shape(out[i], moves.to, part.vector_bytes);
    part.shape.first_block = blocks;
    part.in = Rows(in[i]);
    if (base) part.base = Rows(base[i]);
    part.out = Rows(out[i]);
    if (part.shape.total == 0) continue;
    blocks += (part.shape.total + kBlockVectors - 1) / kBlockVectors;
    wide |= part.shape.total > INT32_MAX - 8 * kRowThreads;
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

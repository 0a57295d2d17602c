// y = factor * act(x W^T + bias), or x W, of blocks of 64 and 128, with wgmma and TMA (Hopper).
//
// D is a tile of y^T: 128 features of a block row x 256 tokens, or, of a block row of 64, 64 x 512 (see
// cuda_mainloop_sm90.cuh). CTAs stay, one a multiprocessor, and walk the tiles; the loading warp runs ahead of the two
// warpgroups that multiply, into the next tile while they write this one. The step that an index out of range would be
// is loaded from outside of both tensors: zeros.
//
// Output: where features are contiguous and aligned the sums are finished in registers (bias, activation), rounded,
// transposed by stmatrix and stored by TMA, 64 features x 32 tokens at a time. With a gate, act(x G^T) is computed
// first and kept in 64 registers, rounded, while x W^T is computed for the same tile: nothing of it goes to memory.
// What is left (a factor, tokens contiguous): 16 tokens at a time go through shared memory as fp32, in a loop that is
// not unrolled: activations are long.
//
// Bound: tensor cores for blocks of 128 from about a third dense on; L2 -> shared memory (7.5 TB/s) for blocks of 64;
// writing y (and reading x) at 5 %.
#pragma once

#include <cuda.h>

#include "matmul/cuda_mainloop_sm90.cuh"
#include "matmul/cuda_product.cuh"

namespace sparsekit::cuda {

struct ProductCall90 {
  CUtensorMap x, w, y, gate_w;
  ProductCall call, gate;  // the gate: W's call with the gate's weight
  int32_t tiles;
  bool plain;  // y has a map, and there is no more to do than this kernel's mode does
};

/// What a kernel does with its sums. Bias and activation in registers cost code, so only x W^T has them.
enum class Mode { any, finishing, gated };

/// Lists in the order in which CTAs take them: long ones first, so that those of a round take equally long. (Of random
/// blocks of 128 at 20 %, 27 tiles of a CTA were 18 % longer than the mean in one of 132.) Every CTA sorts for itself.
/// Beyond kMost lists they stay in place.
struct ListOrder {
  static constexpr int kMost = 448, kBytes = kMost * 2;

  uint32_t place;  // in shared memory
  bool sorted;

  /// All threads; `lengths` has room for kMost. A barrier comes before the first use.
  template <Mode MODE>
  __device__ __forceinline__ void sort(const ProductCall90& arguments, int* lengths) {
    const int lists = int(arguments.call.lists);
    sorted = arguments.call.lists <= kMost;
    if (!sorted) return;
    for (int i = int(threadIdx.x); i < lists; i += kThreads90) {
      const Extent extent = list_extent(arguments.call.offsets, i, arguments.call.pattern.nnz);
      int64_t length = extent.end - extent.begin;
      if constexpr (MODE == Mode::gated) {
        const Extent gate = list_extent(arguments.gate.offsets, i, arguments.gate.pattern.nnz);
        length += gate.end - gate.begin;
      }
      lengths[i] = int(min(length, int64_t(INT32_MAX)));
    }
    __syncthreads();
    for (int i = int(threadIdx.x); i < lists; i += kThreads90) {
      const int own = lengths[i];
      int rank = 0;
      for (int j = 0; j < lists; ++j) rank += lengths[j] > own || (lengths[j] == own && j < i);
      asm volatile("st.shared.b16 [%0], %1;\n" ::"r"(place + uint32_t(rank * 2)), "h"(uint16_t(i)) : "memory");
    }
  }
  __device__ __forceinline__ int32_t at(unsigned rank) const {
    if (!sorted) return int32_t(rank);
    uint16_t list;
    asm volatile("ld.shared.b16 %0, [%1];\n" : "=h"(list) : "r"(place + rank * 2));
    return list;
  }
};

/// The tile of this CTA in round `round`: every other one goes backwards, as lists are sorted.
__device__ __forceinline__ int32_t tile_of_round(int32_t round) {
  const int32_t ctas = int32_t(gridDim.x), cta = int32_t(blockIdx.x);
  return round * ctas + (round & 1 ? ctas - 1 - cta : cta);
}

/// A tile, and where the lists of its features begin and end.
struct Work {
  int32_t token_tile, list, part;
  Extent extent, gate;
};
/// As tile_at, in 32 bits; loads the extents.
template <bool SPLIT, Mode MODE>
__device__ __forceinline__ Work work_at(const ProductCall90& arguments, const ListOrder& order, int32_t at) {
  constexpr unsigned kGroup = SPLIT ? 8 : 4;
  const ProductCall& call = arguments.call;
  if (at >= arguments.tiles) return {0, 0, 0, {0, 0}, {0, 0}};
  const unsigned feature_tiles = unsigned(call.lists) * unsigned(call.parts), per_group = feature_tiles * kGroup;
  const unsigned group = unsigned(at) / per_group, within = unsigned(at) - group * per_group;
  const unsigned size = min(kGroup, unsigned(call.token_tiles) - group * kGroup), feature_tile = within / size;
  Work work;
  work.token_tile = int32_t(group * kGroup + within - feature_tile * size);
  const unsigned rank = feature_tile / unsigned(call.parts);
  work.list = order.at(rank);
  work.part = int32_t(feature_tile - rank * unsigned(call.parts));
  work.extent = list_extent(call.offsets, work.list, call.pattern.nnz);
  if constexpr (MODE == Mode::gated) {
    work.gate = list_extent(arguments.gate.offsets, work.list, arguments.gate.pattern.nnz);
  }
  return work;
}

/// Steps of a list: one, of zeros, if it has no entries.
__device__ __forceinline__ int32_t steps_of(const ProductCall& call, const Extent& extent) {
  return max(int32_t(extent.end - extent.begin), 1) * (call.inner_size / 64);
}

/// Shared memory of the epilogue, of one warpgroup: whole tiles of 64 features x 32 tokens of 16 bits, or 16 tokens x
/// 68 of fp32. Its address is a multiple of 1024.
template <bool SPLIT>
struct Epilogue90 {
  static constexpr int kBuffers = SPLIT ? 2 : 1, kBufferBytes = 64 * 32 * 2;
  static constexpr int kPitch = 68;
  static constexpr int kBytes = SPLIT ? kBuffers * kBufferBytes : 5 * 1024;
  static_assert(16 * kPitch * 4 <= kBytes && kBuffers * kBufferBytes <= kBytes);
};

template <bool SPLIT>
constexpr int kProductBytes90 =
    Step<SPLIT>::kRingBytes + 2 * Epilogue90<SPLIT>::kBytes + Pipeline<SPLIT>::kBarrierBytes + ListOrder::kBytes;

__device__ __forceinline__ void store_matrices_transposed(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

template <int PENDING>
__device__ __forceinline__ void tma_store_wait_read_but() {
  asm volatile("cp.async.bulk.wait_group.read %0;\n" ::"n"(PENDING) : "memory");
}

/// 32 entries of a list, one a lane: where each stands in the contraction and in values; nowhere: -1.
struct Entries {
  int32_t neighbour, place;
};
template <bool TA>
__device__ __forceinline__ Entries read_entries(const ProductCall& call, const Extent& list, int64_t first) {
  const int64_t at = first + int(threadIdx.x) % 32;
  if (at >= list.end) return {-1, 0};
  const int64_t neighbour = index_at(call.neighbour, at), place = TA ? index_at(call.place, at) : at;
  const bool good = neighbour >= 0 && neighbour < call.neighbours && place >= 0 && place < call.pattern.nnz;
  return {good ? int32_t(neighbour) : -1, int32_t(place)};
}

/// Loads the steps of one list; `entries` are its first 32.
template <bool TA, bool TB, bool SPLIT>
__device__ __forceinline__ void load_list(const CUtensorMap& x, const CUtensorMap& w, const ProductCall& call,
                                          const Extent& list, Entries entries, int32_t token, int32_t feature,
                                          Pipeline<SPLIT>& pipeline) {
  const int parts_of_block = call.inner_size / 64;
  const int64_t end = max(list.end, list.begin + 1);
  for (int64_t first = list.begin; first < end; first += 32) {
    // 32 entries at a time, so that indices do not wait for memory one by one.
    if (first != list.begin) entries = read_entries<TA>(call, list, first);
    const int count = int(min(end - first, int64_t(32)));
    for (int i = 0; i < count; ++i) {
      const int32_t neighbour = __shfl_sync(0xffffffffu, entries.neighbour, i);
      const int32_t place = __shfl_sync(0xffffffffu, entries.place, i);
      for (int part = 0; part < parts_of_block; ++part) {
        mbarrier_wait(pipeline.empty(), pipeline.ring.parity ^ 1);
        if (elect_lane()) {
          const bool good = neighbour >= 0;
          const int32_t inner = good ? neighbour * call.inner_size + part * 64 : 0;
          const int32_t stored = good ? place * call.pattern.block_rows : kNowhere;
          const uint32_t a = pipeline.stage(), b = a + Step<SPLIT>::kBytesA, full = pipeline.full();
          mbarrier_expect(full, Step<SPLIT>::kBytes);
          if constexpr (TA) {
#pragma unroll
            for (int m = 0; m < Step<SPLIT>::kM; m += 64) {
              tma_load(a + m * 128, &w, feature + m, stored + part * 64, 0, 0, full);
            }
          } else {
            tma_load(a, &w, part * 64, stored + feature, 0, 0, full);
          }
          if constexpr (TB) {
#pragma unroll
            for (int n = 0; n < Step<SPLIT>::kN; n += 64) {
              tma_load(b + n * 128, &x, token + n, good ? inner : kNowhere, 0, 0, full);
            }
          } else {
#pragma unroll
            for (int n = 0; n < Step<SPLIT>::kN; n += 256) {
              tma_load(b + n * 128, &x, inner, good ? token + n : kNowhere, 0, 0, full);
            }
          }
          mbarrier_arrive(full);
        }
        __syncwarp();
        pipeline.ring.advance();
      }
    }
  }
}

/// The warp that loads. Offsets are read two tiles ahead, the first entries of a list one, so that a list that is short
/// does not wait for memory three times.
template <bool TA, bool TB, bool SPLIT, Mode MODE>
__device__ __forceinline__ void load_tiles(const ProductCall90& arguments, const ListOrder& order,
                                           Pipeline<SPLIT> pipeline) {
  const ProductCall &call = arguments.call, &gate = arguments.gate;
  constexpr bool kGated = MODE == Mode::gated;
  Work work = work_at<SPLIT, MODE>(arguments, order, tile_of_round(0));
  Work next = work_at<SPLIT, MODE>(arguments, order, tile_of_round(1));
  Entries entries = read_entries<TA>(call, work.extent, work.extent.begin), gate_entries = {-1, 0};
  if (kGated) gate_entries = read_entries<TA>(gate, work.gate, work.gate.begin);
  for (int32_t round = 0; tile_of_round(round) < arguments.tiles; ++round) {
    const Work after = work_at<SPLIT, MODE>(arguments, order, tile_of_round(round + 2));
    const Entries next_entries = read_entries<TA>(call, next.extent, next.extent.begin);
    Entries next_gate_entries = {-1, 0};
    if (kGated) next_gate_entries = read_entries<TA>(gate, next.gate, next.gate.begin);
    const int32_t token = work.token_tile * Step<SPLIT>::kN, feature = work.part * Step<SPLIT>::kM;
    if (kGated) {
      load_list<TA, TB, SPLIT>(arguments.x, arguments.gate_w, gate, work.gate, gate_entries, token, feature, pipeline);
    }
    load_list<TA, TB, SPLIT>(arguments.x, arguments.w, call, work.extent, entries, token, feature, pipeline);
    work = next, next = after, entries = next_entries, gate_entries = next_gate_entries;
  }
}

/// d = activation(d + bias of its feature): `bias` of this thread's rows r = 0, 1.
template <Activation ACTIVATION>
__device__ __forceinline__ void finish_sums(float (&d)[kSums], float bias0, float bias1) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) d[i] = activate_fast<ACTIVATION>(d[i] + (i / 2 % 2 ? bias1 : bias0));
}
__device__ __forceinline__ void finish_sums(float (&d)[kSums], Activation activation, float bias0, float bias1) {
  switch (activation) {
    case Activation::relu: finish_sums<Activation::relu>(d, bias0, bias1); break;
    case Activation::gelu: finish_sums<Activation::gelu>(d, bias0, bias1); break;
    case Activation::gelu_tanh: finish_sums<Activation::gelu_tanh>(d, bias0, bias1); break;
    case Activation::silu: finish_sums<Activation::silu>(d, bias0, bias1); break;
    case Activation::none: finish_sums<Activation::none>(d, bias0, bias1); break;
  }
}

/// Two numbers of 16 bits as fp32.
template <class Element>
__device__ __forceinline__ float2 unpack(uint32_t two) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    return {__uint_as_float(two << 16), __uint_as_float(two & 0xffff0000u)};
  } else {
    return __half22float2(*reinterpret_cast<const __half2*>(&two));
  }
}

/// d[4 j + 2 r + c] of a thread is feature 16 warp + lane / 4 + 8 r, token 8 j + 2 (lane % 4) + c of its warpgroup.
template <class Element, int BUFFERS>
__device__ __forceinline__ void store_plain(const ProductCall90& arguments, const float (&d)[kSums], uint32_t staging,
                                            int64_t token, int64_t feature, int group) {
  const int thread = int(threadIdx.x) % kGroupThreads, warp = thread / 32, lane = thread % 32;
  // Lane l gives the address of row l % 8 (a token) of matrix l / 8: (r, j) = (0, 0), (1, 0), (0, 1), (1, 1).
  const int row = lane / 16 * 8 + lane % 8, chunk = 2 * warp + lane / 8 % 2;
  const uint32_t to = staging + uint32_t(row * 128 + ((chunk ^ (row & 7)) * 16));
#pragma unroll
  for (int q = 0; q < 8; ++q) {
    if (token + 32 * q >= arguments.call.out.tokens) break;
    // The tile before may have ended with either buffer.
    if (thread == 0) q == 0 ? tma_store_wait_read_but<0>() : tma_store_wait_read_but<BUFFERS - 1>();
    named_barrier_sync(1 + group, kGroupThreads);
    const uint32_t buffer = uint32_t(q % BUFFERS * (64 * 32 * 2));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = 4 * (4 * q + 2 * half);
      const uint32_t packed[4] = {pack<Element>(d[at], d[at + 1]), pack<Element>(d[at + 2], d[at + 3]),
                                  pack<Element>(d[at + 4], d[at + 5]), pack<Element>(d[at + 6], d[at + 7])};
      store_matrices_transposed(to + buffer + uint32_t(half * 16 * 128), packed);
    }
    fence_async_proxy();
    named_barrier_sync(1 + group, kGroupThreads);
    if (thread == 0) {
      tma_store(&arguments.y, staging + buffer, int32_t(feature), int32_t(token) + 32 * q, 0, 0);
      tma_store_commit();
    }
  }
}

template <class Element>
__device__ __forceinline__ void store_finished(const ProductCall90& arguments, const float (&d)[kSums], float* staging,
                                               int64_t token, int64_t feature, int group) {
  constexpr int kPitch = Epilogue90<true>::kPitch;
  const Output& out = arguments.call.out;
  const int thread = int(threadIdx.x) % kGroupThreads, warp = thread / 32, lane = thread % 32;
  const bool first = out.output.feature == 1;
  // 8 neighbours of the output: features of a token, or tokens of a feature.
  const int t = first ? thread / 8 : thread % 2 * 8, f = first ? thread % 8 * 8 : thread / 2;
  const int features = int(min(int64_t(64), out.features - feature));
#pragma unroll 1
  for (int q = 0; q < 16; ++q) {
    if (token + 16 * q >= out.tokens) break;
    named_barrier_sync(1 + group, kGroupThreads);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (i != q) continue;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int at_t = e / 4 * 8 + lane % 4 * 2 + e % 2, at_f = 16 * warp + lane / 4 + e / 2 % 2 * 8;
        staging[at_t * kPitch + at_f] = d[8 * i + e];
      }
    }
    named_barrier_sync(1 + group, kGroupThreads);
    const int tokens = int(min(int64_t(16), out.tokens - token - 16 * q));
    if (t >= tokens || f >= features) continue;
    const int count = min(8, first ? features - f : tokens - t);
    const int64_t at_token = token + 16 * q + t, at_feature = feature + f;
    Element* to =
        static_cast<Element*>(out.output.data) + at_token * out.output.token + at_feature * out.output.feature;
    alignas(16) Element results[8];
    const bool whole = out.vectors && count == 8;
    if (whole && out.factor.data) {
      const Element* factor =
          static_cast<const Element*>(out.factor.data) + at_token * out.factor.token + at_feature * out.factor.feature;
      *reinterpret_cast<uint4*>(results) = *reinterpret_cast<const uint4*>(factor);
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if (e >= count) continue;
      const int64_t et = first ? at_token : at_token + e, ef = first ? at_feature + e : at_feature;
      float x = staging[(first ? t : t + e) * kPitch + (first ? f + e : f)];
      if (out.bias) x += to_float(static_cast<const Element*>(out.bias)[ef]);
      x = activate(out.activation, x);
      if (out.factor.data) {
        x *= to_float(
            whole ? results[e]
                  : static_cast<const Element*>(out.factor.data)[et * out.factor.token + ef * out.factor.feature]);
      }
      results[e] = from_float<Element>(x);
    }
    if (whole) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(results);
    } else {
      for (int e = 0; e < count; ++e) to[e] = results[e];
    }
  }
}

template <class Element, bool TA, bool TB, bool SPLIT, Mode MODE>
__global__ void __launch_bounds__(kThreads90, 1) product_kernel_90(const __grid_constant__ ProductCall90 arguments) {
  extern __shared__ __align__(1024) char shared[];
  const uint32_t base = shared_address(shared);
  Pipeline<SPLIT> pipeline;
  pipeline.stages = base;
  pipeline.barriers = base + Step<SPLIT>::kRingBytes + 2 * Epilogue90<SPLIT>::kBytes;
  if (threadIdx.x == 0) pipeline.init();
  ListOrder order;
  order.place = pipeline.barriers + Pipeline<SPLIT>::kBarrierBytes;
  order.template sort<MODE>(arguments, reinterpret_cast<int*>(shared));
  fence_async_proxy();  // the ring was scratch
  __syncthreads();
  const ProductCall& call = arguments.call;
  const int group = int(threadIdx.x) / kGroupThreads;
  if (group == 2) {
    fewer_registers<40>();
    if (threadIdx.x < 2 * kGroupThreads + 32) load_tiles<TA, TB, SPLIT, MODE>(arguments, order, pipeline);
    return;
  }
  more_registers<232>();
  const int staging = Step<SPLIT>::kRingBytes + group * Epilogue90<SPLIT>::kBytes;
  float d[kSums];
  Work work = work_at<SPLIT, MODE>(arguments, order, tile_of_round(0));
  for (int32_t round = 0; tile_of_round(round) < arguments.tiles; ++round) {
    const Work next = work_at<SPLIT, MODE>(arguments, order, tile_of_round(round + 1));  // arrives during the products
    [[maybe_unused]] uint32_t kept[MODE == Mode::gated ? kSums / 2 : 1];
    if constexpr (MODE == Mode::gated) {
      multiply<Element, TA, TB, SPLIT>(d, pipeline, steps_of(arguments.gate, work.gate), group,
                                       Step<SPLIT>::b_of(group));
      finish_sums(d, call.out.activation, 0.f, 0.f);
#pragma unroll
      for (int i = 0; i < kSums / 2; ++i) kept[i] = pack<Element>(d[2 * i], d[2 * i + 1]);
    }
    multiply<Element, TA, TB, SPLIT>(d, pipeline, steps_of(call, work.extent), group, Step<SPLIT>::b_of(group));
    const int64_t token = int64_t(work.token_tile) * Step<SPLIT>::kN + Step<SPLIT>::n_of(group);
    const int64_t feature =
        int64_t(work.list) * call.list_size + work.part * Step<SPLIT>::kM + Step<SPLIT>::m_of(group);
    work = next;
    if (feature >= call.out.features) continue;
    if constexpr (MODE == Mode::gated) {
#pragma unroll
      for (int i = 0; i < kSums / 2; ++i) {
        const float2 factor = unpack<Element>(kept[i]);
        d[2 * i] *= factor.x, d[2 * i + 1] *= factor.y;
      }
    }
    if constexpr (MODE == Mode::finishing) {
      float bias[2] = {0.f, 0.f};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t of = feature + int(threadIdx.x) % kGroupThreads / 32 * 16 + int(threadIdx.x) % 32 / 4 + 8 * r;
        if (call.out.bias && of < call.out.features) bias[r] = to_float(static_cast<const Element*>(call.out.bias)[of]);
      }
      finish_sums(d, call.out.activation, bias[0], bias[1]);
    }
    if (MODE != Mode::any || arguments.plain) {
      store_plain<Element, Epilogue90<SPLIT>::kBuffers>(arguments, d, base + staging, token, feature, group);
    } else {
      store_finished<Element>(arguments, d, reinterpret_cast<float*>(shared + staging), token, feature, group);
    }
  }
  if (MODE != Mode::any || arguments.plain) tma_store_wait_read();
}

/// In cuda_product_sm90_<dtype>.cu: a kernel, its shared memory. Modes other than `any` are of x W^T alone.
struct ProductKernel90 {
  void (*kernel)(ProductCall90);
  int shared_bytes;
};
ProductKernel90 product_kernel_90_bf16(bool ta, bool tb, bool split, Mode mode);
ProductKernel90 product_kernel_90_f16(bool ta, bool tb, bool split, Mode mode);

template <class Element>
ProductKernel90 product_kernel_90_of(bool ta, bool tb, bool split, Mode mode) {
  auto of = [&](auto s) -> ProductKernel90 {
    constexpr bool S = decltype(s)::value;
    constexpr int kBytes = kProductBytes90<S>;
    if (mode == Mode::finishing) return {product_kernel_90<Element, false, false, S, Mode::finishing>, kBytes};
    if (mode == Mode::gated) return {product_kernel_90<Element, false, false, S, Mode::gated>, kBytes};
    constexpr Mode kAny = Mode::any;
    if (ta && tb) return {product_kernel_90<Element, true, true, S, kAny>, kBytes};
    if (ta) return {product_kernel_90<Element, true, false, S, kAny>, kBytes};
    if (tb) return {product_kernel_90<Element, false, true, S, kAny>, kBytes};
    return {product_kernel_90<Element, false, false, S, kAny>, kBytes};
  };
  return split ? of(std::true_type()) : of(std::false_type());
}

}  // namespace sparsekit::cuda

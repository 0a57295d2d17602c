// The sm_90 primitives one by one, each against a loop on the host. Without them a wrong bit in a descriptor looks like
// a wrong attention. Part of sparsekit_cuda_tests; passes over where the GPU is no Hopper.
#include <cuda_runtime.h>

#include "common/cuda/barriers_sm90.cuh"
#include "common/cuda/mma.cuh"
#include "common/cuda/shared_memory.cuh"
#include "common/cuda/tensor_map.h"
#include "common/cuda/tma_sm90.cuh"
#include "common/cuda/wgmma_sm90.cuh"
#include "testing.h"

namespace sparsekit::testing {
namespace {

using namespace sparsekit::cuda;
using Bf16 = __nv_bfloat16;

bool hopper() {
  int major = 0;
  return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) == cudaSuccess && major == 9;
}

/// Managed memory: host and device see the same array.
template <class T>
struct Array {
  explicit Array(size_t n) : count(n) {
    CHECK(cudaMallocManaged(&data, n * sizeof(T)) == cudaSuccess, "no managed memory");
  }
  ~Array() { cudaFree(data); }
  T& operator[](size_t i) { return data[i]; }
  T* data = nullptr;
  size_t count;
};

void finish() {
  const cudaError_t code = cudaDeviceSynchronize();
  CHECK(code == cudaSuccess, "%s", cudaGetErrorString(code));
}

__device__ uint32_t aligned_base(char* memory) { return (shared_address(memory) + 1023) & ~1023u; }

// ---- TMA: [batch 2, heads 3, rows 50, dim 96] in a wider allocation; a box of 64 columns x 32 rows of it, as it lands
// in shared memory, and stored back elsewhere.

constexpr int kBoxRows = 32;

__global__ void copy_box(const __grid_constant__ CUtensorMap from, const __grid_constant__ CUtensorMap to, int column,
                         int row, int head, int batch, uint16_t* landed) {
  extern __shared__ char memory[];
  __shared__ __align__(8) uint64_t barrier_words[1];
  const uint32_t box = aligned_base(memory), barrier = shared_address(barrier_words);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_fence_init();
  }
  __syncthreads();
  for (uint32_t round = 0; round < 3; ++round) {  // the parity of the second and third phase, too
    if (threadIdx.x == 0) {
      mbarrier_expect(barrier, kBoxRows * 128);
      tma_load(box, &from, column, row, head, batch, barrier);
      mbarrier_arrive(barrier);
    }
    mbarrier_wait(barrier, round & 1);
    __syncthreads();
  }
  for (int i = threadIdx.x; i < kBoxRows * 8; i += blockDim.x) {
    for (int element = 0; element < 8; ++element) {
      uint16_t x;
      asm volatile("ld.shared.u16 %0, [%1];\n" : "=h"(x) : "r"(box + swizzled<128>(i / 8, i % 8) + element * 2));
      landed[i * 8 + element] = x;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    tma_store(&to, box, column, row, head, batch);
    tma_store_commit();
    tma_store_wait();
  }
}

TEST(sm90_tma_copies_boxes_and_fills_with_zeros) {
  if (!hopper()) return;
  constexpr int64_t batch = 2, heads = 3, rows = 50, dim = 96, row_stride = 104;
  const int64_t head_stride = rows * row_stride + 8, batch_stride = heads * head_stride;
  const size_t size = size_t(batch * batch_stride);
  Array<uint16_t> from(size), to(size), landed(kBoxRows * 64);
  for (size_t i = 0; i < size; ++i) from[i] = uint16_t(i % 60000 + 1);
  const InputView in{from.data, batch_stride, head_stride, row_stride};
  const OutputView out{to.data, batch_stride, head_stride, row_stride};
  CUtensorMap in_map, out_map;
  CHECK_OK(make_tensor_map(&in_map, in, DType::bf16, batch, heads, rows, dim, kBoxRows, from.data));
  CHECK_OK(make_tensor_map(&out_map, out, DType::bf16, batch, heads, rows, dim, kBoxRows, to.data));
  for (int column : {0, 64}) {
    for (int row : {0, 5, 32, 50, 64}) {
      for (size_t i = 0; i < size; ++i) to[i] = 0xffff;
      for (size_t i = 0; i < landed.count; ++i) landed[i] = 0xffff;
      copy_box<<<1, 128, kBoxRows * 128 + 1024>>>(in_map, out_map, column, row, 2, 1, landed.data);
      finish();
      int wrong_landed = 0, wrong_stored = 0;
      for (int r = 0; r < kBoxRows; ++r) {
        for (int c = 0; c < 64; ++c) {
          const bool inside = row + r < rows && column + c < dim;
          const size_t at = size_t(in.offset(1, 2, row + r) + column + c);
          wrong_landed += landed[size_t(r * 64 + c)] != (inside ? from[at] : 0);
          if (inside) wrong_stored += to[at] != from[at], to[at] = 0xffff;
        }
      }
      for (size_t i = 0; i < size; ++i) wrong_stored += to[i] != 0xffff;
      CHECK(!wrong_landed && !wrong_stored, "column %d, row %d: %d wrong in shared memory, %d in the tensor", column,
            row, wrong_landed, wrong_stored);
    }
  }
}

__global__ void copy_bulk(const int32_t* from, int32_t* to, int words) {
  extern __shared__ char memory[];
  __shared__ __align__(8) uint64_t barrier_words[1];
  const uint32_t box = aligned_base(memory), barrier = shared_address(barrier_words);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_fence_init();
    mbarrier_expect(barrier, words * 4);
    bulk_load(box, from, words * 4, barrier);
    mbarrier_arrive(barrier);
  }
  __syncthreads();
  mbarrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < words; i += blockDim.x) {
    asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(to[i]) : "r"(box + 4 * i));
  }
}

TEST(sm90_bulk_copy) {
  if (!hopper()) return;
  Array<int32_t> from(512), to(512);
  for (int i = 0; i < 512; ++i) from[size_t(i)] = i * 7919;
  copy_bulk<<<1, 128, 4096>>>(from.data, to.data, 512);
  finish();
  int wrong = 0;
  for (size_t i = 0; i < 512; ++i) wrong += to[i] != from[i];
  CHECK(!wrong, "%d of 512 words", wrong);
}

// ---- wgmma: the two products of attention on one tile, S = Q K^T and O = P V with P = S rounded, for 64 query rows.
// Panels are written by hand as TMA writes them; `rows_of_q` > 64 puts other rows between Q's panels.

template <class Element>
struct Products {
  const Element *q, *k, *v;  // [64, head], [keys, head], [keys, value]
  float *s, *o;              // [64, keys], [64, value]
};

template <class Element>
__device__ void write_panels(uint32_t to, int panel_bytes, const Element* from, int rows, int columns) {
  for (int i = threadIdx.x; i < rows * columns / 8; i += blockDim.x) {
    const int row = i / (columns / 8), chunk = i % (columns / 8);
    const uint4 x = *reinterpret_cast<const uint4*>(from + row * columns + chunk * 8);
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(to + chunk / 8 * panel_bytes +
                                                                    swizzled<128>(row, chunk % 8)),
                 "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
  }
}

template <class Element, int HEAD, int VALUE, int KEYS>
__global__ void __launch_bounds__(128, 1) multiply(const Products<Element> p) {
  extern __shared__ char memory[];
  constexpr int kQueryPanel = 128 * 128, kKeyPanel = KEYS * 128, kHeadPanels = (HEAD + 63) / 64;
  const uint32_t q = aligned_base(memory), k = q + kHeadPanels * kQueryPanel, v = k + kHeadPanels * kKeyPanel;
  const uint32_t my_q = q + 64 * 128;  // the second 64 rows of a query block
  write_panels(my_q, kQueryPanel, p.q, 64, HEAD);
  write_panels(k, kKeyPanel, p.k, KEYS, HEAD);
  write_panels(v, kKeyPanel, p.v, KEYS, VALUE);
  fence_async_proxy();
  __syncthreads();
  float s[KEYS / 2], o[VALUE / 2];
  uint32_t a[KEYS / 4];
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < HEAD / 16; ++i) {
    const int panel = i / 4, inside = i % 4 * 32;
    wgmma_shared<Element>(s, descriptor(descriptor_low(my_q + panel * kQueryPanel + inside, 16)),
                          descriptor(descriptor_low(k + panel * kKeyPanel + inside, 16)), i > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  pin(s);
#pragma unroll
  for (int i = 0; i < KEYS / 4; ++i) a[i] = pack<Element>(s[2 * i], s[2 * i + 1]);
#pragma unroll
  for (int i = 0; i < VALUE / 2; ++i) o[i] = 0.f;
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < KEYS / 16; ++i) {
    wgmma_registers<Element>(o, &a[4 * i], descriptor(descriptor_low(v + i * 2048, kKeyPanel)));
  }
  wgmma_commit();
  wgmma_wait<0>();
  pin(o);
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < KEYS / 2; ++i) p.s[(row + i / 2 % 2 * 8) * KEYS + i / 4 * 8 + column + i % 2] = s[i];
#pragma unroll
  for (int i = 0; i < VALUE / 2; ++i) p.o[(row + i / 2 % 2 * 8) * VALUE + i / 4 * 8 + column + i % 2] = o[i];
}

template <class Element, int HEAD, int VALUE, int KEYS>
void check_products(const char* what) {
  Random random(HEAD + KEYS);
  Array<Element> q(64 * HEAD), k(KEYS * HEAD), v(KEYS * VALUE);
  Array<float> s(64 * KEYS), o(64 * VALUE);
  // Small integers: every product and sum is exact, in any order, and so is S in 16 bits.
  auto fill = [&](Array<Element>& array, size_t every) {
    for (size_t i = 0; i < array.count; ++i) {
      array[i] = Element(i % every ? 0.f : float(int(random() % 5) - 2));
    }
  };
  fill(q, 3), fill(k, 2), fill(v, 1);
  for (Array<float>* x : {&s, &o}) {
    for (size_t i = 0; i < x->count; ++i) (*x)[i] = 1e30f;
  }
  const int bytes = 1024 + (HEAD + 63) / 64 * (128 + KEYS) * 128 + (VALUE + 63) / 64 * KEYS * 128;
  auto kernel = multiply<Element, HEAD, VALUE, KEYS>;
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) == cudaSuccess, "%s", what);
  kernel<<<1, 128, size_t(bytes)>>>({q.data, k.data, v.data, s.data, o.data});
  finish();
  int wrong_s = 0, wrong_o = 0;
  std::vector<double> row(KEYS);
  for (size_t i = 0; i < 64; ++i) {
    for (size_t j = 0; j < KEYS; ++j) {
      row[j] = 0;
      for (size_t d = 0; d < HEAD; ++d) row[j] += double(float(q[i * HEAD + d])) * double(float(k[j * HEAD + d]));
      wrong_s += double(s[i * KEYS + j]) != row[j];
    }
    for (size_t d = 0; d < VALUE; ++d) {
      double sum = 0;
      for (size_t j = 0; j < KEYS; ++j) sum += row[j] * double(float(v[j * VALUE + d]));
      wrong_o += double(o[i * VALUE + d]) != sum;
    }
  }
  CHECK(!wrong_s && !wrong_o, "%s: %d wrong scores, %d wrong outputs", what, wrong_s, wrong_o);
}

TEST(sm90_wgmma_products) {
  if (!hopper()) return;
  check_products<Bf16, 64, 64, 64>("bf16 64 64, 64 keys");
  check_products<Bf16, 64, 64, 128>("bf16 64 64, 128 keys");
  check_products<Bf16, 96, 96, 128>("bf16 96 96, 128 keys");
  check_products<Bf16, 128, 128, 128>("bf16 128 128, 128 keys");
  check_products<Bf16, 192, 128, 128>("bf16 192 128, 128 keys");
  check_products<Bf16, 256, 256, 64>("bf16 256 256, 64 keys");
  check_products<__half, 128, 128, 64>("fp16 128 128, 64 keys");
  check_products<__half, 128, 128, 128>("fp16 128 128, 128 keys");
}

// ---- Registers and barriers: a producer hands numbers to two consumer groups through a ring, which take turns.

__global__ void __launch_bounds__(384, 1) pass_through_ring(int* sums, int* order, int count) {
  __shared__ __align__(8) uint64_t words[4];
  __shared__ int slots[2], turns;
  const uint32_t full = shared_address(words), empty = full + 16;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) mbarrier_init(full + 8 * i, 1), mbarrier_init(empty + 8 * i, 8);
    mbarrier_fence_init();
    turns = 0;
  }
  __syncthreads();
  Ring<2> ring;
  const int warpgroup = __shfl_sync(0xffffffffu, int(threadIdx.x) / 128, 0);
  if (warpgroup == 0) {
    fewer_registers<72>();
    if (threadIdx.x < 32) {
      for (int i = 0; i < count; ++i) {
        mbarrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
        if (threadIdx.x == 0) {
          *const_cast<volatile int*>(&slots[ring.stage]) = i + 1;
          mbarrier_arrive(full + 8 * ring.stage);
        }
        ring.advance();
      }
    }
  } else {
    more_registers<216>();
    const int group = warpgroup - 1;
    int sum = 0;
    if (group == 1) named_barrier_arrive(1, 256);
    for (int i = 0; i < count; ++i) {
      mbarrier_wait(full + 8 * ring.stage, ring.parity);
      sum += *const_cast<volatile int*>(&slots[ring.stage]);
      named_barrier_sync(1 + group, 256);
      if (threadIdx.x % 128 == 0) order[atomicAdd(&turns, 1)] = group;
      named_barrier_arrive(2 - group, 256);
      __syncwarp();
      if (threadIdx.x % 32 == 0) mbarrier_arrive(empty + 8 * ring.stage);
      ring.advance();
    }
    if (threadIdx.x % 128 == 0) sums[group] = sum;
  }
}

TEST(sm90_ring_turns_and_registers) {
  if (!hopper()) return;
  for (int count : {0, 1, 2, 5, 1000}) {
    Array<int> sums(2), order(size_t(2 * count + 1));
    sums[0] = sums[1] = -1;
    pass_through_ring<<<1, 384>>>(sums.data, order.data, count);
    finish();
    CHECK(sums[0] == count * (count + 1) / 2 && sums[1] == sums[0], "%d numbers: sums %d, %d", count, sums[0], sums[1]);
    int wrong = 0;
    for (int i = 0; i < 2 * count; ++i) wrong += order[size_t(i)] != i % 2;
    CHECK(!wrong, "%d numbers: %d out of turn", count, wrong);
  }
}

}  // namespace
}  // namespace sparsekit::testing

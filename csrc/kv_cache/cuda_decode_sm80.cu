// Which problems the tensor-core decode kernels take, and how they are launched.
#include <cuda_runtime.h>

#include "common/cuda/launch.h"
#include "kv_cache/cuda_decode.cuh"
#include "kv_cache/cuda_decode.h"
#include "kv_cache/cuda_decode_sm80.h"

namespace sparsekit {
namespace {

using namespace sparsekit::cuda;

constexpr int kThreads = 128, kRows = 8;

PackedDecodeKernel kernel_of(int bits, int dim, bool per_channel, int group_size) {
  switch (bits) {
    case kv_fp8: return decode_packed_fp8(dim, per_channel, group_size);
    case 8: return decode_packed_8(dim, per_channel, group_size);
    case 4: return decode_packed_4(dim, per_channel, group_size);
    case 3: return decode_packed_3(dim, per_channel, group_size);
    default: return decode_packed_2(dim, per_channel, group_size);
  }
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

const char* refuses(const DecodeAttention& p, const CudaContext&) {
  if (p.dtype != DType::bf16 && p.dtype != DType::f16) return "query: float32 is left to the next";
  if (p.head_dim != p.value_dim) return "value_dim other than head_dim is left to the next";
  if (p.head_dim != 64 && p.head_dim != 128) return "head_dim other than 64 and 128 is left to the next";
  if (p.plain) {
    const PlainCache& c = *p.plain;
    if (c.dtype != p.dtype) return "a cache of another dtype than query is left to the next";
    bool usable = aligned(c.key) && aligned(c.value);
    for (int64_t stride : {c.key_page, c.key_head, c.key_token, c.value_page, c.value_head, c.value_token})
      usable = usable && stride % 8 == 0;
    return usable ? nullptr : "rows that are not aligned to 16 bytes are left to the next";
  }
  const KvCache& c = *p.cache;
  if (c.dtype != p.dtype) return "a window of another dtype than query is left to the next";
  if (c.key.bits != c.value.bits) return "values of other bits than keys are left to the next";
  if (!c.key.per_channel && c.key.width() < 4 && c.key.group_size == 32)
    return "keys per token in groups of 32 at 2 and 3 bits are left to the next";
  for (const void* pointer : {static_cast<const void*>(c.key_codes), static_cast<const void*>(c.value_codes),
                              static_cast<const void*>(c.key_scales), static_cast<const void*>(c.value_scales),
                              static_cast<const void*>(c.key_minima), static_cast<const void*>(c.value_minima),
                              static_cast<const void*>(c.key_window), static_cast<const void*>(c.value_window)}) {
    if (!aligned(pointer)) return "tensors that are not aligned to 16 bytes are left to the next";
  }
  return nullptr;
}

void shape_of(const DecodeAttention& p, PackedDecodeKernel* kernel, int64_t* tokens) {
  if (p.plain) {
    *kernel = {decode_plain_kernel(p.head_dim, p.dtype == DType::bf16), decode_plain_shared_bytes(p.head_dim), 32};
    *tokens = p.plain->pages_per_head * p.plain->page_size;
  } else {
    const KvPacking& key = p.cache->key;
    *kernel = kernel_of(key.bits, p.head_dim, key.per_channel, key.group_size);
    *tokens = p.cache->capacity();
  }
}

void cut(const DecodeAttention& p, const CudaContext& context, int* splits, int* slots) {
  PackedDecodeKernel kernel;
  int64_t tokens = 0;
  shape_of(p, &kernel, &tokens);
  SharedMemory memory;
  int64_t resident = 1;
  if (shared_memory_of_device(&memory).ok()) resident = memory.per_multiprocessor / int64_t(kernel.shared_bytes + 1024);
  const int64_t most = p.plain ? 2 : kDecodeResident;
  resident = (resident < 1 ? 1 : resident > most ? most : resident) * context.multiprocessors;
  const int64_t rows = (p.heads_q / p.heads_kv * p.len_q + kRows - 1) / kRows;
  const int64_t least = 4 * kernel.tokens;  // a tile per warp
  *splits = choose_splits(p.batch * p.heads_kv * rows, (tokens + least - 1) / least, resident, kMostSplits);
  *slots = *splits + (p.plain ? 0 : 1);
}

Status run(const Decode& decode, const CudaContext& context) {
  PackedDecodeKernel kernel;
  if (decode.packed()) {
    const Format& f = decode.cache.key.format;
    kernel = kernel_of(f.bits, f.dim, f.per_channel, f.group_size);
  } else {
    kernel = {decode_plain_kernel(decode.head_dim, decode.dtype == DType::bf16),
              decode_plain_shared_bytes(decode.head_dim), 32};
  }
  Status status = status_of(
      cudaFuncSetAttribute(kernel.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(kernel.shared_bytes)),
      "decode_attention");
  if (!status.ok()) return status;
  // As many CTAs on a multiprocessor as registers allow, not as the driver's choice of L1 leaves room for.
  status = status_of(cudaFuncSetAttribute(kernel.kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                          cudaSharedmemCarveoutMaxShared),
                     "decode_attention");
  if (!status.ok()) return status;
  const int64_t rows = (decode.rows + kRows - 1) / kRows;
  void* arguments[] = {const_cast<Decode*>(&decode)};
  return status_of(
      cudaLaunchKernel(kernel.kernel,
                       dim3(unsigned(rows * decode.heads_kv), unsigned(decode.batch), unsigned(decode.slots)),
                       dim3(kThreads), arguments, kernel.shared_bytes, static_cast<cudaStream_t>(context.stream)),
      "decode_attention");
}

}  // namespace

const CudaDecodeKernel decode_cuda_sm80 = {"sm80", refuses, cut, run};

}  // namespace sparsekit

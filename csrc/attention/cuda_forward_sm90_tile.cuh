// Sizes of one Hopper forward kernel, its shared memory, and what producer and consumers tell each other in it.
#pragma once

#include "attention/cuda_forward_sm90.h"
#include "attention/cuda_tiles.cuh"
#include "common/cuda/barriers_sm90.cuh"
#include "common/cuda/shared_memory.cuh"

namespace sparsekit::sm90 {

using namespace sparsekit::cuda;

constexpr int kGroupThreads = 128;   // of a warpgroup
constexpr int kPanelRowBytes = 128;  // 64 columns of 16 bits: the swizzle's width
constexpr int kHalf = 64;            // keys: what the kernel takes a block of 64 or a part of a larger one as

/// HEAD and VALUE are upper bounds: TMA fills the columns behind smaller dimensions with zeros. GROUPS warpgroups of 64
/// query rows share the key blocks of one list; a step takes KEYS of them. Buffers are rings of *_STAGES.
template <class ElementType, int HEAD, int VALUE, int GROUPS, int KEYS, int QUERY_STAGES, int KEY_STAGES,
          int VALUE_STAGES>
struct ForwardTile {
  using Element = ElementType;
  static constexpr int kHead = HEAD, kValue = VALUE, kGroups = GROUPS, kKeys = KEYS;
  static constexpr int kQueryStages = QUERY_STAGES, kKeyStages = KEY_STAGES, kValueStages = VALUE_STAGES;
  static constexpr int kRows = 64 * GROUPS, kHalves = KEYS / kHalf;
  static constexpr int kThreads = kGroupThreads * (1 + GROUPS);
  static constexpr int kCtas = GROUPS == 2 ? 1 : 2;  // on a multiprocessor
  /// 65,536 registers: at launch one CTA of 3 warpgroups has 168 per thread, two of 2 have 128. The producer's number
  /// is the least that holds its list walk without spilling, the consumers have the rest.
  static constexpr int kProducerRegisters = GROUPS == 2 ? 72 : 80, kConsumerRegisters = GROUPS == 2 ? 216 : 176;
  /// With two buffers for Q the first product of the next list row runs beside the last of this one.
  static constexpr bool kAcrossRows = QUERY_STAGES > 1;
  /// The two warpgroups issue their products in turns, so that one takes exponentials meanwhile. At head dimension 64
  /// exponentials take as long as products, and turns cost 8 % (an earlier kernel on an H100).
  static constexpr bool kTurns = GROUPS == 2 && HEAD > 64;

  static constexpr int kHeadPanels = (HEAD + 63) / 64, kValuePanels = (VALUE + 63) / 64;
  static constexpr int kQueryPanel = kRows * kPanelRowBytes, kKeyPanel = KEYS * kPanelRowBytes;
  static constexpr int kQueryBytes = kHeadPanels * kQueryPanel;
  static constexpr int kKeyBytes = kHeadPanels * kKeyPanel, kValueBytes = kValuePanels * kKeyPanel;
  static constexpr int kMaskBytes = kRows * 16;  // packed bits of a block of 128 keys, or two of 64
  static_assert(VALUE <= kHeadPanels * 64, "O is staged in Q's buffer");

  // Byte offsets into shared memory. Behind a step's K: its packed bits, bias, key positions and Step.
  static constexpr int kQueryAt = 0, kKeyAt = kQueryAt + QUERY_STAGES * kQueryBytes;
  static constexpr int kValueAt = kKeyAt + KEY_STAGES * kKeyBytes, kMaskAt = kValueAt + VALUE_STAGES * kValueBytes;
  static constexpr int kBiasAt = kMaskAt + KEY_STAGES * kMaskBytes, kPositionAt = kBiasAt + KEY_STAGES * KEYS * 4;
  static constexpr int kStepAt = kPositionAt + KEY_STAGES * KEYS * 4, kRowAt = kStepAt + KEY_STAGES * 16;
  static constexpr int kBarriersAt = kRowAt + QUERY_STAGES * 16;
  // Barriers of 8 bytes: full and empty of each buffer.
  static constexpr int kQueryFull = kBarriersAt, kQueryEmpty = kQueryFull + 8 * QUERY_STAGES;
  static constexpr int kKeyFull = kQueryEmpty + 8 * QUERY_STAGES, kKeyEmpty = kKeyFull + 8 * KEY_STAGES;
  static constexpr int kValueFull = kKeyEmpty + 8 * KEY_STAGES, kValueEmpty = kValueFull + 8 * VALUE_STAGES;
  static constexpr int kEnd = kValueEmpty + 8 * VALUE_STAGES;
  static constexpr int kSharedBytes = kEnd + 1024;  // the base is rounded up to 1024 bytes, the swizzle's period
  static_assert(kCtas * (kSharedBytes + 1024) <= 228 * 1024, "shared memory of a multiprocessor");
};

/// What the producer says about a step, in shared memory with its keys. {flags, first key of each half}.
/// `flags`: kLastStep of this list row; kStop: nothing follows, and no keys came; and of half h, shifted by
/// mask_shift(h), why some of its keys may be hidden from some row.
constexpr int kLastStep = 1, kStop = 2;
constexpr int kCut = 1;    // keys past the end of the sequence, or no block at all
constexpr int kRange = 2;  // causality, window
constexpr int kBits = 4;   // packed bits
__device__ __forceinline__ constexpr int mask_shift(int half) { return 4 + 4 * half; }
constexpr int kAnyMask = ~0xf;

// Small things in shared memory by 32-bit address; ordered against barriers.
__device__ __forceinline__ void store_shared(uint32_t at, int4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(at), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t at, int x) {
  asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(at), "r"(x) : "memory");
}
__device__ __forceinline__ int4 load_shared_int4(uint32_t at) {
  int4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(at)
               : "memory");
  return x;
}
__device__ __forceinline__ int2 load_shared_int2(uint32_t at) {
  int2 x;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];\n" : "=r"(x.x), "=r"(x.y) : "r"(at) : "memory");
  return x;
}

}  // namespace sparsekit::sm90

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
          int VALUE_STAGES, int CTAS = 3 - GROUPS>
struct ForwardTile {
  using Element = ElementType;
  static constexpr int kHead = HEAD, kValue = VALUE, kGroups = GROUPS, kKeys = KEYS;
  static constexpr int kQueryStages = QUERY_STAGES, kKeyStages = KEY_STAGES, kValueStages = VALUE_STAGES;
  static constexpr int kRows = 64 * GROUPS, kHalves = KEYS / kHalf;
  static constexpr int kCtas = CTAS;  // on a multiprocessor
  /// 65,536 registers, 168 a thread for two consumer warpgroups and one for the producer warp, which alone can hand its
  /// registers on: 80 is the least that holds its list walk without spilling (beside O of 256 columns it spills). With
  /// more consumers the producer is a warp by itself, and all have the same number.
  static constexpr bool kSharesRegisters = CTAS * GROUPS == 2;
  static constexpr int kThreads = kGroupThreads * GROUPS + (kSharesRegisters ? kGroupThreads : kWarpSize);
  static constexpr int kProducerRegisters = GROUPS == 1 ? 80 : VALUE > 128 ? 72 : 88;
  static constexpr int kConsumerRegisters = GROUPS == 1 ? 176 : VALUE > 128 ? 216 : 208;

  static constexpr int kProbabilityBuffers = VALUE <= 64 && GROUPS == 2 ? 2 : 1;
  static constexpr int kHeadPanels = (HEAD + 63) / 64, kValuePanels = (VALUE + 63) / 64;
  static constexpr int kQueryPanel = kRows * kPanelRowBytes, kKeyPanel = KEYS * kPanelRowBytes;
  static constexpr int kQueryBytes = kHeadPanels * kQueryPanel;
  static constexpr int kKeyBytes = kHeadPanels * kKeyPanel, kValueBytes = kValuePanels * kKeyPanel;
  static constexpr int kMaskBytes = kRows * 16;  // packed bits of a block of 128 keys, or two of 64
  /// Whose rows are at work: a consumer writes row i - 1 during the first step of row i, when the producer can be
  /// KEY_STAGES steps, so at most as many rows, ahead.
  static constexpr int kRowSlots = 8;
  static_assert(KEY_STAGES + 2 <= kRowSlots, "a slot would be written before it is read");

  // Byte offsets into shared memory. Behind a step's K: its packed bits, bias, key positions and Step.
  static constexpr int kQueryAt = 0, kKeyAt = kQueryAt + QUERY_STAGES * kQueryBytes;
  static constexpr int kValueAt = kKeyAt + KEY_STAGES * kKeyBytes, kMaskAt = kValueAt + VALUE_STAGES * kValueBytes;
  static constexpr int kBiasAt = kMaskAt + KEY_STAGES * kMaskBytes, kPositionAt = kBiasAt + KEY_STAGES * KEYS * 4;
  static constexpr int kStepAt = kPositionAt + KEY_STAGES * KEYS * 4, kRowAt = kStepAt + KEY_STAGES * 16;
  static constexpr int kBarriersAt = kRowAt + kRowSlots * 32;
  // Barriers of 8 bytes: full and empty of each buffer.
  static constexpr int kQueryFull = kBarriersAt, kQueryEmpty = kQueryFull + 8 * QUERY_STAGES;
  static constexpr int kKeyFull = kQueryEmpty + 8 * QUERY_STAGES, kKeyEmpty = kKeyFull + 8 * KEY_STAGES;
  static constexpr int kValueFull = kKeyEmpty + 8 * KEY_STAGES, kValueEmpty = kValueFull + 8 * VALUE_STAGES;
  static constexpr int kCutValues = kValueEmpty + 8 * VALUE_STAGES;  // values that the producer has to look at
  static constexpr int kEnd = kCutValues + 8;
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
constexpr int kUpper = 8;  // with kBits: the half is the upper one of a block of 128 keys that takes two steps
__device__ __forceinline__ constexpr int mask_shift(int half) { return 4 + 4 * half; }
constexpr int kAnyMask = ~0xf;

/// What a row of the block lists is about: batch entry, query head, its first query row, the end of its sequence's
/// query rows, its sequence's keys. Rows and keys are numbers in the tensors, also where these hold several sequences.
struct ListRow {
  int batch, head, first, end, keys_begin, keys_end;
};

/// The keys (or key positions, where the problem has them) that causality and the window let query row `row` see.
__device__ __forceinline__ KeyRange range_of(const AttentionProblem& p, const ListRow& list, int row) {
  int64_t position = int64_t(row) + list.keys_end - list.end - list.keys_begin;
  if (p.query_positions) position = p.query_positions[list.batch * p.query_positions_batch + row];
  if (!p.key_positions) position += list.keys_begin;  // a key's position is its number in its sequence
  int64_t low = p.window_left >= 0 ? position - p.window_left : INT_MIN;
  int64_t high = p.window_right >= 0 ? position + p.window_right : INT_MAX;
  if (p.causal) high = min(high, position);
  const int64_t least = INT_MIN, most = INT_MAX;
  return {int(min(max(low, least), most)), int(min(max(high, least), most))};
}

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

/// Where the producer says, with its queries, what the CTA's row-th list row (of those that have keys) is about.
template <class Tile>
__device__ __forceinline__ void store_list_row(uint32_t shared, int row, const ListRow& list) {
  const uint32_t at = shared + Tile::kRowAt + row % Tile::kRowSlots * 32;
  store_shared(at, int4{list.batch, list.head, list.first, list.end});
  store_shared(at + 16, int4{list.keys_begin, list.keys_end, 0, 0});
}
template <class Tile>
__device__ __forceinline__ ListRow load_list_row(uint32_t shared, int row) {
  const uint32_t at = shared + Tile::kRowAt + row % Tile::kRowSlots * 32;
  const int4 rows = load_shared_int4(at), keys = load_shared_int4(at + 16);
  return {rows.x, rows.y, rows.z, rows.w, keys.x, keys.y};
}

}  // namespace sparsekit::sm90

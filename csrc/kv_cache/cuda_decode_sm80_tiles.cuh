// The packed decode kernel's way from memory to registers: which blocks a warp copies, where they stand in its ring,
// and codes out of it. What it computes: cuda_decode_sm80_packed.cuh.
#pragma once

#include "kv_cache/cuda_decode_sm80.cuh"
#include "kv_cache/cuda_decode_sm80_codes.cuh"

namespace sparsekit::cuda {

/// One shape of the kernel. HALVES: a tile holds two key groups of 32 tokens.
template <int BITS, int DIM, bool CHANNEL, bool HALVES>
struct PackedTiles {
  using C = Codes<BITS>;
  static constexpr int kTokens = C::kTokens, kBlocks = kTokens / 32, kSlots = 3;
  static constexpr int kLoads = DIM * C::kPlane / 128;  // of 16 bytes of a lane, per 32 tokens of keys
  static constexpr int kTiles = DIM / 16;               // of out
  static constexpr int kBlockBytes = 4 * DIM * (C::kHigh ? 3 : C::kPlane);
  static constexpr int kCodeBytes = kBlockBytes * kBlocks;
  static constexpr int kGroups = CHANNEL ? (HALVES ? 2 : 1) : 0;  // key groups of a tile, per channel
  static constexpr int kWords = 32 / C::kPlane;                   // channels (tokens) of a word

  /// Bytes of a slot: codes, then scales and minima of keys or of values.
  static __host__ __device__ int parameter_bytes(int group_size) {
    const int groups = (DIM + group_size - 1) / group_size;
    const int per_token = kTokens * groups * 4, per_channel = kGroups * DIM * 4;
    return CHANNEL && per_channel > per_token ? per_channel : per_token;
  }
  static __host__ __device__ int slot_bytes(int group_size) { return kCodeBytes + parameter_bytes(group_size); }

  const Decode& p;
  const int lane, g, t;
  const Lengths n;
  const uint32_t ring;  // of this warp
  const int slot_size;
  Columns columns;

  __device__ __forceinline__ PackedTiles(const Decode& p, int64_t b, int64_t h, int first_row, const Lengths& n,
                                         uint32_t ring)
      : p(p),
        lane(threadIdx.x % 32),
        g(lane / 4),
        t(lane % 4),
        n(n),
        ring(ring),
        slot_size(slot_bytes(p.cache.key.format.group_size)),
        columns(columns_of(p, b, h, first_row, n.total())) {}

  __device__ __forceinline__ int chunk(int s) const { return C::kMixed ? 4 * (g >> 1) + 2 * s + (g & 1) : 8 * s + g; }
  /// The first of this lane's 8 tokens of step s, as the values' product has them.
  __device__ __forceinline__ int tokens_of(int s) const { return C::kMixed ? 16 * t + 8 * s : 32 * s + 8 * t; }

  /// Blocks of the tile that is copied next; of this warp's tiles in turn, without a division each.
  struct Cursor {
    int token, page, in_page;        // of the tile's first block; in_page in blocks
    int base;                        // the first block of that page, or negative: it is none
    int blocks[2];                   // 0 where there is none
    uint32_t absent, absent_before;  // bit s: block s of the newest tile, and of the one before it, is none
  } cursor;

  __device__ __forceinline__ int first_block(int page) const {
    const Cache& c = p.cache;
    const int64_t number = c.page(columns.b, columns.h, page);
    return number < 0 ? -1
                      : int((number * c.page_heads + (c.page_heads == 1 ? 0 : columns.h)) * (c.page_size / kv_block));
  }
  __device__ __forceinline__ void start_cursor(int token) {
    const int blocks = p.cache.page_size / kv_block;
    cursor.token = token;
    cursor.page = token / kv_block / blocks;
    cursor.in_page = token / kv_block % blocks;
    cursor.base = first_block(cursor.page);
    cursor.absent = 0;
  }
  __device__ __forceinline__ void next_tile() {
    const int blocks = p.cache.page_size / kv_block;
    cursor.absent_before = cursor.absent;
    cursor.absent = 0;
#pragma unroll
    for (int s = 0; s < kBlocks; ++s) {
      int block = cursor.base < 0 ? -1 : cursor.base + cursor.in_page + s;
      if (s > 0 && __builtin_expect(cursor.in_page + s >= blocks, 0)) block = first_block(cursor.page + 1);
      if (cursor.token + 32 * s >= n.quantized) block = -1;
      cursor.blocks[s] = max(block, 0);
      cursor.absent |= uint32_t(block < 0) << s;
    }
    cursor.token += kDecodeWarps * kTokens;
    cursor.in_page += kDecodeWarps * kBlocks;
    if (cursor.in_page >= blocks) {
      cursor.page += cursor.in_page / blocks;
      cursor.in_page %= blocks;
      cursor.base = first_block(cursor.page);
    }
  }

  /// Which 16 bytes of a tile's scales and minima this lane copies: chunk `number` of [block or group][2][...]; -1:
  /// none. In one register: its offset in scales or minima of block (group) 0, then `of`, then whether it is minima.
  struct Part {
    int code;
    __device__ __forceinline__ bool none() const { return code < 0; }
    __device__ __forceinline__ int offset() const { return code & 0xffff; }
    __device__ __forceinline__ int of() const { return code >> 16 & 1; }
    __device__ __forceinline__ bool minima() const { return (code & 0x20000) != 0; }
  };
  __device__ __forceinline__ Part part_of(const Pool& pool, int number, bool value) const {
    const int each = each_of(value), count = !value && CHANNEL ? kGroups : kBlocks;
    const int of = number / (2 * each), second = number % (2 * each) / each;
    const bool none = of >= count || (second && !pool.minima);
    return {none ? -1 : number % each * 8 | of << 16 | second << 17};
  }

  /// Chunks per scales (or minima) of a block, or of a group of keys per channel.
  __device__ __forceinline__ int each_of(bool value) const {
    return !value && CHANNEL ? DIM / 8 : p.cache.value.format.groups * 4;
  }
  __device__ __forceinline__ int parameter_chunks(bool value) const {
    return 2 * each_of(value) * (!value && CHANNEL ? kGroups : kBlocks);
  }
  Part key_part, value_part;

  // SWIZZLE. A warp copies 512 neighbouring bytes at once: what it would read that way, in 32 bytes here and there, is
  // four times as many requests, and L2 is busy with them long before memory is. Lane (g, t) then reads chunk g (of 16
  // bytes, in 8) of a row that t decides. The rows of the four t are 128 bytes or a multiple apart, so chunk c of one
  // stands at c ^ 2 t: 8 lanes read 8 different chunks.

  /// The lane of four that reads row `row` of the value words of block s; planes one behind the other.
  static __device__ __forceinline__ int reader_of(int s, int row) {
    return C::kMixed ? 2 * s + (row < 2 ? row : 0) : row * C::kSteps / 2;
  }

  /// Starts the copies of the cursor's tile of keys or values into a slot.
  __device__ __forceinline__ void copy_tile(int slot, bool value) const {
    const Pool& pool = value ? p.cache.value : p.cache.key;
    const uint32_t to = ring + slot * slot_size;
    constexpr int kChunks = kBlockBytes / 16;
#pragma unroll
    for (int s = 0; s < kBlocks; ++s) {
      const uint8_t* from = pool.codes + lane * 16 + int64_t(cursor.blocks[s]) * kBlockBytes;
      const bool exists = !(cursor.absent >> s & 1);
#pragma unroll
      for (int i = 0; i < (kChunks + 31) / 32; ++i) {
        // See SWIZZLE: `t` is the lane of four that reads this chunk. Slots are multiples of 128 bytes.
        const int t = value ? reader_of(s, DIM == 64 ? 2 * i + lane / 16 : i) : lane / 8;
        if (32 * i + 31 < kChunks || 32 * i + lane < kChunks)
          copy_async_16(((to + lane * 16) ^ (32 * t)) + s * kBlockBytes + i * 512, from + i * 512, exists);
      }
    }
    // Scales, then minima: per channel [group][2][DIM], per token [block][2][groups][32]. Mostly one copy.
    copy_part(to + kCodeBytes + lane * 16, value ? value_part : key_part, value);
    const int chunks = parameter_chunks(value);
    if (__builtin_expect(chunks > 32, 0)) {
#pragma unroll 1
      for (int first = 32; first < chunks; first += 32)
        copy_part(to + kCodeBytes + (first + lane) * 16, part_of(pool, first + lane, value), value);
    }
  }
  __device__ __forceinline__ void copy_part(uint32_t to, const Part& part, bool value) const {
    if (part.none()) return;
    const Pool& pool = value ? p.cache.value : p.cache.key;
    const int block = part.of() ? cursor.blocks[1] : cursor.blocks[0];
    const Format& f = value ? p.cache.value.format : p.cache.key.format;
    const int64_t at = !value && CHANNEL ? int64_t(block >> (f.group_size == 32   ? 0
                                                             : f.group_size == 64 ? 1
                                                                                  : 2)) *
                                               DIM
                                         : int64_t(block) * (f.groups * 32);
    copy_async_16(to, (part.minima() ? pool.minima : pool.scales) + part.offset() + at,
                  !(cursor.absent >> part.of() & 1));
  }
  __device__ __forceinline__ static uint32_t word_of(const uint4& x, int i) {
    return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
  }

  /// Codes of load i, step s: of the four tokens, as A operands.
  __device__ __forceinline__ void load_codes(uint32_t slot, int i, int s, uint32_t (&codes)[4][2 * C::kSteps]) const {
    const int block = C::kMixed ? g >> 2 : s, column = chunk(s) & 7;
    const uint4 words = load_shared(slot + block * kBlockBytes + i * 512 + t * 128 + (column ^ 2 * t) * 16);
    uint4 high = make_uint4(0, 0, 0, 0);
    if (C::kHigh) {
      const int row = 2 * i + (t >> 1);
      high = load_shared(slot + block * kBlockBytes + 8 * DIM + row * 128 + (column ^ 2 * (row & 3)) * 16);
      const int by = 4 * (t & 1);
      high.x >>= by, high.y >>= by, high.z >>= by, high.w >>= by;
    }
#pragma unroll
    for (int a = 0; a < 4; ++a) C::unpack(word_of(words, a), word_of(high, a), codes[a]);
  }

  /// Largest of the scales that this lane copied, NaN where one is.
  __device__ __forceinline__ __half2 largest_scales(uint32_t slot, bool value) const {
    const Pool& pool = value ? p.cache.value : p.cache.key;
    __half2 most = __float2half2_rn(0.f);
    auto take = [&](const Part& part, int number) {
      if (part.none() || part.minima()) return;
      const uint4 x = load_shared(slot + kCodeBytes + number * 16);
      most = __hmax2_nan(
          most, __hmax2_nan(__hmax2_nan(half2_of(x.x), half2_of(x.y)), __hmax2_nan(half2_of(x.z), half2_of(x.w))));
    };
    take(value ? value_part : key_part, lane);
    const int chunks = parameter_chunks(value);
    if (__builtin_expect(chunks > 32, 0)) {
#pragma unroll 1
      for (int first = 32; first < chunks; first += 32) take(part_of(pool, first + lane, value), first + lane);
    }
    return most;
  }
};

}  // namespace sparsekit::cuda

// Quantizes tiles of 16-bit rows, 64 or 128 tokens x 128 channels, at the rate of memory.
//
// A lane holds 8 channels x 8 tokens as they come from memory: 8 loads of 16 bytes, 32 registers. A warp has 16 tokens
// (half a block), 16 lanes a row. Extremes are taken of two elements at once; one thread per group makes scale and
// minimum and leaves what codes are computed with in shared memory. A code is one multiply-add with a number that
// rounds, and goes to its word with one shift-and-add: a word's 32 / bits elements are mostly of one lane, else of 2 or
// 4 neighbours. Budget at 0.8 of a copy's bandwidth: 20 issue slots per element of 2 bytes; used: extremes 1,
// conversion 1, code 2, distance to a tie 3, word 1.
//
// Bit-exact with packing.h, whose quotient is an IEEE division: product and quotient round to the same code unless they
// are very near to a tie (kNear). Those, and groups whose elements need clamping or hold NaN, go the exact way.
#pragma once

#include "kv_cache/cuda_quantize.cuh"

namespace sparsekit::cuda {

/// Two elements in a register: NaN-keeping extremes, and both as fp32.
template <class Element>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  static __device__ __forceinline__ uint32_t higher(uint32_t a, uint32_t b) {
    uint32_t x;
    asm("max.NaN.bf16x2 %0, %1, %2;\n" : "=r"(x) : "r"(a), "r"(b));
    return x;
  }
  static __device__ __forceinline__ uint32_t lower(uint32_t a, uint32_t b) {
    uint32_t x;
    asm("min.NaN.bf16x2 %0, %1, %2;\n" : "=r"(x) : "r"(a), "r"(b));
    return x;
  }
  static __device__ __forceinline__ float low(uint32_t x) { return __uint_as_float(x << 16); }
  static __device__ __forceinline__ float high(uint32_t x) { return __uint_as_float(x & 0xffff0000u); }
  static constexpr uint32_t kLowest = 0xff80ff80u;  // -inf, -inf
};
template <>
struct Pair<__half> {
  static __device__ __forceinline__ uint32_t higher(uint32_t a, uint32_t b) {
    uint32_t x;
    asm("max.NaN.f16x2 %0, %1, %2;\n" : "=r"(x) : "r"(a), "r"(b));
    return x;
  }
  static __device__ __forceinline__ uint32_t lower(uint32_t a, uint32_t b) {
    uint32_t x;
    asm("min.NaN.f16x2 %0, %1, %2;\n" : "=r"(x) : "r"(a), "r"(b));
    return x;
  }
  static __device__ __forceinline__ float low(uint32_t x) { return half_value(uint16_t(x)); }
  static __device__ __forceinline__ float high(uint32_t x) { return half_value(uint16_t(x >> 16)); }
  static constexpr uint32_t kLowest = 0xfc00fc00u;
};
/// The smaller ones are the larger ones of the negated: -min.
__device__ __forceinline__ uint32_t negated(uint32_t x) { return x ^ 0x80008000u; }

/// What codes of a group are computed with. inverse: 1 / unit, 0 where the scale is 0, NaN: every element goes the
/// exact way (the group is poisoned, or elements need clamping).
struct Step {
  float base, inverse;
};

/// A tile. `row(t)`: the elements of its token t; `place(t)`: codes of the block, scales of the unit of token t.
/// Keys per channel, or keys or values per token; VALUE: the layout of values.
template <class Element, int BITS, bool CHANNEL, bool VALUE>
struct QuantizeRows {
  static constexpr bool kFp8 = BITS == kv_fp8;
  static constexpr int kWidth = kFp8 ? 8 : BITS, kPlane = kWidth == 3 ? 2 : kWidth;
  static constexpr int kMostWarps = 8, kWarpTokens = 16;
  // Product and quotient differ by 2^-23 of the code at most: nearer than this to the middle of two, it is computed.
  static constexpr float kNear = 0.5f - 1.5f * float(1 << kWidth) / 8388608.f;
  static constexpr float kRare = __builtin_nanf("");
  using P = Pair<Element>;

  struct Shared {
    union {
      uint4 extremes[kMostWarps][2][16];           // per channel: of a warp, highest and negated lowest
      uint32_t rows[kMostWarps][kWarpTokens][16];  // per token: of a lane, highest and negated lowest
    };
    uint4 second[kWidth == 3 && VALUE ? kMostWarps / 2 : 1][2][16];  // 3 bits of values: words of a block's second half
    // Per channel: [group of the tile][channel]; per token: [token][group of the slice], up to 4.
    Place places[kMostWarps / 2];  // of blocks
    alignas(16) Step steps[CHANNEL ? 2 * kSlice : kMostWarps * kWarpTokens * 4];
    float units[CHANNEL ? 2 * kSlice : kMostWarps * kWarpTokens * 4];  // negative: poisoned
  };

  const Format& f;
  const int shift, count, slice;  // group_size = 1 << shift
  Shared& shared;
  const int lane, warp, c, half, d;
  uint32_t x[8][4];

  __device__ __forceinline__ QuantizeRows(const Format& f, int count, int slice, Shared& shared)
      : f(f),
        shift(f.group_size == 32   ? 5
              : f.group_size == 64 ? 6
                                   : 7),
        count(count),
        slice(slice),
        shared(shared),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        c(lane % 16),
        half(lane / 16),
        d(slice * kSlice + c * 8) {}

  /// Token of the tile that is this lane's number i. In the layout of keys four neighbours, so that the two halves of
  /// a warp fill sectors of 32 bytes together.
  __device__ __forceinline__ int token(int i) const {
    return warp * kWarpTokens + (VALUE ? 8 * half + i : i / 4 * 8 + 4 * half + i % 4);
  }

  /// `rows(t)`: the elements of token t. Where the tile is full and evenly spaced, `first` is its first row, and rows
  /// are `stride` elements apart. Tokens past the end repeat the last one, which changes no extremes.
  template <class Row>
  __device__ __forceinline__ void load(const Element* first, int64_t stride, const Row& rows) {
    const int column = d < f.dim ? d : 0;
    auto take = [&](int i, const Element* row) {
      const uint4 raw = __ldcs(reinterpret_cast<const uint4*>(row + column));
      x[i][0] = raw.x, x[i][1] = raw.y, x[i][2] = raw.z, x[i][3] = raw.w;
    };
    if (first) {
      first += token(0) * stride;
#pragma unroll
      for (int i = 0; i < 8; ++i) take(i, first + (token(i) - token(0)) * stride);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) take(i, rows(min(token(i), count - 1)));
    }
  }

  static __device__ __forceinline__ float most(bool symmetric) {
    return symmetric ? float((1 << (kWidth - 1)) - 1) : float((1 << kWidth) - 1);
  }
  static __device__ __forceinline__ float middle(bool symmetric) { return symmetric ? float(1 << (kWidth - 1)) : 0.f; }

  /// Scale and minimum of a group, and its step.
  __device__ __forceinline__ void settle(float low, float high, int at, uint16_t* scale, uint16_t* minimum) const {
    const Group g = make_group(f, low, high);
    // Zeros of fp8 have signs, which a product with 0 keeps and the CPU does not.
    Step step = {g.base, g.unit > 0.f ? __frcp_rn(g.unit) : kFp8 ? kRare : 0.f};
    if (!kFp8) {
      const float top = most(f.symmetric), bottom = f.symmetric ? -top : 0.f;
      if (!((low - g.base) * step.inverse > bottom - 0.499f && (high - g.base) * step.inverse < top + 0.499f))
        step.inverse = kRare;
    }
    if (g.poison) step.inverse = kRare;
    shared.steps[at] = step;
    shared.units[at] = g.poison ? -1.f : g.unit;
    *scale = g.scale;
    if (minimum) *minimum = g.minimum;
  }

  __device__ __forceinline__ void settle_channels() {
    uint32_t high[4], low[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      high[k] = low[k] = x[0][k];
#pragma unroll
      for (int i = 1; i < 8; ++i) {
        high[k] = P::higher(high[k], x[i][k]);
        low[k] = P::lower(low[k], x[i][k]);
      }
      low[k] = negated(low[k]);
    }
    // One half of the warp goes on with the highest, the other with the lowest.
    uint32_t own[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t other = __shfl_xor_sync(0xffffffffu, half ? high[k] : low[k], 16);
      own[k] = P::higher(half ? low[k] : high[k], other);
    }
    shared.extremes[warp][half][c] = make_uint4(own[0], own[1], own[2], own[3]);
    __syncthreads();
    const int per = 1 << (shift - 4), groups = int(blockDim.x / 32) >> (shift - 4);  // per: warps of a group
#pragma unroll 1
    for (int at = threadIdx.x; at < groups * kSlice; at += blockDim.x) {
      const int group = at / kSlice, channel = at % kSlice, first = group << shift;
      if (slice * kSlice + channel >= f.dim || first >= count) continue;
      uint32_t both = P::kLowest;
      const auto* from = reinterpret_cast<const uint16_t*>(shared.extremes) + channel;
#pragma unroll 2
      for (int w = group * per; w < (group + 1) * per; ++w)
        both = P::higher(both, from[w * 2 * kSlice] | uint32_t(from[(w * 2 + 1) * kSlice]) << 16);
      const Place& to = shared.places[first / kv_block];
      const int index = slice * kSlice + channel;
      settle(-P::high(both), P::low(both), at, to.scales + index, to.minima ? to.minima + index : nullptr);
    }
    __syncthreads();
  }

  __device__ __forceinline__ void settle_tokens() {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t high = P::higher(P::higher(x[i][0], x[i][1]), P::higher(x[i][2], x[i][3]));
      const uint32_t low = negated(P::lower(P::lower(x[i][0], x[i][1]), P::lower(x[i][2], x[i][3])));
      const uint32_t both = P::higher(__byte_perm(high, low, 0x5410), __byte_perm(high, low, 0x7632));
      shared.rows[warp][token(i) % kWarpTokens][c] = d < f.dim ? both : P::kLowest;
    }
    __syncwarp();
    const int lanes = f.group_size / 8, groups = kSlice >> shift;
#pragma unroll 1
    for (int at = lane; at < kWarpTokens * groups; at += 32) {
      const int t = at % kWarpTokens, group = at / kWarpTokens, first = slice * kSlice + (group << shift);
      if (first >= f.dim) continue;
      uint32_t both = P::kLowest;
      const auto* from = reinterpret_cast<const uint4*>(&shared.rows[warp][t][group * lanes]);
#pragma unroll 2
      for (int k = 0; k < lanes / 4; ++k) {
        const uint4 four = from[k];
        both = P::higher(both, P::higher(P::higher(four.x, four.y), P::higher(four.z, four.w)));
      }
      const int number = warp * kWarpTokens + t, block = number / kv_block * kv_block;
      uint16_t scale, minimum = 0;
      settle(-P::high(both), P::low(both), number * 4 + group, &scale, &minimum);
      if (block >= count) continue;  // not of a block that is written
      const Place& to = shared.places[block / kv_block];
      const int index = ((slice * kSlice >> shift) + group) * kv_block + number % kv_block;
      to.scales[index] = number < count ? scale : uint16_t(0);
      if (to.minima) to.minima[index] = number < count ? minimum : uint16_t(0);
    }
    __syncwarp();
  }

  static __device__ __forceinline__ int step_index(int shift, int t, int channel) {
    return CHANNEL ? (t >> shift) * kSlice + channel : t * 4 + (channel >> shift);
  }

  /// kRound + the code of element k of a row (fp8: the code's bits) as the CPU computes it. Out of line: one in 2,000
  /// elements of 16 bits is in the middle of two codes.
  static __device__ __noinline__ float exact(const Step& step, float unit, bool symmetric, int k, uint4 row) {
    const uint32_t pair = k < 2 ? row.x : k < 4 ? row.y : k < 6 ? row.z : row.w;
    const float value = k % 2 ? P::high(pair) : P::low(pair);
    if (unit < 0.f) return kFp8 ? 0.f : kRound;
    if (kFp8) return __uint_as_float(fp8_codes(unit > 0.f ? __fdiv_rn(value, unit) : 0.f, 0.f) & 0xff);
    const float top = most(symmetric), quotient = unit > 0.f ? __fdiv_rn(value - step.base, unit) : 0.f;
    return fminf(fmaxf(quotient, symmetric ? -top : 0.f), top) + kRound + middle(symmetric);
  }

  /// Adds the 8 codes of row x[I] to the words they belong to. A word's element e stands at bit 8 (e % 4) + width (e /
  /// 4); what this lane's elements begin with, if not 0, is shifted in later.
  struct Words {
    static constexpr int kRows = kPlane == 8 ? 2 : 1;  // words of 8 elements
    uint32_t low[8 * kRows], high[kWidth == 3 ? 8 : 1];
  };
  static __host__ __device__ constexpr int bit(int element, int width) {
    return 8 * (element % 4) + (width == 8 ? 0 : width * (element / 4));
  }
  static __host__ __device__ constexpr int word(int i, int k) {
    return VALUE ? (kPlane == 8 ? i / 4 * 8 : 0) + k : i * Words::kRows + (kPlane == 8 ? k / 4 : 0);
  }

  /// bits: of kRound + code, or of an fp8 code. Sums of kRound's bits, shifted, are taken away at the end.
  static __device__ __forceinline__ void add(Words& words, int i, int k, uint32_t bits) {
    const int element = VALUE ? i : k;
    if (kWidth == 3) {
      words.low[word(i, k)] += (bits & 3) << bit(element, 2);
      words.high[VALUE ? k : i] += (bits >> 2 & 1) << bit(element, 1);
    } else {
      words.low[word(i, k)] += bits << bit(element, kPlane);
    }
  }

  __device__ __forceinline__ void pack(Words& words) const {
    Step own[8];
    bool spoiled = false;  // some group of this lane's channels is: every row goes the exact way
    if (CHANNEL) {
      const auto* from = reinterpret_cast<const float4*>(&shared.steps[step_index(shift, warp * kWarpTokens, c * 8)]);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float4 two = d < f.dim ? from[k] : make_float4(0.f, 0.f, 0.f, 0.f);
        own[2 * k] = {two.x, two.y};
        own[2 * k + 1] = {two.z, two.w};
        if (kFp8) spoiled |= !(two.y == two.y && two.w == two.w);
      }
    }
    // kRound's bits are 0x4b400000; kRows of them share a word.
    constexpr uint32_t kBits = 0x4b400000u;
    uint32_t start = 0;
    if (!kFp8 && kWidth != 3) {
#pragma unroll
      for (int e = 0; e < 8 / Words::kRows; ++e) start -= kBits << bit(e, kPlane);
    }
#pragma unroll
    for (int w = 0; w < 8 * Words::kRows; ++w) words.low[w] = start;
    if (kWidth == 3) {
#pragma unroll
      for (int w = 0; w < 8; ++w) words.high[kWidth == 3 ? w : 0] = 0;
    }
    const float shifted = kRound + middle(f.symmetric);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int t = token(i);
      Step step = {0.f, 0.f};
      if (!CHANNEL && d < f.dim) step = shared.steps[step_index(shift, t, c * 8)];
      const bool all = kFp8 && (CHANNEL ? spoiled : step.inverse != step.inverse);
      bool rare = all || t >= count;
      float codes[8];
      auto base_of = [&](int k) { return CHANNEL ? own[k].base : step.base; };
      auto inverse_of = [&](int k) { return CHANNEL ? own[k].inverse : step.inverse; };
      auto value_of = [&](int k) { return k % 2 ? P::high(x[i][k / 2]) : P::low(x[i][k / 2]); };
      // Whether code k is certain. That of an integer: the distance, exact, of the product from it is less than 1/2.
      auto certain = [&](int k) {
        return fabsf(fmaf(value_of(k) - base_of(k), inverse_of(k), shifted - codes[k])) <= kNear;
      };
      // The quotient is within 2^-22 of the product; nearly always the whole interval has one code.
      auto near = [&](int k, float factor) {
        return fp8_codes(value_of(k) * inverse_of(k) * factor, value_of(k + 1) * inverse_of(k + 1) * factor) & 0xffff;
      };
      if (kFp8) {
#pragma unroll
        for (int k = 0; k < 8; k += 2) {
          const uint32_t two = near(k, 0.9999995f);
          rare |= two != near(k, 1.0000005f);
          codes[k] = __uint_as_float(two & 0xff);
          codes[k + 1] = __uint_as_float(two >> 8);
        }
      } else {
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          codes[k] = fmaf(value_of(k) - base_of(k), inverse_of(k), shifted);
          rare |= !certain(k);
        }
      }
      if (__builtin_expect(rare, 0)) {
        uint32_t left = 0;  // bit k: code k is to be computed exactly
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          const uint32_t bits = __float_as_uint(codes[k]);
          const bool sure = kFp8 ? !all && (near(k / 2 * 2, 1.0000005f) >> (k % 2 * 8) & 0xff) == bits : certain(k);
          left |= uint32_t(!sure && t < count) << k;
          if (t >= count) codes[k] = kFp8 ? 0.f : kRound;
        }
        while (left != 0) {
          const int number = __ffs(int(left)) - 1, at = step_index(shift, t, c * 8 + number);
          left &= left - 1;
          const float code = exact(shared.steps[at], shared.units[at], f.symmetric, number,
                                   make_uint4(x[i][0], x[i][1], x[i][2], x[i][3]));
#pragma unroll
          for (int k = 0; k < 8; ++k) codes[k] = k == number ? code : codes[k];
        }
      }
#pragma unroll
      for (int k = 0; k < 8; ++k) add(words, i, k, __float_as_uint(codes[k]));
    }
  }

  /// Sums of words that two lanes have parts of: this lane keeps those of `first`, or (`second`) of the second half.
  template <int COUNT>
  static __device__ __forceinline__ void share(const uint32_t (&words)[2 * COUNT], bool second, int step,
                                               uint32_t (&kept)[COUNT]) {
#pragma unroll
    for (int j = 0; j < COUNT; ++j) {
      const uint32_t other = __shfl_xor_sync(0xffffffffu, second ? words[j] : words[COUNT + j], step);
      kept[j] = (second ? words[COUNT + j] : words[j]) + other;
    }
  }
  static __device__ __forceinline__ void put(uint32_t* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    *reinterpret_cast<uint4*>(to) = make_uint4(a, b, c, d);
  }

  /// Stores the words of this warp's half of a block at `block`, if it is to be written.
  __device__ __forceinline__ void store(Words& words, uint8_t* block, bool written) const {
    auto* to = reinterpret_cast<uint32_t*>(block);
    const bool writes = written && d < f.dim;
    const int odd = warp % 2;
    if (VALUE) {
      if (kPlane == 8 || kPlane == 4) {
        constexpr int kRows = Words::kRows;
        uint32_t* row = to + (odd * 2 + half) * kRows * f.dim + d;
#pragma unroll
        for (int r = 0; r < kRows && writes; ++r) {
#pragma unroll
          for (int q = 0; q < 2; ++q) {
            const uint32_t* w = &words.low[(r * 8 + q * 4) % (8 * kRows)];
            put(row + r * f.dim + q * 4, w[0], w[1], w[2], w[3]);
          }
        }
        return;
      }
      uint32_t all[8], kept[4];
#pragma unroll
      for (int k = 0; k < 8; ++k) all[k] = words.low[k] << (4 * half);
      share<4>(all, half, 16, kept);
      if (writes) put(to + odd * f.dim + d + 4 * half, kept[0], kept[1], kept[2], kept[3]);
      if (kWidth == 3) {  // a word holds the 32 tokens of two warps
#pragma unroll
        for (int k = 0; k < 8; ++k) all[k] = words.high[kWidth == 3 ? k : 0] << (2 * half + 4 * odd);
        share<4>(all, half, 16, kept);
        uint4& other = shared.second[warp / 2][half][c];
        if (odd) other = make_uint4(kept[0], kept[1], kept[2], kept[3]);
        __syncthreads();
        if (!odd && writes)
          put(to + 2 * f.dim + d + 4 * half, kept[0] + other.x, kept[1] + other.y, kept[2] + other.z,
              kept[3] + other.w);
      }
      return;
    }
    const int column = odd * kWarpTokens + 4 * half;
    if (kPlane == 8 || kPlane == 4) {
      constexpr int kRows = Words::kRows;
#pragma unroll
      for (int q = 0; q < 2 && writes; ++q) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          auto w = [&](int j) { return words.low[((q * 4 + j) * kRows + r) % (8 * kRows)]; };
          put(to + (d * kRows / 8 + r) * kv_block + column + q * 8, w(0), w(1), w(2), w(3));
        }
      }
      return;
    }
    // A word holds 16 channels, two lanes: each keeps 4 of the 8 tokens.
    const int pair = c % 2;
    uint32_t all[8], kept[4];
#pragma unroll
    for (int i = 0; i < 8; ++i) all[i] = words.low[i] << (4 * pair);
    share<4>(all, pair, 1, kept);
    if (writes) put(to + d / 16 * kv_block + column + pair * 8, kept[0], kept[1], kept[2], kept[3]);
    if (kWidth == 3) {  // 32 channels, four lanes: each keeps two tokens
      const int second = c / 2 % 2;
      uint32_t two[2];
#pragma unroll
      for (int i = 0; i < 8; ++i) all[i] = words.high[kWidth == 3 ? i : 0] << (2 * (c % 4));
      share<4>(all, pair, 1, kept);
      share<2>(kept, second, 2, two);
      if (writes)
        *reinterpret_cast<uint2*>(to + 2 * f.dim + d / 32 * kv_block + column + pair * 8 + second * 2) =
            make_uint2(two[0], two[1]);
    }
  }

  /// All of it. Every thread of the CTA calls it.
  template <class Row, class PlaceOf>
  __device__ __forceinline__ void run(const Element* first, int64_t stride, const Row& row, const PlaceOf& place) {
    load(first, stride, row);
    if (int(threadIdx.x) * kv_block < count) shared.places[threadIdx.x] = place(int(threadIdx.x) * kv_block);
    if (CHANNEL) {
      settle_channels();
    } else {
      __syncthreads();
      settle_tokens();
    }
    Words words;
    pack(words);
    const bool written = warp / 2 * kv_block < count;
    store(words, written ? shared.places[warp / 2].codes : nullptr, written);
  }
};

}  // namespace sparsekit::cuda

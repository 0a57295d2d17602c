// Decode attention over packed caches: codes to tensor-core operands without leaving registers.
//
// CODES. A code of up to 8 bits in the low bits of a 16-bit half *is* an fp16 number, code * 2^-24 (a subnormal, which
// tensor cores multiply at full speed): one AND makes the A operand of two codes, no exponent is inserted and nothing
// subtracted. What stands higher in the half is larger by a power of two, which the other operand takes back. For
// codes of 4 bits a lane spends 5 instructions of 8; 2 bits 9 of 16; 8 bits 3 of 4; 3 bits 20 of 16; fp8 7 of 4.
// KEYS per channel: score = sum_d (q_d scale_d) code_d + sum_d q_d minimum_d. q is brought to |q| < 2^a by a power of
// two per row, where a suits the scales met so far; q * scale is kept as two halves (product and exact remainder of an
// fma: 22 bits, like the CPU's factors), and the second sum is the same for a whole group: one product with A = the
// minima in every row. KEYS per token: the products of a group of channels, times the token's scale, in fp32. VALUES:
// the token's scale goes to the weight (as fp16, 11 bits); sum_t weight minimum is a product whose A has the groups'
// minima as rows. Symmetric formats: the scale is the minimum, times -2^(bits - 1) at the end. RANGE. Weights are 2^15
// at most; where a tile's largest scale would take weight * scale beyond fp16, the exponent of everything summed so far
// goes down (rare; one vote per tile, which finds NaN scales as well).
//
// TILES. 64 tokens (8 bits: 32), a ring of 3 slots per warp, keys and values in turn. Lane (g, t) = (lane / 4, lane %
// 4) of step s takes 4 neighbouring tokens, chunk(g, s): 8 s + g, but with 2 and 3 bits, whose value words hold 16
// tokens, 4 (g / 2) + 2 s + g % 2, so that lane t gets weights of the 16 tokens 16 t .. of its words.
#pragma once

#include "kv_cache/cuda_decode_sm80_tiles.cuh"

namespace sparsekit::cuda {

template <int BITS, int DIM, bool CHANNEL, bool HALVES>
struct PackedDecode : PackedTiles<BITS, DIM, CHANNEL, HALVES> {
  using Tiles = PackedTiles<BITS, DIM, CHANNEL, HALVES>;
  using C = typename Tiles::C;
  using Tiles::chunk, Tiles::copy_tile, Tiles::largest_scales, Tiles::load_codes, Tiles::next_tile, Tiles::part_of,
      Tiles::start_cursor, Tiles::tokens_of, Tiles::word_of;
  using Tiles::columns, Tiles::cursor, Tiles::g, Tiles::key_part, Tiles::lane, Tiles::n, Tiles::p, Tiles::ring,
      Tiles::slot_size, Tiles::t, Tiles::value_part;
  using Tiles::kBlockBytes, Tiles::kBlocks, Tiles::kCodeBytes, Tiles::kGroups, Tiles::kLoads, Tiles::kSlots,
      Tiles::kTiles, Tiles::kTokens, Tiles::kWords;

  float base_unit;                       // of the minima's products, in units of the codes'
  int exponent;                          // |q| < 2^exponent: per channel 15 before the first tile, else 0
  uint32_t query[kLoads][C::kSteps][2];  // B: column g, channels as the codes have them, times 2^-shift
  float sums[CHANNEL ? 1 : 4][2];        // per token: sum of q over a group of channels, times -2^(b-1) or 1
  Softmax state;
  float out[kTiles][4], extra[4];

  using Tiles::PackedTiles;

  __device__ __forceinline__ void load_query() {
    const int64_t b = columns.b, h = columns.h;
    const int row = columns.row - 2 * t + g;
    const bool used = row < p.rows;
    const int64_t from = used ? p.query_row(b, h, row) : 0;
    // Elements of each word's channels, 4 at a time.
    constexpr int kQuads = DIM / 16;
    float x[kQuads][4], largest = 0.f;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const int64_t at = from + (4 * (i / C::kSteps) + t) * kWords + 4 * (i % C::kSteps);
      const uint2 raw =
          used ? *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(p.query.data) + at) : make_uint2(0, 0);
      const uint16_t halves[4] = {uint16_t(raw.x), uint16_t(raw.x >> 16), uint16_t(raw.y), uint16_t(raw.y >> 16)};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        x[i][c] = p.dtype == DType::bf16 ? __uint_as_float(uint32_t(halves[c]) << 16) : half_value(halves[c]);
        largest = fmaxf(largest, fabsf(x[i][c]));
      }
    }
    largest = row_max(largest);
    // 2^k that brings |q| below 1; of a row of zeros a k that 2^15 more leaves finite.
    const int high = min(max(int(__float_as_uint(largest) >> 23), 16), 252);
    float down = __uint_as_float(uint32_t(253 - high) << 23);
    const float up = 1.f / down;
    exponent = CHANNEL ? 15 : 0;
    down *= float(1 << exponent);
    const float sign = p.scale < 0.f ? -down : down;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
#pragma unroll
      for (int j = 0; j < C::kSteps; ++j) {
        const float shift = sign * (1.f / float(1 << C::shift(j)));
        const float (&quad)[4] = x[i * C::kSteps + j];
        query[i][j][0] = pack<__half>(quad[0] * shift, quad[2] * shift);
        query[i][j][1] = pack<__half>(quad[1] * shift, quad[3] * shift);
      }
    }
    const float unit = magnitude_of(p.scale) * kLog2e * C::kUnit / float(1 << exponent);
#pragma unroll
    for (int c = 0; c < 2; ++c) columns.factor[c] = __shfl_sync(kAllLanes, up, 8 * t + 4 * c) * unit;
    const Format& f = p.cache.key.format;
    const float base = (f.symmetric ? -float(1 << (BITS > 0 ? BITS - 1 : 0)) : 1.f) / C::kUnit;
    base_unit = base;
    if (!CHANNEL) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
          const int group = ((4 * (i / C::kSteps) + t) * kWords + 4 * (i % C::kSteps)) / f.group_size;
          if (group == k) sum += (x[i][0] + x[i][1] + (x[i][2] + x[i][3])) * sign;
        }
        sum = row_sum(sum) * base;
#pragma unroll
        for (int c = 0; c < 2; ++c) sums[CHANNEL ? 0 : k][c] = __shfl_sync(kAllLanes, sum, 8 * t + 4 * c);
      }
    }
    state = {{-kInfinity, -kInfinity}, {0.f, 0.f}, 15};
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) out[i][c] = 0.f;
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) extra[c] = 0.f;
  }
  /// sum += the codes of two tokens per row (m: the first or the second two), step j, times B.
  __device__ __forceinline__ static void add_product(float (&sum)[4], const uint32_t (&codes)[4][2 * C::kSteps], int m,
                                                     int j, const uint32_t (&b)[2]) {
    const uint32_t a[4] = {codes[2 * m][2 * j], codes[2 * m + 1][2 * j], codes[2 * m][2 * j + 1],
                           codes[2 * m + 1][2 * j + 1]};
    mma_m16n8k16<__half>(sum, a, b[0], b[1]);
  }

  /// Halves of the channels of a word of load i, from a row [DIM] in shared memory: pairs as the codes have them.
  __device__ __forceinline__ void channel_pairs(uint32_t row, int i, uint32_t (&pairs)[C::kSteps][2]) const {
    const uint32_t from = row + (4 * i + t) * kWords * 2;
    if (C::kSteps == 1) {
      const uint2 x = load_shared_8(from);
      pairs[0][0] = even_of(x.x, x.y);
      pairs[0][1] = odd_of(x.x, x.y);
      return;
    }
#pragma unroll
    for (int j = 0; j < C::kSteps; j += 2) {
      const uint4 x = load_shared(from + j * 8);
      pairs[j][0] = even_of(x.x, x.y);
      pairs[j][1] = odd_of(x.x, x.y);
      if (j + 1 < C::kSteps) {
        pairs[j + 1 < C::kSteps ? j + 1 : 0][0] = even_of(x.z, x.w);
        pairs[j + 1 < C::kSteps ? j + 1 : 0][1] = odd_of(x.z, x.w);
      }
    }
  }

  /// Brings q * scale to 2^12 at most for the largest scale of a tile: 2^4 below the end of fp16, far above subnormals.
  __device__ __forceinline__ void fit_query(const __half2& most) {
    float largest = fmaxf(__low2float(most), __high2float(most));  // NaN, the mark of a poisoned group, does not count
    largest = largest <= kHalfLargest ? largest : 0.f;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, step));
    const int fits = min(max(12 + 126 - int(__float_as_uint(largest) >> 23), 0), exponent);
    if (fits == exponent) return;
    const float down = __uint_as_float(uint32_t(127 + fits - exponent) << 23);
    const uint32_t half_down = pack<__half>(down, down);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
#pragma unroll
      for (int j = 0; j < C::kSteps; ++j) {
        query[i][j][0] = multiply(query[i][j][0], half_down);
        query[i][j][1] = multiply(query[i][j][1], half_down);
      }
    }
    columns.factor[0] /= down;
    columns.factor[1] /= down;
    exponent = fits;
  }

  /// `shift`: what is to be added to the scores of a column.
  __device__ __forceinline__ void scores_per_channel(uint32_t slot, bool first, float (&x)[kBlocks][2][4],
                                                     float (&shift)[2]) {
    // One vote: would q * scale leave fp16?
    const __half2 most = largest_scales(slot, false);
    const float bound = __uint_as_float(uint32_t(127 + 15 - exponent) << 23);
    const bool fits = !first && __low2float(most) <= bound && __high2float(most) <= bound;
    if (__builtin_expect(__any_sync(kAllLanes, !fits), 0)) fit_query(most);
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      const uint32_t scales = slot + kCodeBytes + k * DIM * 4;
      float base[2] = {0.f, 0.f};
      if (!C::kFp8) {
        const uint32_t minima = scales + (p.cache.key.format.symmetric ? 0 : DIM * 2);
        float sum[C::kSteps][4] = {};
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          uint32_t low[C::kSteps][2];
          channel_pairs(minima, i, low);
#pragma unroll
          for (int j = 0; j < C::kSteps; ++j) {
            const uint32_t a[4] = {low[j][0], low[j][0], low[j][1], low[j][1]};
            mma_m16n8k16<__half>(sum[j], a, query[i][j][0], query[i][j][1]);
          }
        }
#pragma unroll
        for (int j = 0; j < C::kSteps; ++j) {
#pragma unroll
          for (int c = 0; c < 2; ++c) base[c] += sum[j][c] * (base_unit * float(1 << C::shift(j)));
        }
      }
      float y[kBlocks][2][4];
#pragma unroll
      for (int s = 0; s < kBlocks; ++s) {
#pragma unroll
        for (int c = 0; c < 8; ++c) y[s][c / 4][c % 4] = HALVES ? base[c % 2] : 0.f;
      }
      if (!HALVES) shift[0] = base[0], shift[1] = base[1];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        uint32_t factors[C::kSteps][2], rest[C::kSteps][2];
        channel_pairs(scales, i, factors);
#pragma unroll
        for (int j = 0; j < C::kSteps; ++j) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const __half2 q = half2_of(query[i][j][c]), scale = half2_of(factors[j][c]), product = __hmul2(q, scale);
            rest[j][c] = bits_of(__hfma2(q, scale, __hneg2(product)));
            factors[j][c] = bits_of(product);
          }
        }
#pragma unroll
        for (int s = 0; s < kBlocks; ++s) {
          if (HALVES && !C::kMixed && s != k) continue;
          uint32_t codes[4][2 * C::kSteps];
          load_codes(slot, i, s, codes);
#pragma unroll
          for (int part = 0; part < 2 * C::kSteps; ++part) {
#pragma unroll
            for (int m = 0; m < 2; ++m)
              add_product(y[s][m], codes, m, part / 2, part % 2 ? rest[part / 2] : factors[part / 2]);
          }
        }
      }
#pragma unroll
      for (int s = 0; s < kBlocks; ++s) {
        const bool mine = !HALVES || (C::kMixed ? g >> 2 == k : s == k);  // this lane's tokens are of this group
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          if (k == 0 || mine) x[s][c / 4][c % 4] = y[s][c / 4][c % 4];
        }
      }
    }
  }

  __device__ __forceinline__ void scores_per_token(uint32_t slot, float (&x)[kBlocks][2][4]) const {
    const Format& f = p.cache.key.format;
    const int loads = f.group_size * C::kPlane / 128;  // of a group of channels: a power of two
    float y[kBlocks][2][4] = {};
#pragma unroll
    for (int s = 0; s < kBlocks; ++s) {
#pragma unroll
      for (int c = 0; c < 8; ++c) x[s][c / 4][c % 4] = 0.f;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
#pragma unroll
      for (int s = 0; s < kBlocks; ++s) {
        uint32_t codes[4][2 * C::kSteps];
        load_codes(slot, i, s, codes);
#pragma unroll
        for (int j = 0; j < C::kSteps; ++j) {
#pragma unroll
          for (int m = 0; m < 2; ++m) add_product(y[s][m], codes, m, j, query[i][j]);
        }
      }
      if (((i + 1) & (loads - 1)) != 0 && i + 1 < kLoads) continue;
      const int k = i * f.groups / kLoads;
      float sum[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        sum[c] = 0.f;
#pragma unroll
        for (int other = 0; other < (CHANNEL ? 1 : 4); ++other) sum[c] = other == k ? sums[other][c] : sum[c];
      }
#pragma unroll
      for (int s = 0; s < kBlocks; ++s) {
        const int four = chunk(s), block = four >> 3;
        const uint32_t from = slot + kCodeBytes + (block * 2 * f.groups + k) * 64 + (four & 7) * 8;
        const uint2 scales = load_shared_8(from), low = f.minima ? load_shared_8(from + f.groups * 64) : scales;
#pragma unroll
        for (int a = 0; a < 4; ++a) {
          const uint32_t pair = a < 2 ? scales.x : scales.y, low_pair = a < 2 ? low.x : low.y;
          const float scale = a % 2 ? __high2float(half2_of(pair)) : __low2float(half2_of(pair));
          const float minimum = C::kFp8 ? 0.f
                                : a % 2 ? __high2float(half2_of(low_pair))
                                        : __low2float(half2_of(low_pair));
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& score = x[s][a / 2][a % 2 * 2 + c];
            score = fmaf(scale, y[s][a / 2][a % 2 * 2 + c], C::kFp8 ? score : fmaf(minimum, sum[c], score));
            y[s][a / 2][a % 2 * 2 + c] = 0.f;
          }
        }
      }
    }
  }

  /// Lowers the exponent where weight * scale would leave fp16. A NaN scale, the mark of a poisoned group, goes to the
  /// outputs of the rows that see it, and leaves the slot.
  __device__ __forceinline__ void rare_scales(uint32_t slot, uint32_t (&weights)[kBlocks][4]) {
    const Format& f = p.cache.value.format;
    const uint32_t scales = slot + kCodeBytes;
    const int halves = kTokens * f.groups * (f.minima ? 2 : 1);  // without minima: every second row of `groups`
    auto address = [&](int at) {
      const int row = at / 32;  // [block][2][groups], or [block][groups]
      return scales + (f.minima ? at : (row / f.groups * 2 * f.groups + row % f.groups) * 32 + at % 32) * 2;
    };
    float largest = 0.f;
    bool poison = false;
#pragma unroll 1
    for (int at = lane; at < halves; at += 32) {
      const bool minimum = f.minima && at / 32 % (2 * f.groups) >= f.groups;
      const float scale = minimum ? 0.f : fabsf(half_value(load_shared_2(address(at))));
      poison |= !(scale <= kHalfLargest);
      largest = fmaxf(largest, scale <= kHalfLargest ? scale : 0.f);
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, step));
    int exponent = state.exponent;
    while (largest * exp2f(float(exponent)) > kHalfLargest) --exponent;
    if (exponent != state.exponent) {
      const float down = exp2f(float(exponent - state.exponent));
      state.exponent = exponent;
      const uint32_t half_down = pack<__half>(down, down);
#pragma unroll
      for (int s = 0; s < kBlocks; ++s) {
#pragma unroll
        for (int a = 0; a < 4; ++a) weights[s][a] = multiply(weights[s][a], half_down);
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) state.total[c] *= down;
#pragma unroll
      for (int c = 0; c < 4; ++c) extra[c] *= down;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int c = 0; c < 4; ++c) out[i][c] *= down;
      }
    }
    if (!__any_sync(kAllLanes, poison)) return;
#pragma unroll 1
    for (int k = 0; k < f.groups; ++k) {
      bool seen = false;  // of column g
      for (int s = 0; s < kBlocks; ++s) {
        for (int i = 0; i < 8; ++i) {
          const int token = tokens_of(s) + i;
          const float scale = half_value(load_shared_2(scales + (token / 32 * 2 * f.groups + k) * 64 + token % 32 * 2));
          uint32_t weight = 0;
#pragma unroll
          for (int a = 0; a < 4; ++a) {
#pragma unroll
            for (int other = 0; other < kBlocks; ++other)
              weight = a == i % 4 && other == s ? weights[other][a] : weight;
          }
          seen |= !(fabsf(scale) <= kHalfLargest) && (i < 4 ? weight & 0x7fff : weight & 0x7fff0000) != 0;
        }
      }
      uint32_t spoiled = seen;
      spoiled |= __shfl_xor_sync(kAllLanes, spoiled, 1);
      spoiled |= __shfl_xor_sync(kAllLanes, spoiled, 2);
      const uint32_t first = __shfl_sync(kAllLanes, spoiled, 8 * t),
                     second = __shfl_sync(kAllLanes, spoiled, 8 * t + 4);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        if (i / 2 * 32 / f.group_size != k) continue;
        if (first) out[i][0] = out[i][2] = __int_as_float(0x7fc00000);
        if (second) out[i][1] = out[i][3] = __int_as_float(0x7fc00000);
      }
    }
    __syncwarp();
#pragma unroll 1
    for (int at = lane; at < halves; at += 32) {
      if (!(fabsf(half_value(load_shared_2(address(at)))) <= kHalfLargest)) store_shared_2(address(at), 0);
    }
    __syncwarp();
  }

  __device__ __forceinline__ void add_values(uint32_t slot, uint32_t (&weights)[kBlocks][4]) {
    const Format& f = p.cache.value.format;
    // One vote: is any scale NaN, or too large?
    const __half2 most = largest_scales(slot, true);
    const float bound = kHalfLargest * __uint_as_float(uint32_t(127 - state.exponent) << 23);
    const bool fits = __low2float(most) <= bound && __high2float(most) <= bound;
    if (__builtin_expect(__any_sync(kAllLanes, !fits), 0)) rare_scales(slot, weights);

    uint32_t pairs[2 * kBlocks][2];  // B of k step 2 s + i: tokens (0, 2), (1, 3) of the lane's 4
#pragma unroll
    for (int s = 0; s < kBlocks; ++s) {
      pairs[2 * s][0] = even_of(weights[s][0], weights[s][2]);
      pairs[2 * s][1] = even_of(weights[s][1], weights[s][3]);
      pairs[2 * s + 1][0] = odd_of(weights[s][0], weights[s][2]);
      pairs[2 * s + 1][1] = odd_of(weights[s][1], weights[s][3]);
    }
    if (!C::kFp8) {  // minima (or scales) of group g in row g
#pragma unroll
      for (int s = 0; s < kBlocks; ++s) {
        const int token = tokens_of(s);
        uint4 x = make_uint4(0, 0, 0, 0);
        if (g < f.groups) {
          x = load_shared(slot + kCodeBytes + (token / 32 * 2 * f.groups + (f.symmetric ? g : f.groups + g)) * 64 +
                          token % 32 * 2);
        }
        const uint32_t low[4] = {even_of(x.x, x.y), 0, odd_of(x.x, x.y), 0};
        const uint32_t high[4] = {even_of(x.z, x.w), 0, odd_of(x.z, x.w), 0};
        mma_m16n8k16<__half>(extra, low, pairs[2 * s][0], pairs[2 * s][1]);
        mma_m16n8k16<__half>(extra, high, pairs[2 * s + 1][0], pairs[2 * s + 1][1]);
      }
    }
    // What stands higher in the halves of the codes.
#pragma unroll
    for (int k = 0; k < 2 * kBlocks; ++k) {
      const int j = k % C::kSteps;
      if (j == 0) continue;
      const float down = 1.f / float(1 << C::shift(j));
      const uint32_t half_down = bits_of(__float2half2_rn(down));
      pairs[k][0] = multiply(pairs[k][0], half_down);
      pairs[k][1] = multiply(pairs[k][1], half_down);
    }
    constexpr int kParts = C::kMixed ? 1 : kBlocks * (2 / C::kSteps);  // loads of 32 channels
    uint32_t scaled[2 * kBlocks][2];
#pragma unroll
    for (int q = 0; q < DIM / 32; ++q) {
      if (q == 0 || f.groups > 1) {
        const int k = q * f.groups / (DIM / 32);
        if (q == 0 || k != (q - 1) * f.groups / (DIM / 32)) {
#pragma unroll
          for (int s = 0; s < kBlocks; ++s) {
            const int token = tokens_of(s);
            const uint4 x = load_shared(slot + kCodeBytes + (token / 32 * 2 * f.groups + k) * 64 + token % 32 * 2);
            scaled[2 * s][0] = multiply(pairs[2 * s][0], even_of(x.x, x.y));
            scaled[2 * s][1] = multiply(pairs[2 * s][1], odd_of(x.x, x.y));
            scaled[2 * s + 1][0] = multiply(pairs[2 * s + 1][0], even_of(x.z, x.w));
            scaled[2 * s + 1][1] = multiply(pairs[2 * s + 1][1], odd_of(x.z, x.w));
          }
        }
      }
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        // Rows of words: of the mixed ones, two blocks of two; else 4 or 8 of each block.
        constexpr int kRows = C::kMixed ? 1 : 2 / C::kSteps;
        const int block = C::kMixed ? t >> 1 : part / kRows;
        const int row = C::kMixed ? t & 1 : t * kRows + part % kRows;
        const uint32_t from = slot + block * kBlockBytes + q * 128;
        const uint4 words = load_shared(from + row * DIM * 4 + (g ^ 2 * t) * 16);
        uint4 high = make_uint4(0, 0, 0, 0);
        if (C::kHigh) {
          high = load_shared(from + 2 * DIM * 4 + (g ^ 4 * (t >> 1)) * 16);
          const int by = 4 * (t & 1);
          high.x >>= by, high.y >>= by, high.z >>= by, high.w >>= by;
        }
        uint32_t codes[4][2 * C::kSteps];
#pragma unroll
        for (int a = 0; a < 4; ++a) C::unpack(word_of(words, a), word_of(high, a), codes[a]);
#pragma unroll
        for (int j = 0; j < C::kSteps; ++j) {
#pragma unroll
          for (int m = 0; m < 2; ++m) add_product(out[2 * q + m], codes, m, j, scaled[part * C::kSteps + j]);
        }
      }
    }
  }

  __device__ __forceinline__ void run(Share share, int slot_of_state, float* shared) {
    load_query();
    const int warp = threadIdx.x / 32;
    const int first = share.first + warp, count = max(0, (share.last - first + kDecodeWarps - 1) / kDecodeWarps);
    start_cursor(first * kTokens);
    key_part = part_of(p.cache.key, lane, false);
    value_part = part_of(p.cache.value, lane, true);
    auto start_copy = [&](int number) {  // keys (even) or values of this warp's tile number / 2
      if (number < 2 * count) {
        if (number % 2 == 0) next_tile();
        copy_tile(number % kSlots, number % 2);
      }
      copy_async_commit();
    };
#pragma unroll
    for (int i = 0; i < kSlots - 1; ++i) start_copy(i);
    for (int tile = 0; tile < count; ++tile) {
      const int start = (first + tile * kDecodeWarps) * kTokens;
      copy_async_wait<kSlots - 2>();
      __syncwarp();  // scales are copied by other lanes than those that read them
      start_copy(2 * tile + kSlots - 1);
      float x[kBlocks][2][4], shift[2] = {0.f, 0.f};
      const uint32_t key = ring + 2 * tile % kSlots * slot_size;
      if (CHANNEL) {
        scores_per_channel(key, tile == 0, x, shift);
      } else {
        scores_per_token(key, x);
      }
      // Blocks that are none: past the end, or on a page out of range. The cursor is one tile ahead, except at the end.
      static_assert(kSlots == 3 || kSlots == 4, "copies of the next tile's keys have started, and no others");
      const uint32_t absent = tile + 1 < count ? cursor.absent_before : cursor.absent;
      const bool masks = absent != 0 || n.sinks + start + kTokens > columns.least_limit;
      softmax_step<kBlocks, kTiles>(
          p, columns, masks, state, x, shift, out, extra,
          [&](int s, int a) { return n.sinks + start + 4 * chunk(s) + a; },
          [&](int s, int) { return (absent >> (C::kMixed ? g >> 2 : s) & 1) != 0; });
      uint32_t weights[kBlocks][4];
#pragma unroll
      for (int s = 0; s < kBlocks; ++s) {
#pragma unroll
        for (int a = 0; a < 4; ++a)
          weights[s][a] = transposed(pack<__half>(x[s][a / 2][a % 2 * 2], x[s][a / 2][a % 2 * 2 + 1]));
      }
      copy_async_wait<kSlots - 2>();
      __syncwarp();
      start_copy(2 * tile + kSlots);
      add_values(ring + (2 * tile + 1) % kSlots * slot_size, weights);
    }
    copy_async_wait<0>();
    // Minima of a group of channels, times their factor, to all of its channels.
    const Format& f = p.cache.value.format;
    const float base = f.symmetric ? -float(1 << (BITS > 0 ? BITS - 1 : 0)) : 1.f;
#pragma unroll
    for (int q = 0; q < DIM / 32; ++q) {
      const int k = 32 * q / f.group_size;
      const float low = __shfl_sync(kAllLanes, extra[0], 4 * k + t) * base;
      const float high = __shfl_sync(kAllLanes, extra[1], 4 * k + t) * base;
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        float (&tile)[4] = out[2 * q + m];
#pragma unroll
        for (int c = 0; c < 4; ++c) tile[c] = fmaf(tile[c], C::kUnit, C::kFp8 ? 0.f : c % 2 ? high : low);
      }
    }
    finish_split<DIM>(
        p, columns.b, columns.h, slot_of_state, columns.row - 2 * t, state, out,
        [&](int i) { return i / 2 * 32 + 4 * g + i % 2 * 2; }, shared);
  }
};

}  // namespace sparsekit::cuda

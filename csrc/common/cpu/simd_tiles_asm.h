// Tile<SPARSEKIT_TILE_PRODUCT> in assembly: included by simd_tiles.h once per product, with the instruction that
// multiplies and adds (SPARSEKIT_MADD) and the one that broadcasts an element (SPARSEKIT_BROADCAST).
//
// One step of a tile: load its vectors of b, then per row broadcast an element of a and multiply and add it to each.
// Sums are operands %0, %1, ...; vectors of b and the broadcast element stand in fixed registers.

#ifndef SPARSEKIT_TILE_TEXT
#define SPARSEKIT_TILE_TEXT

#if SPARSEKIT_TILES == 512
#define TILE_B0 "%%zmm28"
#define TILE_B1 "%%zmm29"
#define TILE_B2 "%%zmm30"
#define TILE_B3 "%%zmm31"
#define TILE_A "%%zmm27"
#define TILE_TAKEN "cc", "memory", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31"
#define TILE_BYTES(n) TILE_TEXT(n * 64)
#else
#define TILE_B0 "%%ymm14"
#define TILE_B1 "%%ymm15"
#define TILE_A "%%ymm13"
#define TILE_TAKEN "cc", "memory", "xmm13", "xmm14", "xmm15"
#define TILE_BYTES(n) TILE_TEXT(n * 32)
#endif
#define TILE_LOOP ".p2align 6\n1:\n"
#define TILE_TEXT(x) TILE_TEXT_OF(x)
#define TILE_TEXT_OF(x) #x

#define TILE_LOAD1 "vmovups (%[b]), " TILE_B0 "\n"
#define TILE_LOAD2 TILE_LOAD1 "vmovups " TILE_BYTES(1) "(%[b]), " TILE_B1 "\n"
#define TILE_LOAD3 TILE_LOAD2 "vmovups " TILE_BYTES(2) "(%[b]), " TILE_B2 "\n"
#define TILE_LOAD4 TILE_LOAD3 "vmovups " TILE_BYTES(3) "(%[b]), " TILE_B3 "\n"

// One row; `a` is the address of its element.
#define TILE_MADD(b, sum) SPARSEKIT_MADD b ", " TILE_A ", %" #sum "\n"
#define TILE_ROW2(a, s0, s1) SPARSEKIT_BROADCAST a ", " TILE_A "\n" TILE_MADD(TILE_B0, s0) TILE_MADD(TILE_B1, s1)
#define TILE_ROW3(a, s0, s1, s2) TILE_ROW2(a, s0, s1) TILE_MADD(TILE_B2, s2)
#define TILE_ROW4(a, s0, s1, s2, s3) TILE_ROW3(a, s0, s1, s2) TILE_MADD(TILE_B3, s3)
#if SPARSEKIT_TILES == 512
#define TILE_ROW1(a, s0) SPARSEKIT_MADD a "%{1to16%}, " TILE_B0 ", %" #s0 "\n"
#else
#define TILE_ROW1(a, s0) SPARSEKIT_BROADCAST a ", " TILE_A "\n" TILE_MADD(TILE_B0, s0)
#endif

// Tiles of one step; `at(n)` is the address of row n's element.
#define TILE_4x4(at)                                                                                  \
  TILE_LOAD4 TILE_ROW4(at(0), 0, 1, 2, 3) TILE_ROW4(at(1), 4, 5, 6, 7) TILE_ROW4(at(2), 8, 9, 10, 11) \
      TILE_ROW4(at(3), 12, 13, 14, 15)
#define TILE_4x3(at) \
  TILE_LOAD3 TILE_ROW3(at(0), 0, 1, 2) TILE_ROW3(at(1), 3, 4, 5) TILE_ROW3(at(2), 6, 7, 8) TILE_ROW3(at(3), 9, 10, 11)
#define TILE_4x2(at) \
  TILE_LOAD2 TILE_ROW2(at(0), 0, 1) TILE_ROW2(at(1), 2, 3) TILE_ROW2(at(2), 4, 5) TILE_ROW2(at(3), 6, 7)
#define TILE_6x2(at) TILE_4x2(at) TILE_ROW2(at(4), 8, 9) TILE_ROW2(at(5), 10, 11)
#define TILE_8x2(at) TILE_6x2(at) TILE_ROW2(at(6), 12, 13) TILE_ROW2(at(7), 14, 15)
#define TILE_8_ROWS(at) \
  TILE_ROW1(at(0), 0)   \
  TILE_ROW1(at(1), 1)   \
  TILE_ROW1(at(2), 2)   \
  TILE_ROW1(at(3), 3) TILE_ROW1(at(4), 4) TILE_ROW1(at(5), 5) TILE_ROW1(at(6), 6) TILE_ROW1(at(7), 7)
#define TILE_8x1(at) TILE_LOAD1 TILE_8_ROWS(at)
#define TILE_16x1(at)                                                                              \
  TILE_8x1(at) TILE_ROW1(at(8), 8) TILE_ROW1(at(9), 9) TILE_ROW1(at(10), 10) TILE_ROW1(at(11), 11) \
      TILE_ROW1(at(12), 12) TILE_ROW1(at(13), 13) TILE_ROW1(at(14), 14) TILE_ROW1(at(15), 15)
#define TILE_AT_ROW(n) "(%[a" #n "],%[k])"
#define TILE_AT_PANEL(n) "4*" #n "(%[a])"

// Operands: sums, cleared first, and row pointers.
#define TILE_CLEAR(n) "vxorps %" #n ", %" #n ", %" #n "\n"
#define TILE_CLEAR8 \
  TILE_CLEAR(0) TILE_CLEAR(1) TILE_CLEAR(2) TILE_CLEAR(3) TILE_CLEAR(4) TILE_CLEAR(5) TILE_CLEAR(6) TILE_CLEAR(7)
#define TILE_CLEAR12 TILE_CLEAR8 TILE_CLEAR(8) TILE_CLEAR(9) TILE_CLEAR(10) TILE_CLEAR(11)
#define TILE_CLEAR16 TILE_CLEAR12 TILE_CLEAR(12) TILE_CLEAR(13) TILE_CLEAR(14) TILE_CLEAR(15)
#define TILE_SUM(n) "=&v"(sum[(n) / columns][(n) % columns])
#define TILE_SUMS8 \
  TILE_SUM(0), TILE_SUM(1), TILE_SUM(2), TILE_SUM(3), TILE_SUM(4), TILE_SUM(5), TILE_SUM(6), TILE_SUM(7)
#define TILE_SUMS12 TILE_SUMS8, TILE_SUM(8), TILE_SUM(9), TILE_SUM(10), TILE_SUM(11)
#define TILE_SUMS16 TILE_SUMS12, TILE_SUM(12), TILE_SUM(13), TILE_SUM(14), TILE_SUM(15)
#define TILE_END(n) [a##n] "r"(a[n] + steps)
#define TILE_ENDS4 TILE_END(0), TILE_END(1), TILE_END(2), TILE_END(3)
#define TILE_ENDS6 TILE_ENDS4, TILE_END(4), TILE_END(5)
#define TILE_ENDS8 TILE_ENDS6, TILE_END(6), TILE_END(7)

#define SPARSEKIT_TILE_ROWS(rows, width, sums)                                                           \
  template <>                                                                                            \
  template <>                                                                                            \
  __attribute__((always_inline)) inline void Tile<SPARSEKIT_TILE_PRODUCT>::multiply_rows<rows, width>(   \
      const Element* const(&a)[rows], const Element* b, int64_t steps, Simd::Float(&sum)[rows][width]) { \
    constexpr int columns = width;                                                                       \
    int64_t k = -4 * steps;                                                                              \
    asm volatile(TILE_CLEAR##sums TILE_LOOP TILE_##rows##x##width(TILE_AT_ROW) "add $" TILE_BYTES(       \
                     width) ", %[b]\nadd $4, %[k]\njnz 1b"                                               \
                 : TILE_SUMS##sums, [b] "+r"(b), [k] "+r"(k)                                             \
                 : TILE_ENDS##rows                                                                       \
                 : TILE_TAKEN);                                                                          \
  }

#define SPARSEKIT_TILE_PANEL(rows, width, sums)                                                                      \
  template <>                                                                                                        \
  template <>                                                                                                        \
  __attribute__((always_inline)) inline void Tile<SPARSEKIT_TILE_PRODUCT>::multiply_panel<rows, width>(              \
      const PanelRun* runs, int count, const Element* b, Simd::Float(&sum)[rows][width]) {                           \
    constexpr int columns = width;                                                                                   \
    int64_t k;                                                                                                       \
    const void* a;                                                                                                   \
    asm volatile(                                                                                                    \
        TILE_CLEAR##sums                                                                                             \
        "2:\nmov (%[runs]), %[a]\nmov 8(%[runs]), %[k]\nadd $16, %[runs]\n" TILE_LOOP TILE_##rows##x##width(         \
            TILE_AT_PANEL) "add $64, %[a]\nadd $" TILE_BYTES(width) ", %[b]\ndec %[k]\njnz 1b\ndec %[count]\njnz 2b" \
        : TILE_SUMS##sums, [a] "=&r"(a), [k] "=&r"(k), [b] "+r"(b), [runs] "+r"(runs), [count] "+r"(count)           \
        :                                                                                                            \
        : TILE_TAKEN);                                                                                               \
  }
#endif

#if SPARSEKIT_TILES == 512
SPARSEKIT_TILE_ROWS(4, 4, 16)
SPARSEKIT_TILE_ROWS(4, 3, 12)
SPARSEKIT_TILE_ROWS(8, 2, 16)
SPARSEKIT_TILE_PANEL(4, 4, 16)
SPARSEKIT_TILE_PANEL(4, 3, 12)
SPARSEKIT_TILE_PANEL(8, 2, 16)
SPARSEKIT_TILE_PANEL(16, 1, 16)
#else
SPARSEKIT_TILE_ROWS(6, 2, 12)
SPARSEKIT_TILE_ROWS(4, 2, 8)
SPARSEKIT_TILE_PANEL(6, 2, 12)
SPARSEKIT_TILE_PANEL(4, 2, 8)
SPARSEKIT_TILE_PANEL(8, 1, 8)
#endif

#ifndef SPARSEKIT_TILE_TWO_SETS
SPARSEKIT_TILE_ROWS(8, 1, 8)
#else
/// 8 rows and one vector: even and odd steps have sums of their own, as vdpbf16ps takes 7 cycles and 16 row pointers do
/// not fit the registers.
template <>
template <>
__attribute__((always_inline)) inline void Tile<SPARSEKIT_TILE_PRODUCT>::multiply_rows<8, 1>(
    const Element* const (&a)[8], const Element* b, int64_t steps, Simd::Float (&result)[8][1]) {
#define TILE_AT_NEXT(n) "4(%[a" #n "],%[k])"
#define TILE_8x1_NEXT                                                                              \
  "vmovups 64(%[b]), " TILE_B0 "\n" TILE_ROW1(TILE_AT_NEXT(0), 8) TILE_ROW1(TILE_AT_NEXT(1), 9)    \
      TILE_ROW1(TILE_AT_NEXT(2), 10) TILE_ROW1(TILE_AT_NEXT(3), 11) TILE_ROW1(TILE_AT_NEXT(4), 12) \
          TILE_ROW1(TILE_AT_NEXT(5), 13) TILE_ROW1(TILE_AT_NEXT(6), 14) TILE_ROW1(TILE_AT_NEXT(7), 15)
  constexpr int columns = 1;
  Simd::Float sum[16][1];
  const int64_t odd = steps % 2;
  steps -= odd;
  int64_t k = -4 * steps;
  if (steps == 0) {
    clear_sums(sum);
  } else {
    asm volatile(TILE_CLEAR16 TILE_LOOP TILE_8x1(TILE_AT_ROW) TILE_8x1_NEXT "add $128, %[b]\nadd $8, %[k]\njnz 1b"
                 : TILE_SUMS16, [b] "+r"(b), [k] "+r"(k)
                 : TILE_ENDS8
                 : TILE_TAKEN);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    if (odd) {
      using Product = SPARSEKIT_TILE_PRODUCT;
      sum[i][0] = Product::madd(Product::broadcast(a[i] + steps), Product::load(b), sum[i][0]);
    }
    result[i][0] = Simd::add(sum[i][0], sum[i + 8][0]);
  }
}
#endif

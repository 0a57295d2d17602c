// Tiles in shared memory: asynchronous copies from global memory (cp.async), the bank swizzle, and ldmatrix.
//
// A tile is `rows x DIM` elements, row after row without padding. It is addressed in chunks of 16 bytes, the unit of
// cp.async and of one ldmatrix row. ldmatrix reads the same chunk column of 8 consecutive rows at once, which without a
// swizzle would all lie in the same 4 banks (8-fold conflict, 8 times slower). So chunk c of row r is stored at chunk
// c ^ f(r) of its row, where f makes those 8 places distinct modulo 128 bytes:
//   row bytes = 0 mod 128 (dims 64, 128, 192, 256 in 16 bit)   f = r mod 8
//   row bytes = 64 mod 128 (dims 32, 96)                       f = (r / 2) mod 4: neighbouring rows differ by 64 bytes
// Tile bases must be aligned to 128 bytes. Primitives: PTX ISA 7.0, sm_80.
#pragma once

#include <cstdint>

namespace sparsekit::cuda {

constexpr int kChunkBytes = 16;

/// The 32-bit shared-memory address that PTX instructions take.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// Where a tile of rows of `ROW_BYTES` bytes keeps chunk `chunk` of row `row`: byte offset from the tile's base.
template <int ROW_BYTES>
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
  static_assert(ROW_BYTES % 64 == 0, "the swizzle needs rows of a multiple of 64 bytes");
  const int moved = ROW_BYTES % 128 == 0 ? chunk ^ (row & 7) : chunk ^ ((row >> 1) & 3);
  return uint32_t(row * ROW_BYTES + moved * kChunkBytes);
}

/// Starts a copy of 16 bytes; where `valid` is false nothing is read and the destination is filled with zeros.
/// Bypasses L1 (.cg): tiles are read once per CTA.
__device__ __forceinline__ void copy_async_16(uint32_t destination, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(destination), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}

/// Closes the group of the copies started so far by this thread.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

/// Waits until at most `PENDING` of this thread's latest groups are still under way. Other threads' copies become
/// visible only after a barrier.
template <int PENDING>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory");
}

/// Loads four 8x8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8. Register i of
/// lane l then holds elements (row l / 4, columns 2 (l % 4) and + 1) of matrix i. In 32-bit elements a matrix is 8 x 4,
/// and register i holds element (row l / 4, column l % 4).
__device__ __forceinline__ void load_matrices(uint32_t (&registers)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(address));
}

/// The same, each 8x8 matrix transposed (16-bit elements only): register i holds rows 2 (l % 4) and + 1 of column l
/// / 4.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&registers)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(address));
}

/// Address that lane `lane` gives to load_matrices so that the four registers are, in order, the A operand of a
/// m16n8k16 product: rows first_row .. + 15, columns of chunks first_chunk, first_chunk + 1. With
/// load_matrices_transposed the same address loads B = rows (k) x columns (n): registers 0, 1 are B of the first 8
/// columns, registers 2, 3 of the next 8.
template <int ROW_BYTES>
__device__ __forceinline__ uint32_t address_rows16(uint32_t tile, int first_row, int first_chunk, int lane) {
  return tile + swizzled<ROW_BYTES>(first_row + (lane & 15), first_chunk + (lane >> 4));
}

/// Address for load_matrices so that registers 0, 1 are the B operand (k = the 16 columns of chunks first_chunk and +
/// 1, n = rows first_row .. + 7) of a m16n8k16 product and registers 2, 3 that of rows first_row + 8 .. + 15: the
/// product with the transposed tile, as in q k^T. With load_matrices_transposed: A = the transposed 16x16 part,
/// registers in order.
template <int ROW_BYTES>
__device__ __forceinline__ uint32_t address_columns16(uint32_t tile, int first_row, int first_chunk, int lane) {
  return tile + swizzled<ROW_BYTES>(first_row + (lane & 7) + ((lane >> 4) << 3), first_chunk + ((lane >> 3) & 1));
}

/// Moves such an address, given for chunk 0 or 1, on by 2 * `pairs` chunks of the same row: one XOR with a constant and
/// an immediate offset. Rows a multiple of 16 further on are plain offsets of ROW_BYTES each.
template <int ROW_BYTES>
__device__ __forceinline__ uint32_t advance_chunks(uint32_t address, int pairs) {
  constexpr int kPairs = ROW_BYTES % 128 == 0 ? 4 : 2;  // chunk pairs that the swizzle permutes among themselves
  return (address ^ uint32_t(pairs % kPairs * 2 * kChunkBytes)) + uint32_t(pairs / kPairs * kPairs * 2 * kChunkBytes);
}

}  // namespace sparsekit::cuda

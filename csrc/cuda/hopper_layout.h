// Where things lie for Hopper's warpgroup products: boxes of tiles in shared memory, the
// descriptors that name them, and the registers of accumulators. Index arithmetic alone, on host
// and device.
//
// A tile of R rows x D columns of 16-bit numbers lies in D / 64 boxes, one behind the other; a box
// is R rows of 128 bytes, as one TMA copy with 128-byte swizzle leaves it: in every row the 16-byte
// pieces are permuted by the row's number modulo 8. Tiles begin at multiples of 1024 bytes.
//
// The same bytes serve as both second operands. With `rows` of the tile as N (K-major, "PTX ISA,
// Asynchronous Warpgroup Level Matrix Shared Memory Layout"), eight rows are one swizzle atom and
// the stride byte offset leads to the next eight; 16 columns further within an atom is 32 bytes
// further in address, for the hardware permutes by the bits of addresses. With its columns as N
// (MN-major, transposed), the leading byte offset leads from 64 columns to the next 64, that is to
// the next box, and the stride byte offset from eight rows to the next eight.

#pragma once

#include <cstdint>

#include "layout.h"

namespace softcl::cuda {

inline constexpr int kWarpgroup = 128;
inline constexpr int kWarpgroupRows = 64;  // of a product
inline constexpr int kBoxColumns = 64;
inline constexpr int kBoxRowBytes = kBoxColumns * 2;
inline constexpr int kAtomBytes = 8 * kBoxRowBytes;  // the swizzle's pattern repeats

/// The 128-byte swizzle: bits 4 to 6 of an address, exclusive or bits 7 to 9.
SOFTCL_HOST_DEVICE constexpr std::uint32_t swizzled(std::uint32_t address) {
  return address ^ (address >> 7 & 7) << 4;
}

/// Byte offset of element (row, column) of a tile of `rows` rows.
SOFTCL_HOST_DEVICE constexpr std::uint32_t box_offset(int rows, int row, int column) {
  const int box = column / kBoxColumns;
  return static_cast<std::uint32_t>(box * rows * kBoxRowBytes) +
         swizzled(static_cast<std::uint32_t>(row * kBoxRowBytes + column % kBoxColumns * 2));
}

/// Byte offset, in a box or in several one behind the other, of byte `byte` of a line of 128.
SOFTCL_HOST_DEVICE constexpr std::uint32_t line_offset(int line, int byte) {
  return swizzled(static_cast<std::uint32_t>(line * kBoxRowBytes + byte));
}

// Numbers in two parts. Lanes take a tile of the queue apart, eight columns each: which, of 64, and
// in which of eight lines, of which a warp takes four at a time. Of eight neighbouring lanes, whose
// accesses go together, two times four lie in two lines, i and i ^ 5: what they read of fp32, every
// second 16 bytes of half a line, lies in different banks, and so do the four neighbouring pieces
// of a line that they write.
SOFTCL_HOST_DEVICE constexpr int split_line(int lane, int half) {
  return (2 * half + lane / 16) ^ (lane / 4 % 2 * 5);
}
SOFTCL_HOST_DEVICE constexpr int split_piece(int lane) {
  return lane % 4 + lane / 8 % 2 * 4;
}

/// A matrix descriptor with 128-byte swizzle and base offset 0 ("Matrix Descriptor Format"): bits
/// 0-13 the address, 16-29 the leading, 32-45 the stride byte offset, each over 16; 62-63 the
/// swizzle.
SOFTCL_HOST_DEVICE constexpr std::uint64_t matrix_descriptor(std::uint32_t address,
                                                             std::uint32_t leading,
                                                             std::uint32_t stride) {
  return std::uint64_t((address & 0x3ffff) >> 4) | std::uint64_t(leading >> 4) << 16 |
         std::uint64_t(stride >> 4) << 32 | std::uint64_t(1) << 62;
}

// Other parts of a tile are sums: a tile's addresses, over 16, do not carry out of their 14 bits.

/// Columns 16 k .. 16 k + 15 of a tile's rows, K-major. The leading offset is not used; 1 stands
/// for it.
SOFTCL_HOST_DEVICE constexpr std::uint64_t row_descriptor(std::uint32_t tile, int rows, int k) {
  const int steps = kBoxColumns / 16;
  return matrix_descriptor(tile, 16, kAtomBytes) +
         ((k / steps * rows * kBoxRowBytes + k % steps * 32) >> 4);
}

/// Rows 16 k .. 16 k + 15 of a tile, all its columns as N, MN-major.
SOFTCL_HOST_DEVICE constexpr std::uint64_t column_descriptor(std::uint32_t tile, int rows, int k) {
  return matrix_descriptor(tile, rows * kBoxRowBytes, kAtomBytes) + (k * 2 * kAtomBytes >> 4);
}

// An accumulator (64, N) in registers ("Matrix Fragments for wgmma.mma_async.m64nNk16"): of warp w
// of the warpgroup, rows 16 w .. 16 w + 15, in every eight columns as accumulator_row and
// accumulator_column of layout.h have it. So chunks of columns are those of the mma.sync kernel,
// and two neighbouring eights of columns are, rounded, one first operand (64, 16).

}  // namespace softcl::cuda

// Rows of 16-bit numbers from global into shared memory, as they are or normalised; fp16 in parts.

#pragma once

#include "elements.h"
#include "layout.h"
#include "ptx.h"

namespace softcl::cuda {

/// Elements 8 piece .. 8 piece + 7 of a row of D elements, zeros past its end.
template <typename T>
SOFTCL_DEVICE ptx::Vector load_piece(const T* row, int piece, int dim, bool aligned) {
  ptx::Vector v = {};
  if (aligned) {  // D is a multiple of 8
    if (piece * 8 < dim) v = *reinterpret_cast<const ptx::Vector*>(row + piece * 8);
    return v;
  }
  SOFTCL_UNROLL
  for (int i = 0; i < 8; ++i) {
    if (piece * 8 + i < dim) v.x[i / 2] |= std::uint32_t(row[piece * 8 + i].bits) << i % 2 * 16;
  }
  return v;
}

template <typename T>
SOFTCL_DEVICE T element_of(const ptx::Vector& v, int i) {
  return {static_cast<std::uint16_t>(v.x[i / 2] >> i % 2 * 16)};
}

/// The row that a group of kDim / 8 neighbouring lanes holds, piece by piece, over its norm. The
/// sum of squares is double, where no finite row overflows.
template <typename T, int kDim>
SOFTCL_DEVICE ptx::Vector unit_piece(const ptx::Vector& v) {
  double squares = 0.0;
  SOFTCL_UNROLL
  for (int i = 0; i < 8; ++i) {
    const double u = to_float(element_of<T>(v, i));
    squares += u * u;
  }
  SOFTCL_UNROLL
  for (int mask = kDim / 16; mask > 0; mask /= 2) squares += ptx::shuffle_xor(squares, mask);
  const double inverse = inverse_norm(squares);
  ptx::Vector unit = {};
  SOFTCL_UNROLL
  for (int i = 0; i < 8; ++i) {
    const T x = unit_element<T>(to_float(element_of<T>(v, i)), inverse);
    unit.x[i / 2] |= std::uint32_t(x.bits) << i % 2 * 16;
  }
  return unit;
}

/// Rows first .. first + count - 1 of source (num_rows, D) into a tile of shared memory (layout.h),
/// zeros where there is no row. By all threads of the block; asynchronous copies where the rows
/// are aligned and taken as they are, plain stores otherwise: commit, wait and synchronise.
template <typename T, int kDim, int kThreads>
SOFTCL_DEVICE void load_rows(std::uint32_t tile, const void* source, std::int64_t first, int count,
                             std::int64_t num_rows, int dim, bool aligned, bool normalize) {
  constexpr int kPieces = kDim / 8;  // of a row; a power of two that divides a warp
  static_assert(kThreads % kPieces == 0, "");
  const auto* elements = static_cast<const T*>(source);
  const int piece = threadIdx.x % kPieces;
  for (int i = threadIdx.x / kPieces; i < count; i += kThreads / kPieces) {
    const std::int64_t n = first + i;
    const bool exists = n < num_rows;
    const T* row = elements + (exists ? n : 0) * dim;
    const std::uint32_t target = tile + piece_offset<kDim>(i, piece);
    if (aligned && !normalize) {
      const bool reads = exists && piece * 8 < dim;
      ptx::cp_async(target, reads ? row + piece * 8 : elements, reads ? 16 : 0);
      continue;
    }
    ptx::Vector v = {};
    if (exists) v = load_piece(row, piece, dim, aligned);
    if (normalize) v = unit_piece<T, kDim>(v);  // all lanes: `count` is a multiple of the rows
    ptx::store_shared(target, v);
  }
}

/// Two fp16 numbers as sums of two bf16 each: the larger parts replace them, the rest is returned.
SOFTCL_DEVICE std::uint32_t split_fp16(std::uint32_t& x) {
  const float low = ptx::float_of_fp16(static_cast<std::uint16_t>(x & 0xffff));
  const float high = ptx::float_of_fp16(static_cast<std::uint16_t>(x >> 16));
  x = ptx::pack_bf16(low, high);
  return ptx::pack_bf16(low - ptx::float_of(x << 16), high - ptx::float_of(x & 0xffff0000u));
}

}  // namespace softcl::cuda

// Rows from global into shared memory, as they are, normalised or converted; numbers in two parts.

#pragma once

#include "elements.h"
#include "layout.h"
#include "ptx.h"
#include "softcl/element_type.h"

namespace softcl::cuda {

template <typename T>
SOFTCL_DEVICE T element_of(const ptx::Vector& v, int i) {
  return {static_cast<std::uint16_t>(v.x[i / 2] >> i % 2 * 16)};
}

/// Element i of an array of a type that is known when the kernel runs.
SOFTCL_DEVICE float element_at(const void* elements, ElementType type, std::int64_t i) {
  if (type == ElementType::kFloat32) return static_cast<const float*>(elements)[i];
  const std::uint16_t bits = static_cast<const std::uint16_t*>(elements)[i];
  return type == ElementType::kBFloat16 ? to_float(BFloat16{bits}) : to_float(Float16{bits});
}

/// An element of a unit row of that type.
SOFTCL_DEVICE float unit_element(ElementType type, float u, double inverse) {
  if (type == ElementType::kFloat32) return unit_element<float>(u, inverse);
  return type == ElementType::kBFloat16 ? to_float(unit_element<BFloat16>(u, inverse))
                                        : to_float(unit_element<Float16>(u, inverse));
}

/// The numbers in 32 bytes of fp32 (both halves), or in 16 bytes of a 16-bit type (the first).
SOFTCL_DEVICE void to_floats(float (&x)[8], ElementType type, const ptx::Vector& first,
                             const ptx::Vector& second) {
  SOFTCL_UNROLL
  for (int i = 0; i < 8; ++i) {
    x[i] = type == ElementType::kFloat32    ? ptx::float_of((i < 4 ? first : second).x[i % 4])
           : type == ElementType::kBFloat16 ? to_float(element_of<BFloat16>(first, i))
                                            : to_float(element_of<Float16>(first, i));
  }
}

/// Elements 8 piece .. 8 piece + 7 of row n of an array (.., D), zeros past its end.
SOFTCL_DEVICE void load_floats(float (&x)[8], const void* rows, ElementType type, std::int64_t n,
                               int piece, int dim, bool aligned) {
  const std::int64_t start = n * dim + piece * 8;
  if (aligned) {  // D is a multiple of 8
    ptx::Vector v[2] = {};
    if (piece * 8 < dim) {
      const bool wide = type == ElementType::kFloat32;
      const auto* from = static_cast<const ptx::Vector*>(rows) + start / 8 * (wide ? 2 : 1);
      v[0] = from[0];
      if (wide) v[1] = from[1];
    }
    return to_floats(x, type, v[0], v[1]);
  }
  SOFTCL_UNROLL
  for (int i = 0; i < 8; ++i) {
    x[i] = piece * 8 + i < dim ? element_at(rows, type, start + i) : 0.0f;
  }
}

/// The row that a group of kDim / 8 neighbouring lanes holds, piece by piece, over its norm,
/// rounded to its type. The sum of squares is double, where no finite row overflows.
template <int kDim>
SOFTCL_DEVICE void normalize_floats(float (&x)[8], ElementType type) {
  double squares = 0.0;
  SOFTCL_UNROLL
  for (int i = 0; i < 8; ++i) squares += static_cast<double>(x[i]) * x[i];
  SOFTCL_UNROLL
  for (int mask = kDim / 16; mask > 0; mask /= 2) squares += ptx::shuffle_xor(squares, mask);
  const double inverse = inverse_norm(squares);
  SOFTCL_UNROLL
  for (int i = 0; i < 8; ++i) x[i] = unit_element(type, x[i], inverse);
}

/// A number in two parts is (high + low) / kPartScale, both fp16, one scale for both so that all
/// their products add up in one sum: 22 bits of it while it is above 2^-10, with an error below
/// 2^-32 else. Of unit rows it is never above 1; from 256 on there is none: NaN.
inline constexpr float kPartScale = 256.0f;
inline constexpr float kProductScale = 1.0f / (kPartScale * kPartScale);  // of two of them

/// Two numbers as sums of two fp16 each: returns the larger parts, `low` gets the rest.
SOFTCL_DEVICE std::uint32_t split_to_fp16(float first, float second, std::uint32_t& low) {
  const std::uint32_t high = ptx::pack_fp16(first, second);
  low = ptx::pack_fp16(first - ptx::float_of_fp16(static_cast<std::uint16_t>(high & 0xffff)),
                       second - ptx::float_of_fp16(static_cast<std::uint16_t>(high >> 16)));
  return high;
}

/// The parts of eight numbers, to `target` and `low` bytes behind it.
SOFTCL_DEVICE void store_parts(std::uint32_t target, std::uint32_t low, const float (&x)[8]) {
  ptx::Vector parts[2];
  SOFTCL_UNROLL
  for (int i = 0; i < 4; ++i) {
    parts[0].x[i] = split_to_fp16(x[2 * i] * kPartScale, x[2 * i + 1] * kPartScale, parts[1].x[i]);
  }
  ptx::store_shared(target, parts[0]);
  ptx::store_shared(target + low, parts[1]);
}

/// Whether a kernel of T takes a number of this type as another: in parts, or bf16 as fp16, which
/// has all of it from 2^-14 on and the rest to 2^-25; of rows longer than 65504 there is none.
template <typename T>
SOFTCL_DEVICE bool converts(ElementType type) {
  return kHasMaximum<T> && (kParts<T> == 2 || type != ElementType::kFloat16);
}

/// Eight numbers as a kernel of T multiplies them, to `target`; low parts `low` bytes behind it.
template <typename T>
SOFTCL_DEVICE void store_numbers(std::uint32_t target, std::uint32_t low, const float (&x)[8]) {
  if constexpr (kParts<T> == 2) {
    store_parts(target, low, x);
  } else {
    ptx::Vector v;
    SOFTCL_UNROLL
    for (int i = 0; i < 4; ++i) {
      v.x[i] = kHasMaximum<T> ? ptx::pack_fp16(x[2 * i], x[2 * i + 1])
                              : ptx::pack_bf16(x[2 * i], x[2 * i + 1]);
    }
    ptx::store_shared(target, v);
  }
}

// ---- A tile -------------------------------------------------------------------------------------

/// Converts a tile that load_rows has copied as it is: each thread the pieces that it copied
/// itself, so that its own wait is enough before, and the block's barrier after.
template <typename T, int kDim, int kThreads>
SOFTCL_DEVICE void convert_rows(std::uint32_t tile, std::uint32_t low, ElementType type,
                                int count) {
  constexpr int kPieces = kDim / 8;
  const bool wide = kParts<T> == 2 && type == ElementType::kFloat32;
  for (int i = threadIdx.x / kPieces; i < count; i += kThreads / kPieces) {
    const std::uint32_t target = tile + piece_offset<kDim>(i, threadIdx.x % kPieces);
    const auto first = ptx::load_shared<ptx::Vector>(target);
    const auto second = wide ? ptx::load_shared<ptx::Vector>(target + low) : ptx::Vector{};
    float x[8];
    to_floats(x, type, first, second);
    store_numbers<T>(target, low, x);
  }
}

/// Rows first .. first + count - 1 of source (num_rows, D) into a tile of shared memory (layout.h),
/// zeros where there is no row. By all threads of the block; asynchronous copies where the rows
/// are aligned and taken as they are, plain stores otherwise: commit, wait, convert_rows where
/// numbers are converted (low parts `low` bytes behind the high ones), and synchronise.
template <typename T, int kDim, int kThreads>
SOFTCL_DEVICE void load_rows(std::uint32_t tile, std::uint32_t low, const void* source,
                             ElementType type, std::int64_t first, int count, std::int64_t num_rows,
                             int dim, bool aligned, bool normalize) {
  constexpr int kPieces = kDim / 8;  // of a row; a power of two that divides a warp
  static_assert(kThreads % kPieces == 0, "");
  const int piece = threadIdx.x % kPieces;
  const bool wide = kParts<T> == 2 && type == ElementType::kFloat32;
  for (int i = threadIdx.x / kPieces; i < count; i += kThreads / kPieces) {
    const std::int64_t n = first + i;
    const bool exists = n < num_rows;
    const std::uint32_t target = tile + piece_offset<kDim>(i, piece);
    if (aligned && !normalize) {
      const bool reads = exists && piece * 8 < dim;
      const auto* from = static_cast<const char*>(source);
      if (reads) from += (n * dim + piece * 8) * (wide ? 4 : 2);
      ptx::cp_async(target, from, reads ? 16 : 0);
      if (wide) ptx::cp_async(target + low, reads ? from + 16 : from, reads ? 16 : 0);
      continue;
    }
    float x[8] = {};
    if (exists) load_floats(x, source, type, n, piece, dim, aligned);
    if (normalize) normalize_floats<kDim>(x, type);  // all lanes: `count` is a multiple of the rows
    store_numbers<T>(target, low, x);
  }
}

}  // namespace softcl::cuda

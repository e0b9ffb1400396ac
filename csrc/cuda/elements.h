// The storage types of rows, and their conversions to and from fp32.

#pragma once

#include <cmath>
#include <cstdint>

#include "ptx.h"

namespace softcl::cuda {

struct BFloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

/// In the streaming kernel: a number of any type in two fp16 parts, see rows.h.
struct TwoParts {};

/// Its weights are fp16, and relative to a running maximum; of bf16 they are bf16, and 2^x.
template <typename T>
inline constexpr bool kHasMaximum = true;
template <>
inline constexpr bool kHasMaximum<BFloat16> = false;

template <typename T>
inline constexpr int kParts = 1;
template <>
inline constexpr int kParts<TwoParts> = 2;

SOFTCL_DEVICE float to_float(float x) {
  return x;
}
SOFTCL_DEVICE float to_float(BFloat16 x) {
  return ptx::float_of(std::uint32_t(x.bits) << 16);
}
SOFTCL_DEVICE float to_float(Float16 x) {
  return ptx::float_of_fp16(x.bits);
}

// All round to nearest, ties to even, as torch does.
template <typename T>
struct FromFloat;
template <>
struct FromFloat<float> {
  static SOFTCL_DEVICE float round(float x) { return x; }
};
template <>
struct FromFloat<BFloat16> {
  static SOFTCL_DEVICE BFloat16 round(float x) {
    return {static_cast<std::uint16_t>(ptx::pack_bf16(x, 0.0f) & 0xffff)};
  }
};
template <>
struct FromFloat<Float16> {
  static SOFTCL_DEVICE Float16 round(float x) { return {ptx::fp16_of(x)}; }
};

template <typename T>
SOFTCL_DEVICE T from_float(float x) {
  return FromFloat<T>::round(x);
}

inline constexpr double kNormFloor = 1e-12;

/// 1 / max(sqrt(squares), 1e-12); NaN stays NaN.
SOFTCL_DEVICE double inverse_norm(double squares) {
  const double norm = sqrt(squares);
  return 1.0 / (norm < kNormFloor ? kNormFloor : norm);
}

/// An element of a unit row: u / |u| in double, rounded once to fp32 and once to T. `inverse` is
/// inverse_norm. The streaming and the finishing kernels must see the very same rows.
template <typename T>
SOFTCL_DEVICE T unit_element(float u, double inverse) {
  return from_float<T>(static_cast<float>(static_cast<double>(u) * inverse));
}

}  // namespace softcl::cuda

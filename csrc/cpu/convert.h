// Scalar conversions between fp32 and the storage types, all rounding to nearest even as torch
// does.
//
// Functions here are static: the files that include this are compiled for different instruction
// sets, and a shared inline function could be taken from the wrong one.

#pragma once

#include <cstdint>
#include <cstring>

#include "softcl/element_type.h"

namespace softcl::cpu {

static inline std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

static inline float float_of(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

static inline float from_bfloat16(std::uint16_t half) {
  return float_of(std::uint32_t(half) << 16);
}

static inline std::uint16_t to_bfloat16(float x) {
  const std::uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return std::uint16_t(bits >> 16) | 0x40u;  // quiet NaN
  return std::uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float from_float16(std::uint16_t half) {
  const std::uint32_t sign = std::uint32_t(half & 0x8000u) << 16;
  const std::uint32_t rest = half & 0x7fffu;
  if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  // The product by 2^112 moves the exponent's bias; it is exact for subnormal numbers too.
  return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
}

static inline std::uint16_t to_float16(float x) {
  const std::uint16_t sign = std::uint16_t((bits_of(x) >> 16) & 0x8000u);
  const std::uint32_t rest = bits_of(x) & 0x7fffffffu;
  if (rest > 0x7f800000u) return sign | 0x7e00u;
  if (rest >= 0x477ff000u) return sign | 0x7c00u;  // from 65520 on
  if (rest < 0x38800000u) {
    // Below 2^-14 the result is a multiple of 2^-24, the spacing of fp32 next to 0.5.
    return sign | std::uint16_t(bits_of(float_of(rest) + 0.5f) - 0x3f000000u);
  }
  return sign | std::uint16_t((rest + 0xfffu + ((rest >> 13) & 1u) - 0x38000000u) >> 13);
}

static inline float load_element(const void* row, ElementType type, std::int64_t i) {
  switch (type) {
    case ElementType::kFloat32:
      return static_cast<const float*>(row)[i];
    case ElementType::kBFloat16:
      return from_bfloat16(static_cast<const std::uint16_t*>(row)[i]);
    case ElementType::kFloat16:
      return from_float16(static_cast<const std::uint16_t*>(row)[i]);
  }
  return 0.0f;
}

static inline void store_element(void* row, ElementType type, std::int64_t i, float x) {
  switch (type) {
    case ElementType::kFloat32:
      static_cast<float*>(row)[i] = x;
      break;
    case ElementType::kBFloat16:
      static_cast<std::uint16_t*>(row)[i] = to_bfloat16(x);
      break;
    case ElementType::kFloat16:
      static_cast<std::uint16_t*>(row)[i] = to_float16(x);
      break;
  }
}

/// x as it is after being stored in `type`.
static inline float rounded_to(ElementType type, float x) {
  switch (type) {
    case ElementType::kFloat32:
      return x;
    case ElementType::kBFloat16:
      return from_bfloat16(to_bfloat16(x));
    case ElementType::kFloat16:
      return from_float16(to_float16(x));
  }
  return x;
}

}  // namespace softcl::cpu

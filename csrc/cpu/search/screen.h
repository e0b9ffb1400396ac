// The screen: nearest rows found in 16-bit fixed point, at twice the rate of fp32 or more, with a
// bound on its error, so that the few rows which may be among the nearest can be compared exactly
// (see search.h). Compiled once per instruction set, like the sweep.
//
// A row x of norm at most kLargestNorm becomes round(kFixedOne x): products of 16-bit integers,
// summed exactly in 32 bits. With e and f the roundings of two rows, |e_d|, |f_d| <= 1/2, their
// product is off by at most |x||f| + |q||e| + |e||f| (Cauchy-Schwarz), in units of 1 / kFixedOne^2:
//     error(D) = kLargestNorm kFixedOne sqrt(D) + D / 4
// 7e-4 for D = 512. No sum can overflow: every partial one is at most
// (kLargestNorm kFixedOne + sqrt(D) / 2)^2 < 2^31.

#pragma once

#include <cstdint>

#include "softcl/element_type.h"

namespace softcl::cpu {

inline constexpr float kFixedOne = 32000.0f;
inline constexpr float kLargestNorm = 1.01f;  // rounding to bf16 lets unit rows grow to 1.004

/// Per row the candidates seen so far: those that may be among its k nearest.
struct ScreenLists {
  std::int64_t k = 0;
  std::int64_t capacity = 0;
  std::int32_t margin = 0;            // of two products whose order is certain
  std::int32_t* threshold = nullptr;  // (rows,) a product must be above it to enter
  std::int32_t* count = nullptr;      // (rows,)
  std::int32_t* products = nullptr;   // (rows, capacity)
  std::int32_t* indices = nullptr;    // (rows, capacity) queue rows, ascending, less the first one
};

struct ScreenTask {
  const void* queue = nullptr;  // (K, D)
  ElementType queue_type = ElementType::kFloat32;
  std::int64_t dim = 0;    // D
  std::int64_t begin = 0;  // first queue row to visit
  std::int64_t end = 0;    // one past the last; begin < end, end - begin < 2^31
  std::int64_t strips = 0;
  const std::int32_t* rows = nullptr;  // (strips, pairs, lanes) pairs of 16-bit numbers
  ScreenLists lists;                   // of strips * lanes rows

  // Workspace of the running thread.
  std::int32_t* tile = nullptr;      // (kScreenTileRows, pair_stride(D))
  std::int32_t* products = nullptr;  // (kScreenTileRows, lanes)
};

inline constexpr std::int64_t kScreenTileRows = 96;

static inline std::int64_t num_pairs(std::int64_t dim) {
  return (dim + 1) / 2;
}

/// Pairs from one row of a tile to the next: an odd number of cache lines, as in the sweep.
static inline std::int64_t pair_stride(std::int64_t dim) {
  return ((num_pairs(dim) + 15) / 16 | 1) * 16;
}

struct ScreenKernels {
  int lanes;
  /// A strip (D, lanes) of fp32 rows, divided by their norms, as pairs (pairs, lanes). Every
  /// product is above the thresholds (lanes,) it leaves, none where a row is zero or not finite.
  void (*fix_strip)(const float* strip, std::int64_t dim, std::int32_t* pairs,
                    std::int32_t* threshold);
  /// Adds candidates of every row to its list, which has a threshold already. False if it gave up:
  /// a queue row is too long or not finite, or a list overflowed for too many products lay within
  /// the margin.
  bool (*screen)(const ScreenTask& task);
  /// out[i] = v . Q_index[i] in fp32; `scratch` holds D floats. Equal rows give equal bits.
  void (*compare)(const float* v, const void* queue, ElementType queue_type, std::int64_t dim,
                  const std::int64_t* index, std::int64_t count, float* scratch, float* out);
};

#if defined(SOFTCL_X86)
extern const ScreenKernels kAvx2Screen;
extern const ScreenKernels kAvx512Screen;  // with AVX-512 VNNI
#endif

}  // namespace softcl::cpu

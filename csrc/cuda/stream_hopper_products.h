// The products that the Hopper streaming kernel starts, and where they end. See
// stream_hopper_kernel.h.

#pragma once

#include "stream_hopper_weights.h"

#if defined(SOFTCL_HAS_WARPGROUPS)

namespace softcl::cuda {

/// Starts s (64, N) (+)= columns 16 begin .. 16 end - 1 of rows (64, D) times those of N rows of a
/// tile, transposed.
template <typename T, int kEights>
SOFTCL_DEVICE void multiply_rows(float (&s)[kEights][4], std::uint32_t rows, std::uint32_t tile,
                                 int begin, int end, bool add) {
  SOFTCL_UNROLL
  for (int k = begin; k < end; ++k) {
    ptx::wgmma_rows<T>(s, row_descriptor(rows, kWarpgroupRows, k),
                       row_descriptor(tile, 8 * kEights, k), add || k > begin);
  }
}

// Products of numbers in two parts are summed over so many columns, or so many rows of the queue,
// at a time: tensor cores cut their long sums off, where an addition rounds them.
inline constexpr int kColumnsAtOnce = 64;
inline constexpr int kQueueRowsAtOnce = 64;

/// Accumulators beside s that its products take: eights of columns, 1 stands for none.
template <typename T, int kDim>
SOFTCL_HOST_DEVICE constexpr int rest_eights(int eights) {
  return kParts<T> == 2 && kDim > kColumnsAtOnce ? eights : 1;
}

/// Starts s (64, N) = rows times N rows of a tile, transposed. In two parts (the low ones of the
/// tile `tile_low` bytes behind the high ones) the products with a low part come first, the small
/// ones; low x low is left out. high x high of the first 64 columns goes to `rest`, where there are
/// more.
template <typename T, int kDim, int kEights, int kRest>
SOFTCL_DEVICE void start_products(float (&s)[kEights][4], float (&rest)[kRest][4],
                                  std::uint32_t rows, std::uint32_t tile, std::uint32_t tile_low) {
  constexpr int kSteps = kDim / 16, kFirst = kColumnsAtOnce / 16;
  rows = ptx::opaque(rows);
  if constexpr (kParts<T> == 1) {
    multiply_rows<T>(s, rows, tile, 0, kSteps, false);
  } else {
    static_assert(kDim <= 2 * kColumnsAtOnce, "two sums");
    multiply_rows<Float16>(s, rows + kWarpgroupRows * kDim * 2, tile, 0, kSteps, false);
    multiply_rows<Float16>(s, rows, tile + tile_low, 0, kSteps, true);
    if constexpr (kDim > kColumnsAtOnce) {
      multiply_rows<Float16>(rest, rows, tile, 0, kFirst, false);
      multiply_rows<Float16>(s, rows, tile, kFirst, kSteps, true);
    } else {
      multiply_rows<Float16>(s, rows, tile, 0, kSteps, true);
    }
  }
}

/// s as the products of start_products, after the wait for them.
template <typename T, int kDim, int kEights, int kRest>
SOFTCL_DEVICE void finish_products(float (&s)[kEights][4], float (&rest)[kRest][4]) {
  ptx::settle(s);
  if constexpr (kParts<T> == 2) {
    if constexpr (kDim > kColumnsAtOnce) ptx::settle(rest);
    SOFTCL_UNROLL
    for (int n = 0; n < kEights; ++n) {
      SOFTCL_UNROLL
      for (int e = 0; e < 4; ++e) {
        if constexpr (kDim > kColumnsAtOnce) s[n][e] += rest[n][e];
        s[n][e] *= kProductScale;
      }
    }
  }
}

/// Starts mean (64, D) += weights (64, rows of the tile) times the tile.
template <typename T, typename S>
SOFTCL_DEVICE void multiply_weights(float (&mean)[S::kDim / 8][4], const Weights<S, 1>& weights,
                                    std::uint32_t tile) {
  SOFTCL_UNROLL
  for (int k = 0; k < S::kTileRows / 16; ++k) {
    ptx::wgmma_columns<T>(mean, weights.parts[0][k], column_descriptor(tile, S::kTileRows, k),
                          true);
  }
}

/// Starts sum (64, D) = weights times rows 16 begin .. 16 end - 1 of the tile, both in two parts,
/// the small products first.
template <typename S>
SOFTCL_DEVICE void multiply_parts(float (&sum)[S::kDim / 8][4], const Weights<S, 2>& weights,
                                  std::uint32_t tile, int begin, int end) {
  SOFTCL_UNROLL
  for (int i = 0; i < 3; ++i) {  // low x high, high x low, high x high
    const std::uint32_t part = tile + (i == 1 ? S::kTilePartBytes : 0);
    SOFTCL_UNROLL
    for (int k = begin; k < end; ++k) {
      ptx::wgmma_columns<Float16>(sum, weights.parts[i == 0 ? 1 : 0][k],
                                  column_descriptor(part, S::kTileRows, k), i > 0 || k > begin);
    }
  }
}

/// z.t of the warpgroup's rows, by the very products that z.Q takes: a queue row equal to t must
/// not count as better than t.
template <typename T, typename S>
SOFTCL_DEVICE void find_positives(RowSums& sums, std::uint32_t rows, std::uint32_t keys) {
  constexpr int kEights = kWarpgroupRows / 8;
  float products[kEights][4] = {}, rest[rest_eights<T, S::kDim>(kEights)][4] = {};
  ptx::wgmma_fence();
  start_products<T, S::kDim>(products, rest, rows, keys, S::kRowPartBytes);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  finish_products<T, S::kDim>(products, rest);
  // Of the diagonal one of a row's four lanes holds the element; the others add zeros.
  SOFTCL_UNROLL
  for (int i = 0; i < 2; ++i) {
    float positive = 0.0f;
    SOFTCL_UNROLL
    for (int n = 0; n < kEights; ++n) {
      SOFTCL_UNROLL
      for (int e = 2 * i; e < 2 * i + 2; ++e) {
        if (8 * n + accumulator_column(lane_index(), e) == warpgroup_row(i)) {
          positive = products[n][e];
        }
      }
    }
    sums.positive[i] = quad_sum(positive);
  }
}

}  // namespace softcl::cuda

#endif

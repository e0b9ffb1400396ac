// The streaming kernel's second product: the weights of a step times the same queue rows.

#pragma once

#include "elements.h"
#include "ptx.h"
#include "rows.h"
#include "stream_products.h"
#include "stream_state.h"

namespace softcl::cuda {

/// The B fragments of 16 rows, columns 16 n and following: x[0], x[1] of the first eight columns.
template <int kDim>
SOFTCL_DEVICE ptx::Vector mean_fragment(std::uint32_t rows, int row, int n) {
  const int lane = lane_index();
  return ptx::ldmatrix_transposed(
      piece_after(rows + piece_offset<kDim>(row + lane / 8 % 2 * 8 + lane % 8, lane / 16), 2 * n));
}

/// Two weights of a row as the product takes them. Of a queue in two parts so are they, the low
/// parts in `low`: then they have the queue's 22 bits.
template <typename T>
SOFTCL_DEVICE std::uint32_t pack_weights(float first, float second, std::uint32_t& low) {
  if constexpr (kParts<T> == 2) {
    return split_to_fp16(first * kHeadroom, second * kHeadroom, low);
  } else if constexpr (kHasMaximum<T>) {
    return ptx::pack_fp16(first * kHeadroom, second * kHeadroom);
  } else {
    return ptx::pack_bf16(first, second);
  }
}

/// mean (16, kMeanDim) of each tile += its weights (16, 32) times 32 rows of the queue tile.
/// Of numbers in two parts 16 rows are summed by themselves first: tensor cores cut their long sums
/// off, where an addition rounds them.
template <typename T, int kDim, typename S>
SOFTCL_DEVICE void add_means(State<S>& state, const float (&w)[2][4][4], std::uint32_t tile,
                             int first) {
  constexpr bool kInParts = kParts<T> == 2;
  constexpr std::uint32_t kOnes = kHasMaximum<T> ? kOnesFp16 : kOnesBf16;
  SOFTCL_UNROLL
  for (int k = 0; k < 2; ++k) {
    ptx::Vector high[S::kMeanTiles], low[S::kMeanTiles];
    SOFTCL_UNROLL
    for (int r = 0; r < S::kMeanTiles; ++r) {
      SOFTCL_UNROLL
      for (int i = 0; i < 4; ++i) {
        // Element pairs of C are those of A: rows g and g + 8, then eight columns on.
        const float* pair = &w[r][2 * k + i / 2][i % 2 * 2];
        high[r].x[i] = pack_weights<T>(pair[0], pair[1], low[r].x[i]);
      }
      float sums[4] = {};
      float (&target)[4] = kInParts ? sums : state.mean_weight[r];
      multiply_add<T>(target, high[r], kOnes, kOnes);
      if constexpr (kInParts) {
        multiply_add<T>(target, low[r], kOnes, kOnes);
        add_to(state.mean_weight[r], sums);
      }
    }
    SOFTCL_UNROLL
    for (int n = 0; n < S::kMeanDim / 16; ++n) {
      // Of many fragments that are all taken apart, ptxas would load too many at once.
      if constexpr (kInParts) ptx::keep_order();
      const int column = part_index<S>() * S::kMeanDim / 16 + n;
      const ptx::Vector q = mean_fragment<kDim>(tile, first + 16 * k, column);
      ptx::Vector q_low = {};
      if constexpr (kInParts) {
        q_low = mean_fragment<kDim>(tile + S::kTilePartBytes, first + 16 * k, column);
      }
      SOFTCL_UNROLL
      for (int i = 0; i < 4; i += 2) {
        SOFTCL_UNROLL
        for (int r = 0; r < S::kMeanTiles; ++r) {
          float (&mean)[4] = state.mean[r][2 * n + i / 2];
          if constexpr (kInParts) {
            float sums[4] = {};
            multiply_add<T>(sums, high[r], q_low.x[i], q_low.x[i + 1]);
            multiply_add<T>(sums, low[r], q.x[i], q.x[i + 1]);
            multiply_add<T>(sums, high[r], q.x[i], q.x[i + 1]);
            add_to(mean, sums);
          } else {
            multiply_add<T>(mean, high[r], q.x[i], q.x[i + 1]);
          }
        }
      }
    }
  }
}

}  // namespace softcl::cuda

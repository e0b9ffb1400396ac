// The streaming kernel's second product: the weights of a step times the same queue rows.

#pragma once

#include <type_traits>

#include "elements.h"
#include "ptx.h"
#include "rows.h"
#include "stream_state.h"

namespace softcl::cuda {

/// The B fragments of 16 rows, columns 16 n and following: x[0], x[1] of the first eight columns.
template <int kDim>
SOFTCL_DEVICE ptx::Vector mean_fragment(std::uint32_t rows, int row, int n) {
  const int lane = lane_index();
  return ptx::ldmatrix_transposed(
      piece_after(rows + piece_offset<kDim>(row + lane / 8 % 2 * 8 + lane % 8, lane / 16), 2 * n));
}

/// Two weights of a row as the product takes them, and in `low` what rounding left of them. Of a
/// queue in two parts both parts are fp16 and relative to the running maximum, so that they have
/// the queue's 22 bits; bf16 would have 16.
template <typename T>
SOFTCL_DEVICE std::uint32_t split_weights(float first, float second, std::uint32_t& low) {
  if constexpr (kParts<T> == 2) {
    return split_to_fp16(first * kHeadroom, second * kHeadroom, low);
  }
  return split_floats(first, second, low);
}

/// C += A B of the type that split_weights makes.
template <typename T>
SOFTCL_DEVICE void multiply_weights(float (&c)[4], const ptx::Vector& a, std::uint32_t b0,
                                    std::uint32_t b1) {
  if constexpr (kParts<T> == 2) {
    ptx::mma_fp16(c, a, b0, b1);
  } else {
    ptx::mma_bf16(c, a, b0, b1);
  }
}

/// mean (16, kMeanDim) of each tile += its weights (16, 32) times 32 rows of the queue tile.
/// Of a queue in two parts (`two_parts`, then, of the weights too) 16 rows are summed by themselves
/// first: tensor cores cut their long sums off, where an addition rounds them.
template <typename T, int kDim, typename S>
SOFTCL_DEVICE void add_means(State<S>& state, const float (&w)[2][4][4], std::uint32_t tile,
                             int first, bool two_parts) {
  constexpr bool kFp16 = std::is_same_v<T, Float16>, kInParts = kParts<T> == 2;
  // Of many fragments that are all taken apart, ptxas would load too many at once.
  constexpr bool kKeepsOrder = kInParts || (kFp16 && S::kMeanTiles == 1 && S::kMeanDim == 256);
  SOFTCL_UNROLL
  for (int k = 0; k < 2; ++k) {
    ptx::Vector high[S::kMeanTiles], low[S::kMeanTiles];
    SOFTCL_UNROLL
    for (int r = 0; r < S::kMeanTiles; ++r) {
      SOFTCL_UNROLL
      for (int i = 0; i < 4; ++i) {
        // Element pairs of C are those of A: rows g and g + 8, then eight columns on.
        const float* pair = &w[r][2 * k + i / 2][i % 2 * 2];
        high[r].x[i] = split_weights<T>(pair[0], pair[1], low[r].x[i]);
      }
      float sums[4] = {};
      float (&target)[4] = kInParts ? sums : state.mean_weight[r];
      constexpr std::uint32_t kOnes = kInParts ? kOnesFp16 : kOnesBf16;
      multiply_weights<T>(target, high[r], kOnes, kOnes);
      if (two_parts) multiply_weights<T>(target, low[r], kOnes, kOnes);
      if constexpr (kInParts) add_to(state.mean_weight[r], sums);
    }
    SOFTCL_UNROLL
    for (int n = 0; n < S::kMeanDim / 16; ++n) {
      if constexpr (kKeepsOrder) ptx::keep_order();
      const int column = part_index<S>() * S::kMeanDim / 16 + n;
      ptx::Vector q = mean_fragment<kDim>(tile, first + 16 * k, column), q_low = {};
      if constexpr (kInParts) {
        q_low = mean_fragment<kDim>(tile + S::kTilePartBytes, first + 16 * k, column);
      }
      SOFTCL_UNROLL
      for (int i = 0; i < 4; i += 2) {
        std::uint32_t rest[2] = {q_low.x[i], q_low.x[i + 1]};
        if constexpr (kFp16) {
          SOFTCL_UNROLL
          for (int j = 0; j < 2; ++j) rest[j] = split_fp16(q.x[i + j]);
        }
        SOFTCL_UNROLL
        for (int r = 0; r < S::kMeanTiles; ++r) {
          float (&mean)[4] = state.mean[r][2 * n + i / 2];
          float sums[4] = {};
          float (&target)[4] = kInParts ? sums : mean;
          if constexpr (kFp16 || kInParts) {
            multiply_weights<T>(target, high[r], rest[0], rest[1]);
          }
          if (two_parts) multiply_weights<T>(target, low[r], q.x[i], q.x[i + 1]);
          multiply_weights<T>(target, high[r], q.x[i], q.x[i + 1]);
          if constexpr (kInParts) add_to(mean, sums);
        }
      }
    }
  }
}

}  // namespace softcl::cuda

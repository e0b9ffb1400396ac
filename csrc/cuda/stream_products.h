// The streaming kernel's first product: rows times queue rows, and the students' rows times the
// keys of their samples. See stream_kernel.h.

#pragma once

#include <type_traits>

#include "elements.h"
#include "ptx.h"
#include "rows.h"
#include "stream_state.h"

namespace softcl::cuda {

template <typename T>
SOFTCL_DEVICE void multiply_add(float (&c)[4], const ptx::Vector& a, std::uint32_t b0,
                                std::uint32_t b1) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    ptx::mma_bf16(c, a, b0, b1);
  } else {
    ptx::mma_fp16(c, a, b0, b1);
  }
}

/// The A fragment of 16 rows from `row` on, columns 16 k and following.
template <int kDim>
SOFTCL_DEVICE ptx::Vector row_fragment(std::uint32_t rows, int row, int k) {
  const int lane = lane_index();
  return ptx::ldmatrix(rows + piece_offset<kDim>(row + lane % 16, 2 * k + lane / 16));
}

/// The B fragments of the transpose of 16 rows: x[0], x[1] of the first eight, x[2], x[3].
template <int kDim>
SOFTCL_DEVICE ptx::Vector column_fragment(std::uint32_t rows, int row, int k) {
  const int lane = lane_index(), piece = lane / 8 % 2;
  row += lane / 16 * 8 + lane % 8;
  // One place either way; ptxas finds registers for all variants only like this.
  if constexpr (kDim == 256) {
    return ptx::ldmatrix(piece_after(rows + piece_offset<kDim>(row, piece), 2 * k));
  }
  return ptx::ldmatrix(rows + piece_offset<kDim>(row, 2 * k + piece));
}

/// s[tile] (16, 32) += columns 16 begin .. 16 end - 1 of rows (16, D) times those of 32 rows of the
/// queue tile, from `first` on, transposed.
template <typename T, int kDim, typename S>
SOFTCL_DEVICE void multiply_columns(float (&s)[2][4][4], std::uint32_t rows, std::uint32_t tile,
                                    int first, int begin = 0, int end = kDim / 16) {
  // Unrolled whole, the addresses of all k would be kept in registers from tile to tile.
  SOFTCL_UNROLL_BY_4
  for (int k = begin; k < end; ++k) {
    const ptx::Vector b[2] = {column_fragment<kDim>(tile, first, k),
                              column_fragment<kDim>(tile, first + 16, k)};
    SOFTCL_UNROLL
    for (int r = 0; r < 2; ++r) {
      const ptx::Vector a = row_fragment<kDim>(rows, warp_row<S>() + r * S::kTileSamples, k);
      SOFTCL_UNROLL
      for (int n = 0; n < 4; ++n) {
        multiply_add<T>(s[r][n], a, b[n / 2].x[n % 2 * 2], b[n / 2].x[n % 2 * 2 + 1]);
      }
    }
  }
}

/// s[tile] = rows times 32 rows of the queue tile. Of two parts each, the products with a low part
/// come first, the small ones; low x low is left out. high x high is summed over 16 columns at a
/// time: tensor cores cut their long sums off, where an addition rounds them.
template <typename T, int kDim, typename S>
SOFTCL_DEVICE void multiply_rows(float (&s)[2][4][4], std::uint32_t rows, std::uint32_t tile,
                                 int first) {
  if constexpr (kParts<T> == 1) {
    multiply_columns<T, kDim, S>(s, rows, tile, first);
    return;
  }
  multiply_columns<T, kDim, S>(s, rows + S::kRowPartBytes, tile, first);
  multiply_columns<T, kDim, S>(s, rows, tile + S::kTilePartBytes, first);
  constexpr int kUnroll = kDim == 256 ? 1 : 4;  // registers for more there are not
  SOFTCL_UNROLL_BY(kUnroll)
  for (int k = 0; k < kDim / 16; ++k) {
    float sums[2][4][4] = {};
    multiply_columns<T, kDim, S>(sums, rows, tile, first, k, k + 1);
    SOFTCL_UNROLL
    for (int i = 0; i < 8; ++i) add_to(s[i / 4][i % 4], sums[i / 4][i % 4]);
  }
  SOFTCL_UNROLL
  for (int i = 0; i < 32; ++i) s[i / 16][i / 4 % 4][i % 4] *= kProductScale;
}

/// z.t of every student's row, by the very products that z.Q takes: a queue row equal to t must not
/// count as better than t. Called by all threads, before the first tile is loaded; they lie behind
/// the stages, tile by tile, after the next barrier.
template <typename T, int kDim, typename S>
SOFTCL_DEVICE void store_positives(const StreamParams& p, std::uint32_t rows,
                                   std::uint32_t stages) {
  for (int r = 0; r < (S::kPair ? 1 : 2); ++r) {
    std::uint32_t keys = rows + S::kTileSamples * kDim * 2, low = S::kRowPartBytes;
    if constexpr (!S::kPair) {
      keys = stages;
      low = S::kTileSamples * kDim * 2;
      ptx::sync_threads();  // the keys before these have been read
      load_rows<T, kDim, S::kThreads>(keys, low, p.rows[1], p.row_type, first_sample_of<S>(r),
                                      S::kTileSamples, p.num_rows, p.dim, p.aligned, p.normalize);
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    if (!S::kPair && converts<T>(p.row_type) && p.aligned && !p.normalize) {
      convert_rows<T, kDim, S::kThreads>(keys, low, p.row_type, S::kTileSamples);
    }
    ptx::sync_threads();
    float products[2][4] = {};
    const auto multiply = [&](float (&sums)[2][4], std::uint32_t row_part, std::uint32_t key_part,
                              int begin, int end) {
      for (int k = begin; k < end; ++k) {
        const ptx::Vector a = row_fragment<kDim>(row_part, warp_row<S>() + r * S::kTileSamples, k);
        const ptx::Vector b = column_fragment<kDim>(key_part, warp_row<S>(), k);
        multiply_add<T>(sums[0], a, b.x[0], b.x[1]);
        multiply_add<T>(sums[1], a, b.x[2], b.x[3]);
      }
    };
    if constexpr (kParts<T> == 1) {
      multiply(products, rows, keys, 0, kDim / 16);
    } else {  // as multiply_rows does
      multiply(products, rows + S::kRowPartBytes, keys, 0, kDim / 16);
      multiply(products, rows, keys + low, 0, kDim / 16);
      for (int k = 0; k < kDim / 16; ++k) {
        float sums[2][4] = {};
        multiply(sums, rows, keys, k, k + 1);
        for (int n = 0; n < 2; ++n) add_to(products[n], sums[n]);
      }
      SOFTCL_UNROLL
      for (int i = 0; i < 8; ++i) products[i / 4][i % 4] *= kProductScale;
    }
    // Of the diagonal, rows g and g + 8, one of four neighbouring lanes holds each element.
    SOFTCL_UNROLL
    for (int i = 0; i < 2; ++i) {
      SOFTCL_UNROLL
      for (int e = 2 * i; e < 2 * i + 2; ++e) {
        if (part_index<S>() == 0 && accumulator_column(lane_index(), e) == lane_index() / 4) {
          ptx::store_shared(positive_address<S>(stages, r, i), products[i][e]);
        }
      }
    }
  }
  if constexpr (!S::kPair) ptx::sync_threads();  // the stages take queue tiles next
}

}  // namespace softcl::cuda

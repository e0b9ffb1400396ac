// The streaming kernel for sm_80 and later: mma.sync products of 16-bit rows, cp.async queue tiles.
//
// Tiling, of rows of 16-bit numbers. Grid (row blocks, splits of the queue), row blocks fastest, so
// that the blocks in flight read the same part of the queue. Four warps; each holds two tiles of 16
// rows: of 16 samples the student's rows and the teacher's (paired), or 32 rows of one kind
// (single). Every fragment of the queue that a warp reads from shared memory serves both tiles, and
// a thread holds the student's and the teacher's product with the same queue row: z.mu needs no
// exchange. The rows lie in shared memory, the sums in registers: two tiles of 16 x D means are D
// floats a thread. At D = 256 that is too many, and eight warps share the work: each computes all
// products v.Q of its tiles, and half of the columns of the means.
//
//     D     tile rows   stages   shared memory     means per thread
//     64    64          3        40 KB             64
//     128   64          3        80 KB             128
//     256   32          2        96 KB             128
//
// Weights are of the type of the queue: 2^x in bf16, and in fp16, which 2^x would leave, relative
// to a running maximum. bf16 is too coarse for some calls (kernel_type): for those a thread turns
// the pieces of a tile that it has copied into fp16, in place, so that one product does where two
// parts of bf16 weights would take two.
//
// fp32, of rows or of the queue, makes all of it two fp16 parts (rows.h), 22 bits: three products
// for v.Q, high x high and the two with one low part, and three for the means, whose weights are in
// two fp16 parts as well. Two bf16 parts have 16 bits: an error of 2e-5 in the gradient, where
// these have 1e-6. A tile holds the high parts, then the low ones, together the bytes of its fp32
// numbers: a thread copies 32 bytes of fp32 to where its eight high and eight low parts will lie,
// and takes them apart in place. Twice the bytes:
//
//     64    64          3        80 KB             64
//     128   32          2        96 KB             64      eight warps for dense labels
//     256   32          2        128 KB            64      half of the samples, two to four times
//                                                          the warps for them
//
// A step is 32 queue rows: 2 x 16 products a thread, turned into weights in place, and from there
// operands of the second product without leaving the registers.
//
// Traffic: K D 2 bytes of queue per row block, from L2; rows and sums once; with chunk maxima four
// bytes per row and chunk. Nothing of size N x K is written.
//
// Experimental: has not yet run on a GPU; tests/native/cuda runs it on a CPU.

#pragma once

#include "launch.h"
#include "ptx.h"
#include "rows.h"
#include "stream_means.h"
#include "stream_products.h"
#include "stream_state.h"

namespace softcl::cuda {

/// Turns the products x of one tile of rows into weights, in place, and adds up their sums.
/// z_products: the student's products with the same queue rows, read if kStudent.
template <bool kEntropy, bool kStudent, bool kRunning, typename S>
SOFTCL_DEVICE void add_weights(State<S>& state, int r, float (&x)[4][4],
                               const float (&z_products)[4][4], float scale) {
  float offset[2] = {};
  if constexpr (kRunning) {
    SOFTCL_UNROLL
    for (int i = 0; i < 2; ++i) {
      float largest = kAbsent;
      SOFTCL_UNROLL
      for (int n = 0; n < 4; ++n) {
        largest = fmaxf(largest, fmaxf(x[n][2 * i], x[n][2 * i + 1]));
      }
      largest = fmaxf(largest, ptx::shuffle_xor(largest, 1));
      largest = fmaxf(largest, ptx::shuffle_xor(largest, 2));
      offset[i] = fmaxf(state.maximum[r][i], largest * scale);
      const float drop = state.maximum[r][i] - offset[i];
      const float carry = ptx::exp2_approx(drop);
      state.maximum[r][i] = offset[i];
      state.cosine[r][i] = (state.cosine[r][i] + drop * state.weight[r][i]) * carry;
      state.weight[r][i] *= carry;
      if constexpr (kStudent) state.student[i] *= carry;
      if (r < S::kMeanTiles) {
        SOFTCL_UNROLL
        for (int e = 2 * i; e < 2 * i + 2; ++e) {
          state.mean_weight[r][e] *= carry;
          SOFTCL_UNROLL
          for (int n = 0; n < S::kMeanDim / 8; ++n) state.mean[r][n][e] *= carry;
        }
      }
    }
  }
  // Summed over the step first: one rounding per step in the long sums, not eight.
  float weight[2] = {}, cosine[2] = {}, student[2] = {};
  SOFTCL_UNROLL
  for (int n = 0; n < 4; ++n) {
    SOFTCL_UNROLL
    for (int e = 0; e < 4; ++e) {
      const float logit = kRunning ? fmaf(x[n][e], scale, -offset[e / 2]) : x[n][e] * scale;
      const float w = ptx::exp2_approx(logit);
      weight[e / 2] += w;
      if constexpr (kEntropy) cosine[e / 2] = fmaf(w, kRunning ? logit : x[n][e], cosine[e / 2]);
      if constexpr (kStudent) student[e / 2] = fmaf(w, z_products[n][e], student[e / 2]);
      x[n][e] = w;
    }
  }
  SOFTCL_UNROLL
  for (int i = 0; i < 2; ++i) {
    state.weight[r][i] += weight[i];
    if constexpr (kEntropy) state.cosine[r][i] += cosine[i];
    if constexpr (kStudent) state.student[i] += student[i];
  }
}

/// The weights of all rows of a step. The teacher's first: they read the student's products.
/// A product of minus infinity has no weight; that it is there shows in a mean, or where there is
/// none in the cosines' sum: 0 x -inf.
template <bool kRunning, typename S>
SOFTCL_DEVICE void add_all_weights(State<S>& state, float (&s)[2][4][4], const StreamParams& p) {
  if constexpr (S::kPair) {
    if (p.softmax) add_weights<true, true, kRunning>(state, 1, s[1], s[0], p.scale[1]);
    add_weights<S::kMeanTiles == 0, false, kRunning>(state, 0, s[0], s[1], p.scale[0]);
  } else if (S::kMeanTiles == 0 || p.entropy) {
    add_weights<true, false, kRunning>(state, 0, s[0], s[1], p.scale[0]);
    add_weights<true, false, kRunning>(state, 1, s[1], s[0], p.scale[0]);
  } else {
    add_weights<false, false, kRunning>(state, 0, s[0], s[1], p.scale[0]);
    add_weights<false, false, kRunning>(state, 1, s[1], s[0], p.scale[0]);
  }
}

/// One step: 32 rows of a queue tile, from row `first` of the tile on.
template <typename T, int kDim, typename S>
SOFTCL_DEVICE void visit_step(State<S>& state, const StreamParams& p, std::uint32_t rows,
                              std::uint32_t stages, std::uint32_t tile, int first, int step) {
  float s[2][4][4] = {};
  multiply_rows<T, kDim, S>(s, rows, tile, first);
  const std::int64_t left = p.queue_size - std::int64_t(step) * kStepColumns;
  if (left < kStepColumns) {
    SOFTCL_UNROLL
    for (int n = 0; n < 4; ++n) {
      SOFTCL_UNROLL
      for (int e = 0; e < 4; ++e) {
        if (8 * n + accumulator_column(lane_index(), e) >= static_cast<int>(left)) {
          s[0][n][e] = s[1][n][e] = kAbsent;
        }
      }
    }
  }
  if (p.ranks != nullptr) {
    SOFTCL_UNROLL
    for (int i = 0; i < (S::kPair ? 2 : 4); ++i) {  // two rows of each tile of students
      const int r = i / 2;
      const auto positive = ptx::load_shared<float>(positive_address<S>(stages, r, i % 2));
      SOFTCL_UNROLL
      for (int j = 0; j < 8; ++j) {
        state.rank[r][i % 2] += s[r][j / 2][i % 2 * 2 + j % 2] > positive;
      }
    }
  }
  if (p.maxima != nullptr) store_maxima(state, s, p, step);
  if (S::kPair || p.softmax) add_all_weights<kHasMaximum<T>>(state, s, p);
  if constexpr (S::kMeanTiles > 0) add_means<T, kDim>(state, s, tile, first);
}

template <typename T, int kDim, Pairing kPairing, int kMeanRows>
__global__ void __launch_bounds__(Shape<kDim, kPairing, kMeanRows, kParts<T>>::kThreads,
                                  Shape<kDim, kPairing, kMeanRows, kParts<T>>::kBlocks)
    stream_kernel(const StreamParams p) {
  using S = Shape<kDim, kPairing, kMeanRows, kParts<T>>;
  const std::uint32_t rows = ptx::shared_memory();
  const std::uint32_t stages = rows + S::kRowBytes;
  const int first_tile = blockIdx.y * p.tiles_per_split;
  const int last_tile = min(first_tile + p.tiles_per_split, p.num_tiles);

  const auto load_tile = [&](int tile) {
    if (tile < last_tile) {
      load_rows<T, kDim, S::kThreads>(
          stages + tile % S::kStages * S::kStageBytes, S::kTilePartBytes, p.queue, p.queue_type,
          std::int64_t(tile) * S::kTileRows, S::kTileRows, p.queue_size, p.dim, p.aligned, false);
    }
    ptx::cp_async_commit();  // an empty group too: the waits count groups
  };

  SOFTCL_UNROLL
  for (int r = 0; r < 2; ++r) {
    load_rows<T, kDim, S::kThreads>(rows + r * S::kTileSamples * kDim * 2, S::kRowPartBytes,
                                    p.rows[S::kPair ? r : 0], p.row_type, first_sample_of<S>(r),
                                    S::kTileSamples, p.num_rows, p.dim, p.aligned, p.normalize);
  }
  if (converts<T>(p.row_type) && p.aligned && !p.normalize) {
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    for (int r = 0; r < 2; ++r) {
      convert_rows<T, kDim, S::kThreads>(rows + r * S::kTileSamples * kDim * 2, S::kRowPartBytes,
                                         p.row_type, S::kTileSamples);
    }
  }
  State<S> state;
  if (p.ranks != nullptr) {
    store_positives<T, kDim, S>(p, rows, stages);
  }
  SOFTCL_UNROLL
  for (int i = 0; i < S::kStages - 1; ++i) load_tile(first_tile + i);
  for (int tile = first_tile; tile < last_tile; ++tile) {
    ptx::cp_async_wait<S::kStages - 2>();
    const std::uint32_t here = stages + tile % S::kStages * S::kStageBytes;
    if (converts<T>(p.queue_type) && p.aligned) {
      convert_rows<T, kDim, S::kThreads>(here, S::kTilePartBytes, p.queue_type, S::kTileRows);
    }
    // This tile is there for all, and all have done with the one whose stage is filled next.
    ptx::sync_threads();
    load_tile(tile + S::kStages - 1);
    SOFTCL_NO_UNROLL
    for (int first = 0; first < S::kTileRows; first += kStepColumns) {
      const int step = tile * (S::kTileRows / kStepColumns) + first / kStepColumns;
      visit_step<T, kDim>(state, p, rows, stages, here, first, step);
    }
  }
  store_sums<S>(state, p);
}

}  // namespace softcl::cuda

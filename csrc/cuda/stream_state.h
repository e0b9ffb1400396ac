// How the streaming kernel cuts its work (Shape), what a thread holds of it (State), and how that
// gets back to global memory. See stream_kernel.h.

#pragma once

#include "layout.h"
#include "ptx.h"
#include "rows.h"
#include "stream.h"

namespace softcl::cuda {

inline constexpr std::uint32_t kOnesBf16 = 0x3F803F80, kOnesFp16 = 0x3C003C00;  // two ones

// What fp16 weights are multiplied by for their product: the largest, 1 at the running maximum,
// becomes as large as fp16 has it, and weights down to 2^-39 of it still have a value. Their sum in
// the same product's scale divides it out again.
inline constexpr float kHeadroom = 32768.0f;

// The product of a column past the end of the queue: no weight, no rank, the least of its chunk.
// It is finite, so that a weight of zero times it is zero.
inline constexpr float kAbsent = -1e30f;
inline constexpr float kLowest = -1e30f;  // a running maximum before the first step

/// kNumParts: 16-bit parts of a number, 2 of fp32.
template <int kDim, Pairing kPairing, int kMeanRows, int kNumParts = 1>
struct Shape {
  static constexpr int kRowWarps = kDim * kNumParts > 256 ? 2 : 4;
  static constexpr int kTileSamples = 16 * kRowWarps;  // of one of a warp's two tiles
  static constexpr bool kPair = kPairing == Pairing::kPaired;
  static constexpr int kMeanTiles = kPair ? kMeanRows : kMeanRows > 0 ? 2 : 0;
  // Warps that share the columns of a row's means: each holds 128 floats of them a thread, and 64
  // where all of them are taken apart first.
  static constexpr int kMeanFloats = kMeanTiles * kDim / 2, kMostFloats = kNumParts == 2 ? 64 : 128;
  static constexpr int kMeanWarps = kMeanFloats > kMostFloats ? kMeanFloats / kMostFloats : 1;
  static constexpr int kThreads = kRowWarps * kWarp * kMeanWarps;
  // Per multiprocessor, by registers (255 a thread) and, of two parts, by shared memory.
  static constexpr int kBlocks = kThreads > 128 || kDim* kNumParts > 256 ? 1 : 2;
  static constexpr int kMeanDim = kDim / kMeanWarps;  // columns of a mean that one warp holds
  static constexpr float kMeanScale = kNumParts == 2 ? 1.0f / kPartScale : 1.0f;
  static constexpr int kSamples = kPair ? kTileSamples : 2 * kTileSamples;
  static constexpr int kTileRows = kDim * kNumParts >= 256 ? 32 : 64;
  static constexpr int kStages = kDim * kNumParts >= 256 ? 2 : 3;
  static constexpr int kRowPartBytes = 2 * kTileSamples * kDim * 2;
  static constexpr int kTilePartBytes = kTileRows * kDim * 2;
  static constexpr int kRowBytes = kNumParts * kRowPartBytes;
  static constexpr int kStageBytes = kNumParts * kTilePartBytes;
  static constexpr int kSharedBytes = kRowBytes + kStages * kStageBytes + 2 * kTileSamples * 4;
  static_assert(kStages * kTileRows >= kTileSamples, "keys pass through the stages, for the ranks");
};

/// What a thread holds: of two tiles, rows g = lane / 4 and g + 8 of each.
template <typename S>
struct State {
  float mean[S::kMeanTiles > 0 ? S::kMeanTiles : 1][S::kMeanDim / 8][4] = {};
  float mean_weight[S::kMeanTiles > 0 ? S::kMeanTiles : 1][4] = {};  // all columns alike
  float weight[2][2] = {};                                           // its own columns' share
  float cosine[2][2] = {};
  float student[2] = {};
  float maximum[2][2] = {{kLowest, kLowest}, {kLowest, kLowest}};
  float chunk_maximum[2][2] = {{kAbsent, kAbsent}, {kAbsent, kAbsent}};
  int rank[2][2] = {};
};

SOFTCL_DEVICE void add_to(float (&x)[4], const float (&y)[4]) {
  SOFTCL_UNROLL
  for (int e = 0; e < 4; ++e) x[e] += y[e];
}

// Where this thread stands. Asked for where it is needed: registers are scarcer than instructions.

SOFTCL_DEVICE int lane_index() {
  return threadIdx.x % kWarp;
}

/// The first of its warp's 16 rows, in each of the two tiles of rows in shared memory.
template <typename S>
SOFTCL_DEVICE int warp_row() {
  return threadIdx.x / kWarp % S::kRowWarps * 16;
}

/// Which part of the columns of the means its warp holds.
template <typename S>
SOFTCL_DEVICE int part_index() {
  return threadIdx.x / (kWarp * S::kRowWarps);
}

/// The first sample whose row lies in tile r.
template <typename S>
SOFTCL_DEVICE std::int64_t first_sample_of(int r) {
  return std::int64_t(blockIdx.x) * S::kSamples + (S::kPair ? 0 : r * S::kTileSamples);
}

/// The sample of its row g (i = 0) or g + 8 (i = 1) of tile r.
template <typename S>
SOFTCL_DEVICE std::int64_t sample_of(int r, int i) {
  return first_sample_of<S>(r) + warp_row<S>() + accumulator_row(lane_index(), 2 * i);
}

/// Adds a step's products to the chunk maxima of the searching rows, and writes the maxima where a
/// chunk ends with this step.
template <typename S>
SOFTCL_DEVICE void store_maxima(State<S>& state, const float (&s)[2][4][4], const StreamParams& p,
                                int step) {
  const int last_step = p.num_tiles * (S::kTileRows / kStepColumns) - 1;
  const bool ends = ends_chunk(step, p.chunk_shift) || step == last_step;
  const int chunk = chunk_of(step, lane_index(), p.chunk_shift);
  SOFTCL_UNROLL
  for (int r = S::kPair ? 1 : 0; r < 2; ++r) {
    SOFTCL_UNROLL
    for (int i = 0; i < 2; ++i) {
      float& largest = state.chunk_maximum[r][i];
      SOFTCL_UNROLL
      for (int n = 0; n < 4; ++n) {
        largest = fmaxf(largest, fmaxf(s[r][n][2 * i], s[r][n][2 * i + 1]));
      }
      if (!ends) continue;
      const std::int64_t sample = sample_of<S>(r, i);
      if (part_index<S>() == 0 && sample < p.num_rows)
        ptx::store_global(p.maxima + sample * p.num_chunks + chunk, largest);
      largest = kAbsent;
    }
  }
}

/// Where z.t of that sample lies in shared memory.
template <typename S>
SOFTCL_DEVICE std::uint32_t positive_address(std::uint32_t stages, int r, int i) {
  const int row = r * S::kTileSamples + warp_row<S>() + accumulator_row(lane_index(), 2 * i);
  return stages + S::kStages * S::kStageBytes + row * 4;
}

/// x summed over the four lanes that hold a row.
template <typename N>
SOFTCL_DEVICE N quad_sum(N x) {
  x += ptx::shuffle_xor(x, 1);
  return x + ptx::shuffle_xor(x, 2);
}

/// Writes a split's sums, by the first lane of a row's four, and the means, by all of them.
template <typename S>
SOFTCL_DEVICE void store_sums(State<S>& state, const StreamParams& p) {
  const std::int64_t split = blockIdx.y;
  const bool is_writer = part_index<S>() == 0 && lane_index() % 4 == 0;
  SOFTCL_UNROLL
  for (int r = 0; r < 2; ++r) {
    SOFTCL_UNROLL
    for (int i = 0; i < 2; ++i) {
      const float weight = quad_sum(state.weight[r][i]);
      const float cosine = quad_sum(state.cosine[r][i]);
      const float student = quad_sum(state.student[i]);
      const int rank = quad_sum(state.rank[r][i]);
      const std::int64_t sample = sample_of<S>(r, i);
      if (sample >= p.num_rows) continue;
      const std::int64_t sum_row = sample + (S::kPair ? r * p.num_rows : 0);
      if (is_writer) {
        float* sums = p.sums + split * kNumSlots * p.num_sum_rows + sum_row;
        const auto store = [&](SumSlot s, float x) {
          ptx::store_global(sums + s * p.num_sum_rows, x);
        };
        if (p.softmax || (S::kPair && r == 0)) {
          store(kWeights, weight);
          store(kCosines, cosine);
          store(kMaximum, state.maximum[r][i]);
        }
        if (S::kPair && r == 1 && p.softmax) store(kStudentCosines, student);
        if (r < S::kMeanTiles) store(kMeanWeights, state.mean_weight[r][2 * i]);
        if (p.ranks != nullptr && (!S::kPair || r == 0))
          ptx::store_global(p.ranks + split * p.num_rows + sample, rank);
      }
      if (r >= S::kMeanTiles) continue;
      float* mean = p.means + (split * p.num_mean_rows + sum_row) * p.dim;
      SOFTCL_UNROLL
      for (int n = 0; n < S::kMeanDim / 8; ++n) {
        SOFTCL_UNROLL
        for (int e = 2 * i; e < 2 * i + 2; ++e) {
          const int d = part_index<S>() * S::kMeanDim + 8 * n + accumulator_column(lane_index(), e);
          if (d < p.dim) ptx::store_global(mean + d, state.mean[r][n][e] * S::kMeanScale);
        }
      }
    }
  }
}

}  // namespace softcl::cuda

// How the Hopper streaming kernel cuts its work (HopperShape), what a thread holds of it (RowSums),
// and how that gets back to global memory. See stream_hopper_kernel.h.

#pragma once

#include "hopper_ptx.h"
#include "stream_hopper.h"
#include "stream_state.h"

namespace softcl::cuda {

inline constexpr int kConsumers = 2 * kWarpgroup;
inline constexpr int kHopperThreads = kConsumers + kWarpgroup;  // of the last, one thread works
// Where numbers are converted, the last warpgroup's other warps do it.
inline constexpr int kConvertingWarps = 3;

// Named barriers; 0 is sync_threads'. A turn is warpgroup 0's or 1's, in this order.
enum NamedBarrier : int {
  kTurn = 1,
  kRowsLoaded = 3,
  kKeysRead = 4,
  kProductsSent = 5,
  kProductsTaken = 6,
};

/// T: of which numbers the kernel multiplies, see kernel_type.
template <int kDimensions, Pairing kPairing, int kMeanRows, typename T>
struct HopperShape {
  using Number = T;
  static constexpr int kDim = kDimensions, kNumParts = kParts<T>;
  // Of 65536 registers: 168 a thread at the start, then these. Warps that convert want more.
  static constexpr int kProducerRegisters = kHasMaximum<T> ? 40 : 24;
  static constexpr int kConsumerRegisters = kHasMaximum<T> ? 232 : 240;
  static_assert(kWarpgroup * kProducerRegisters + kConsumers * kConsumerRegisters <= 65536, "");
  static constexpr bool kPair = kPairing == Pairing::kPaired;
  // Without means a warpgroup has registers for both rows of its samples.
  static constexpr bool kBoth = kPair && kMeanRows == 0;
  // z.mu is a sum over products that the student's warpgroup has and the teacher's wants.
  static constexpr bool kSends = kPair && kMeanRows == 2;
  static constexpr int kRowTiles = kBoth ? 4 : 2;  // of 64 rows each
  static constexpr int kSamples = (kPair ? 1 : 2) * kRowTiles / 2 * kWarpgroupRows;
  // What shared memory has room for, and registers for two accumulators of products.
  static constexpr bool kNarrow = kDim * kNumParts == 256 && (kNumParts == 1 || kBoth);
  static constexpr int kTileRows = kNarrow ? 64 : 128;
  static constexpr int kStages = kDim * kNumParts < 256 ? 4 : kBoth ? 3 : kNarrow ? 4 : 2;
  static constexpr int kRowPartBytes = kWarpgroupRows * kDim * 2;
  static constexpr int kTilePartBytes = kTileRows * kDim * 2;
  static constexpr int kRowTileBytes = kNumParts * kRowPartBytes;
  static constexpr int kStageBytes = kNumParts * kTilePartBytes;
  static constexpr int kSentBytes = kSends ? kTileRows * kWarpgroupRows * 4 : 0;
  // Offsets in shared memory; the rows are at 0.
  static constexpr int kStagesAt = kRowTiles * kRowTileBytes;
  static constexpr int kSentAt = kStagesAt + kStages * kStageBytes;
  static constexpr int kBarriersAt = kSentAt + kSentBytes;
  static constexpr int kSharedBytes = kBarriersAt + 3 * kStages * 8;
  static_assert(kSharedBytes <= 227 << 10, "a block has no more");
  static_assert(kStages * kStageBytes >= 2 * kRowTileBytes, "keys pass through, for the ranks");
  static constexpr float kMeanScale = kNumParts == 2 ? 1.0f / kPartScale : 1.0f;
};

/// What a thread holds of rows g = lane / 4 and g + 8 of its warp's 16.
struct RowSums {
  float weight[2] = {};  // its own columns' share
  float mean_weight[2] = {};
  float cosine[2] = {};
  float student[2] = {};
  float maximum[2] = {kLowest, kLowest};
  float chunk_maximum[2] = {kAbsent, kAbsent};
  float positive[2] = {};
  int rank[2] = {};
};

#if defined(SOFTCL_HAS_WARPGROUPS)

SOFTCL_DEVICE int warpgroup_index() {
  return ptx::uniform(static_cast<int>(threadIdx.x) / kWarpgroup);
}

/// Its place among the 64 rows of its warpgroup.
SOFTCL_DEVICE int warpgroup_row(int i) {
  return threadIdx.x % kWarpgroup / kWarp * 16 + accumulator_row(lane_index(), 2 * i);
}

/// The first sample of a tile of rows in shared memory. There are at most 2^30 rows.
template <typename S>
SOFTCL_DEVICE int first_sample_of_tile(int row_tile) {
  const int samples = S::kBoth ? row_tile / 2 : S::kPair ? 0 : row_tile;
  return static_cast<int>(blockIdx.x) * S::kSamples + samples * kWarpgroupRows;
}

/// Adds a tile's products to the chunk maxima, and writes those of the chunks that end in it.
template <typename S>
SOFTCL_DEVICE void store_chunk_maxima(RowSums& sums, const float (&s)[S::kTileRows / 8][4],
                                      const StreamParams& p, int row_tile, int tile) {
  constexpr int kSteps = S::kTileRows / kStepColumns;
  const int last_step = p.num_tiles * kSteps - 1;
  SOFTCL_UNROLL
  for (int q = 0; q < kSteps; ++q) {
    const int step = tile * kSteps + q;
    const bool ends = ends_chunk(step, p.chunk_shift) || step == last_step;
    SOFTCL_UNROLL
    for (int i = 0; i < 2; ++i) {
      float& largest = sums.chunk_maximum[i];
      SOFTCL_UNROLL
      for (int n = 4 * q; n < 4 * q + 4; ++n) {
        largest = fmaxf(largest, fmaxf(s[n][2 * i], s[n][2 * i + 1]));
      }
      if (!ends) continue;
      const int sample = first_sample_of_tile<S>(row_tile) + warpgroup_row(i);
      if (sample < p.num_rows) {
        ptx::store_global(p.maxima + std::int64_t(sample) * p.num_chunks +
                              chunk_of(step, lane_index(), p.chunk_shift),
                          largest);
      }
      largest = kAbsent;
    }
  }
}

/// Writes a split's sums, by the first lane of a row's four.
template <typename S, bool kTeacher>
SOFTCL_DEVICE void store_row_sums(const RowSums& sums, const StreamParams& p, int row_tile,
                                  bool has_mean) {
  SOFTCL_UNROLL
  for (int i = 0; i < 2; ++i) {
    const float weight = quad_sum(sums.weight[i]);
    const float mean_weight = quad_sum(sums.mean_weight[i]);
    const float cosine = quad_sum(sums.cosine[i]);
    const float student = quad_sum(sums.student[i]);
    const int rank = quad_sum(sums.rank[i]);
    const int sample = first_sample_of_tile<S>(row_tile) + warpgroup_row(i);
    if (sample >= p.num_rows || lane_index() % 4 != 0) continue;
    const std::int64_t sum_row = (kTeacher ? p.num_rows : 0) + sample;
    float* slots = p.sums + std::int64_t(blockIdx.y) * kNumSlots * p.num_sum_rows + sum_row;
    const auto store = [&](SumSlot slot, float x) {
      ptx::store_global(slots + slot * p.num_sum_rows, x);
    };
    if (p.softmax || (S::kPair && !kTeacher)) {
      store(kWeights, weight);
      store(kCosines, cosine);
      store(kMaximum, sums.maximum[i]);
    }
    if (kTeacher && p.softmax) store(kStudentCosines, student);
    if (has_mean) store(kMeanWeights, mean_weight);
    if (!kTeacher && p.ranks != nullptr) {
      ptx::store_global(p.ranks + std::int64_t(blockIdx.y) * p.num_rows + sample, rank);
    }
  }
}

/// Writes a split's means.
template <typename S, bool kTeacher>
SOFTCL_DEVICE void store_means(const float (&mean)[S::kDim / 8][4], const StreamParams& p,
                               int row_tile) {
  SOFTCL_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int sample = first_sample_of_tile<S>(row_tile) + warpgroup_row(i);
    if (sample >= p.num_rows) continue;
    const std::int64_t row = (kTeacher ? p.num_rows : 0) + sample;
    float* target = p.means + (std::int64_t(blockIdx.y) * p.num_mean_rows + row) * p.dim;
    SOFTCL_UNROLL
    for (int n = 0; n < S::kDim / 8; ++n) {
      SOFTCL_UNROLL
      for (int e = 2 * i; e < 2 * i + 2; ++e) {
        const int d = 8 * n + accumulator_column(lane_index(), e);
        if (d < p.dim) ptx::store_global(target + d, mean[n][e] * S::kMeanScale);
      }
    }
  }
}

#endif

}  // namespace softcl::cuda

// Where things lie: queue tiles in shared memory, accumulators in registers, chunks of columns.
// Index arithmetic alone, on host and device, so that it can be tested by itself.

#pragma once

#include <cstdint>

#include "softcl/labels.h"

namespace softcl::cuda {

inline constexpr int kWarp = 32;

/// Queue rows whose products with a row one thread holds at a time, and its share of them.
inline constexpr int kStepColumns = 32;
inline constexpr int kChunksPerStep = 4;
inline constexpr int kChunkShiftPerStep = 3;
inline constexpr int kChunkColumnsPerStep = 1 << kChunkShiftPerStep;
static_assert(kChunkColumnsPerStep * kChunksPerStep == kStepColumns, "");

/// Byte offset of 16-byte piece `piece` of row `row` in a tile of kDim 16-bit numbers a row. Eight
/// rows apart in memory take their pieces in eight different orders, so that the eight that one
/// ldmatrix reads together, the same piece of eight rows, lie in different banks.
template <int kDim>
SOFTCL_HOST_DEVICE constexpr std::uint32_t piece_offset(int row, int piece) {
  return static_cast<std::uint32_t>(row * kDim * 2 + ((piece ^ (row & 7)) * 16));
}

/// The address of piece `first + distance` of a row, from that of its piece `first`, 0 or 1;
/// distance is even, and the tile begins at a multiple of 128. One instruction where the distance
/// is constant, and no register that lives from one tile to the next.
SOFTCL_HOST_DEVICE constexpr std::uint32_t piece_after(std::uint32_t address, int distance) {
  return (address ^ static_cast<std::uint32_t>((distance & 7) * 16)) +
         static_cast<std::uint32_t>((distance & ~7) * 16);
}

/// Row (of 16) and column (of 8) of element `i`, 0 to 3, of a thread's part of an accumulator.
SOFTCL_HOST_DEVICE constexpr int accumulator_row(int lane, int i) {
  return lane / 4 + i / 2 * 8;
}

SOFTCL_HOST_DEVICE constexpr int accumulator_column(int lane, int i) {
  return lane % 4 * 2 + i % 2;
}

/// Chunks. A step's columns that one thread holds (of one row) are one chunk; over 2^chunk_shift
/// steps the same thread's columns make one longer chunk. Chunk `chunk` holds columns
/// chunk_column(chunk, i), 0 <= i < kChunkColumnsPerStep << chunk_shift, ascending in i. Shifts,
/// for GPUs divide by a number known only when the kernel runs in twenty instructions.
SOFTCL_HOST_DEVICE constexpr std::int64_t chunk_column(int chunk, int i, int chunk_shift) {
  const std::int64_t step =
      (std::int64_t(chunk / kChunksPerStep) << chunk_shift) + i / kChunkColumnsPerStep;
  const int j = i % kChunkColumnsPerStep;
  return step * kStepColumns + j / 2 * 8 + chunk % kChunksPerStep * 2 + j % 2;
}

/// The chunk that starts in the step that `step` belongs to, for the thread with this lane.
SOFTCL_HOST_DEVICE constexpr int chunk_of(int step, int lane, int chunk_shift) {
  return (step >> chunk_shift) * kChunksPerStep + lane % 4;
}

/// Whether the chunks that `step` belongs to end with it, unless the queue does before.
SOFTCL_HOST_DEVICE constexpr bool ends_chunk(int step, int chunk_shift) {
  return ((step + 1) & ((1 << chunk_shift) - 1)) == 0;
}

// Slots of the partial sums (splits, kNumSlots, rows), see stream.h.
enum SumSlot : int { kWeights, kMeanWeights, kCosines, kStudentCosines, kMaximum, kNumSlots };

}  // namespace softcl::cuda

// See plan.h.

#include "plan.h"

#include <algorithm>

namespace softcl::cuda {

namespace {

constexpr std::int64_t kMostChunks = 8192;  // of a row: the workspace does not grow with the queue
constexpr int kFinishBlocksPerMultiprocessor = 8;
constexpr std::int64_t kMostCandidateBytes = std::int64_t(512) << 20;  // of all blocks together

std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

// Of the means of all splits, where accuracy asks for more of them than fill the GPU.
constexpr std::int64_t kMostMeanBytes = std::int64_t(512) << 20;

// Short enough for what the means promise, as far as there is room for so many.
int splits_for_accuracy(const Work& work) {
  if (work.mean_rows == 0) return 1;
  const std::int64_t longest = work.kernel_type != ElementType::kFloat32 ? kLongestSplit
                               : work.hopper                             ? kLongestHopperPartsSplit
                                                                         : kLongestPartsSplit;
  const std::int64_t room = kMostMeanBytes / (work.num_rows * work.mean_rows * work.dim * 4);
  const std::int64_t most = std::max<std::int64_t>(1, std::min<std::int64_t>(room, kMostSplits));
  return static_cast<int>(std::min(ceil_div(work.queue_size, longest), most));
}

// Blocks that hold candidates take one row after the other. 1024 neighbours among millions of rows
// are a million candidates each: then fewer blocks run at a time.
int choose_finish_blocks(const Work& work, std::int64_t candidates_per_block) {
  std::int64_t blocks = work.num_rows;
  if (candidates_per_block > 0) {
    const std::int64_t room = kMostCandidateBytes / (candidates_per_block * 4);
    blocks = std::min({blocks, std::max<std::int64_t>(room, 1),
                       std::int64_t(work.multiprocessors) * kFinishBlocksPerMultiprocessor});
  }
  return static_cast<int>(blocks);
}

}  // namespace

int choose_splits(std::int64_t row_blocks, int num_tiles, int slots) {
  // The time of one block is its tiles plus about two more for its start and end; blocks run in
  // waves of `slots`. Of equal times the fewest splits win: fewer sums to merge. In eighths.
  int best = 1;
  std::int64_t best_time = INT64_MAX;
  for (int splits = 1; splits <= std::min(kMostSplits, num_tiles); ++splits) {
    const std::int64_t waves = ceil_div(row_blocks * splits, slots);
    const std::int64_t time = 8 * waves * (ceil_div(num_tiles, splits) + 2) + splits;
    if (time < best_time) {
      best = splits;
      best_time = time;
    }
  }
  return best;
}

int choose_chunk_shift(std::int64_t queue_size, std::int64_t num_neighbors) {
  int shift = num_neighbors <= 4 ? 2 : num_neighbors <= 16 ? 1 : 0;
  while (ceil_div(queue_size, kChunkColumnsPerStep << shift) > kMostChunks) ++shift;
  return shift;
}

Plan make_plan(const Work& work) {
  Plan plan = {};
  plan.shape = (work.hopper ? hopper_shape : stream_shape)(work.kernel_type, work.dim, work.pairing,
                                                           work.mean_rows);
  const bool paired = work.pairing == Pairing::kPaired;
  plan.row_blocks = static_cast<int>(ceil_div(work.num_rows, plan.shape.rows_per_block));
  plan.num_tiles = static_cast<int>(ceil_div(work.queue_size, plan.shape.tile_rows));
  plan.chunk_shift = choose_chunk_shift(work.queue_size, work.num_neighbors);
  const int steps_per_chunk = 1 << plan.chunk_shift;

  const int steps_per_tile = plan.shape.tile_rows / kStepColumns;
  const int tiles_per_chunk =
      work.num_neighbors > 0 ? std::max(1, steps_per_chunk / steps_per_tile) : 1;
  // As many blocks run beside each other as registers and shared memory allow.
  const int blocks = std::clamp(work.shared_bytes / (plan.shape.shared_bytes + kReservedBytes), 1,
                                plan.shape.blocks);
  int wanted = choose_splits(plan.row_blocks, plan.num_tiles, work.multiprocessors * blocks);
  wanted = std::max(wanted, splits_for_accuracy(work));
  // No chunk belongs to two splits.
  plan.tiles_per_split = static_cast<int>(
      ceil_div(ceil_div(plan.num_tiles, wanted), tiles_per_chunk) * tiles_per_chunk);
  plan.splits = static_cast<int>(ceil_div(plan.num_tiles, plan.tiles_per_split));

  if (work.num_neighbors > 0) {
    const std::int64_t steps = std::int64_t(plan.num_tiles) * steps_per_tile;
    plan.num_chunks = static_cast<int>(ceil_div(steps, steps_per_chunk) * kChunksPerStep);
    plan.num_filled_chunks = plan.num_chunks;
    // Chunks are filled in order of their first columns.
    while (chunk_column(plan.num_filled_chunks - 1, 0, plan.chunk_shift) >= work.queue_size) {
      --plan.num_filled_chunks;
    }
    plan.candidates_per_block = std::min<std::int64_t>(work.num_neighbors, plan.num_filled_chunks) *
                                kChunkColumnsPerStep * steps_per_chunk;
  }
  plan.finish_blocks = choose_finish_blocks(work, plan.candidates_per_block);

  plan.num_sum_rows = work.num_rows * (paired ? 2 : 1);
  plan.num_mean_rows = work.mean_rows == 0             ? 0
                       : paired && work.mean_rows == 2 ? 2 * work.num_rows
                                                       : work.num_rows;
  std::int64_t bytes = 0;
  const auto take = [&](std::int64_t count) {
    const std::int64_t offset = bytes;
    bytes += ceil_div(count * 4, 256) * 256;
    return offset;
  };
  plan.sums = take(plan.splits * kNumSlots * plan.num_sum_rows);
  plan.means = take(plan.splits * plan.num_mean_rows * work.dim);
  plan.maxima = take(work.num_rows * plan.num_chunks);
  plan.ranks = take(work.ranks ? plan.splits * work.num_rows : 0);
  plan.candidates = take(plan.finish_blocks * plan.candidates_per_block);
  plan.workspace_bytes = bytes;
  return plan;
}

}  // namespace softcl::cuda

#include "pass/plan.h"

#include "isa.h"
#include "pieces.h"

namespace softcl::cpu {

namespace {

// Strips and sums of a block, which the sweep visits once per tile, may take so much of the L2
// cache; strips alone, which are only read, twice that.
constexpr std::int64_t kBlockBytes = 256 << 10;
// Lists of neighbours may take so much per block.
constexpr std::int64_t kListBytes = 16 << 20;
// A split is at least so long, or merging its sums would show.
constexpr std::int64_t kMinSplitRows = 768;
// Weights kept may take so much per thread.
constexpr std::int64_t kKeptBytes = 4400 << 10;
// Fewer rows than that in a block are not worth packing the queue twice.
constexpr std::int64_t kMinKeptRows = 64;

}  // namespace

Plan make_plan(const PassRequest& request, int lanes) {
  Plan plan;
  plan.lanes = lanes;
  plan.num_threads = std::max(1, request.num_threads);
  const std::int64_t D = request.dim, K = request.queue_size, threads = plan.num_threads;
  plan.tile_rows = D <= 256 ? 96 : D <= 1024 ? 48 : 24;

  std::int64_t strip_bytes = 0, list_bytes = 1, block_bytes = 2 * kBlockBytes;
  for (int i = 0; i < request.num_reductions; ++i) {
    const ReductionRequest& r = request.reductions[i];
    strip_bytes += lanes * D * 4 * (r.has_mean ? 2 : 1);
    if (r.has_mean) block_bytes = kBlockBytes;
    list_bytes += lanes * list_capacity(r.num_neighbors, K) * std::int64_t{sizeof(Neighbor)};
  }
  plan.strips = divide_up(request.num_rows, lanes);
  const std::int64_t largest =
      std::max<std::int64_t>(1, std::min(block_bytes / strip_bytes, kListBytes / list_bytes));
  plan.strips_per_block = even_blocks(plan.strips, largest, threads);
  plan.blocks = divide_up(plan.strips, plan.strips_per_block);

  const std::int64_t splits = std::min(best_splits(plan.blocks, threads), K / kMinSplitRows);
  plan.split_rows =
      divide_up(divide_up(K, std::max<std::int64_t>(1, splits)), plan.tile_rows) * plan.tile_rows;
  plan.splits = divide_up(K, plan.split_rows);
  return plan;
}

std::optional<Plan> make_combined_plan(const PassRequest& request, int lanes) {
  if (request.num_reductions != 2) return std::nullopt;
  if (!request.reductions[0].has_mean || !request.reductions[1].has_mean) return std::nullopt;
  Plan plan = make_plan(request, lanes);
  plan.kept_rows = divide_up(request.queue_size, kTileGranularity) * kTileGranularity;
  const std::int64_t strip_bytes = kMaxReductions * plan.kept_rows * lanes * 4;
  const std::int64_t largest = std::min(
      {plan.strips_per_block, kKeptBytes / strip_bytes, divide_up(plan.strips, plan.num_threads)});
  if (largest < 1) return std::nullopt;
  plan.strips_per_block = even_blocks(plan.strips, largest, plan.num_threads);
  plan.blocks = divide_up(plan.strips, plan.strips_per_block);
  plan.split_rows = divide_up(request.queue_size, plan.tile_rows) * plan.tile_rows;
  plan.splits = 1;
  const bool all_work = plan.blocks >= plan.num_threads;
  if (!all_work || plan.strips_per_block * lanes < kMinKeptRows) return std::nullopt;
  return plan;
}

bool can_combine(const PassRequest& request) {
  return make_combined_plan(request, sweep_kernels().lanes).has_value();
}

bool keeps_weights(std::int64_t num_rows, std::int64_t queue_size, std::int64_t dim,
                   int num_threads) {
  PassRequest request;
  request.num_rows = num_rows;
  request.queue_size = queue_size;
  request.dim = dim;
  request.num_threads = num_threads;
  request.num_reductions = 2;
  for (ReductionRequest& r : request.reductions) r.has_softmax = r.has_mean = true;
  return can_combine(request);
}

}  // namespace softcl::cpu

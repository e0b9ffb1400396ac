// One pass over the queue for all rows: how the work is cut, run and put together again.
//
// Rows are cut into blocks whose strips and sums fit the L2 cache. Many blocks: one piece of work
// is a block and the whole queue. Few blocks: the queue is cut too, into equal splits; every split
// leaves its sums, and they are merged in ascending order. The cut depends on the sizes and the
// number of threads only, and not on which thread runs what: same inputs, same number of threads,
// same bits.
//
// Short queues: a caller that needs one linear combination of both means, with shares that follow
// from the sums, gets it for one product in place of two. A block's softmax weights are kept, in at
// most kKeptBytes a thread, and the block visits the queue once more.

#pragma once

#include <cstdint>
#include <functional>

#include "pass/sweep.h"
#include "rows.h"
#include "softcl/element_type.h"

namespace softcl::cpu {

/// What is wanted of one softmax reduction.
struct ReductionRequest {
  const Rows* rows = nullptr;
  const float* positive = nullptr;  // (strips * lanes,) or null, see Reduction
  double temperature = 1.0;
  bool has_softmax = false;
  bool has_mean = false;
  bool has_alignment = false;  // of the second reduction with the first
  std::int64_t num_neighbors = 0;
};

struct PassRequest {
  const void* queue = nullptr;  // (K, D)
  ElementType queue_type = ElementType::kFloat32;
  std::int64_t num_rows = 0;    // N
  std::int64_t queue_size = 0;  // K
  std::int64_t dim = 0;         // D
  int num_threads = 1;
  int num_reductions = 0;
  ReductionRequest reductions[kMaxReductions];
  const std::int64_t* excluded = nullptr;  // (strips * lanes,) or null, see SweepTask
};

/// log2(e) / temperature as the sweep has it, in fp32.
float sweep_scale(double temperature);

/// The temperature of which that is exact. Whatever is compared with a pass's sums uses this one:
/// the rounding, 6e-8 of a logit of 10, would show where a label or a share of the positive is a
/// small difference.
double sweep_temperature(double temperature);

/// The merged result of one reduction for the rows of one strip.
struct StripResult {
  double lse[kMaxLanes];
  double entropy[kMaxLanes];
  std::int64_t rank[kMaxLanes];
  double offset[kMaxLanes], sum[kMaxLanes];  // sum 2^offset = e^lse
  double alignment[kMaxLanes];    // E[v' . Q] of the first reduction's rows v', if has_alignment
  double* mean = nullptr;         // (D, lanes) if has_mean
  Neighbor* neighbors = nullptr;  // (lanes, neighbor_stride), best first
  std::int64_t neighbor_stride = 0;
  std::int64_t num_neighbors[kMaxLanes];  // found; fewer than wanted only if rows are not finite
};

/// Called once per strip with a result per reduction, on thread [0, num_threads); `finite`: every
/// queue row is. May overwrite the results. Must not throw.
using FinishStrip =
    std::function<void(std::int64_t strip, StripResult* results, bool finite, int thread)>;

void run_pass(const PassRequest& request, const FinishStrip& finish);

/// Called once per strip when the sums are known: writes the share of each reduction's mean in the
/// combination. The results have no means; the second has an alignment.
using WeighStrip = std::function<void(std::int64_t strip, const StripResult* results,
                                      double (*shares)[kMaxLanes])>;

/// Whether run_combined_pass serves this request better: two reductions with means, and a queue
/// short enough for their weights to be kept.
bool can_combine(const PassRequest& request);

/// The same for what `bench/` counts: two reductions with means over a queue of these sizes.
bool keeps_weights(std::int64_t num_rows, std::int64_t queue_size, std::int64_t dim,
                   int num_threads);

/// The same as run_pass, but that results[0].mean is share_0 mean_0 + share_1 mean_1, and
/// results[1] has none.
void run_combined_pass(const PassRequest& request, const WeighStrip& weigh,
                       const FinishStrip& finish);

}  // namespace softcl::cpu

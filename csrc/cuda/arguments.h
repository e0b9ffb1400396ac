// Checks of the arguments, and what both operators make of them.

#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>

#include "launch.h"
#include "plan.h"
#include "select.h"
#include "softcl/checks.h"
#include "softcl/cuda.h"

namespace softcl::cuda {

inline constexpr double kLog2E = 1.44269504088896340736;

// 2^x of unit rows stays in fp32's range for |x| <= log2(e) / temperature <= 63.
inline constexpr double kColdestWithoutMaximum = 0.023;

inline constexpr std::int64_t kMostRows = std::int64_t(1) << 30;

inline void check_arguments(const Call& call, int device) {
  check_type("vector_type", call.vector_type);
  check_type("queue_type", call.queue_type);
  check_call(call, {kMostRows, most_dimensions(call.vector_type, call.queue_type, device),
                    kMostNeighbors});
  if (call.excluded != nullptr) {
    throw std::invalid_argument("excluded is given: these kernels leave no row out");
  }
}

inline void check_launch(const Launch& launch, std::int64_t workspace_bytes) {
  check_pointer("workspace", launch.workspace);
  check_count("workspace_bytes", launch.workspace_bytes, workspace_bytes,
              std::numeric_limits<std::int64_t>::max());
}

inline bool is_aligned(const void* pointer, int dim) {
  return dim % 8 == 0 && reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
}

/// What follows from the plan alone. rows, scale and the flags are the operator's to fill in.
inline StreamParams stream_params(const Work& work, const Plan& plan, void* workspace) {
  auto* bytes = static_cast<char*>(workspace);
  StreamParams p = {};
  p.sums = reinterpret_cast<float*>(bytes + plan.sums);
  p.means = reinterpret_cast<float*>(bytes + plan.means);
  p.maxima = work.num_neighbors > 0 ? reinterpret_cast<float*>(bytes + plan.maxima) : nullptr;
  p.ranks = work.ranks ? reinterpret_cast<std::int32_t*>(bytes + plan.ranks) : nullptr;
  p.has_maxima = p.maxima != nullptr;
  p.has_ranks = p.ranks != nullptr;
  p.num_rows = work.num_rows;
  p.queue_size = work.queue_size;
  p.num_chunks = plan.num_chunks;
  p.num_sum_rows = plan.num_sum_rows;
  p.num_mean_rows = plan.num_mean_rows;
  p.dim = work.dim;
  p.num_tiles = plan.num_tiles;
  p.tiles_per_split = plan.tiles_per_split;
  p.kernel_type = work.kernel_type;
  p.chunk_shift = plan.chunk_shift;
  return p;
}

/// The streaming kernel that the plan is for.
inline void launch_planned_stream(const StreamParams& params, const Work& work, const Plan& plan,
                                  void* stream) {
  (work.hopper ? launch_stream_hopper : launch_stream)(params, work.pairing, work.mean_rows,
                                                       plan.row_blocks, plan.splits, stream);
}

}  // namespace softcl::cuda

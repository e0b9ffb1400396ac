// How a pass cuts rows and queue into work: see queue_pass.h.

#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "pass/queue_pass.h"

namespace softcl::cpu {

struct Plan {
  int lanes;
  std::int64_t strips;  // of all rows
  std::int64_t strips_per_block;
  std::int64_t blocks;
  std::int64_t tile_rows;
  std::int64_t split_rows;  // queue rows in a split, a multiple of tile_rows
  std::int64_t splits;
  std::int64_t num_threads;
  std::int64_t kept_rows = 0;  // queue rows whose weights are kept: all, or none

  bool is_split() const { return splits > 1; }
  bool keeps_weights() const { return kept_rows > 0; }
  std::int64_t block_strips(std::int64_t block) const {
    return std::min(strips_per_block, strips - block * strips_per_block);
  }
};

Plan make_plan(const PassRequest& request, int lanes);

/// Blocks as large as the weights allow, and no splits; none where that is not worth it.
std::optional<Plan> make_combined_plan(const PassRequest& request, int lanes);

}  // namespace softcl::cpu

// How work is cut into pieces: blocks of rows, and splits of the queue where blocks are few.

#pragma once

#include <algorithm>
#include <cstdint>

namespace softcl::cpu {

/// Pieces of work per thread when the queue is split: a thread that is held up does less.
inline constexpr std::int64_t kPiecesPerThread = 2;

inline std::int64_t divide_up(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

/// Strips per block, at most `largest`: blocks of nearly equal size, an equal number for every
/// thread if there are enough.
inline std::int64_t even_blocks(std::int64_t strips, std::int64_t largest, std::int64_t threads) {
  std::int64_t blocks = divide_up(strips, std::max<std::int64_t>(1, largest));
  if (blocks > threads) blocks = divide_up(blocks, threads) * threads;
  return divide_up(strips, std::min(blocks, strips));
}

/// How often to split the queue: a few pieces of work for every thread, and few threads idle while
/// the last pieces run.
inline std::int64_t best_splits(std::int64_t blocks, std::int64_t threads) {
  if (threads == 1 || blocks >= threads * kPiecesPerThread) return 1;
  const std::int64_t least = divide_up(threads * kPiecesPerThread, blocks);
  std::int64_t best = least;
  double best_use = 0.0;
  for (std::int64_t splits = least; splits <= 2 * least; ++splits) {
    const std::int64_t pieces = blocks * splits;
    const double use = double(pieces) / double(divide_up(pieces, threads) * threads);
    if (use > best_use) best = splits, best_use = use;
  }
  return best;
}

}  // namespace softcl::cpu

// From the shapes of a call to the launch of the streaming kernel: splits, chunks, workspace.
//
// Everything here depends on shapes, types and the kind of device alone, so the same call runs the
// same way every time.

#pragma once

#include <cstdint>

#include "stream.h"
#include "stream_hopper.h"

namespace softcl::cuda {

/// What the kernels have to do for one call.
struct Work {
  std::int64_t num_rows;    // N
  std::int64_t queue_size;  // K
  int dim;                  // D
  Pairing pairing;
  int mean_rows;               // see stream_shape
  std::int64_t num_neighbors;  // k
  bool ranks;
  int multiprocessors;
  ElementType kernel_type;
  bool hopper;       // see can_stream_hopper
  int shared_bytes;  // of a multiprocessor
};

inline constexpr int kReservedBytes = 1024;  // of shared memory, for each block

struct Plan {
  StreamShape shape;
  int row_blocks;
  int num_tiles;
  int splits;
  int tiles_per_split;
  int chunk_shift;        // a chunk has 2^chunk_shift steps
  int num_chunks;         // places of a row's maxima; 0 without neighbours
  int num_filled_chunks;  // those that hold any column, the first ones
  int finish_blocks;
  std::int64_t num_sum_rows;
  std::int64_t num_mean_rows;
  // Byte offsets in the workspace.
  std::int64_t sums, means, maxima, ranks, candidates;
  std::int64_t candidates_per_block;
  std::int64_t workspace_bytes;
};

inline constexpr int kMostSplits = 64;

Plan make_plan(const Work& work);

/// Splits of the queue that keep `slots` resident blocks evenly busy.
int choose_splits(std::int64_t row_blocks, int num_tiles, int slots);

/// Short chunks mean few columns to multiply again for each neighbour, long ones few maxima to
/// write and to scan.
int choose_chunk_shift(std::int64_t queue_size, std::int64_t num_neighbors);

}  // namespace softcl::cuda

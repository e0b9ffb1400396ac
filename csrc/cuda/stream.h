// The streaming kernel's interface: one visit of the queue, partial sums out. See stream_kernel.h.
//
// With weights 2^x_j, x_j = scale v.Q_j, one row's partial sums over a piece of the queue are
//
//     kWeights         sum_j 2^x_j
//     kMeanWeights     sum_j w_j                 w_j: 2^x_j as the second product takes it
//     kCosines         sum_j 2^x_j v.Q_j         for the entropy
//     kStudentCosines  sum_j 2^x_j z.Q_j         of a teacher's row, z the student's: z.mu in fp32
//     mean             sum_j w_j Q_j
//
// and those of disjoint pieces add up. In bf16 2^x needs no running maximum while |x| <= 63, that
// is at temperatures from 0.023 on, for unit rows. fp16 has no such range: with its weights all
// sums are relative to 2^kMaximum, and kCosines is sum_j 2^(x_j - maximum) (x_j - maximum).
//
// The mean is divided by the sum of the very weights that made it, so that their rounding moves it
// only by the spread of the Q_j, and by nothing where they are alike. A bf16 weight (2^-9) keeps
// the gradient's 1e-3 where the positive's label dominates it and the queue is long; a mean by
// itself, or the difference of two, takes fp16 weights (2^-12), and so does a short queue.

#pragma once

#include <cstdint>

#include "layout.h"
#include "softcl/element_type.h"

namespace softcl::cuda {

enum class Pairing : int {
  kSingle,  // rows of one kind: the student's alone, or the vectors of queue_statistics
  kPaired,  // of every sample the student's and the teacher's row
};

struct StreamParams {
  const void* rows[2];      // (N, D): query or vectors, key; of row_type
  const void* queue;        // (K, D), of queue_type
  float* sums;              // (splits, kNumSlots, num_sum_rows) out: N students, then N teachers
  float* means;             // (splits, num_mean_rows, D) out
  float* maxima;            // (N, num_chunks) out, largest v.Q_j of each chunk; null: not wanted
  std::int32_t* ranks;      // (splits, N) out, how many z.Q_j exceed z.t; null: not wanted
  std::int64_t num_rows;    // N
  std::int64_t queue_size;  // K
  std::int64_t num_chunks;
  std::int64_t num_sum_rows;  // N, or 2 N if paired
  std::int64_t num_mean_rows;
  int dim;  // D
  int num_tiles;
  int tiles_per_split;
  int chunk_shift;  // see layout.h
  ElementType row_type, queue_type, kernel_type;
  float scale[2];              // log2(e) / temperature of rows[0] and rows[1]
  bool aligned;                // rows and queue rows begin at multiples of 16 bytes
  bool normalize;              // the rows are divided by their norms first
  bool softmax;                // of single rows, or of the teacher's: sums are wanted
  bool entropy;                // of single rows; a teacher's softmax always has it
  bool has_maxima, has_ranks;  // they are wanted: fewer registers than the pointers would take
};

/// How one variant of the kernel cuts its work.
struct StreamShape {
  int rows_per_block;  // samples
  int tile_rows;       // queue rows per tile
  int threads;
  int blocks;  // of a multiprocessor
  int shared_bytes;
};

/// The kernel for rows and queue of these types: kBFloat16, whose weights are 2^x in bf16, for
/// calls that are not `exact`; kFloat16, which takes bf16 as fp16, for all others of 16 bits;
/// kFloat32, which takes every number apart, where there is an fp32.
inline ElementType kernel_type(ElementType row_type, ElementType queue_type, bool exact) {
  if (row_type == ElementType::kFloat32 || queue_type == ElementType::kFloat32) {
    return ElementType::kFloat32;
  }
  const bool is_bf16 = row_type == ElementType::kBFloat16 && queue_type == row_type;
  return is_bf16 && !exact ? ElementType::kBFloat16 : ElementType::kFloat16;
}

/// Whether that kernel's sums are relative to a running maximum.
inline bool has_running_maximum(ElementType kernel_type) {
  return kernel_type != ElementType::kBFloat16;
}

/// `mean_rows`: of every sample, how many rows get a mean: 0, 1 (the student's), or 2 (both; of
/// single rows, all).
StreamShape stream_shape(ElementType kernel_type, int dim, Pairing pairing, int mean_rows);

/// Launches on the current device. grid: (row blocks, splits).
void launch_stream(const StreamParams& params, Pairing pairing, int mean_rows, int row_blocks,
                   int splits, void* stream);

inline constexpr int kMostDimensions = 256;

/// Queue rows of a split with means, of 16-bit numbers. Tensor cores cut off what they add to a
/// sum: of 32,768 rows around a few directions that made the gradient's error 1.1e-3, of
/// these 6.0e-4 (emulated, D = 128; of random rows 0.5e-4).
inline constexpr int kLongestSplit = 1 << 14;

/// Queue rows of a split, of numbers in two parts with means. A mean is a sum in fp32 to which 16
/// rows at a time are added, and every addition rounds: of 8192 rows around a few directions it
/// made the gradient's error 3.7e-6, of these 1.2e-6 (emulated, D = 128; of random rows 0.2e-6).
inline constexpr int kLongestPartsSplit = 2048;

}  // namespace softcl::cuda

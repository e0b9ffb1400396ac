// The interface of the operator's kernels: raw pointers and sizes, no framework.
//
// z, t, v: rows of query, key, vectors.  Q: rows of the queue.  Notation as in
// softcl/ops/reference.py. All arrays are contiguous and row-major; no output overlaps an input or
// another output.

#pragma once

#include <cstdint>

#include "softcl/element_type.h"
#include "softcl/labels.h"

namespace softcl {

/// Statistics of softmax_j(v . Q_j / temperature) for every row v, and its k nearest queue rows.
/// A null output is not wanted; without `mean` the second product over the queue is not made, and
/// without `lse`, `mean` and `entropy` no exponentials are taken.
struct QueueStatisticsParams {
  const void* vectors = nullptr;  // (N, D)
  const void* queue = nullptr;    // (K, D)
  ElementType vector_type = ElementType::kFloat32;
  ElementType queue_type = ElementType::kFloat32;
  std::int64_t num_vectors = 0;    // N >= 1
  std::int64_t queue_size = 0;     // K >= 1
  std::int64_t dim = 0;            // D >= 1
  std::int64_t num_neighbors = 0;  // k, 0 <= k <= K
  double temperature = 0.0;        // > 0
  int num_threads = 1;
  // (N,) a queue row that takes no part in this row's statistics, or -1; null: none. k < K then.
  const std::int64_t* excluded = nullptr;

  float* lse = nullptr;                      // (N,)
  float* mean = nullptr;                     // (N, D)
  float* entropy = nullptr;                  // (N,) nats
  float* neighbor_logits = nullptr;          // (N, k) descending, equal ones by lowest queue row
  std::int64_t* neighbor_indices = nullptr;  // (N, k)
};

/// The loss of a label rule against the student's softmax, and its gradient, per row.
/// A null output is not wanted; without `dquery` the student's second product is not made.
struct SoftContrastiveParams {
  const void* query = nullptr;  // (N, D), of vector_type
  const void* key = nullptr;    // (N, D), of vector_type
  const void* queue = nullptr;  // (K, D)
  ElementType vector_type = ElementType::kFloat32;
  ElementType queue_type = ElementType::kFloat32;
  std::int64_t num_queries = 0;                 // N >= 1
  std::int64_t queue_size = 0;                  // K >= 1
  std::int64_t dim = 0;                         // D >= 1
  LabelRule rule = {LabelKind::kHard, 0, 1.0};  // 0 <= n <= K
  double temperature = 0.0;                     // > 0
  double teacher_temperature = 0.0;             // > 0
  bool positive = true;                         // the positive takes part in the student's softmax
  bool normalize = false;  // query and key are divided by max(norm, 1e-12), rounded to vector_type
  int num_threads = 1;
  // (N,) a queue row that takes no part for this row, neither in the student's softmax nor in the
  // teacher's, or -1; null: none. n < K then. The CPU kernels alone know it.
  const std::int64_t* excluded = nullptr;

  float* loss = nullptr;                     // (N,)
  float* dquery = nullptr;                   // (N, D)
  float* confidence = nullptr;               // (N,)
  float* entropy = nullptr;                  // (N,) nats
  std::int64_t* positive_rank = nullptr;     // (N,) queue rows with z . Q_j > z . t
  std::int64_t* neighbor_indices = nullptr;  // (N, n)
};

namespace cpu {

// Both throw std::invalid_argument that names the argument and its value. A row that is not finite
// gives NaN in its own results, a queue row that is not finite gives NaN everywhere.
// Same inputs, same number of threads: same bits.
void queue_statistics(const QueueStatisticsParams& params);
void soft_contrastive(const SoftContrastiveParams& params);

}  // namespace cpu

}  // namespace softcl

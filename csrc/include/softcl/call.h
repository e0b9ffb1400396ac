// The interface of the operator's kernels: one call is one record of raw pointers and sizes.
//
// z, t: rows of query and key.  Q: rows of the queue.  Notation as in softcl/ops/reference.py. All
// arrays are contiguous and row-major; no output overlaps an input or another output. A null
// output is not wanted. The module's keyword arguments are the names of these fields, see
// call_fields.h.

#pragma once

#include <cstdint>

#include "softcl/element_type.h"
#include "softcl/labels.h"

namespace softcl {

/// With a key: the loss of a label rule against the student's softmax, and its gradient, per row.
/// Without `dquery` the student's second product is not made.
///
/// Without: the statistics of softmax_j(z . Q_j / temperature) of every row, and its k nearest
/// queue rows, k = rule.num_neighbors; the rest of the rule is not read, nor is what says "loss".
/// Without `mean` the second product over the queue is not made, and without `lse`, `mean` and
/// `entropy` no exponentials are taken.
struct Call {
  const void* query = nullptr;  // (N, D), of vector_type
  const void* key = nullptr;    // (N, D), of vector_type
  const void* queue = nullptr;  // (K, D)
  ElementType vector_type = ElementType::kFloat32;
  ElementType queue_type = ElementType::kFloat32;
  std::int64_t num_queries = 0;      // N >= 1
  std::int64_t queue_size = 0;       // K >= 1
  std::int64_t dim = 0;              // D >= 1
  LabelRule rule;                    // 0 <= n <= K
  double temperature = 0.0;          // in [kLeastTemperature, kMostTemperature] of checks.h
  double teacher_temperature = 0.0;  // loss: likewise
  bool positive = true;              // loss: the positive takes part in the student's softmax
  // Loss: query and key are divided by max(norm, 1e-12) and rounded to vector_type. A row of norm
  // 1e-12 or less has no direction: its gradient is 0.
  bool normalize = false;
  int num_threads = 1;  // of the CPU kernels
  // (N,) a queue row that takes no part for this row, neither in the student's softmax nor in the
  // teacher's, or -1; null: none. n < K then. The CPU kernels alone know it.
  const std::int64_t* excluded = nullptr;

  float* loss = nullptr;                     // (N,) loss
  float* dquery = nullptr;                   // (N, D) loss
  float* confidence = nullptr;               // (N,) loss, of rules that need the softmax
  float* entropy = nullptr;                  // (N,) nats; loss: as confidence
  std::int64_t* positive_rank = nullptr;     // (N,) loss: queue rows with z . Q_j > z . t
  std::int64_t* neighbor_indices = nullptr;  // (N, n) best first, equal ones by lowest queue row
  float* lse = nullptr;                      // (N,) statistics
  float* mean = nullptr;                     // (N, D) statistics
  float* neighbor_logits = nullptr;          // (N, n) statistics
};

namespace cpu {

void queue_statistics(const Call& call);
void soft_contrastive(const Call& call);

/// Throws std::invalid_argument that names the argument and its value. A row that is not finite
/// gives NaN in its own results, a queue row that is not finite gives NaN everywhere.
/// Same inputs, same number of threads: same bits.
inline void run(const Call& call) {
  call.key == nullptr ? queue_statistics(call) : soft_contrastive(call);
}

}  // namespace cpu

}  // namespace softcl

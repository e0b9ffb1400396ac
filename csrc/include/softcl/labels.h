// The label rules: what share of a row's label mass goes where. Host and device, no torch.
//
// Every rule's label mean is one weighted average over the positive t, the teacher's mean mu and
// the neighbours Q_j, j in N_n (the n queue rows nearest to t):
//
//     m = (p t + a mu + sum_j w_j Q_j) / (p + a + sum_j w_j)
//
//     rule                 p     a       w_j                   with
//     hard                 1     0       -
//     relational           0     1       -
//     mixed                w     1 - w   -
//     adaptive_soft        1     c n     min(0, 1 - c n q_j)   q_j the teacher's softmax
//     adaptive_neighbors   1     0       c                     c   its confidence
//     neighbors            1     0       1
//
// adaptive_soft: labels min(1, a q_j) differ from a q_j only where a q_j > 1, that is for fewer
// than n rows, all among the n nearest; w_j takes their excess away.

#pragma once

#include <cstdint>

#if defined(__CUDACC__)
  #define SOFTCL_HOST_DEVICE __host__ __device__
#else
  #define SOFTCL_HOST_DEVICE
#endif

namespace softcl {

/// The values are those that Python passes.
enum class LabelKind : std::int32_t {
  kHard = 0,
  kRelational = 1,
  kMixed = 2,
  kAdaptiveSoft = 3,
  kAdaptiveNeighbors = 4,
  kNeighbors = 5,
};

inline constexpr std::int32_t kNumLabelKinds = 6;

struct LabelRule {
  LabelKind kind;
  std::int64_t num_neighbors;  // n; 0 where the rule has none
  double positive_weight;      // w of `mixed`
};

/// The rule defines a confidence and an entropy: the teacher's softmax sums are wanted.
SOFTCL_HOST_DEVICE inline bool has_softmax(const LabelRule& rule) {
  return rule.kind != LabelKind::kHard && rule.kind != LabelKind::kNeighbors;
}

/// m depends on the teacher's mean mu: a second product over the queue.
SOFTCL_HOST_DEVICE inline bool reads_mean(const LabelRule& rule) {
  return rule.kind == LabelKind::kRelational || rule.kind == LabelKind::kMixed ||
         (rule.kind == LabelKind::kAdaptiveSoft && rule.num_neighbors > 0);
}

/// m depends on the teacher's softmax sums, through mu, c or q_j.
SOFTCL_HOST_DEVICE inline bool reads_softmax(const LabelRule& rule) {
  return reads_mean(rule) || (rule.kind == LabelKind::kAdaptiveNeighbors && rule.num_neighbors > 0);
}

/// c = clamp(1 - H / log K, 0, 1); a queue of one row says nothing about relations: 0.
template <typename T>
SOFTCL_HOST_DEVICE T label_confidence(T entropy, T log_queue_size) {
  if (!(log_queue_size > T(0))) return T(0);
  const T confidence = T(1) - entropy / log_queue_size;
  // In this order NaN passes through.
  return confidence < T(0) ? T(0) : confidence > T(1) ? T(1) : confidence;
}

/// p, before the division by the sum of all weights.
template <typename T>
SOFTCL_HOST_DEVICE T label_positive(const LabelRule& rule) {
  if (rule.kind == LabelKind::kRelational) return T(0);
  return rule.kind == LabelKind::kMixed ? T(rule.positive_weight) : T(1);
}

/// a, before the division by the sum of all weights.
template <typename T>
SOFTCL_HOST_DEVICE T label_mean_weight(const LabelRule& rule, T confidence) {
  switch (rule.kind) {
    case LabelKind::kRelational:
      return T(1);
    case LabelKind::kMixed:
      return T(1) - T(rule.positive_weight);
    case LabelKind::kAdaptiveSoft:
      return confidence * T(rule.num_neighbors);
    default:
      return T(0);
  }
}

/// w_j of a neighbour whose teacher softmax is `probability`, before the division.
template <typename T>
SOFTCL_HOST_DEVICE T label_neighbor(const LabelRule& rule, T confidence, T probability) {
  switch (rule.kind) {
    case LabelKind::kAdaptiveSoft: {
      const T excess = T(1) - confidence * T(rule.num_neighbors) * probability;
      return excess > T(0) ? T(0) : excess;
    }
    case LabelKind::kAdaptiveNeighbors:
      return confidence;
    case LabelKind::kNeighbors:
      return T(1);
    default:
      return T(0);
  }
}

}  // namespace softcl

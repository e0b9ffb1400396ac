// The label rule: which share of a row's label mass goes where. Host and device, no torch.
//
// A rule is numbers. The label mean is one weighted average over the positive t, the teacher's mean
// mu and the n queue rows Q_j nearest to t:
//
//     m = [(p + a (1 - r)) t + a r mu + sum_j w_j Q_j] / [p + a + sum_j w_j]
//
//     p    positive
//     a    mean + confident_mean c, c the teacher's confidence
//     r    1; with a teacher_positive the queue's share of the teacher's softmax when the positive
//          enters it with logit x0 = 0 (kZero) or t.t / teacher_temperature (kSelf)
//     w_j  neighbor + confident_neighbor c; with clip min(0, p - a r q_j), q the teacher's softmax
//          over the queue
//
// clip: the labels of the nearest rows are min(p, a r q_j). No other label is above p if n >= a /
// p: a r q_j > p holds for fewer than a / p rows, and those are the nearest.

#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
  #define SOFTCL_HOST_DEVICE __host__ __device__
#else
  #define SOFTCL_HOST_DEVICE
#endif

namespace softcl {

/// The values are those that Python passes.
enum class TeacherPositive : std::int32_t { kNone = 0, kZero = 1, kSelf = 2 };

struct LabelRule {
  double positive = 1.0;
  double mean = 0.0;
  double confident_mean = 0.0;
  double neighbor = 0.0;
  double confident_neighbor = 0.0;
  bool clip = false;
  std::int64_t num_neighbors = 0;  // n
  TeacherPositive teacher_positive = TeacherPositive::kNone;
};

/// m depends on the teacher's mean mu: a second product over the queue.
SOFTCL_HOST_DEVICE inline bool needs_mean(const LabelRule& rule) {
  return rule.mean > 0.0 || rule.confident_mean > 0.0;
}

/// m depends on the teacher's softmax; entropy and confidence are results of such rules alone.
SOFTCL_HOST_DEVICE inline bool needs_softmax(const LabelRule& rule) {
  return needs_mean(rule) || (rule.confident_neighbor > 0.0 && rule.num_neighbors > 0);
}

/// m depends on the neighbours.
SOFTCL_HOST_DEVICE inline bool adds_neighbors(const LabelRule& rule) {
  return rule.num_neighbors > 0 &&
         (rule.neighbor > 0.0 || rule.confident_neighbor > 0.0 || (rule.clip && needs_mean(rule)));
}

/// c = clamp(1 - H / log K, 0, 1); a queue of one row says nothing about relations: 0.
SOFTCL_HOST_DEVICE inline double label_confidence(double entropy, double log_queue_size) {
  if (!(log_queue_size > 0.0)) return 0.0;
  const double confidence = 1.0 - entropy / log_queue_size;
  // In this order NaN passes through.
  return confidence < 0.0 ? 0.0 : confidence > 1.0 ? 1.0 : confidence;
}

/// The weights before the division by their sum, without the neighbours'.
struct LabelWeights {
  double positive;  // p + a (1 - r)
  double mean;      // a r
};

/// margin: LSE_t - x0; read where the rule has a teacher_positive.
SOFTCL_HOST_DEVICE inline LabelWeights label_weights(const LabelRule& rule, double confidence,
                                                     double margin) {
  const double mean = needs_mean(rule) ? rule.mean + rule.confident_mean * confidence : 0.0;
  if (rule.teacher_positive == TeacherPositive::kNone) return {rule.positive, mean};
  // Each share by itself: their difference from 1 would lose the smaller one.
  return {rule.positive + mean / (1.0 + exp(margin)), mean / (1.0 + exp(-margin))};
}

/// w_j of a neighbour whose teacher softmax is `probability`, which clip alone reads.
SOFTCL_HOST_DEVICE inline double neighbor_weight(const LabelRule& rule, const LabelWeights& weights,
                                                 double confidence, double probability) {
  if (!rule.clip) return rule.neighbor + rule.confident_neighbor * confidence;
  const double excess = rule.positive - weights.mean * probability;
  return excess > 0.0 ? 0.0 : excess;
}

}  // namespace softcl

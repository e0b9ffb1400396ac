// The splits of one row put together again, in ascending order, and sums over a block of threads.

#pragma once

#include "layout.h"
#include "select.h"
#include "stream.h"

namespace softcl::cuda {

inline constexpr int kWarpsPerRow = kFinishThreads / kWarp;
inline constexpr int kElements = kMostDimensions / kFinishThreads;  // of a row, per thread
inline constexpr int kMostSums = 2;
inline constexpr int kReduceBytes = kWarpsPerRow * kMostSums * 8;
inline constexpr double kLn2 = 0.693147180559945309417;

/// Each x[i] summed over the block, the same bits in all threads. scratch: kReduceBytes of shared
/// memory.
template <int kCount>
SOFTCL_DEVICE void block_sum(double (&x)[kCount], std::uint32_t scratch) {
  static_assert(kCount <= kMostSums, "");
  SOFTCL_UNROLL
  for (int i = 0; i < kCount; ++i) {
    SOFTCL_UNROLL
    for (int mask = kWarp / 2; mask > 0; mask /= 2) x[i] += ptx::shuffle_xor(x[i], mask);
    if (threadIdx.x % kWarp == 0) {
      ptx::store_shared(scratch + (threadIdx.x / kWarp * kCount + i) * 8, x[i]);
    }
  }
  ptx::sync_threads();
  SOFTCL_UNROLL
  for (int i = 0; i < kCount; ++i) {
    x[i] = 0.0;
    for (int w = 0; w < kWarpsPerRow; ++w) {
      x[i] += ptx::load_shared<double>(scratch + (w * kCount + i) * 8);
    }
  }
  ptx::sync_threads();  // the next sum writes there
}

/// This thread's elements d = threadIdx.x + i kFinishThreads of row n, in fp32.
SOFTCL_DEVICE void load_elements(float (&x)[kElements], const void* rows, ElementType type,
                                 std::int64_t n, int dim) {
  SOFTCL_UNROLL
  for (int i = 0; i < kElements; ++i) {
    const int d = threadIdx.x + i * kFinishThreads;
    x[i] = d < dim ? element_at(rows, type, n * dim + d) : 0.0f;
  }
}

/// x becomes the unit row, of its type, that the streaming kernel saw; returns its inverse norm.
SOFTCL_DEVICE double normalize(float (&x)[kElements], ElementType type, std::uint32_t scratch) {
  double squares[1] = {};
  SOFTCL_UNROLL
  for (int i = 0; i < kElements; ++i) squares[0] += static_cast<double>(x[i]) * x[i];
  block_sum(squares, scratch);
  const double inverse = inverse_norm(squares[0]);
  SOFTCL_UNROLL
  for (int i = 0; i < kElements; ++i) x[i] = unit_element(type, x[i], inverse);
  return inverse;
}

/// Where the streaming kernel left its sums.
struct Partial {
  const float* sums;   // (splits, kNumSlots, num_sum_rows)
  const float* means;  // (splits, num_mean_rows, D)
  std::int64_t num_sum_rows;
  std::int64_t num_mean_rows;
  int splits;
  int dim;
  bool running_maximum;

  SOFTCL_DEVICE double slot(int split, SumSlot s, std::int64_t row) const {
    return ptx::load_global(sums + (std::int64_t(split) * kNumSlots + s) * num_sum_rows + row);
  }
};

/// The merged softmax of one row.
struct Merged {
  double maximum;  // in base 2; 0 without a running maximum
  double log_sum;  // log2 sum_j 2^x_j
  double entropy;  // nats
  double student;  // sum_j p_j z.Q_j, of a teacher's row
};

SOFTCL_DEVICE double carry_of(const Partial& p, int split, std::int64_t row, double maximum) {
  return p.running_maximum ? exp2(p.slot(split, kMaximum, row) - maximum) : 1.0;
}

SOFTCL_DEVICE Merged merge_sums(const Partial& p, std::int64_t row, double scale, bool entropy,
                                bool student) {
  Merged m = {};
  if (p.running_maximum) {
    m.maximum = p.slot(0, kMaximum, row);
    for (int s = 1; s < p.splits; ++s) m.maximum = fmax(m.maximum, p.slot(s, kMaximum, row));
  }
  double weights = 0.0, cosines = 0.0, products = 0.0;
  for (int s = 0; s < p.splits; ++s) {
    const double carry = carry_of(p, s, row, m.maximum);
    const double weight = p.slot(s, kWeights, row);
    weights += weight * carry;
    if (entropy) {
      double cosine = p.slot(s, kCosines, row);
      if (p.running_maximum) cosine += (p.slot(s, kMaximum, row) - m.maximum) * weight;
      cosines += cosine * carry;
    }
    if (student) products += p.slot(s, kStudentCosines, row) * carry;
  }
  const double log_weights = log2(weights);
  m.log_sum = log_weights + m.maximum;
  m.entropy = (log_weights - cosines / weights * (p.running_maximum ? 1.0 : scale)) * kLn2;
  m.student = products / weights;
  return m;
}

/// This thread's elements of sum_j p_j Q_j.
SOFTCL_DEVICE void merge_mean(float (&mean)[kElements], const Partial& p, std::int64_t row,
                              double maximum) {
  double weights = 0.0, sums[kElements] = {};
  for (int s = 0; s < p.splits; ++s) {
    const double carry = carry_of(p, s, row, maximum);
    weights += p.slot(s, kMeanWeights, row) * carry;
    SOFTCL_UNROLL
    for (int i = 0; i < kElements; ++i) {
      const int d = threadIdx.x + i * kFinishThreads;
      if (d >= p.dim) continue;
      sums[i] += ptx::load_global(p.means + (s * p.num_mean_rows + row) * p.dim + d) * carry;
    }
  }
  SOFTCL_UNROLL
  for (int i = 0; i < kElements; ++i) mean[i] = static_cast<float>(sums[i] / weights);
}

}  // namespace softcl::cuda

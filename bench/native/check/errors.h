// How far results are from the reference, and how far they may be.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "check/reference.h"

namespace softcl::check {

// As in softcl/testing.py; the gradient of inputs in two parts as tests/cuda_parts.py has it for
// clipped labels, the hardest: 9.6e-6, measured with sums cut off as tensor cores do.
inline constexpr double kLossTolerance = 2e-6, kEntropyTolerance = 1e-5, kCosineTolerance = 2e-6;
inline constexpr double kHalfGradientTolerance = 1e-3, kPartsGradientTolerance = 1.2e-5;

/// Of a loss or a log-sum-exp. A tensor core may cut a bit off its sum with every eight products,
/// and a softmax that one queue row dominates does not average that away: half a bit each. Inputs
/// in two parts are summed more carefully.
inline double loss_tolerance(std::int64_t dim, bool in_parts, double temperature) {
  return kLossTolerance + (in_parts ? 0.0 : dim / 8 * 0x1p-25 / temperature);
}

/// The largest error of each result, as a fraction of its tolerance.
using Errors = std::map<std::string, double>;

inline void note(Errors& errors, const char* name, double error, double tolerance) {
  double& worst = errors[name];
  const double share = error / tolerance;
  worst = share == share ? std::max(worst, share) : INFINITY;  // NaN is no result
}

inline double relative(double actual, double expected) {
  return std::fabs(actual - expected) / std::max(1.0, std::fabs(expected));
}

/// The largest difference of rows of D, as a fraction of the largest entry or of `least`.
inline double gradient_error(const float* actual, const std::vector<double>& expected,
                             double least) {
  double error = 0.0, largest = least;
  for (std::size_t d = 0; d < expected.size(); ++d) {
    const double difference = std::fabs(actual[d] - expected[d]);
    if (difference != difference) return INFINITY;
    error = std::max(error, difference);
    largest = std::max(largest, std::fabs(expected[d]));
  }
  return error / largest;
}

/// How much worse a set of neighbours is than the nearest ones, in cosines; infinite if it is none.
inline double neighbor_error(const std::int64_t* indices, const std::vector<double>& cosines,
                             std::int64_t n) {
  std::vector<double> own;
  std::vector<std::int64_t> seen(indices, indices + n);
  std::sort(seen.begin(), seen.end());
  if (std::adjacent_find(seen.begin(), seen.end()) != seen.end()) return INFINITY;
  for (const std::int64_t j : seen) {
    if (j < 0 || j >= static_cast<std::int64_t>(cosines.size())) return INFINITY;
    own.push_back(cosines[j]);
  }
  std::sort(own.rbegin(), own.rend());
  const std::vector<std::int64_t> best = nearest(cosines, n);
  double error = 0.0;
  for (std::int64_t i = 0; i < n; ++i) error = std::max(error, cosines[best[i]] - own[i]);
  return error;
}

}  // namespace softcl::check

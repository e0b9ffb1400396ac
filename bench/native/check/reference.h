// What the kernels must compute, in double precision on the host, as plainly as it can be written.

#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "softcl/element_type.h"
#include "softcl/labels.h"

namespace softcl::check {

/// An array (count, dim) as its type stores it, and the numbers that it stores.
struct Rows {
  ElementType type;
  std::int64_t count;
  std::int64_t dim;
  std::vector<unsigned char> bytes;
  std::vector<double> values;

  const double* row(std::int64_t i) const { return values.data() + i * dim; }
};

/// Unit rows around `centers` (or in every direction, if it has no rows), rounded to `type`.
Rows make_rows(ElementType type, std::int64_t count, std::int64_t dim, const Rows& centers,
               std::mt19937_64& random);

/// Softmax statistics of v over the queue at one temperature, and the cosines.
struct Softmax {
  std::vector<double> cosines;  // (K,)
  std::vector<double> mean;     // (D,)
  double lse;
  double entropy;
};
Softmax softmax_over(const double* v, const Rows& queue, double temperature);

/// The n rows of the largest cosines, best first, equal ones by lowest row.
std::vector<std::int64_t> nearest(const std::vector<double>& cosines, std::int64_t n);

struct Loss {
  double loss;
  std::vector<double> dquery;  // (D,)
  double confidence;
  double entropy;
  double positive_cosine;
  Softmax student, teacher;
};

/// The cross-entropy of one row, from the labels of the positive and of every queue row.
Loss loss_of(const double* z, const double* t, const Rows& queue, const LabelRule& rule,
             double temperature, double teacher_temperature, bool positive);

}  // namespace softcl::check

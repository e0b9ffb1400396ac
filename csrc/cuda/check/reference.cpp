// See reference.h.

#include "check/reference.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

namespace softcl::check {

namespace {

double dot(const double* a, const double* b, std::int64_t dim) {
  double sum = 0.0;
  for (std::int64_t d = 0; d < dim; ++d) sum += a[d] * b[d];
  return sum;
}

// x rounded to nearest, ties to even, to a type of `digits` binary digits whose smallest step is
// 2^least_exponent.
double rounded(double x, int digits, int least_exponent) {
  int exponent = 0;
  std::frexp(x, &exponent);
  const int step = std::max(exponent - digits, least_exponent);
  return std::ldexp(std::nearbyint(std::ldexp(x, -step)), step);
}

// Appends x, which `type` represents, in its storage.
void store(std::vector<unsigned char>& bytes, ElementType type, double x) {
  const float f = static_cast<float>(x);
  std::uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (type == ElementType::kFloat32) {
    for (int i = 0; i < 4; ++i) bytes.push_back(bits >> 8 * i & 255);
    return;
  }
  std::uint32_t half = bits >> 16;
  if (type == ElementType::kFloat16) {
    const std::uint32_t sign = half & 0x8000, exponent = bits >> 23 & 255;
    half = exponent < 113  // below the smallest normal number: whole steps of 2^-24
               ? sign | static_cast<std::uint32_t>(std::fabs(x) * 0x1p24)
               : sign | (exponent - 112) << 10 | (bits >> 13 & 1023);
  }
  bytes.push_back(half & 255);
  bytes.push_back(half >> 8);
}

}  // namespace

Rows make_rows(ElementType type, std::int64_t count, std::int64_t dim, const Rows& centers,
               std::mt19937_64& random) {
  std::normal_distribution<double> gaussian;
  Rows rows{type, count, dim, {}, {}};
  std::vector<double> x(dim);
  for (std::int64_t i = 0; i < count; ++i) {
    const double spread = centers.count > 0 ? 0.5 / std::sqrt(static_cast<double>(dim)) : 1.0;
    for (double& element : x) element = spread * gaussian(random);
    if (centers.count > 0) {
      const double* center = centers.row(random() % centers.count);
      for (std::int64_t d = 0; d < dim; ++d) x[d] += center[d];
    }
    const double norm = std::sqrt(dot(x.data(), x.data(), dim));
    for (double element : x) {
      element /= norm;
      const double value = type == ElementType::kFloat32    ? static_cast<float>(element)
                           : type == ElementType::kBFloat16 ? rounded(element, 8, -133)
                                                            : rounded(element, 11, -24);
      rows.values.push_back(value);
      store(rows.bytes, type, value);
    }
  }
  return rows;
}

Softmax softmax_over(const double* v, const Rows& queue, double temperature) {
  Softmax s{{}, std::vector<double>(queue.dim), 0.0, 0.0};
  double largest = -INFINITY, weights = 0.0, logits = 0.0;
  for (std::int64_t j = 0; j < queue.count; ++j) {
    s.cosines.push_back(dot(v, queue.row(j), queue.dim));
    largest = std::max(largest, s.cosines.back() / temperature);
  }
  for (std::int64_t j = 0; j < queue.count; ++j) {
    const double logit = s.cosines[j] / temperature, weight = std::exp(logit - largest);
    weights += weight;
    logits += weight * logit;
    for (std::int64_t d = 0; d < queue.dim; ++d) s.mean[d] += weight * queue.row(j)[d];
  }
  for (double& element : s.mean) element /= weights;
  s.lse = largest + std::log(weights);
  s.entropy = s.lse - logits / weights;
  return s;
}

std::vector<std::int64_t> nearest(const std::vector<double>& cosines, std::int64_t n) {
  std::vector<std::int64_t> order(cosines.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](std::int64_t a, std::int64_t b) { return cosines[a] > cosines[b]; });
  order.resize(n);
  return order;
}

Loss loss_of(const double* z, const double* t, const Rows& queue, const LabelRule& rule,
             double temperature, double teacher_temperature, bool positive) {
  const std::int64_t D = queue.dim;
  Loss out;
  out.student = softmax_over(z, queue, temperature);
  out.teacher = softmax_over(t, queue, teacher_temperature);
  out.entropy = out.teacher.entropy;
  out.confidence = label_confidence(out.entropy, std::log(static_cast<double>(queue.count)));

  const double positive_weight = label_positive<double>(rule);
  const double mean_weight = label_mean_weight(rule, out.confidence);
  double total = positive_weight + mean_weight;
  std::vector<double> m(D);
  for (std::int64_t d = 0; d < D; ++d) {
    m[d] = positive_weight * t[d] + mean_weight * out.teacher.mean[d];
  }
  for (const std::int64_t j : nearest(out.teacher.cosines, rule.num_neighbors)) {
    const double p = std::exp(out.teacher.cosines[j] / teacher_temperature - out.teacher.lse);
    const double weight = label_neighbor(rule, out.confidence, p);
    total += weight;
    for (std::int64_t d = 0; d < D; ++d) m[d] += weight * queue.row(j)[d];
  }
  for (double& element : m) element /= total;

  out.positive_cosine = dot(z, t, D);
  const double lse = out.student.lse, logit = out.positive_cosine / temperature;
  const double all =
      positive ? std::max(lse, logit) + std::log1p(std::exp(-std::fabs(lse - logit))) : lse;
  const double queue_share = std::exp(lse - all),
               own_share = positive ? std::exp(logit - all) : 0.0;
  out.loss = all - dot(z, m.data(), D) / temperature;
  for (std::int64_t d = 0; d < D; ++d) {
    const double g = out.student.mean[d] * queue_share + t[d] * own_share;
    out.dquery.push_back((g - m[d]) / temperature);
  }
  return out;
}

}  // namespace softcl::check

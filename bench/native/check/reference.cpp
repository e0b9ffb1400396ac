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

namespace {

// The labels y of [positive, queue rows], by the definition in labels.h, divided by their sum.
std::vector<double> labels_of(const double* t, const Softmax& teacher, double confidence,
                              const LabelRule& rule, std::int64_t dim, double temperature) {
  std::vector<double> y = {rule.positive};
  double share = 1.0;
  if (rule.teacher_positive != TeacherPositive::kNone) {
    const bool is_self = rule.teacher_positive == TeacherPositive::kSelf;
    const double own = is_self ? dot(t, t, dim) / temperature : 0.0;
    share = 1.0 / (1.0 + std::exp(own - teacher.lse));
  }
  const double a = rule.mean + rule.confident_mean * confidence;
  y[0] += a * (1.0 - share);
  for (const double cosine : teacher.cosines) {
    y.push_back(a * share * std::exp(cosine / temperature - teacher.lse));
  }
  for (const std::int64_t j : nearest(teacher.cosines, rule.num_neighbors)) {
    if (rule.clip) {
      y[1 + j] = std::min(rule.positive, y[1 + j]);
    } else {
      y[1 + j] += rule.neighbor + rule.confident_neighbor * confidence;
    }
  }
  const double total = std::accumulate(y.begin(), y.end(), 0.0);
  for (double& label : y) label /= total;
  return y;
}

}  // namespace

Loss loss_of(const double* z, const double* t, const Rows& queue, const LabelRule& rule,
             double temperature, double teacher_temperature, bool positive) {
  const std::int64_t D = queue.dim;
  Loss out;
  out.student = softmax_over(z, queue, temperature);
  out.teacher = softmax_over(t, queue, teacher_temperature);
  out.entropy = out.teacher.entropy;
  out.confidence = label_confidence(out.entropy, std::log(static_cast<double>(queue.count)));
  out.positive_cosine = dot(z, t, D);
  const std::vector<double> y =
      labels_of(t, out.teacher, out.confidence, rule, D, teacher_temperature);

  const double lse = out.student.lse, logit = out.positive_cosine / temperature;
  const double total =
      positive ? std::max(lse, logit) + std::log1p(std::exp(-std::fabs(lse - logit))) : lse;
  out.loss = 0.0;
  out.dquery.resize(D);
  // The labelled rows one by one: v is the positive, then the queue.
  for (std::int64_t j = 0; j <= queue.count; ++j) {
    const double* v = j == 0 ? t : queue.row(j - 1);
    const double s = j == 0 ? logit : out.student.cosines[j - 1] / temperature;
    const double probability = j == 0 && !positive ? 0.0 : std::exp(s - total);
    out.loss += y[j] * (total - s);
    for (std::int64_t d = 0; d < D; ++d) out.dquery[d] += (probability - y[j]) / temperature * v[d];
  }
  return out;
}

}  // namespace softcl::check

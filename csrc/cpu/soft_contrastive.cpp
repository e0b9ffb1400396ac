// The loss of a label rule and its gradient, in one pass over the queue (see queue_pass.h).
//
//     L  = logaddexp(LSE_s, z.t/tau_s)                 (LSE_s without the positive)
//     g+ = g exp(LSE_s - L) + t exp(z.t/tau_s - L)     (g without the positive)
//     loss = L - z.m/tau_s      dz = (g+ - m)/tau_s      du = (dz - z (z.dz)) / max(|u|, 1e-12)
//
// The sums of the pass are fp32 products; everything below is O(N (D + n D)) and in double.

#include <algorithm>
#include <cmath>
#include <limits>

#include "arena.h"
#include "check.h"
#include "convert.h"
#include "isa.h"
#include "parallel.h"
#include "queue_pass.h"
#include "softcl/params.h"

namespace softcl::cpu {

namespace {

constexpr std::int64_t kLargest = std::int64_t{1} << 48;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

void check(const SoftContrastiveParams& p) {
  check_count("num_queries", p.num_queries, 1, kLargest);
  check_count("queue_size", p.queue_size, 1, kLargest);
  check_count("dim", p.dim, 1, kLargest);
  check_count("rule", static_cast<std::int64_t>(p.rule.kind), 0, kNumLabelKinds - 1);
  check_count("num_neighbors", p.rule.num_neighbors, 0, p.queue_size);
  check_count("num_threads", p.num_threads, 1, 4096);
  check_temperature("temperature", p.temperature);
  check_temperature("teacher_temperature", p.teacher_temperature);
  check_type("vector_type", p.vector_type);
  check_type("queue_type", p.queue_type);
  check_pointer("query", p.query);
  check_pointer("key", p.key);
  check_pointer("queue", p.queue);
  check_pointer("loss", p.loss);
}

class SoftContrastive {
 public:
  explicit SoftContrastive(const SoftContrastiveParams& params)
      : p_(params),
        kernels_(sweep_kernels()),
        strips_((params.num_queries + kernels_.lanes - 1) / kernels_.lanes),
        log_queue_size_(std::log(double(params.queue_size))) {}

  void run() {
    Arena measure;
    lay_out(measure);
    Arena arena(measure.used());
    lay_out(arena);
    parallel_for(p_.num_threads, strips_, [&](std::int64_t strip, int thread) {
      const int lanes = kernels_.lanes;
      read_strip(p_.query, p_.vector_type, p_.num_queries, p_.dim, p_.normalize, strip * lanes,
                 lanes, z_);
      read_strip(p_.key, p_.vector_type, p_.num_queries, p_.dim, p_.normalize, strip * lanes, lanes,
                 t_);
      if (p_.positive_rank != nullptr) similarity_of_positives(strip, thread);
    });
    run_pass(request(), [&](std::int64_t row, RowResult* results, bool finite, int thread) {
      if (finite && z_.finite[row] && t_.finite[row]) {
        finish_row(row, results, label_means_ + thread * p_.dim);
      } else {
        write_nan(row);
      }
    });
  }

 private:
  void lay_out(Arena& arena) {
    const std::int64_t rows = strips_ * kernels_.lanes;
    for (Rows* half : {&z_, &t_}) {
      half->strips = arena.take<float>(rows * p_.dim);
      half->norm = arena.take<double>(rows);
      half->finite = arena.take<bool>(rows);
    }
    label_means_ = arena.take<double>(p_.num_threads * p_.dim);
    if (p_.positive_rank == nullptr) return;
    positive_ = arena.take<float>(rows);
    tile_rows_ = (kernels_.lanes + kTileGranularity - 1) / kTileGranularity * kTileGranularity;
    tiles_ = arena.take<float>(p_.num_threads * tile_rows_ * tile_stride(p_.dim));
    similarities_ = arena.take<float>(p_.num_threads * tile_rows_ * kernels_.lanes);
  }

  bool has_teacher_softmax() const {
    return reads_softmax(p_.rule) ||
           (has_softmax(p_.rule) && (p_.confidence != nullptr || p_.entropy != nullptr));
  }

  PassRequest request() const {
    PassRequest request;
    request.queue = p_.queue;
    request.queue_type = p_.queue_type;
    request.num_rows = p_.num_queries;
    request.queue_size = p_.queue_size;
    request.dim = p_.dim;
    request.num_threads = p_.num_threads;
    request.num_reductions = has_teacher_softmax() || p_.rule.num_neighbors > 0 ? 2 : 1;
    ReductionRequest& student = request.reductions[0];
    student.rows = &z_;
    student.positive = positive_;
    student.temperature = p_.temperature;
    student.has_softmax = true;
    student.has_mean = p_.dquery != nullptr;
    ReductionRequest& teacher = request.reductions[1];
    teacher.rows = &t_;
    teacher.temperature = p_.teacher_temperature;
    teacher.has_softmax = has_teacher_softmax();
    teacher.has_mean = reads_mean(p_.rule);
    teacher.num_neighbors = p_.rule.num_neighbors;
    return request;
  }

  // z . t by the sweep's own kernel, so that a queue row equal to the key is not counted above it:
  // the strip's keys become a tile, and the diagonal of (keys, queries) is kept.
  void similarity_of_positives(std::int64_t strip, int thread) const {
    const std::int64_t D = p_.dim, lanes = kernels_.lanes, stride = tile_stride(D);
    const std::int64_t first = strip * lanes;
    float* tile = tiles_ + thread * tile_rows_ * stride;
    float* s = similarities_ + thread * tile_rows_ * lanes;
    for (std::int64_t j = 0; j < tile_rows_; ++j) {
      for (std::int64_t d = 0; d < D; ++d) {
        tile[j * stride + d] = j < lanes ? t_.strips[first * D + d * lanes + j] : 0.0f;
      }
    }
    kernels_.similarities(tile, tile_rows_, z_.strips + first * D, D, s);
    for (std::int64_t lane = 0; lane < lanes; ++lane) {
      positive_[first + lane] = s[lane * lanes + lane];
    }
  }

  const float* row_of(const Rows& rows, std::int64_t row) const {
    const std::int64_t lanes = kernels_.lanes;
    return rows.strips + row / lanes * lanes * p_.dim + row % lanes;  // next element: + lanes
  }

  void finish_row(std::int64_t row, RowResult* results, double* label_mean) const {
    const std::int64_t n = p_.rule.num_neighbors;
    if (n > 0 && results[1].num_neighbors != n) return write_nan(row);
    const std::int64_t D = p_.dim, lanes = kernels_.lanes;
    const float* z = row_of(z_, row);
    const float* t = row_of(t_, row);
    const RowResult& student = results[0];
    const RowResult& teacher = results[1];
    const bool has_confidence = has_teacher_softmax();
    const double confidence =
        has_confidence ? label_confidence(teacher.entropy, log_queue_size_) : 0.0;

    mean_of_labels(t, teacher, confidence, label_mean);

    double positive = 0.0, labelled = 0.0;  // z . t, z . m
    for (std::int64_t d = 0; d < D; ++d) {
      positive += double(z[d * lanes]) * double(t[d * lanes]);
      labelled += double(z[d * lanes]) * label_mean[d];
    }
    const double positive_logit = positive / p_.temperature;
    double total = student.lse;
    if (p_.positive) {
      total = std::max(student.lse, positive_logit) +
              std::log1p(std::exp(-std::abs(student.lse - positive_logit)));
    }
    p_.loss[row] = float(total - labelled / p_.temperature);
    if (p_.dquery != nullptr) {
      const double queue_share = p_.positive ? std::exp(student.lse - total) : 1.0;
      const double positive_share = p_.positive ? std::exp(positive_logit - total) : 0.0;
      for (std::int64_t d = 0; d < D; ++d) {
        const double expected =
            queue_share * student.mean[d] + positive_share * double(t[d * lanes]);
        student.mean[d] = (expected - label_mean[d]) / p_.temperature;
      }
      write_gradient(row, z, student.mean);
    }
    if (p_.confidence != nullptr && has_confidence) p_.confidence[row] = float(confidence);
    if (p_.entropy != nullptr && has_confidence) p_.entropy[row] = float(teacher.entropy);
    if (p_.positive_rank != nullptr) p_.positive_rank[row] = student.rank;
    if (p_.neighbor_indices != nullptr) {
      for (std::int64_t i = 0; i < n; ++i) {
        p_.neighbor_indices[row * n + i] = teacher.neighbors[i].index;
      }
    }
  }

  // m (D,) of labels.h from the key t (stride lanes) and the teacher's results.
  void mean_of_labels(const float* t, const RowResult& teacher, double confidence,
                      double* m) const {
    const std::int64_t D = p_.dim, lanes = kernels_.lanes;
    const double positive_weight = label_positive<double>(p_.rule);
    const double mean_weight = reads_mean(p_.rule) ? label_mean_weight(p_.rule, confidence) : 0.0;
    double total = positive_weight + mean_weight;
    for (std::int64_t d = 0; d < D; ++d) {
      m[d] = positive_weight * double(t[d * lanes]);
      if (mean_weight != 0.0) m[d] += mean_weight * teacher.mean[d];
    }
    const char* queue = static_cast<const char*>(p_.queue);
    for (std::int64_t i = 0; i < p_.rule.num_neighbors; ++i) {
      const Neighbor& neighbor = teacher.neighbors[i];
      // Only rules with a softmax read the probability.
      const double probability =
          reads_softmax(p_.rule)
              ? std::exp(double(neighbor.value) / p_.teacher_temperature - teacher.lse)
              : 0.0;
      const double weight = label_neighbor(p_.rule, confidence, probability);
      if (weight == 0.0) continue;
      total += weight;
      const void* row = queue + neighbor.index * D * size_of(p_.queue_type);
      for (std::int64_t d = 0; d < D; ++d) {
        m[d] += weight * double(load_element(row, p_.queue_type, d));
      }
    }
    for (std::int64_t d = 0; d < D; ++d) m[d] /= total;
  }

  // dquery from dz (D,), through the normalisation if there is one.
  void write_gradient(std::int64_t row, const float* z, const double* dz) const {
    const std::int64_t D = p_.dim, lanes = kernels_.lanes;
    float* dquery = p_.dquery + row * D;
    if (!p_.normalize) {
      for (std::int64_t d = 0; d < D; ++d) dquery[d] = float(dz[d]);
      return;
    }
    double along = 0.0;  // z . dz
    for (std::int64_t d = 0; d < D; ++d) along += double(z[d * lanes]) * dz[d];
    for (std::int64_t d = 0; d < D; ++d) {
      dquery[d] = float((dz[d] - double(z[d * lanes]) * along) / z_.norm[row]);
    }
  }

  void write_nan(std::int64_t row) const {
    const std::int64_t n = p_.rule.num_neighbors;
    p_.loss[row] = kNaN;
    if (p_.dquery != nullptr) std::fill_n(p_.dquery + row * p_.dim, p_.dim, kNaN);
    if (p_.confidence != nullptr) p_.confidence[row] = kNaN;
    if (p_.entropy != nullptr) p_.entropy[row] = kNaN;
    if (p_.positive_rank != nullptr) p_.positive_rank[row] = 0;
    if (p_.neighbor_indices != nullptr) {
      for (std::int64_t i = 0; i < n; ++i) p_.neighbor_indices[row * n + i] = i;  // valid rows
    }
  }

  const SoftContrastiveParams& p_;
  const SweepKernels& kernels_;
  const std::int64_t strips_;
  const double log_queue_size_;
  Rows z_, t_;
  double* label_means_ = nullptr;  // (threads, D)
  float* positive_ = nullptr;      // (strips, lanes) z . t, if the rank is wanted
  std::int64_t tile_rows_ = 0;
  float* tiles_ = nullptr;         // (threads, tile_rows, stride)
  float* similarities_ = nullptr;  // (threads, tile_rows, lanes)
};

}  // namespace

void soft_contrastive(const SoftContrastiveParams& params) {
  check(params);
  SoftContrastive(params).run();
}

}  // namespace softcl::cpu

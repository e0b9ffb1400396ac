// The loss of a label rule and its gradient, in one pass over the queue (see queue_pass.h).
//
//     L  = logaddexp(LSE_s, z.t/tau_s)                 (LSE_s without the positive)
//     g+ = g exp(LSE_s - L) + t exp(z.t/tau_s - L)     (g without the positive)
//     loss = L - z.m/tau_s      dz = (g+ - m)/tau_s      du = (dz - z (z.dz)) / max(|u|, 1e-12)
//
// The sums of the pass are fp32 products; what is below is O(N D (1 + n)), in double, and runs over
// the lanes of a strip side by side.

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
        log_queue_size_(std::log(double(params.queue_size))),
        num_neighbors_(neighbors_to_find(params)),
        temperature_(sweep_temperature(params.temperature)),
        teacher_temperature_(sweep_temperature(params.teacher_temperature)) {}

  void run() {
    Arena measure;
    lay_out(measure);
    Arena arena(measure.used());
    lay_out(arena);
    parallel_for(p_.num_threads, strips_, [&](std::int64_t strip, int thread) {
      const int lanes = kernels_.lanes;
      float* scratch = row_scratch_ + thread * p_.dim;
      read_strip(p_.query, p_.vector_type, p_.num_queries, p_.dim, p_.normalize, strip * lanes,
                 lanes, scratch, z_);
      read_strip(p_.key, p_.vector_type, p_.num_queries, p_.dim, p_.normalize, strip * lanes, lanes,
                 scratch, t_);
      if (p_.positive_rank != nullptr) similarity_of_positives(strip, thread);
    });
    run_pass(request(), [&](std::int64_t strip, StripResult* results, bool finite, int thread) {
      finish_strip(strip, results, finite, label_means_ + thread * kernels_.lanes * p_.dim);
    });
  }

 private:
  // Clipped labels are all among the n - 1 nearest; the n-th is found only to be shown.
  static std::int64_t neighbors_to_find(const SoftContrastiveParams& p) {
    const std::int64_t n = p.rule.num_neighbors;
    const bool clips = p.rule.kind == LabelKind::kAdaptiveSoft;
    return clips && n > 0 && p.neighbor_indices == nullptr ? n - 1 : n;
  }

  void lay_out(Arena& arena) {
    const std::int64_t rows = strips_ * kernels_.lanes;
    for (Rows* half : {&z_, &t_}) {
      half->strips = arena.take<float>(rows * p_.dim);
      half->norm = arena.take<double>(rows);
      half->finite = arena.take<bool>(rows);
    }
    row_scratch_ = arena.take<float>(p_.num_threads * p_.dim);
    label_means_ = arena.take<double>(p_.num_threads * kernels_.lanes * p_.dim);
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
    request.num_reductions = has_teacher_softmax() || num_neighbors_ > 0 ? 2 : 1;
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
    teacher.num_neighbors = num_neighbors_;
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

  // m (D, lanes): scratch for the label means.
  void finish_strip(std::int64_t strip, StripResult* results, bool queue_is_finite,
                    double* m) const {
    const int lanes = kernels_.lanes;
    const std::int64_t first = strip * lanes, D = p_.dim;
    const float* z = z_.strips + first * D;
    const float* t = t_.strips + first * D;
    const StripResult& student = results[0];
    double confidence[kMaxLanes], positive[kMaxLanes], labelled[kMaxLanes];
    for (int lane = 0; lane < lanes; ++lane) {
      confidence[lane] =
          has_teacher_softmax() ? label_confidence(results[1].entropy[lane], log_queue_size_) : 0.0;
      positive[lane] = labelled[lane] = 0.0;
    }
    mean_of_labels(t, results[1], confidence, m);
    for (std::int64_t d = 0; d < D; ++d) {
      for (int lane = 0; lane < lanes; ++lane) {
        const std::int64_t x = d * lanes + lane;
        positive[lane] += double(z[x]) * double(t[x]);  // z . t
        labelled[lane] += double(z[x]) * m[x];          // z . m
      }
    }
    double loss[kMaxLanes], queue_share[kMaxLanes], positive_share[kMaxLanes];
    for (int lane = 0; lane < lanes; ++lane) {
      const double lse = student.lse[lane], logit = positive[lane] / temperature_;
      const double total =
          p_.positive ? std::max(lse, logit) + std::log1p(std::exp(-std::abs(lse - logit))) : lse;
      loss[lane] = total - labelled[lane] / temperature_;
      queue_share[lane] = p_.positive ? std::exp(lse - total) : 1.0;
      positive_share[lane] = p_.positive ? std::exp(logit - total) : 0.0;
    }
    if (p_.dquery != nullptr) {
      gradient(z, t, m, queue_share, positive_share, z_.norm + first, student.mean);
    }
    for (int lane = 0; lane < lanes && first + lane < p_.num_queries; ++lane) {
      const std::int64_t row = first + lane;
      const bool finite = queue_is_finite && z_.finite[row] && t_.finite[row] &&
                          (num_neighbors_ == 0 || results[1].num_neighbors[lane] == num_neighbors_);
      write_row(row, lane, results, finite, loss[lane], confidence[lane]);
    }
  }

  // m (D, lanes) of labels.h from the keys t (D, lanes) and the teacher's results.
  void mean_of_labels(const float* t, const StripResult& teacher, const double* confidence,
                      double* m) const {
    const int lanes = kernels_.lanes;
    const std::int64_t D = p_.dim;
    const bool has_mean = reads_mean(p_.rule);
    const double positive_weight = label_positive<double>(p_.rule);
    double mean_weight[kMaxLanes], total[kMaxLanes];
    for (int lane = 0; lane < lanes; ++lane) {
      mean_weight[lane] = has_mean ? label_mean_weight(p_.rule, confidence[lane]) : 0.0;
      total[lane] = positive_weight + mean_weight[lane];
    }
    for (std::int64_t d = 0; d < D; ++d) {
      for (int lane = 0; lane < lanes; ++lane) {
        const std::int64_t x = d * lanes + lane;
        m[x] = positive_weight * double(t[x]);
        if (has_mean) m[x] += mean_weight[lane] * teacher.mean[x];
      }
    }
    if (num_neighbors_ > 0) add_neighbors(teacher, confidence, m, total);
    for (int lane = 0; lane < lanes; ++lane) total[lane] = 1.0 / total[lane];
    for (std::int64_t d = 0; d < D; ++d) {
      for (int lane = 0; lane < lanes; ++lane) m[d * lanes + lane] *= total[lane];
    }
  }

  // m += sum_j w_j Q_j and total += sum_j w_j over each lane's neighbours.
  void add_neighbors(const StripResult& teacher, const double* confidence, double* m,
                     double* total) const {
    const int lanes = kernels_.lanes;
    const std::int64_t D = p_.dim;
    const char* queue = static_cast<const char*>(p_.queue);
    for (int lane = 0; lane < lanes; ++lane) {
      const Neighbor* neighbors = teacher.neighbors + lane * teacher.neighbor_stride;
      for (std::int64_t i = 0; i < teacher.num_neighbors[lane]; ++i) {
        // The teacher's softmax, which only rules that have one read.
        const double probability =
            reads_softmax(p_.rule)
                ? std::exp(double(neighbors[i].value) / teacher_temperature_ - teacher.lse[lane])
                : 0.0;
        const double weight = label_neighbor(p_.rule, confidence[lane], probability);
        if (weight == 0.0) continue;
        total[lane] += weight;
        const void* row = queue + neighbors[i].index * D * size_of(p_.queue_type);
        for (std::int64_t d = 0; d < D; ++d) {
          m[d * lanes + lane] += weight * double(load_element(row, p_.queue_type, d));
        }
      }
    }
  }

  // expected (D, lanes), the student's mean over the queue, becomes the gradient of the loss.
  void gradient(const float* z, const float* t, const double* m, const double* queue_share,
                const double* positive_share, const double* norm, double* expected) const {
    const int lanes = kernels_.lanes;
    const std::int64_t D = p_.dim;
    const double inverse_temperature = 1.0 / temperature_;
    double along[kMaxLanes] = {};  // z . dz
    for (std::int64_t d = 0; d < D; ++d) {
      for (int lane = 0; lane < lanes; ++lane) {
        const std::int64_t x = d * lanes + lane;
        const double mean = queue_share[lane] * expected[x] + positive_share[lane] * double(t[x]);
        expected[x] = (mean - m[x]) * inverse_temperature;
        along[lane] += double(z[x]) * expected[x];
      }
    }
    if (!p_.normalize) return;
    double inverse_norm[kMaxLanes];
    for (int lane = 0; lane < lanes; ++lane) inverse_norm[lane] = 1.0 / norm[lane];
    for (std::int64_t d = 0; d < D; ++d) {
      for (int lane = 0; lane < lanes; ++lane) {
        const std::int64_t x = d * lanes + lane;
        expected[x] = (expected[x] - double(z[x]) * along[lane]) * inverse_norm[lane];
      }
    }
  }

  // results[0].mean holds the gradient by now.
  void write_row(std::int64_t row, int lane, const StripResult* results, bool finite, double loss,
                 double confidence) const {
    const int lanes = kernels_.lanes;
    const std::int64_t D = p_.dim, n = p_.rule.num_neighbors;
    p_.loss[row] = finite ? float(loss) : kNaN;
    if (p_.dquery != nullptr) {
      for (std::int64_t d = 0; d < D; ++d) {
        p_.dquery[row * D + d] = finite ? float(results[0].mean[d * lanes + lane]) : kNaN;
      }
    }
    if (p_.confidence != nullptr && has_softmax(p_.rule)) {
      p_.confidence[row] = finite ? float(confidence) : kNaN;
    }
    if (p_.entropy != nullptr && has_softmax(p_.rule)) {
      p_.entropy[row] = finite ? float(results[1].entropy[lane]) : kNaN;
    }
    if (p_.positive_rank != nullptr) p_.positive_rank[row] = finite ? results[0].rank[lane] : 0;
    if (p_.neighbor_indices == nullptr || n == 0) return;
    const Neighbor* neighbors = results[1].neighbors + lane * results[1].neighbor_stride;
    for (std::int64_t i = 0; i < n; ++i) {
      // Of rows that are not finite the first n are named: valid rows, to gather without a check.
      p_.neighbor_indices[row * n + i] = finite ? neighbors[i].index : i;
    }
  }

  const SoftContrastiveParams& p_;
  const SweepKernels& kernels_;
  const std::int64_t strips_;
  const double log_queue_size_;
  const std::int64_t num_neighbors_;
  const double temperature_, teacher_temperature_;
  Rows z_, t_;
  float* row_scratch_ = nullptr;   // (threads, D)
  double* label_means_ = nullptr;  // (threads, D, lanes)
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

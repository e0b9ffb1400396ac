// The loss of a label rule and its gradient, in one pass over the queue (see queue_pass.h).
//
//     L  = logaddexp(LSE_s, z.t/tau_s)                 (LSE_s without the positive)
//     g+ = g exp(LSE_s - L) + t exp(z.t/tau_s - L)     (g without the positive)
//     loss = L - z.m/tau_s      dz = (g+ - m)/tau_s      du = (dz - z (z.dz)) / |u|
//
// m = m' + b mu, where m' is of the positive and the neighbours: the gradient needs g and mu only
// as exp(LSE_s - L) g - b mu, one mean where the pass can combine them, and the loss needs of mu
// only z.mu, which is the teacher's expectation of the student's similarities.
//
// The sums of the pass are fp32 products; what is below is O(N D (1 + n)), in double, and runs over
// the lanes of a strip side by side.

#include <algorithm>
#include <cmath>
#include <limits>

#include "arena.h"
#include "convert.h"
#include "isa.h"
#include "parallel.h"
#include "pass/queue_pass.h"
#include "softcl/checks.h"

namespace softcl::cpu {

namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

class SoftContrastive {
 public:
  explicit SoftContrastive(const Call& call)
      : p_(call),
        kernels_(sweep_kernels()),
        strips_((call.num_queries + kernels_.lanes - 1) / kernels_.lanes),
        log_queue_size_(std::log(double(call.queue_size))),
        log_queue_size_without_one_(std::log(double(call.queue_size - 1))),
        num_neighbors_(neighbors_to_find(call)),
        temperature_(sweep_temperature(call.temperature)),
        teacher_temperature_(sweep_temperature(call.teacher_temperature)) {}

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
      if (p_.excluded != nullptr) {
        read_excluded(p_.excluded, p_.num_queries, strip, lanes, excluded_);
      }
    });
    request_ = request();
    combined_ = can_combine(request_);
    const FinishStrip finish = [&](std::int64_t strip, StripResult* results, bool finite,
                                   int thread) {
      finish_strip(strip, results, finite, label_means_ + thread * kernels_.lanes * p_.dim);
    };
    const WeighStrip weigh = [&](std::int64_t strip, const StripResult* results,
                                 double (*shares)[kMaxLanes]) {
      const Sums sums = sums_of(strip, results);
      for (int lane = 0; lane < kernels_.lanes; ++lane) {
        shares[0][lane] = sums.queue_share[lane];
        shares[1][lane] = -sums.mean_label[lane];
      }
    };
    combined_ ? run_combined_pass(request_, weigh, finish) : run_pass(request_, finish);
  }

 private:
  // All n only to be shown, or where that many labels may be added or clipped: of a total mass of
  // at most n positives, fewer than n labels are above the positive's.
  static std::int64_t neighbors_to_find(const Call& call) {
    const LabelRule& rule = call.rule;
    const std::int64_t n = rule.num_neighbors;
    if (call.neighbor_indices != nullptr) return n;
    if (!adds_neighbors(rule)) return 0;
    const double most = rule.mean + rule.confident_mean;
    return rule.clip && most <= rule.positive * double(n) ? n - 1 : n;
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
    if (p_.excluded != nullptr) excluded_ = arena.take<std::int64_t>(rows);
    if (p_.positive_rank == nullptr) return;
    positive_ = arena.take<float>(rows);
    tile_rows_ = (kernels_.lanes + kTileGranularity - 1) / kTileGranularity * kTileGranularity;
    tiles_ = arena.take<float>(p_.num_threads * tile_rows_ * tile_stride(p_.dim));
    similarities_ = arena.take<float>(p_.num_threads * tile_rows_ * kernels_.lanes);
  }

  PassRequest request() const {
    PassRequest request;
    request.queue = p_.queue;
    request.queue_type = p_.queue_type;
    request.num_rows = p_.num_queries;
    request.queue_size = p_.queue_size;
    request.dim = p_.dim;
    request.num_threads = p_.num_threads;
    request.excluded = excluded_;
    request.num_reductions = needs_softmax(p_.rule) || num_neighbors_ > 0 ? 2 : 1;
    ReductionRequest& student = request.reductions[0];
    student.rows = &z_;
    student.positive = positive_;
    student.temperature = p_.temperature;
    student.has_softmax = true;
    student.has_mean = p_.dquery != nullptr;
    ReductionRequest& teacher = request.reductions[1];
    teacher.rows = &t_;
    teacher.temperature = p_.teacher_temperature;
    teacher.has_softmax = needs_softmax(p_.rule);
    teacher.has_mean = needs_mean(p_.rule) && p_.dquery != nullptr;
    teacher.has_alignment = needs_mean(p_.rule) && p_.dquery == nullptr;
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

  // Per lane: all that follows from a strip's sums without a mean.
  struct Sums {
    double confidence[kMaxLanes];
    double total[kMaxLanes];           // L
    double queue_share[kMaxLanes];     // exp(LSE_s - L)
    double positive_share[kMaxLanes];  // exp(z . t / temperature - L); 0 without the positive
    LabelWeights weights[kMaxLanes];
    double labels[kMaxLanes];      // the sum of all weights
    double mean_label[kMaxLanes];  // b = weights.mean / labels
  };

  Sums sums_of(std::int64_t strip, const StripResult* results) const {
    const int lanes = kernels_.lanes;
    const std::int64_t first = strip * lanes;
    const float* z = z_.strips + first * p_.dim;
    const float* t = t_.strips + first * p_.dim;
    Sums sums;
    double positive[kMaxLanes];
    products(z, t, positive);
    for (int lane = 0; lane < lanes; ++lane) {
      const double lse = results[0].lse[lane], logit = positive[lane] / temperature_;
      const double total =
          p_.positive ? std::max(lse, logit) + std::log1p(std::exp(-std::abs(lse - logit))) : lse;
      sums.total[lane] = total;
      sums.queue_share[lane] = p_.positive ? std::exp(lse - total) : 1.0;
      sums.positive_share[lane] = p_.positive ? std::exp(logit - total) : 0.0;
    }
    weigh_labels(first, t, results[1], sums);
    return sums;
  }

  // a . b of every lane of two strips (D, lanes).
  void products(const float* a, const float* b, double* out) const {
    const int lanes = kernels_.lanes;
    std::fill_n(out, lanes, 0.0);
    for (std::int64_t d = 0; d < p_.dim; ++d) {
      for (int lane = 0; lane < lanes; ++lane) {
        const std::int64_t x = d * lanes + lane;
        out[lane] += double(a[x]) * double(b[x]);
      }
    }
  }

  // The part of `sums` that the rule says, for the keys t (D, lanes) of rows first, first + 1, ...
  void weigh_labels(std::int64_t first, const float* t, const StripResult& teacher,
                    Sums& sums) const {
    const LabelRule& rule = p_.rule;
    double own[kMaxLanes] = {};  // t . t
    if (rule.teacher_positive == TeacherPositive::kSelf) products(t, t, own);
    for (int lane = 0; lane < kernels_.lanes; ++lane) {
      double confidence = 0.0, margin = 0.0;
      if (needs_softmax(rule)) {
        confidence = label_confidence(teacher.entropy[lane], log_queue_size(first + lane));
        margin = teacher.lse[lane] - own[lane] / teacher_temperature_;
      }
      const LabelWeights weights = label_weights(rule, confidence, margin);
      sums.confidence[lane] = confidence;
      sums.weights[lane] = weights;
      sums.labels[lane] = weights.positive + weights.mean;
      if (num_neighbors_ > 0) {
        for (std::int64_t i = 0; i < teacher.num_neighbors[lane]; ++i) {
          sums.labels[lane] += weight_of(teacher, lane, i, sums);
        }
      }
      sums.mean_label[lane] = weights.mean / sums.labels[lane];
    }
  }

  double log_queue_size(std::int64_t row) const {
    const bool has_excluded = excluded_ != nullptr && excluded_[row] >= 0;
    return has_excluded ? log_queue_size_without_one_ : log_queue_size_;
  }

  // w_j of the lane's i-th neighbour.
  double weight_of(const StripResult& teacher, int lane, std::int64_t i, const Sums& sums) const {
    const Neighbor& neighbor = teacher.neighbors[lane * teacher.neighbor_stride + i];
    // Of the teacher's softmax, which not every rule has.
    const double probability =
        p_.rule.clip && needs_softmax(p_.rule)
            ? std::exp(double(neighbor.value) / teacher_temperature_ - teacher.lse[lane])
            : 0.0;
    return neighbor_weight(p_.rule, sums.weights[lane], sums.confidence[lane], probability);
  }

  // m (D, lanes): scratch for the label means.
  void finish_strip(std::int64_t strip, StripResult* results, bool queue_is_finite,
                    double* m) const {
    const int lanes = kernels_.lanes;
    const std::int64_t first = strip * lanes, D = p_.dim;
    const float* z = z_.strips + first * D;
    const float* t = t_.strips + first * D;
    const Sums sums = sums_of(strip, results);
    own_labels(t, results[1], sums, m);
    // Of z . m: with m' here, and b z . mu.
    double labelled[kMaxLanes] = {}, aligned[kMaxLanes] = {};
    const double* teacher_mean = results[1].mean;
    for (std::int64_t d = 0; d < D; ++d) {
      for (int lane = 0; lane < lanes; ++lane) {
        const std::int64_t x = d * lanes + lane;
        labelled[lane] += double(z[x]) * m[x];
        if (teacher_mean != nullptr) aligned[lane] += double(z[x]) * teacher_mean[x];
      }
    }
    double loss[kMaxLanes];
    for (int lane = 0; lane < lanes; ++lane) {
      if (needs_mean(p_.rule)) {
        const double along = teacher_mean != nullptr ? aligned[lane] : results[1].alignment[lane];
        labelled[lane] += sums.mean_label[lane] * along;
      }
      loss[lane] = sums.total[lane] - labelled[lane] / temperature_;
    }
    if (p_.dquery != nullptr) gradient(z, t, m, sums, z_.norm + first, results);
    for (int lane = 0; lane < lanes && first + lane < p_.num_queries; ++lane) {
      const std::int64_t row = first + lane;
      const bool finite = queue_is_finite && z_.finite[row] && t_.finite[row] &&
                          (num_neighbors_ == 0 || results[1].num_neighbors[lane] == num_neighbors_);
      write_row(row, lane, results, finite, loss[lane], sums.confidence[lane]);
    }
  }

  // m' (D, lanes) = (weights.positive t + sum_j w_j Q_j) / labels from the keys t (D, lanes).
  void own_labels(const float* t, const StripResult& teacher, const Sums& sums, double* m) const {
    const int lanes = kernels_.lanes;
    const std::int64_t D = p_.dim;
    double own[kMaxLanes], inverse[kMaxLanes];
    for (int lane = 0; lane < lanes; ++lane) {
      inverse[lane] = 1.0 / sums.labels[lane];
      own[lane] = sums.weights[lane].positive * inverse[lane];
    }
    for (std::int64_t d = 0; d < D; ++d) {
      for (int lane = 0; lane < lanes; ++lane) {
        const std::int64_t x = d * lanes + lane;
        m[x] = own[lane] * double(t[x]);
      }
    }
    if (num_neighbors_ == 0) return;
    const char* queue = static_cast<const char*>(p_.queue);
    for (int lane = 0; lane < lanes; ++lane) {
      const Neighbor* neighbors = teacher.neighbors + lane * teacher.neighbor_stride;
      for (std::int64_t i = 0; i < teacher.num_neighbors[lane]; ++i) {
        const double share = weight_of(teacher, lane, i, sums) * inverse[lane];
        if (share == 0.0) continue;
        const void* row = queue + neighbors[i].index * D * size_of(p_.queue_type);
        for (std::int64_t d = 0; d < D; ++d) {
          m[d * lanes + lane] += share * double(load_element(row, p_.queue_type, d));
        }
      }
    }
  }

  // results[0].mean (D, lanes) becomes the gradient of the loss.
  void gradient(const float* z, const float* t, const double* m, const Sums& sums,
                const double* norm, StripResult* results) const {
    const int lanes = kernels_.lanes;
    const std::int64_t D = p_.dim;
    double* dz = results[0].mean;
    if (!combined_) {
      const double* teacher_mean = results[1].mean;
      for (std::int64_t d = 0; d < D; ++d) {
        for (int lane = 0; lane < lanes; ++lane) {
          const std::int64_t x = d * lanes + lane;
          dz[x] *= sums.queue_share[lane];
          if (teacher_mean != nullptr) dz[x] -= sums.mean_label[lane] * teacher_mean[x];
        }
      }
    }
    const double inverse_temperature = 1.0 / temperature_;
    double along[kMaxLanes] = {};  // z . dz
    for (std::int64_t d = 0; d < D; ++d) {
      for (int lane = 0; lane < lanes; ++lane) {
        const std::int64_t x = d * lanes + lane;
        dz[x] += sums.positive_share[lane] * double(t[x]) - m[x];
        dz[x] *= inverse_temperature;
        along[lane] += double(z[x]) * dz[x];
      }
    }
    if (!p_.normalize) return;
    double inverse_norm[kMaxLanes];
    for (int lane = 0; lane < lanes; ++lane) {
      // A row that short has no direction that a gradient could turn.
      inverse_norm[lane] = norm[lane] > kNormFloor ? 1.0 / norm[lane] : 0.0;
    }
    for (std::int64_t d = 0; d < D; ++d) {
      for (int lane = 0; lane < lanes; ++lane) {
        const std::int64_t x = d * lanes + lane;
        dz[x] = (dz[x] - double(z[x]) * along[lane]) * inverse_norm[lane];
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
    if (p_.confidence != nullptr && needs_softmax(p_.rule)) {
      p_.confidence[row] = finite ? float(confidence) : kNaN;
    }
    if (p_.entropy != nullptr && needs_softmax(p_.rule)) {
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

  const Call& p_;
  const SweepKernels& kernels_;
  const std::int64_t strips_;
  const double log_queue_size_, log_queue_size_without_one_;
  const std::int64_t num_neighbors_;
  const double temperature_, teacher_temperature_;
  PassRequest request_;
  bool combined_ = false;  // the pass leaves one mean of both reductions
  Rows z_, t_;
  std::int64_t* excluded_ = nullptr;  // (strips, lanes), -1 where a lane has none
  float* row_scratch_ = nullptr;      // (threads, D)
  double* label_means_ = nullptr;     // (threads, D, lanes)
  float* positive_ = nullptr;         // (strips, lanes) z . t, if the rank is wanted
  std::int64_t tile_rows_ = 0;
  float* tiles_ = nullptr;         // (threads, tile_rows, stride)
  float* similarities_ = nullptr;  // (threads, tile_rows, lanes)
};

}  // namespace

void soft_contrastive(const Call& call) {
  check_call(call, {});
  check_count("num_threads", call.num_threads, 1, kMostThreads);
  SoftContrastive(call).run();
}

}  // namespace softcl::cpu

// The loss of a label rule and its gradient: the streaming kernel, then this one, which merges the
// splits, finds the exact neighbours and does what is O(N D (1 + n)).
//
//     L  = logaddexp(LSE_s, z.t/tau_s)                 (LSE_s without the positive)
//     g+ = g exp(LSE_s - L) + t exp(z.t/tau_s - L)     (g without the positive)
//     loss = L - z.m/tau_s      dz = (g+ - m)/tau_s      du = (dz - z (z.dz)) / |u|
//
// With the positive g+ - m is computed as (g - t) exp(LSE_s - L) + (t - m), free of cancellation
// for hard labels (m = t). z.m takes its z.mu from a sum in fp32, not from mu, whose weights are
// rounded for the product. Scalars are double: the loss is a difference of larger numbers.
//
// Tiling: one block of 128 threads per row, two elements of D = 256 a thread. Traffic: the splits'
// sums (splits x D) once, the chunk maxima, n chunks and n rows of the queue from L2, the row in
// and its gradient out.
//
// Experimental: has not yet run on a GPU; tests/native/cuda runs it on a CPU.

#include "finish.h"

namespace softcl::cuda {

namespace {

// Over so few rows the rounding of bf16 weights does not average out.
constexpr std::int64_t kFewRows = 1024;

struct LossParams {
  FinishParams finish;
  const void* query;
  const void* key;
  LabelRule rule;
  bool positive;
  bool normalize;
  bool teacher_softmax;
  double log_queue_size;
  const std::int32_t* ranks;  // (splits, N) or null
  float* loss;
  float* dquery;
  float* confidence;
  float* entropy;
  std::int64_t* positive_rank;
  std::int64_t* neighbor_indices;
};

/// The label mean of one row, divided by nothing yet: m = (partial + mean_weight mu) / total.
struct LabelMean {
  float partial[kElements];
  double mean_weight;
  double total;
};

/// LSE_t - x0 of labels.h, where the rule has a teacher_positive.
SOFTCL_DEVICE double margin_of(const LossParams& p, const float (&t)[kElements], double log_sum,
                               std::uint32_t scratch) {
  double own[1] = {};  // t.t
  if (p.rule.teacher_positive == TeacherPositive::kSelf) {
    SOFTCL_UNROLL
    for (int i = 0; i < kElements; ++i) own[0] += static_cast<double>(t[i]) * t[i];
    block_sum(own, scratch);
  }
  return (log_sum - own[0] * p.finish.scale[1]) * kLn2;
}

/// What labels.h gives the positive and the neighbours, and the weights.
SOFTCL_DEVICE void add_labels(LabelMean& m, const LossParams& p, const SelectMemory& memory,
                              const float (&t)[kElements], double confidence, const Merged& teacher,
                              double margin) {
  const FinishParams& f = p.finish;
  // Of what clips a label, all logits by one sum: at low temperatures the bits in which the
  // selection's products differ from the stream's would be a large part of q_j.
  double log_sum = teacher.log_sum;
  if (f.partial.running_maximum && f.num_neighbors > 0) {
    const auto nearest = ptx::load_shared<std::uint64_t>(memory.sorted());
    log_sum += value_of(nearest) * f.scale[1] - teacher.maximum;
  }
  const LabelWeights weights = label_weights(p.rule, confidence, margin);
  m.mean_weight = weights.mean;
  m.total = weights.positive + weights.mean;
  SOFTCL_UNROLL
  for (int i = 0; i < kElements; ++i) m.partial[i] = static_cast<float>(weights.positive) * t[i];
  const bool reads_probability = p.rule.clip && p.teacher_softmax;
  for (int j = 0; j < f.num_neighbors; ++j) {
    const auto key = ptx::load_shared<std::uint64_t>(memory.sorted() + j * 8);
    const double probability = reads_probability ? exp2(value_of(key) * f.scale[1] - log_sum) : 0.0;
    const double weight = neighbor_weight(p.rule, weights, confidence, probability);
    if (weight == 0.0) continue;
    m.total += weight;
    float q[kElements];
    load_elements(q, f.queue.elements, f.queue.type, index_of(key), f.partial.dim);
    SOFTCL_UNROLL
    for (int i = 0; i < kElements; ++i) m.partial[i] += static_cast<float>(weight) * q[i];
  }
}

/// dz or du of one row, this thread's elements. Returns whether all of it is finite; NaN if not.
SOFTCL_DEVICE bool store_gradient(const LossParams& p, std::int64_t n, std::uint32_t scratch,
                                  const float (&z)[kElements], const float (&t)[kElements],
                                  const LabelMean& labels, double queue_share, double maximum,
                                  double teacher_maximum, double inverse_norm, bool finite) {
  const FinishParams& f = p.finish;
  float g[kElements], mu[kElements] = {};
  merge_mean(g, f.partial, n, maximum);
  if (labels.mean_weight != 0.0) merge_mean(mu, f.partial, n + f.num_rows, teacher_maximum);
  double along[1] = {};
  SOFTCL_UNROLL
  for (int i = 0; i < kElements; ++i) {
    const double m = (labels.partial[i] + labels.mean_weight * mu[i]) / labels.total;
    g[i] = static_cast<float>(((g[i] - t[i]) * queue_share + (t[i] - m)) / f.temperature[0]);
    along[0] += static_cast<double>(z[i]) * g[i];
  }
  block_sum(along, scratch);
  finite &= along[0] - along[0] == 0.0;
  SOFTCL_UNROLL
  for (int i = 0; i < kElements; ++i) {
    const int d = threadIdx.x + i * kFinishThreads;
    if (d >= f.partial.dim) continue;
    const double du = p.normalize ? (g[i] - z[i] * along[0]) * inverse_norm : g[i];
    ptx::store_global(p.dquery + n * f.partial.dim + d,
                      finite ? static_cast<float>(du) : not_a_number());
  }
  return finite;
}

SOFTCL_DEVICE void store_diagnostics(const LossParams& p, const SelectMemory& memory,
                                     std::int64_t n, double confidence, double entropy) {
  const FinishParams& f = p.finish;
  if (threadIdx.x == 0) {
    if (p.confidence != nullptr) {
      ptx::store_global(p.confidence + n, static_cast<float>(confidence));
    }
    if (p.entropy != nullptr) ptx::store_global(p.entropy + n, static_cast<float>(entropy));
    if (p.positive_rank != nullptr) {
      std::int64_t rank = 0;
      for (int s = 0; s < f.partial.splits; ++s) {
        rank += ptx::load_global(p.ranks + s * f.num_rows + n);
      }
      ptx::store_global(p.positive_rank + n, rank);
    }
  }
  if (p.neighbor_indices == nullptr) return;
  for (int j = threadIdx.x; j < f.num_neighbors; j += kFinishThreads) {
    const auto key = ptx::load_shared<std::uint64_t>(memory.sorted() + j * 8);
    ptx::store_global(p.neighbor_indices + n * f.num_neighbors + j, std::int64_t(index_of(key)));
  }
}

SOFTCL_DEVICE void finish_row(const LossParams& p, std::int64_t n) {
  const FinishParams& f = p.finish;
  const std::uint32_t scratch = ptx::shared_memory();
  const SelectMemory memory = select_memory(scratch, f.num_neighbors);
  float z[kElements], t[kElements];
  load_elements(z, p.query, f.row_type, n, f.partial.dim);
  load_elements(t, p.key, f.row_type, n, f.partial.dim);
  double inverse_norm = 1.0;
  if (p.normalize) {
    inverse_norm = normalize(z, f.row_type, scratch);
    // A row that short has no direction that a gradient could turn.
    if (inverse_norm >= 1.0 / kNormFloor) inverse_norm = 0.0;
    normalize(t, f.row_type, scratch);
  }
  if (f.num_neighbors > 0) find_neighbors(f, memory, n, t);

  // Without a gradient the student's entropy is at hand, for the product of minus infinity that it
  // has met; see stream_kernel.h.
  const Merged student = merge_sums(f.partial, n, f.scale[0], p.dquery == nullptr, false);
  Merged teacher = {};
  double confidence = 0.0;
  if (p.teacher_softmax) {
    teacher = merge_sums(f.partial, n + f.num_rows, f.scale[1], true, true);
    confidence = label_confidence(teacher.entropy, p.log_queue_size);
  }
  LabelMean labels;
  add_labels(labels, p, memory, t, confidence, teacher, margin_of(p, t, teacher.log_sum, scratch));
  double products[2] = {};  // z.t and what is known of z.m
  SOFTCL_UNROLL
  for (int i = 0; i < kElements; ++i) {
    products[0] += static_cast<double>(z[i]) * t[i];
    products[1] += static_cast<double>(z[i]) * labels.partial[i];
  }
  block_sum(products, scratch);
  const double labelled = (products[1] + labels.mean_weight * teacher.student) / labels.total;

  const double lse = student.log_sum * kLn2, logit = products[0] / f.temperature[0];
  double total = lse;
  if (p.positive) total = fmax(lse, logit) + log1p(exp(-fabs(lse - logit)));
  if (lse != lse || logit != logit) total = lse + logit;  // fmax passes over NaN
  const double loss = total - labelled / f.temperature[0];
  bool finite = loss - loss == 0.0 && student.entropy - student.entropy == 0.0;
  if (p.dquery != nullptr) {
    const double queue_share = p.positive ? exp(lse - total) : 1.0;
    finite = store_gradient(p, n, scratch, z, t, labels, queue_share, student.maximum,
                            teacher.maximum, inverse_norm, finite);
  }
  if (threadIdx.x == 0) {
    ptx::store_global(p.loss + n, finite ? static_cast<float>(loss) : not_a_number());
  }
  store_diagnostics(p, memory, n, confidence, teacher.entropy);
}

__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const LossParams p) {
  ptx::wait_for_previous_grid();
  for (std::int64_t n = blockIdx.x; n < p.finish.num_rows; n += gridDim.x) finish_row(p, n);
}

/// Whether bf16 weights would be too coarse for the gradient, or too large at the temperatures. The
/// same for the loss alone: its bits do not depend on what else is asked for.
bool needs_fp16_weights(const Call& call) {
  return needs_mean(call.rule) || call.queue_size < kFewRows ||
         call.temperature < kColdestWithoutMaximum ||
         (needs_softmax(call.rule) && call.teacher_temperature < kColdestWithoutMaximum);
}

Work work_of(const Call& call, int device) {
  check_arguments(call, device);
  Work work = {};
  work.num_rows = call.num_queries;
  work.queue_size = call.queue_size;
  work.dim = static_cast<int>(call.dim);
  // All n also where fewer would do for the labels: the same plan, and bits, shown or not.
  const bool finds = adds_neighbors(call.rule) || call.neighbor_indices != nullptr;
  work.num_neighbors = finds ? call.rule.num_neighbors : 0;
  const bool visits_teacher = needs_softmax(call.rule) || work.num_neighbors > 0;
  work.pairing = visits_teacher ? Pairing::kPaired : Pairing::kSingle;
  work.mean_rows = call.dquery == nullptr ? 0 : needs_mean(call.rule) ? 2 : 1;
  work.ranks = call.positive_rank != nullptr;
  work.kernel_type = kernel_type(call.vector_type, call.queue_type, needs_fp16_weights(call));
  work.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  work.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  work.hopper = can_stream_hopper(device, call.queue, work.dim, work.kernel_type);
  return work;
}

LossParams loss_params(const Call& call, const Work& work, const Plan& plan,
                       const StreamParams& stream, void* workspace) {
  LossParams loss = {};
  loss.finish = finish_params(work, plan, stream, workspace);
  loss.finish.temperature[0] = call.temperature;
  loss.finish.temperature[1] = call.teacher_temperature;
  loss.query = call.query;
  loss.key = call.key;
  loss.rule = call.rule;
  loss.positive = call.positive;
  loss.normalize = call.normalize;
  loss.teacher_softmax = needs_softmax(call.rule);
  loss.log_queue_size = std::log(static_cast<double>(call.queue_size));
  loss.ranks = stream.ranks;
  loss.loss = call.loss;
  loss.dquery = call.dquery;
  loss.confidence = needs_softmax(call.rule) ? call.confidence : nullptr;
  loss.entropy = needs_softmax(call.rule) ? call.entropy : nullptr;
  loss.positive_rank = call.positive_rank;
  loss.neighbor_indices = call.neighbor_indices;
  return loss;
}

}  // namespace

std::int64_t soft_contrastive_workspace(const Call& call, int device) {
  return make_plan(work_of(call, device)).workspace_bytes;
}

void soft_contrastive(const Call& call, const Launch& where) {
  const Work work = work_of(call, where.device);
  const Plan plan = make_plan(work);
  check_launch(where, plan.workspace_bytes);
  const DeviceGuard guard(where.device);

  StreamParams stream = stream_params(work, plan, where.workspace);
  stream.rows[0] = call.query;
  stream.rows[1] = call.key;
  stream.queue = call.queue;
  stream.scale[0] = static_cast<float>(kLog2E / call.temperature);
  stream.scale[1] = static_cast<float>(kLog2E / call.teacher_temperature);
  stream.row_type = call.vector_type;
  stream.queue_type = call.queue_type;
  stream.aligned = is_aligned(call.query, work.dim) && is_aligned(call.key, work.dim) &&
                   is_aligned(call.queue, work.dim);
  stream.normalize = call.normalize;
  stream.softmax = work.pairing == Pairing::kSingle || needs_softmax(call.rule);
  launch_planned_stream(stream, work, plan, where.stream);

  const LossParams loss = loss_params(call, work, plan, stream, where.workspace);
  launch(&finish_kernel, dim3(plan.finish_blocks), kFinishThreads,
         finish_shared_bytes(loss.finish.num_neighbors), static_cast<cudaStream_t>(where.stream),
         loss, can_launch_early(&finish_kernel));
}

}  // namespace softcl::cuda

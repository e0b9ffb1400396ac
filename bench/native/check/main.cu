// softcl_cuda_check: the kernels against a double-precision host reference, then their times, with
// no Python and no torch: to develop, sanitise and profile them by themselves.
//
//     cmake -S . -B build/check -DSOFTCL_PYTHON=OFF
//     cmake --build build/check -t softcl_cuda_check
//     build/check/softcl_cuda_check [--rows N --queue K --dim D] [--neighbors n] [--time] ...
//
// Exit status: 0 all results within their tolerances, 1 some are not, 2 an unusable argument,
// 77 no CUDA device.

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "check/ceiling.h"
#include "check/device_memory.h"
#include "check/errors.h"
#include "check/options.h"
#include "check/reference.h"
#include "check/timing.h"
#include "softcl/cuda.h"
#include "softcl/device.h"

namespace softcl::check {

namespace {

constexpr int kFailed = 1, kBadArgument = 2, kNoDevice = 77;
constexpr double kTemperature = 0.1, kTeacherTemperature = 0.05;

struct Problem {
  Rows query, key, queue;
  Device<unsigned char> query_on, key_on, queue_on;

  Problem(Rows z, Rows t, Rows q)
      : query(std::move(z)),
        key(std::move(t)),
        queue(std::move(q)),
        query_on(query.bytes),
        key_on(key.bytes),
        queue_on(queue.bytes) {}
  bool in_parts() const { return query.type != queue.type || query.type == ElementType::kFloat32; }
  double loss_tolerance() const {
    return check::loss_tolerance(query.dim, in_parts(), kTemperature);
  }
  double gradient_tolerance() const {
    return in_parts() ? kPartsGradientTolerance : kHalfGradientTolerance;
  }
};

Problem make_problem(std::int64_t N, std::int64_t K, std::int64_t D, ElementType row_type,
                     ElementType queue_type, std::mt19937_64& random) {
  const Rows none{row_type, 0, D, {}, {}};
  Rows key = make_rows(row_type, N, D, none, random);
  Rows query = make_rows(row_type, N, D, key, random);
  // Half of the queue around the keys: sharp softmaxes, and neighbours that matter.
  Rows queue = make_rows(queue_type, K / 2, D, key, random);
  const Rows rest = make_rows(queue_type, K - K / 2, D, none, random);
  queue.count = K;
  queue.bytes.insert(queue.bytes.end(), rest.bytes.begin(), rest.bytes.end());
  queue.values.insert(queue.values.end(), rest.values.begin(), rest.values.end());
  return Problem(std::move(query), std::move(key), std::move(queue));
}

/// The inputs that both operators have.
Call call_on(const Problem& p) {
  Call call;
  call.query = p.query_on.get();
  call.queue = p.queue_on.get();
  call.vector_type = p.query.type;
  call.queue_type = p.queue.type;
  call.num_queries = p.query.count;
  call.queue_size = p.queue.count;
  call.dim = p.query.dim;
  call.temperature = kTemperature;
  return call;
}

struct LossCall {
  Call call;
  Device<float> loss, dquery, confidence, entropy;
  Device<std::int64_t> rank, indices;
  Device<unsigned char> workspace;
  cuda::Launch launch;

  LossCall(const Problem& p, const LabelRule& rule, int device)
      : call(make_call(p, rule)),
        loss(p.query.count),
        dquery(p.query.count * p.query.dim),
        confidence(p.query.count),
        entropy(p.query.count),
        rank(p.query.count),
        indices(p.query.count * rule.num_neighbors),
        workspace(cuda::workspace_bytes(with_outputs(), device)) {
    launch = {device, nullptr, workspace.get(), static_cast<std::int64_t>(workspace.bytes())};
  }
  void run() { cuda::run(call, launch); }

 private:
  static Call make_call(const Problem& p, const LabelRule& rule) {
    Call call = call_on(p);
    call.key = p.key_on.get();
    call.rule = rule;
    call.teacher_temperature = kTeacherTemperature;
    return call;
  }
  const Call& with_outputs() {
    call.loss = loss.get();
    call.dquery = dquery.get();
    call.confidence = confidence.get();
    call.entropy = entropy.get();
    call.positive_rank = rank.get();
    call.neighbor_indices = indices.get();
    return call;
  }
};

void check_loss_row(Errors& errors, const Problem& p, const LabelRule& rule, std::int64_t n,
                    const std::vector<float>& loss, const std::vector<float>& dquery,
                    const std::vector<float>& confidence, const std::vector<float>& entropy,
                    const std::vector<std::int64_t>& rank,
                    const std::vector<std::int64_t>& indices) {
  const std::int64_t D = p.query.dim;
  const Loss want =
      loss_of(p.query.row(n), p.key.row(n), p.queue, rule, kTemperature, kTeacherTemperature, true);
  note(errors, "loss", relative(loss[n], want.loss), p.loss_tolerance());
  const double least = 1.0 / (std::sqrt(static_cast<double>(D)) * kTemperature);
  note(errors, "gradient", gradient_error(&dquery[n * D], want.dquery, least),
       p.gradient_tolerance());
  if (needs_softmax(rule)) {
    note(errors, "entropy", relative(entropy[n], want.entropy), kEntropyTolerance);
    note(errors, "confidence", relative(confidence[n], want.confidence), kEntropyTolerance);
  }
  std::int64_t fewest = 0, most = 0;
  for (const double cosine : want.student.cosines) {
    fewest += cosine > want.positive_cosine + kCosineTolerance;
    most += cosine > want.positive_cosine - kCosineTolerance;
  }
  note(errors, "rank", rank[n] < fewest || rank[n] > most ? INFINITY : 0.0, 1.0);
  note(errors, "neighbors",
       neighbor_error(&indices[n * rule.num_neighbors], want.teacher.cosines, rule.num_neighbors),
       kCosineTolerance);
}

Errors check_loss(const Problem& p, const LabelRule& rule, int device) {
  LossCall call(p, rule, device);
  call.run();
  SOFTCL_CUDA_CHECK(cudaDeviceSynchronize());
  const auto loss = call.loss.download(), dquery = call.dquery.download();
  const auto confidence = call.confidence.download(), entropy = call.entropy.download();
  const auto rank = call.rank.download(), indices = call.indices.download();
  Errors errors;
  for (std::int64_t n = 0; n < p.query.count; ++n) {
    check_loss_row(errors, p, rule, n, loss, dquery, confidence, entropy, rank, indices);
  }
  call.run();
  const bool again = call.loss.download() == loss && call.dquery.download() == dquery;
  note(errors, "same bits", again ? 0.0 : INFINITY, 1.0);
  // Without what is not asked for, perhaps by another variant of the kernel.
  call.call.dquery = nullptr;
  call.call.positive_rank = call.call.neighbor_indices = nullptr;
  call.run();
  const auto alone = call.loss.download();
  for (std::int64_t n = 0; n < p.query.count; ++n) {
    note(errors, "loss alone", relative(alone[n], loss[n]), p.loss_tolerance());
  }
  return errors;
}

Errors check_statistics(const Problem& p, std::int64_t neighbors, int device) {
  const std::int64_t N = p.query.count, D = p.query.dim;
  Device<float> lse(N), mean(N * D), entropy(N), logits(N * neighbors);
  Device<std::int64_t> indices(N * neighbors);
  Call call = call_on(p);
  call.rule.num_neighbors = neighbors;
  call.lse = lse.get();
  call.mean = mean.get();
  call.entropy = entropy.get();
  call.neighbor_logits = logits.get();
  call.neighbor_indices = indices.get();
  const Device<unsigned char> workspace(cuda::workspace_bytes(call, device));
  cuda::run(call, {device, nullptr, workspace.get(), static_cast<std::int64_t>(workspace.bytes())});
  SOFTCL_CUDA_CHECK(cudaDeviceSynchronize());
  const auto own_lse = lse.download(), own_mean = mean.download(), own_entropy = entropy.download();
  const auto own_logits = logits.download();
  const auto own_indices = indices.download();
  Errors errors;
  for (std::int64_t n = 0; n < N; ++n) {
    const Softmax want = softmax_over(p.query.row(n), p.queue, kTemperature);
    note(errors, "lse", relative(own_lse[n], want.lse), p.loss_tolerance());
    note(errors, "mean", gradient_error(&own_mean[n * D], want.mean, 0.0), p.gradient_tolerance());
    note(errors, "entropy", relative(own_entropy[n], want.entropy), kEntropyTolerance);
    const std::int64_t* row = &own_indices[n * neighbors];
    const double error = neighbor_error(row, want.cosines, neighbors);
    note(errors, "neighbors", error, kCosineTolerance);
    for (std::int64_t i = 0; i < neighbors && error < INFINITY; ++i) {
      const double cosine = own_logits[n * neighbors + i] * kTemperature;
      note(errors, "neighbor logits", std::fabs(cosine - want.cosines[row[i]]), kCosineTolerance);
    }
  }
  return errors;
}

const char* name_of(ElementType type) {
  return type == ElementType::kFloat32 ? "fp32" : type == ElementType::kBFloat16 ? "bf16" : "fp16";
}

/// Prints one line; returns whether all errors are within `tolerance` of theirs.
bool report(const Problem& p, const char* what, const Errors& errors, double tolerance) {
  bool good = true;
  std::string line;
  for (const auto& [name, share] : errors) {
    const bool within = share <= tolerance;
    good &= within;
    char text[64];
    std::snprintf(text, sizeof(text), "  %s %.2g%s", name.c_str(), share, within ? "" : " !");
    line += text;
  }
  std::printf("%-6s N=%lld K=%lld D=%lld %s/%s %-18s%s\n", good ? "ok" : "FAILED",
              static_cast<long long>(p.query.count), static_cast<long long>(p.queue.count),
              static_cast<long long>(p.query.dim), name_of(p.query.type), name_of(p.queue.type),
              what, line.c_str());
  return good;
}

struct NamedRule {
  const char* name;
  LabelRule rule;
};

/// The published rules, and one that uses every number at once.
std::vector<NamedRule> named_rules(std::int64_t neighbors) {
  LabelRule relational;
  relational.positive = 0.0;
  relational.mean = 1.0;
  LabelRule distillation = relational;
  distillation.teacher_positive = TeacherPositive::kSelf;
  LabelRule mixed;
  mixed.positive = 0.3;
  mixed.mean = 0.7;
  LabelRule adaptive_soft;
  adaptive_soft.confident_mean = static_cast<double>(neighbors);
  adaptive_soft.clip = true;
  adaptive_soft.num_neighbors = neighbors;
  LabelRule adaptive_neighbors;
  adaptive_neighbors.confident_neighbor = 1.0;
  adaptive_neighbors.num_neighbors = neighbors;
  LabelRule nearest;
  nearest.neighbor = 1.0;
  nearest.num_neighbors = neighbors;
  LabelRule every = mixed;
  every.confident_mean = 0.5;
  every.neighbor = 0.2;
  every.confident_neighbor = 0.4;
  every.num_neighbors = neighbors;
  every.teacher_positive = TeacherPositive::kZero;
  return {{"hard", {}},
          {"relational", relational},
          {"distillation", distillation},
          {"mixed", mixed},
          {"adaptive_soft", adaptive_soft},
          {"adaptive_neighbors", adaptive_neighbors},
          {"neighbors", nearest},
          {"every_number", every}};
}

/// Loss and gradient alone, of every rule, beside the ceiling of the products that they take.
void time_rules(const Problem& p, const Ceilings& ceilings, const Options& options) {
  const bool in_parts = p.in_parts();
  const Ceiling& ceiling = in_parts ? ceilings.fp16 : ceilings.of(p.query.type);
  for (const auto& [name, rule] : named_rules(std::min(options.neighbors, p.queue.count))) {
    LossCall call(p, rule, options.device);
    call.call.confidence = call.call.entropy = nullptr;
    call.call.positive_rank = call.call.neighbor_indices = nullptr;
    const double time = microseconds([&] { call.run(); }, options.repeat);
    const double flop = loss_flop(p.query.count, p.queue.count, p.query.dim, rule);
    std::printf(
        "time   N=%lld K=%lld D=%lld %s/%s %-18s  %.1f us  %.4g TFLOP/s  %.3g %% of the %s "
        "ceiling%s\n",
        static_cast<long long>(p.query.count), static_cast<long long>(p.queue.count),
        static_cast<long long>(p.query.dim), name_of(p.query.type), name_of(p.queue.type), name,
        time, flop / time * 1e-6,
        100.0 * flop * products_of_one(in_parts) / (time * 1e-6) / ceiling.flop_per_second,
        ceiling.instruction, in_parts ? ", three products for one" : "");
  }
}

/// Of the instruction that the fast calls take; what runs in another kernel there, for its shape,
/// is held against it all the same.
Ceilings measure_and_print(int device) {
  const Ceilings ceilings = measure_ceilings(device);
  for (const ElementType type : {ElementType::kBFloat16, ElementType::kFloat16}) {
    const Ceiling& ceiling = ceilings.of(type);
    std::printf("ceiling %s %.4g TFLOP/s: %s alone, in a loop on this device, operands in %s\n",
                name_of(type), ceiling.flop_per_second * 1e-12, ceiling.instruction,
                ceiling.operands);
  }
  return ceilings;
}

/// Every rule and the statistics on one problem.
bool check_all(const Problem& p, const Options& options) {
  const std::int64_t neighbors = std::min(options.neighbors, p.queue.count);
  bool good = true;
  for (const auto& [name, rule] : named_rules(neighbors)) {
    good &= report(p, name, check_loss(p, rule, options.device), options.tolerance);
  }
  const Errors errors = check_statistics(p, neighbors, options.device);
  return report(p, "queue_statistics", errors, options.tolerance) && good;
}

bool run(const Options& options) {
  struct Shape {
    std::int64_t N, K, D;
  };
  std::vector<Shape> shapes = {{3, 40, 33}, {70, 150, 64}, {5, 200, 128}, {9, 90, 200}};
  if (options.rows > 0) shapes = {{options.rows, options.queue, options.dim}};
  constexpr ElementType kBF16 = ElementType::kBFloat16, kFP16 = ElementType::kFloat16,
                        kFP32 = ElementType::kFloat32;
  constexpr ElementType kTypes[][2] = {
      {kBF16, kBF16}, {kFP16, kFP16}, {kFP32, kFP32}, {kBF16, kFP32}};
  std::mt19937_64 random(options.seed);
  const Ceilings ceilings = options.time ? measure_and_print(options.device) : Ceilings{};
  bool good = true;
  for (const Shape& shape : shapes) {
    for (const auto& types : kTypes) {
      if (shape.D > cuda::most_dimensions(types[0], types[1], options.device)) {
        std::printf("skipped D=%lld %s/%s: the device has no room for it\n",
                    static_cast<long long>(shape.D), name_of(types[0]), name_of(types[1]));
        continue;
      }
      const Problem p = make_problem(shape.N, shape.K, shape.D, types[0], types[1], random);
      good &= check_all(p, options);
      if (options.time) time_rules(p, ceilings, options);
    }
  }
  std::printf(good ? "all results are within their tolerances\n"
                   : "some results are not within their tolerances\n");
  return good;
}

int main_program(int count, char** words) {
  const Options options = parse(count, words);
  if (options.help) {
    std::printf("%s", kHelp);
    return 0;
  }
  const int devices = cuda::device_count();
  if (devices == 0) {
    std::printf("no CUDA device: %s\n", cuda::no_device_reason().c_str());
    return kNoDevice;
  }
  const cuda::Device device = cuda::device(options.device);
  SOFTCL_CUDA_CHECK(cudaSetDevice(options.device));
  std::printf("%s, compute capability %d.%d, %d multiprocessors\n", device.name.c_str(),
              device.major, device.minor, device.multiprocessors);
  return run(options) ? 0 : kFailed;
}

}  // namespace

}  // namespace softcl::check

int main(int count, char** words) {
  try {
    return softcl::check::main_program(count, words);
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "softcl_cuda_check: %s\n", error.what());
    return softcl::check::kBadArgument;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "softcl_cuda_check: %s\n", error.what());
    return softcl::check::kFailed;
  }
}

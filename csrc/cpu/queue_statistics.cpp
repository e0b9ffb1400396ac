// Softmax statistics of every vector over the queue, in one pass (see queue_pass.h).

#include <cmath>
#include <limits>

#include "arena.h"
#include "isa.h"
#include "parallel.h"
#include "pass/queue_pass.h"
#include "search/search.h"
#include "softcl/checks.h"

namespace softcl::cpu {

namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

void write_row(const Call& p, std::int64_t row, int lane, int lanes, const StripResult& result,
               bool finite) {
  const std::int64_t D = p.dim, k = p.rule.num_neighbors;
  if (p.lse != nullptr) p.lse[row] = finite ? float(result.lse[lane]) : kNaN;
  if (p.entropy != nullptr) p.entropy[row] = finite ? float(result.entropy[lane]) : kNaN;
  if (p.mean != nullptr) {
    for (std::int64_t d = 0; d < D; ++d) {
      p.mean[row * D + d] = finite ? float(result.mean[d * lanes + lane]) : kNaN;
    }
  }
  if (k == 0) return;
  const Neighbor* neighbors = result.neighbors + lane * result.neighbor_stride;
  const bool has_all = finite && result.num_neighbors[lane] == k;
  for (std::int64_t i = 0; i < k; ++i) {
    // Of rows that are not finite the first k are named: valid rows, to gather without a check.
    p.neighbor_logits[row * k + i] =
        has_all ? float(double(neighbors[i].value) / p.temperature) : kNaN;
    p.neighbor_indices[row * k + i] = has_all ? neighbors[i].index : i;
  }
}

}  // namespace

void queue_statistics(const Call& p) {
  check_call(p, {});
  check_count("num_threads", p.num_threads, 1, kMostThreads);
  const bool is_search = p.lse == nullptr && p.entropy == nullptr && p.mean == nullptr;
  if (is_search && p.rule.num_neighbors > 0 && p.excluded == nullptr && screened_search(p)) return;
  const int lanes = sweep_kernels().lanes;
  const std::int64_t strips = (p.num_queries + lanes - 1) / lanes;
  Rows rows;
  std::int64_t* excluded = nullptr;  // (strips, lanes)
  float* scratch = nullptr;          // (threads, D)
  const auto lay_out = [&](Arena& arena) {
    rows.strips = arena.take<float>(strips * lanes * p.dim);
    rows.norm = arena.take<double>(strips * lanes);
    rows.finite = arena.take<bool>(strips * lanes);
    scratch = arena.take<float>(p.num_threads * p.dim);
    if (p.excluded != nullptr) excluded = arena.take<std::int64_t>(strips * lanes);
  };
  Arena measure;
  lay_out(measure);
  Arena arena(measure.used());
  lay_out(arena);
  parallel_for(p.num_threads, strips, [&](std::int64_t strip, int thread) {
    read_strip(p.query, p.vector_type, p.num_queries, p.dim, false, strip * lanes, lanes,
               scratch + thread * p.dim, rows);
    if (p.excluded != nullptr) read_excluded(p.excluded, p.num_queries, strip, lanes, excluded);
  });

  PassRequest request;
  request.queue = p.queue;
  request.queue_type = p.queue_type;
  request.num_rows = p.num_queries;
  request.queue_size = p.queue_size;
  request.dim = p.dim;
  request.num_threads = p.num_threads;
  request.excluded = excluded;
  request.num_reductions = 1;
  request.reductions[0].rows = &rows;
  request.reductions[0].temperature = p.temperature;
  request.reductions[0].has_mean = p.mean != nullptr;
  request.reductions[0].has_softmax = p.lse != nullptr || p.entropy != nullptr || p.mean != nullptr;
  request.reductions[0].num_neighbors = p.rule.num_neighbors;
  run_pass(request, [&](std::int64_t strip, StripResult* results, bool finite, int) {
    for (int lane = 0; lane < lanes; ++lane) {
      const std::int64_t row = strip * lanes + lane;
      if (row >= p.num_queries) break;
      write_row(p, row, lane, lanes, results[0], finite && rows.finite[row]);
    }
  });
}

}  // namespace softcl::cpu

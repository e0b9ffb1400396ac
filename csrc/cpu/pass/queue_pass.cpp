#include "pass/queue_pass.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "arena.h"
#include "isa.h"
#include "parallel.h"
#include "pass/plan.h"
#include "pieces.h"

namespace softcl::cpu {

namespace {

constexpr double kLn2 = 0.693147180559945309417232121458;

// What a reduction leaves for one block and one split.
struct Piece {
  Reduction reductions[kMaxReductions];
  bool finite = true;
};

// What a thread needs while it sweeps and while it finishes rows.
struct Workspace {
  float* tile;
  float* similarities[kMaxReductions] = {};
  float* weights[kMaxReductions] = {};
  float* kept[kMaxReductions] = {};   // (strips_per_block, kept_rows, lanes)
  float* share[kMaxReductions] = {};  // (strips_per_block, lanes)
  float* partial_mean[kMaxReductions] = {};
  double* mean[kMaxReductions] = {};
  Neighbor* candidates[kMaxReductions] = {};
};

class Pass {
 public:
  Pass(const PassRequest& request, const Plan& plan, const WeighStrip& weigh,
       const FinishStrip& finish)
      : request_(request), weigh_(weigh), finish_(finish), kernels_(sweep_kernels()), plan_(plan) {}

  void run() {
    Arena measure;
    lay_out(measure);
    Arena arena(measure.used());
    lay_out(arena);
    const int threads = static_cast<int>(plan_.num_threads);
    if (!plan_.is_split()) {
      parallel_for(threads, plan_.blocks, [&](std::int64_t block, int thread) {
        sweep(block, 0, pieces_[thread], workspaces_[thread]);
        if (plan_.keeps_weights()) combine(block, pieces_[thread], workspaces_[thread]);
        for (std::int64_t strip = 0; strip < plan_.block_strips(block); ++strip) {
          finish_strip(block, &pieces_[thread], strip, thread);
        }
      });
      return;
    }
    parallel_for(threads, plan_.blocks * plan_.splits, [&](std::int64_t i, int thread) {
      sweep(i / plan_.splits, i % plan_.splits, pieces_[i], workspaces_[thread]);
    });
    parallel_for(threads, plan_.strips, [&](std::int64_t strip, int thread) {
      const std::int64_t block = strip / plan_.strips_per_block;
      finish_strip(block, &pieces_[block * plan_.splits], strip % plan_.strips_per_block, thread);
    });
  }

 private:
  void lay_out(Arena& arena) {
    const std::int64_t D = request_.dim;
    const std::int64_t rows = plan_.strips_per_block * plan_.lanes;
    const std::int64_t num_pieces =
        plan_.is_split() ? plan_.blocks * plan_.splits : plan_.num_threads;
    pieces_.resize(num_pieces);
    workspaces_.resize(plan_.num_threads);
    for (Piece& piece : pieces_) {
      for (int i = 0; i < request_.num_reductions; ++i) {
        const ReductionRequest& wanted = request_.reductions[i];
        Reduction& r = piece.reductions[i];
        if (wanted.has_softmax) {
          r.offset = arena.take<float>(rows);
          r.sum = arena.take<double>(rows);
          r.weighted = arena.take<double>(rows);
        }
        if (has_sums_of_rows(i)) r.mean = arena.take<double>(rows * D);
        if (wants_alignment(i)) r.alignment = arena.take<double>(rows);
        if (wanted.positive != nullptr) r.rank = arena.take<std::int64_t>(rows);
        if (wanted.num_neighbors > 0) {
          r.neighbors.k = wanted.num_neighbors;
          r.neighbors.capacity = capacity_of(wanted);
          r.neighbors.threshold = arena.take<float>(rows);
          r.neighbors.count = arena.take<std::int64_t>(rows);
          r.neighbors.items = arena.take<Neighbor>(rows * r.neighbors.capacity);
        }
      }
    }
    for (Workspace& w : workspaces_) {
      w.tile = arena.take<float>(plan_.tile_rows * tile_stride(D));
      lay_out_weights(arena, w);
      for (int i = 0; i < request_.num_reductions; ++i) {
        const ReductionRequest& wanted = request_.reductions[i];
        if (has_sums_of_rows(i)) {
          w.partial_mean[i] = arena.take<float>(rows * D);
          if (!plan_.keeps_weights()) w.mean[i] = arena.take<double>(plan_.lanes * D);
        }
        if (wanted.num_neighbors > 0 && plan_.is_split()) {
          w.candidates[i] = arena.take<Neighbor>(plan_.lanes * plan_.splits * capacity_of(wanted));
        }
      }
    }
  }

  // One S and E for all, unless the first reduction's S must outlive the second's.
  void lay_out_weights(Arena& arena, Workspace& w) const {
    const std::int64_t size = plan_.tile_rows * plan_.lanes;
    w.similarities[0] = w.similarities[1] = w.weights[0] = w.weights[1] = arena.take<float>(size);
    if (wants_alignment(1)) {
      w.similarities[1] = w.weights[0] = w.weights[1] = arena.take<float>(size);
    }
    if (!plan_.keeps_weights()) return;
    for (int i = 0; i < request_.num_reductions; ++i) {
      w.kept[i] = arena.take<float>(plan_.strips_per_block * plan_.kept_rows * plan_.lanes);
      w.share[i] = arena.take<float>(plan_.strips_per_block * plan_.lanes);
    }
  }

  // Where weights are kept the first reduction takes the sums of both.
  bool has_sums_of_rows(int i) const {
    return request_.reductions[i].has_mean && (i == 0 || !plan_.keeps_weights());
  }

  bool wants_alignment(int i) const {
    return i == 1 && (request_.reductions[i].has_alignment || plan_.keeps_weights());
  }

  std::int64_t capacity_of(const ReductionRequest& wanted) const {
    return list_capacity(wanted.num_neighbors, std::min(request_.queue_size, plan_.split_rows));
  }

  SweepTask task_of(std::int64_t block, std::int64_t split, const Piece& piece,
                    const Workspace& workspace) const {
    const std::int64_t first_row = block * plan_.strips_per_block * plan_.lanes;
    SweepTask task;
    task.queue = request_.queue;
    task.queue_type = request_.queue_type;
    task.dim = request_.dim;
    task.begin = split * plan_.split_rows;
    task.end = std::min(task.begin + plan_.split_rows, request_.queue_size);
    task.strips = plan_.block_strips(block);
    task.num_reductions = request_.num_reductions;
    if (request_.excluded != nullptr) task.excluded = request_.excluded + first_row;
    task.kept_rows = plan_.kept_rows;
    task.tile_rows = plan_.tile_rows;
    task.tile = workspace.tile;
    for (int i = 0; i < request_.num_reductions; ++i) {
      const ReductionRequest& wanted = request_.reductions[i];
      Reduction r = piece.reductions[i];
      r.rows = wanted.rows->strips + first_row * request_.dim;
      r.positive = wanted.positive == nullptr ? nullptr : wanted.positive + first_row;
      r.scale = sweep_scale(wanted.temperature);
      r.has_softmax = wanted.has_softmax;
      r.has_mean = wanted.has_mean && !plan_.keeps_weights();
      r.kept = workspace.kept[i];
      r.share = workspace.share[i];
      task.reductions[i] = r;
      task.partial_mean[i] = workspace.partial_mean[i];
      task.similarities[i] = workspace.similarities[i];
      task.weights[i] = workspace.weights[i];
    }
    return task;
  }

  void sweep(std::int64_t block, std::int64_t split, Piece& piece,
             const Workspace& workspace) const {
    SweepTask task = task_of(block, split, piece, workspace);
    kernels_.sweep(task);
    piece.finite = task.finite;
  }

  // After the sweep of a block: the shares of its rows, then their mean of both reductions.
  void combine(std::int64_t block, Piece& piece, const Workspace& workspace) const {
    for (std::int64_t local = 0; local < plan_.block_strips(block); ++local) {
      StripResult results[kMaxReductions];
      for (int i = 0; i < kMaxReductions; ++i) {
        merge_sums(&piece, i, local, results[i]);
        merge_neighbors(&piece, i, local, nullptr, results[i]);
      }
      double shares[kMaxReductions][kMaxLanes];
      weigh_(block * plan_.strips_per_block + local, results, shares);
      for (int i = 0; i < kMaxReductions; ++i) {
        for (int lane = 0; lane < plan_.lanes; ++lane) {
          const std::int64_t row = local * plan_.lanes + lane;
          workspace.share[i][row] = float(shares[i][lane] / piece.reductions[i].sum[row]);
        }
      }
    }
    SweepTask task = task_of(block, 0, piece, workspace);
    task.reductions[0].has_mean = true;
    kernels_.combine(task);
  }

  // Strip `local` of a block whose pieces, one per split, lie at `pieces`.
  void finish_strip(std::int64_t block, Piece* pieces, std::int64_t local, int thread) {
    bool finite = true;
    for (std::int64_t split = 0; split < plan_.splits; ++split) finite &= pieces[split].finite;
    StripResult results[kMaxReductions];
    for (int i = 0; i < request_.num_reductions; ++i) {
      merge_sums(pieces, i, local, results[i]);
      merge_mean(pieces, i, local, workspaces_[thread].mean[i], results[i]);
      merge_neighbors(pieces, i, local, workspaces_[thread].candidates[i], results[i]);
    }
    finish_(block * plan_.strips_per_block + local, results, finite, thread);
  }

  void merge_sums(const Piece* pieces, int i, std::int64_t local, StripResult& result) const {
    const ReductionRequest& wanted = request_.reductions[i];
    const int lanes = plan_.lanes;
    const std::int64_t row = local * lanes, splits = plan_.splits;
    if (wanted.positive != nullptr) {
      for (int lane = 0; lane < lanes; ++lane) {
        result.rank[lane] = 0;
        for (std::int64_t split = 0; split < splits; ++split) {
          result.rank[lane] += pieces[split].reductions[i].rank[row + lane];
        }
      }
    }
    if (!wanted.has_softmax) return;
    for (int lane = 0; lane < lanes; ++lane) {
      double offset = -std::numeric_limits<double>::infinity();
      for (std::int64_t split = 0; split < splits; ++split) {
        offset = std::max(offset, double(pieces[split].reductions[i].offset[row + lane]));
      }
      double sum = 0.0, weighted = 0.0, alignment = 0.0;
      for (std::int64_t split = 0; split < splits; ++split) {
        const Reduction& r = pieces[split].reductions[i];
        const double difference = offset - double(r.offset[row + lane]);
        const double factor = std::exp2(-difference);
        sum += factor * r.sum[row + lane];
        weighted += factor * (r.weighted[row + lane] - difference * r.sum[row + lane]);
        if (r.alignment != nullptr) alignment += factor * r.alignment[row + lane];
      }
      // One weight of unit rows is near 1. Where all are 0, logits were beyond float's precision:
      // no number then, where a logarithm of 0 would leave a loss finite and wrong.
      const double log_sum = sum > 0.0 ? std::log(sum) : std::nan("");
      result.offset[lane] = offset;
      result.sum[lane] = sum;
      result.lse[lane] = kLn2 * offset + log_sum;
      // The offset cancels; both terms are small where lse - E[x] would cancel.
      result.entropy[lane] = log_sum - kLn2 * weighted / sum;
      result.alignment[lane] = alignment / sum;
    }
  }

  void merge_mean(Piece* pieces, int i, std::int64_t local, double* mean,
                  StripResult& result) const {
    if (!has_sums_of_rows(i)) return;
    const int lanes = plan_.lanes;
    const std::int64_t row = local * lanes, splits = plan_.splits;
    if (plan_.keeps_weights()) {
      result.mean = pieces[0].reductions[i].mean + row * request_.dim;
      return;
    }
    result.mean = mean;
    for (std::int64_t split = 0; split < splits; ++split) {
      const Reduction& r = pieces[split].reductions[i];
      double factor[kMaxLanes];
      for (int lane = 0; lane < lanes; ++lane) {
        factor[lane] =
            std::exp2(double(r.offset[row + lane]) - result.offset[lane]) / result.sum[lane];
      }
      const double* part = r.mean + row * request_.dim;
      for (std::int64_t d = 0; d < request_.dim; ++d) {
        for (int lane = 0; lane < lanes; ++lane) {
          const double share = factor[lane] * part[d * lanes + lane];
          mean[d * lanes + lane] = split == 0 ? share : mean[d * lanes + lane] + share;
        }
      }
    }
  }

  void merge_neighbors(Piece* pieces, int i, std::int64_t local, Neighbor* candidates,
                       StripResult& result) const {
    const std::int64_t k = request_.reductions[i].num_neighbors;
    if (k == 0) return;
    const std::int64_t row = local * plan_.lanes;
    const NeighborLists& own = pieces[0].reductions[i].neighbors;
    result.neighbor_stride = plan_.splits * own.capacity;
    // One split: the lists are sorted where they are.
    result.neighbors = plan_.is_split() ? candidates : own.items + row * own.capacity;
    for (int lane = 0; lane < plan_.lanes; ++lane) {
      Neighbor* items = result.neighbors + lane * result.neighbor_stride;
      std::int64_t count = 0;
      for (std::int64_t split = 0; split < plan_.splits; ++split) {
        const NeighborLists& lists = pieces[split].reductions[i].neighbors;
        const std::int64_t found = lists.count[row + lane];
        if (plan_.is_split()) {
          std::copy_n(lists.items + (row + lane) * lists.capacity, found, items + count);
        }
        count += found;
      }
      result.num_neighbors[lane] = sort_best(items, count, k);
    }
  }

  const PassRequest& request_;
  const WeighStrip& weigh_;
  const FinishStrip& finish_;
  const SweepKernels& kernels_;
  const Plan plan_;
  std::vector<Piece> pieces_;
  std::vector<Workspace> workspaces_;
};

}  // namespace

float sweep_scale(double temperature) {
  return static_cast<float>(1.0 / (kLn2 * temperature));
}

double sweep_temperature(double temperature) {
  return 1.0 / (kLn2 * double(sweep_scale(temperature)));
}

void run_pass(const PassRequest& request, const FinishStrip& finish) {
  Pass(request, make_plan(request, sweep_kernels().lanes), {}, finish).run();
}

void run_combined_pass(const PassRequest& request, const WeighStrip& weigh,
                       const FinishStrip& finish) {
  Pass(request, make_combined_plan(request, sweep_kernels().lanes).value(), weigh, finish).run();
}

}  // namespace softcl::cpu

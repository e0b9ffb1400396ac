#include "queue_pass.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "arena.h"
#include "isa.h"
#include "parallel.h"
#include "pieces.h"

namespace softcl::cpu {

namespace {

constexpr double kLn2 = 0.693147180559945309417232121458;

// Strips and sums of a block, which the sweep visits once per tile, may take so much of the L2
// cache; strips alone, which are only read, twice that.
constexpr std::int64_t kBlockBytes = 256 << 10;
// Lists of neighbours may take so much per block.
constexpr std::int64_t kListBytes = 16 << 20;
// A split is at least so long, or merging its sums would show.
constexpr std::int64_t kMinSplitRows = 768;
struct Plan {
  int lanes;
  std::int64_t strips;  // of all rows
  std::int64_t strips_per_block;
  std::int64_t blocks;
  std::int64_t tile_rows;
  std::int64_t split_rows;  // queue rows in a split, a multiple of tile_rows
  std::int64_t splits;
  std::int64_t num_threads;

  bool is_split() const { return splits > 1; }
  std::int64_t block_strips(std::int64_t block) const {
    return std::min(strips_per_block, strips - block * strips_per_block);
  }
};

Plan make_plan(const PassRequest& request, int lanes) {
  Plan plan;
  plan.lanes = lanes;
  plan.num_threads = std::max(1, request.num_threads);
  const std::int64_t D = request.dim, K = request.queue_size, threads = plan.num_threads;
  plan.tile_rows = D <= 256 ? 96 : D <= 1024 ? 48 : 24;

  std::int64_t strip_bytes = 0, list_bytes = 1, block_bytes = 2 * kBlockBytes;
  for (int i = 0; i < request.num_reductions; ++i) {
    const ReductionRequest& r = request.reductions[i];
    strip_bytes += lanes * D * 4 * (r.has_mean ? 2 : 1);
    if (r.has_mean) block_bytes = kBlockBytes;
    list_bytes += lanes * list_capacity(r.num_neighbors, K) * std::int64_t{sizeof(Neighbor)};
  }
  plan.strips = divide_up(request.num_rows, lanes);
  const std::int64_t largest =
      std::max<std::int64_t>(1, std::min(block_bytes / strip_bytes, kListBytes / list_bytes));
  plan.strips_per_block = even_blocks(plan.strips, largest, threads);
  plan.blocks = divide_up(plan.strips, plan.strips_per_block);

  const std::int64_t splits = std::min(best_splits(plan.blocks, threads), K / kMinSplitRows);
  plan.split_rows =
      divide_up(divide_up(K, std::max<std::int64_t>(1, splits)), plan.tile_rows) * plan.tile_rows;
  plan.splits = divide_up(K, plan.split_rows);
  return plan;
}

// What a reduction leaves for one block and one split.
struct Piece {
  Reduction reductions[kMaxReductions];
  bool finite = true;
};

// What a thread needs while it sweeps and while it finishes rows.
struct Workspace {
  float* tile;
  float* weights;
  float* partial_mean[kMaxReductions] = {};
  double* mean[kMaxReductions] = {};
  Neighbor* candidates[kMaxReductions] = {};
};

class Pass {
 public:
  Pass(const PassRequest& request, const FinishStrip& finish)
      : request_(request),
        finish_(finish),
        kernels_(sweep_kernels()),
        plan_(make_plan(request, kernels_.lanes)) {}

  void run() {
    Arena measure;
    lay_out(measure);
    Arena arena(measure.used());
    lay_out(arena);
    const int threads = static_cast<int>(plan_.num_threads);
    if (!plan_.is_split()) {
      parallel_for(threads, plan_.blocks, [&](std::int64_t block, int thread) {
        sweep(block, 0, pieces_[thread], workspaces_[thread]);
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
        if (wanted.has_mean) r.mean = arena.take<double>(rows * D);
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
      w.weights = arena.take<float>(plan_.tile_rows * plan_.lanes);
      for (int i = 0; i < request_.num_reductions; ++i) {
        const ReductionRequest& wanted = request_.reductions[i];
        if (wanted.has_mean) {
          w.partial_mean[i] = arena.take<float>(rows * D);
          w.mean[i] = arena.take<double>(plan_.lanes * D);
        }
        if (wanted.num_neighbors > 0 && plan_.is_split()) {
          w.candidates[i] = arena.take<Neighbor>(plan_.lanes * plan_.splits * capacity_of(wanted));
        }
      }
    }
  }

  std::int64_t capacity_of(const ReductionRequest& wanted) const {
    return list_capacity(wanted.num_neighbors, std::min(request_.queue_size, plan_.split_rows));
  }

  void sweep(std::int64_t block, std::int64_t split, Piece& piece, Workspace& workspace) const {
    const std::int64_t first_row = block * plan_.strips_per_block * plan_.lanes;
    SweepTask task;
    task.queue = request_.queue;
    task.queue_type = request_.queue_type;
    task.dim = request_.dim;
    task.begin = split * plan_.split_rows;
    task.end = std::min(task.begin + plan_.split_rows, request_.queue_size);
    task.strips = plan_.block_strips(block);
    task.num_reductions = request_.num_reductions;
    task.tile_rows = plan_.tile_rows;
    task.tile = workspace.tile;
    task.weights = workspace.weights;
    for (int i = 0; i < request_.num_reductions; ++i) {
      const ReductionRequest& wanted = request_.reductions[i];
      Reduction& r = piece.reductions[i];
      r.rows = wanted.rows->strips + first_row * request_.dim;
      r.positive = wanted.positive == nullptr ? nullptr : wanted.positive + first_row;
      r.scale = sweep_scale(wanted.temperature);
      r.has_softmax = wanted.has_softmax;
      r.has_mean = wanted.has_mean;
      task.reductions[i] = r;
      task.partial_mean[i] = workspace.partial_mean[i];
    }
    kernels_.sweep(task);
    piece.finite = task.finite;
  }

  // Strip `local` of a block whose pieces, one per split, lie at `pieces`.
  void finish_strip(std::int64_t block, Piece* pieces, std::int64_t local, int thread) {
    bool finite = true;
    for (std::int64_t split = 0; split < plan_.splits; ++split) finite &= pieces[split].finite;
    StripResult results[kMaxReductions];
    for (int i = 0; i < request_.num_reductions; ++i) {
      merge_sums(pieces, i, local, workspaces_[thread].mean[i], results[i]);
      merge_neighbors(pieces, i, local, workspaces_[thread].candidates[i], results[i]);
    }
    finish_(block * plan_.strips_per_block + local, results, finite, thread);
  }

  void merge_sums(const Piece* pieces, int i, std::int64_t local, double* mean,
                  StripResult& result) const {
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
    double offset[kMaxLanes], sum[kMaxLanes], weighted[kMaxLanes];
    for (int lane = 0; lane < lanes; ++lane) {
      offset[lane] = -std::numeric_limits<double>::infinity();
      for (std::int64_t split = 0; split < splits; ++split) {
        offset[lane] =
            std::max(offset[lane], double(pieces[split].reductions[i].offset[row + lane]));
      }
      sum[lane] = weighted[lane] = 0.0;
      for (std::int64_t split = 0; split < splits; ++split) {
        const Reduction& r = pieces[split].reductions[i];
        const double difference = offset[lane] - double(r.offset[row + lane]);
        const double factor = std::exp2(-difference);
        sum[lane] += factor * r.sum[row + lane];
        weighted[lane] += factor * (r.weighted[row + lane] - difference * r.sum[row + lane]);
      }
      const double log_sum = std::log(sum[lane]);
      result.lse[lane] = kLn2 * offset[lane] + log_sum;
      // The offset cancels; both terms are small where lse - E[x] would cancel.
      result.entropy[lane] = log_sum - kLn2 * weighted[lane] / sum[lane];
    }
    if (!wanted.has_mean) return;
    result.mean = mean;
    for (std::int64_t split = 0; split < splits; ++split) {
      const Reduction& r = pieces[split].reductions[i];
      double factor[kMaxLanes];
      for (int lane = 0; lane < lanes; ++lane) {
        factor[lane] = std::exp2(double(r.offset[row + lane]) - offset[lane]) / sum[lane];
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
  Pass(request, finish).run();
}

}  // namespace softcl::cpu

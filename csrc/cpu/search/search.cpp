// With y the fixed-point products of a row and Y its k-th largest, k rows have similarities of
// Y - error at least, so a row whose y is below Y - 2 error is not among the k nearest. The others,
// k and a few more, are multiplied again in fp32.

#include "search/search.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <limits>

#include "arena.h"
#include "isa.h"
#include "parallel.h"
#include "pieces.h"
#include "rows.h"
#include "search/neighbors.h"

namespace softcl::cpu {

namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
// Rows of a block take so much of the L2 cache, their lists so much memory.
constexpr std::int64_t kBlockBytes = 512 << 10;
constexpr std::int64_t kListBytes = 4 << 20;
// Below these the exact pass is as fast.
constexpr std::int64_t kLeastDim = 16;
constexpr std::int64_t kLeastRowsPerCandidate = 4;
// Where the bound on the error says little.
constexpr std::int64_t kMostDim = 1 << 15;
// Rounding of the fp32 products that decide in the end.
constexpr double kSlack = 2e-6;

// In units of 1 / kFixedOne^2: products further apart than this are in the order of the exact ones.
std::int32_t margin_of(std::int64_t dim) {
  const double one = kFixedOne, d = double(dim);
  const double error = double(kLargestNorm) * one * std::sqrt(d) + d / 4.0;
  return static_cast<std::int32_t>(std::ceil(2.0 * error + kSlack * one * one)) + 1;
}

struct Workspace {
  Rows rows;                         // of a block
  float* scratch = nullptr;          // (D,)
  float* vector = nullptr;           // (D,)
  std::int32_t* pairs = nullptr;     // (strips, pairs, lanes)
  std::int32_t* tile = nullptr;      // (kScreenTileRows, pair_stride)
  std::int32_t* products = nullptr;  // (kScreenTileRows, lanes)
  std::int32_t* gathered = nullptr;  // (splits * capacity,)
  std::int64_t* indices = nullptr;   // (splits * capacity,)
  float* values = nullptr;           // (splits * capacity,)
  Neighbor* neighbors = nullptr;     // (splits * capacity,)
};

class Search {
 public:
  Search(const Call& call, const ScreenKernels& kernels)
      : p_(call), kernels_(kernels), capacity_(3 * call.rule.num_neighbors + 64) {
    const std::int64_t threads = p_.num_threads, lanes = kernels_.lanes;
    strips_ = divide_up(p_.num_queries, lanes);
    const std::int64_t strip_bytes = num_pairs(p_.dim) * lanes * std::int64_t{4};
    const std::int64_t list_bytes = capacity_ * lanes * std::int64_t{8};
    strips_per_block_ =
        even_blocks(strips_, std::min(kBlockBytes / strip_bytes, kListBytes / list_bytes), threads);
    blocks_ = divide_up(strips_, strips_per_block_);
    const std::int64_t most = p_.queue_size / (kLeastRowsPerCandidate * capacity_);
    const std::int64_t wanted = std::min(best_splits(blocks_, threads), most);
    split_rows_ =
        divide_up(divide_up(p_.queue_size, std::max<std::int64_t>(1, wanted)), kScreenTileRows) *
        kScreenTileRows;
    splits_ = divide_up(p_.queue_size, split_rows_);
  }

  // False if the screen gave up.
  bool run() {
    Arena measure;
    lay_out(measure);
    Arena arena(measure.used());
    lay_out(arena);
    if (splits_ == 1) {
      parallel_for(p_.num_threads, blocks_, [&](std::int64_t block, int thread) {
        screen(block, 0, lists_[thread], workspaces_[thread]);
        for (std::int64_t i = 0; i < block_strips(block) && !gave_up_; ++i) {
          finish_strip(block, i, &lists_[thread], workspaces_[thread]);
        }
      });
      // Other blocks may have written; the caller overwrites all of it.
      return !gave_up_;
    }
    parallel_for(p_.num_threads, blocks_ * splits_, [&](std::int64_t i, int thread) {
      screen(i / splits_, i % splits_, lists_[i], workspaces_[thread]);
    });
    if (gave_up_) return false;
    parallel_for(p_.num_threads, strips_, [&](std::int64_t strip, int thread) {
      const std::int64_t block = strip / strips_per_block_;
      finish_strip(block, strip % strips_per_block_, &lists_[block * splits_], workspaces_[thread]);
    });
    return true;
  }

 private:
  std::int64_t block_strips(std::int64_t block) const {
    return std::min(strips_per_block_, strips_ - block * strips_per_block_);
  }

  void lay_out(Arena& arena) {
    const std::int64_t rows = strips_per_block_ * kernels_.lanes, D = p_.dim;
    lists_.resize(splits_ == 1 ? p_.num_threads : blocks_ * splits_);
    workspaces_.resize(p_.num_threads);
    for (ScreenLists& lists : lists_) {
      lists.k = p_.rule.num_neighbors;
      lists.capacity = capacity_;
      lists.margin = margin_of(D);
      lists.threshold = arena.take<std::int32_t>(rows);
      lists.count = arena.take<std::int32_t>(rows);
      lists.products = arena.take<std::int32_t>(rows * capacity_);
      lists.indices = arena.take<std::int32_t>(rows * capacity_);
    }
    for (Workspace& w : workspaces_) {
      w.rows.strips = arena.take<float>(rows * D);
      w.rows.norm = arena.take<double>(rows);
      w.rows.finite = arena.take<bool>(rows);
      w.scratch = arena.take<float>(D);
      w.vector = arena.take<float>(D);
      w.pairs = arena.take<std::int32_t>(rows * num_pairs(D));
      w.tile = arena.take<std::int32_t>(kScreenTileRows * pair_stride(D));
      w.products = arena.take<std::int32_t>(kScreenTileRows * kernels_.lanes);
      w.gathered = arena.take<std::int32_t>(splits_ * capacity_);
      w.indices = arena.take<std::int64_t>(splits_ * capacity_);
      w.values = arena.take<float>(splits_ * capacity_);
      w.neighbors = arena.take<Neighbor>(splits_ * capacity_);
    }
  }

  void screen(std::int64_t block, std::int64_t split, const ScreenLists& lists, Workspace& w) {
    if (gave_up_) return;
    const std::int64_t lanes = kernels_.lanes, D = p_.dim;
    const std::int64_t first = block * strips_per_block_ * lanes;
    ScreenTask task;
    task.strips = block_strips(block);
    // The block's rows as a matrix of its own: read_strip counts from its start.
    const char* rows = static_cast<const char*>(p_.query) + first * D * size_of(p_.vector_type);
    const std::int64_t num_rows = std::min(p_.num_queries - first, task.strips * lanes);
    for (std::int64_t i = 0; i < task.strips; ++i) {
      read_strip(rows, p_.vector_type, num_rows, D, false, i * lanes, kernels_.lanes, w.scratch,
                 w.rows);
      kernels_.fix_strip(w.rows.strips + i * lanes * D, D, w.pairs + i * lanes * num_pairs(D),
                         lists.threshold + i * lanes);
    }
    std::fill_n(lists.count, task.strips * lanes, 0);
    task.queue = p_.queue;
    task.queue_type = p_.queue_type;
    task.dim = D;
    task.begin = split * split_rows_;
    task.end = std::min(task.begin + split_rows_, p_.queue_size);
    task.rows = w.pairs;
    task.lists = lists;
    task.tile = w.tile;
    task.products = w.products;
    if (!kernels_.screen(task)) gave_up_ = true;
  }

  // Strip `local` of a block whose lists, one for each split, lie at `lists`.
  void finish_strip(std::int64_t block, std::int64_t local, const ScreenLists* lists,
                    Workspace& w) {
    for (int lane = 0; lane < kernels_.lanes; ++lane) {
      const std::int64_t in_block = local * kernels_.lanes + lane;
      const std::int64_t row = block * strips_per_block_ * kernels_.lanes + in_block;
      if (row >= p_.num_queries) return;
      finish_row(row, in_block, lists, w);
    }
  }

  void finish_row(std::int64_t row, std::int64_t in_block, const ScreenLists* lists,
                  Workspace& w) const {
    const std::int64_t k = p_.rule.num_neighbors;
    read_row(p_.query, p_.vector_type, row, p_.dim, w.vector);
    const float *begin = w.vector, *end = w.vector + p_.dim;
    const bool finite = std::all_of(begin, end, [](float x) { return std::isfinite(x); });
    if (!finite || std::all_of(begin, end, [](float x) { return x == 0.0f; })) {
      // No row is nearer than another, so the first ones are named.
      for (std::int64_t i = 0; i < k; ++i) write(row, i, {finite ? 0.0f : kNaN, i});
      return;
    }
    std::int64_t count = gather(in_block, lists, w);
    kernels_.compare(w.vector, p_.queue, p_.queue_type, p_.dim, w.indices, count, w.scratch,
                     w.values);
    for (std::int64_t i = 0; i < count; ++i) w.neighbors[i] = {w.values[i], w.indices[i]};
    sort_best(w.neighbors, count, k);
    for (std::int64_t i = 0; i < k; ++i) write(row, i, w.neighbors[i]);
  }

  // Puts the candidates within the margin of the k-th best of all splits into w.indices.
  std::int64_t gather(std::int64_t in_block, const ScreenLists* lists, Workspace& w) const {
    std::int64_t found = 0;
    for (std::int64_t split = 0; split < splits_; ++split) {
      const std::int64_t start = in_block * capacity_;
      std::copy_n(lists[split].products + start, lists[split].count[in_block], w.gathered + found);
      found += lists[split].count[in_block];
    }
    std::nth_element(w.gathered, w.gathered + (p_.rule.num_neighbors - 1), w.gathered + found,
                     std::greater<std::int32_t>());
    const std::int64_t bound =
        std::int64_t{w.gathered[p_.rule.num_neighbors - 1]} - lists[0].margin;
    std::int64_t count = 0;
    for (std::int64_t split = 0; split < splits_; ++split) {
      const std::int64_t start = in_block * capacity_;
      for (std::int32_t i = 0; i < lists[split].count[in_block]; ++i) {
        w.indices[count] = split * split_rows_ + lists[split].indices[start + i];
        count += lists[split].products[start + i] >= bound;
      }
    }
    return count;
  }

  void write(std::int64_t row, std::int64_t i, const Neighbor& neighbor) const {
    const std::int64_t place = row * p_.rule.num_neighbors + i;
    p_.neighbor_logits[place] = float(double(neighbor.value) / p_.temperature);
    p_.neighbor_indices[place] = neighbor.index;
  }

  const Call& p_;
  const ScreenKernels& kernels_;
  const std::int64_t capacity_;
  std::int64_t strips_, strips_per_block_, blocks_, split_rows_, splits_;
  std::vector<ScreenLists> lists_;
  std::vector<Workspace> workspaces_;
  std::atomic<bool> gave_up_{false};
};

}  // namespace

bool screened_search(const Call& call) {
  const ScreenKernels* kernels = screen_kernels();
  if (kernels == nullptr || call.dim < kLeastDim || call.dim > kMostDim) return false;
  const std::int64_t capacity = 3 * call.rule.num_neighbors + 64;
  if (call.queue_size < kLeastRowsPerCandidate * capacity) return false;
  if (call.queue_size > std::numeric_limits<std::int32_t>::max()) return false;
  return Search(call, *kernels).run();
}

}  // namespace softcl::cpu

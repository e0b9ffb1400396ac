// The sweep's kernels, written once; sweep_<isa>.cpp includes this with
//     SOFTCL_ISA            a name, also of the namespace that keeps the copies apart
//     SOFTCL_VECTOR_WIDTH   floats in a vector register
//     SOFTCL_VECTORS        vectors in a strip; lanes = width * vectors
//     SOFTCL_ROWS           queue rows (or dimensions) in a micro-kernel; divides kTileGranularity
// No function that another file could also emit may be called inline from here (see convert.h).
//
// Tiling. A tile of queue rows is copied to fp32 once per block of rows and serves both products:
//     S (tile_rows, lanes) = tile . strip      micro-kernel: ROWS queue rows x lanes, over D
//     E = 2^(scale S - offset) in place, with its sums, counts and candidates
//     O (D, lanes) += tile^T . E               micro-kernel: ROWS dimensions x lanes, over rows
// In both, ROWS * VECTORS accumulators stay in registers; each step loads VECTORS vectors of the
// strip (or of E) and broadcasts ROWS elements of the tile.
//
// Traffic. The queue is read from memory once per block of rows. Per strip and reduction the tile
// passes through L1 twice (from L2), the strip's rows once, and O is read and written once: at
// D = 128, 96 rows and 16 lanes 5 bytes per 32-flop cycle. S and E never leave L1.
//
// Numbers. Sums over a tile are fp32 in the lane, sums over tiles are double. O is fp32 over
// kFlushTiles tiles, double beyond. The offset is set by the first tile and raised only when a
// value exceeds it by kHeadroom (in log2): for unit rows and temperatures above 0.05 that cannot
// happen, below it hardly does, so the running maximum costs one comparison per tile.

namespace softcl::cpu {

namespace SOFTCL_ISA {

namespace {

#include "simd.h"

constexpr int kVectors = SOFTCL_VECTORS;
constexpr int kRows = SOFTCL_ROWS;
constexpr int kLanes = kWidth * kVectors;
static_assert(kTileGranularity % kRows == 0, "a tile must hold whole groups of rows");

constexpr float kHeadroom = 40.0f;
constexpr std::int64_t kFlushTiles = 16;
// Dimensions of a strip that all rows of a tile visit before the next ones: 16 KB stay in L1.
constexpr std::int64_t kDimBlock = 4096 / kLanes;
// Products summed one after the other; such sums are then added. Rounding grows with the length.
constexpr std::int64_t kDimChain = 32;  // of S
constexpr std::int64_t kRowChain = 24;  // of O

inline std::int64_t smaller(std::int64_t a, std::int64_t b) {
  return a < b ? a : b;
}

// The micro-kernel of both products: out (R, lanes) {=, +=} sum_i b(r, i) x(i, :) over i in [0, n),
// n >= 1, b(r, i) = b[r * row_step + i * step]. R * kVectors accumulators, all in registers.
template <int R>
__attribute__((always_inline)) inline void multiply(const float* b, std::int64_t row_step,
                                                    std::int64_t step, const float* x,
                                                    std::int64_t n, bool add, float* out) {
  Vector sum[R][kVectors];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Vector{};
  }
  const float* const end = x + n * kLanes;
  do {
    Vector column[kVectors];
    for (int v = 0; v < kVectors; ++v) column[v] = load(x + v * kWidth);
    for (int r = 0; r < R; ++r) {
      const Vector element = broadcast(b[r * row_step]);
      for (int v = 0; v < kVectors; ++v) sum[r][v] += element * column[v];
    }
    x += kLanes;
    b += step;
  } while (x != end);
  // Or else the compiler keeps `out` in registers between calls, and there are none left for it.
  asm volatile("" ::: "memory");
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      float* p = out + r * kLanes + v * kWidth;
      store(p, add ? load(p) + sum[r][v] : sum[r][v]);
    }
  }
}

// s (tile_rows, lanes) = tile . strip: kRows queue rows at a time, over chains of dimensions.
void similarities(const float* tile, std::int64_t tile_rows, const float* strip, std::int64_t dim,
                  float* s) {
  const std::int64_t stride = tile_stride(dim);
  for (std::int64_t block = 0; block < dim; block += kDimBlock) {
    const std::int64_t block_end = smaller(block + kDimBlock, dim);
    for (std::int64_t j = 0; j < tile_rows; j += kRows) {
      for (std::int64_t d = block; d < block_end; d += kDimChain) {
        multiply<kRows>(tile + j * stride + d, stride, 1, strip + d * kLanes,
                        smaller(kDimChain, block_end - d), d > 0, s + j * kLanes);
      }
    }
  }
}

// o (R, lanes) {=, +=} tile columns (rows, R)^T . e (rows, lanes), R = size
template <int R>
void accumulate_group(int size, const float* tile, std::int64_t stride, const float* e,
                      std::int64_t rows, bool add, float* o) {
  if (size == R) {
    for (std::int64_t j = 0; j < rows; j += kRowChain) {
      multiply<R>(tile + j * stride, 1, stride, e + j * kLanes, smaller(kRowChain, rows - j),
                  add || j > 0, o);
    }
  } else if constexpr (R > 1) {
    accumulate_group<R - 1>(size, tile, stride, e, rows, add, o);
  }
}

// o (D, lanes) {=, +=} tile (rows, D)^T . e (rows, lanes), in nearly equal groups of dimensions.
void accumulate(const float* tile, std::int64_t rows, const float* e, std::int64_t dim, bool add,
                float* o) {
  const std::int64_t groups = (dim + kRows - 1) / kRows;
  const std::int64_t large = dim % groups;  // so many groups have one dimension more
  std::int64_t d = 0;
  for (std::int64_t g = 0; g < groups; ++g) {
    const int size = static_cast<int>(dim / groups + (g < large ? 1 : 0));
    accumulate_group<kRows>(size, tile + d, tile_stride(dim), e, rows, add, o + d * kLanes);
    d += size;
  }
}

// Rows of a tile that share a maximum per lane: a search looks into few of these groups.
constexpr std::int64_t kGroupRows = 12;
constexpr std::int64_t kMaxGroups = (kMaxColumnRows + kGroupRows - 1) / kGroupRows;

// Largest s of every lane, in groups[g] (lanes,) for the rows of group g and in maximum for all.
void tile_maxima(const float* s, std::int64_t rows, float (*groups)[kLanes],
                 Vector (&maximum)[kVectors]) {
  for (std::int64_t first = 0; first < rows; first += kGroupRows) {
    const std::int64_t end = smaller(first + kGroupRows, rows);
    Vector largest[kVectors];
    for (int v = 0; v < kVectors; ++v) largest[v] = load(s + first * kLanes + v * kWidth);
    for (std::int64_t j = first + 1; j < end; ++j) {
      for (int v = 0; v < kVectors; ++v) {
        largest[v] = max(load(s + j * kLanes + v * kWidth), largest[v]);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      store(groups[first / kGroupRows] + v * kWidth, largest[v]);
      maximum[v] = first == 0 ? largest[v] : max(largest[v], maximum[v]);
    }
  }
}

// One tile at one strip.
struct Visit {
  std::int64_t strip;
  std::int64_t rows;   // queue rows in the tile
  std::int64_t first;  // the first of them
  std::int64_t tiles;  // visited before this one

  std::int64_t groups() const { return (rows + kGroupRows - 1) / kGroupRows; }
};

// Rare: moves the lanes whose maximum exceeds their offset by the headroom to a new offset.
void raise_offset(const Reduction& r, float* partial_mean, std::int64_t dim, const Visit& visit,
                  const Vector (&maximum)[kVectors]) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const std::int64_t row = visit.strip * kLanes + lane;
    const float raised = maximum[lane / kWidth][lane % kWidth] * r.scale;
    const double difference = double(raised) - double(r.offset[row]);
    if (!(difference > double(kHeadroom))) continue;
    const double factor = __builtin_exp2(-difference);
    r.offset[row] = raised;
    // e' = e factor and u' = u - difference.
    r.weighted[row] = factor * (r.weighted[row] - difference * r.sum[row]);
    r.sum[row] *= factor;
    if (!r.has_mean) continue;
    const std::int64_t start = visit.strip * dim * kLanes + lane;
    for (std::int64_t d = 0; d < dim; ++d) {
      if (visit.tiles % kFlushTiles > 0) partial_mean[start + d * kLanes] *= float(factor);
      if (visit.tiles >= kFlushTiles) r.mean[start + d * kLanes] *= factor;
    }
  }
}

// count += number of s above their lane's limit.
void count_above(const float* limits, const float* s, std::int64_t rows,
                 IntVector (&count)[kVectors]) {
  for (int v = 0; v < kVectors; ++v) {
    const Vector limit = load(limits + v * kWidth);
    for (std::int64_t j = 0; j < rows; ++j) {
      count[v] -= (IntVector)(load(s + j * kLanes + v * kWidth) > limit);
    }
  }
}

// The largest float below x.
inline float just_below(float x) {
  std::int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = x > 0.0f ? bits - 1 : x < 0.0f ? bits + 1 : std::int32_t(0x80000001u);
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}

// The k-th largest of a lane's group maxima, k <= groups: k of its s are at least as large.
float kth_group_maximum(const float (*groups)[kLanes], std::int64_t num_groups, int lane,
                        std::int64_t k) {
  float sorted[kMaxGroups];
  for (std::int64_t g = 0; g < num_groups; ++g) {
    std::int64_t place = g;
    for (; place > 0 && sorted[place - 1] < groups[g][lane]; --place) {
      sorted[place] = sorted[place - 1];
    }
    sorted[place] = groups[g][lane];
  }
  return sorted[k - 1];
}

// Some s of the group are above their lane's threshold.
inline bool group_exceeds(const float* maxima, const float* threshold) {
  bool some = false;
  for (int v = 0; v < kVectors; ++v) {
    some |= any_greater(load(maxima + v * kWidth), load(threshold + v * kWidth));
  }
  return some;
}

// Rare: enters the s above their lane's threshold into the lists.
void collect(const NeighborLists& lists, const Visit& visit, const float* s,
             const float (*groups)[kLanes]) {
  const std::int64_t start = visit.strip * kLanes, num_groups = visit.groups();
  float threshold[kLanes];
  for (int v = 0; v < kVectors; ++v) {
    store(threshold + v * kWidth, load(lists.threshold + start + v * kWidth));
  }
  IntVector above[kVectors] = {};
  for (std::int64_t g = 0; g < num_groups; ++g) {
    if (!group_exceeds(groups[g], threshold)) continue;
    const std::int64_t j = g * kGroupRows;
    count_above(threshold, s + j * kLanes, smaller(kGroupRows, visit.rows - j), above);
  }
  // Of more than k candidates in one tile not all are needed: most at the start of a queue, or all
  // along one in ascending order.
  for (int lane = 0; lane < kLanes; ++lane) {
    if (above[lane / kWidth][lane % kWidth] <= lists.k) continue;
    if (lists.k <= num_groups) {
      const float bound = kth_group_maximum(groups, num_groups, lane, lists.k);
      if (bound > threshold[lane]) threshold[lane] = just_below(bound);
    } else {
      push_best(lists, start + lane, {s + lane, kLanes, visit.rows, visit.first});
      threshold[lane] = __builtin_inff();  // this lane is done
    }
  }
  for (std::int64_t g = 0; g < num_groups; ++g) {
    if (!group_exceeds(groups[g], threshold)) continue;
    const std::int64_t end = smaller((g + 1) * kGroupRows, visit.rows);
    for (std::int64_t j = g * kGroupRows; j < end; ++j) {
      for (int v = 0; v < kVectors; ++v) {
        const float* x = s + j * kLanes + v * kWidth;
        unsigned lanes = greater_lanes(load(x), load(threshold + v * kWidth));
        for (; lanes != 0; lanes &= lanes - 1) {
          const int i = __builtin_ctz(lanes);
          const std::int64_t row = start + v * kWidth + i;
          push(lists, row, x[i], visit.first + j);
          float& limit = threshold[v * kWidth + i];
          if (lists.threshold[row] > limit) limit = lists.threshold[row];
        }
      }
    }
  }
}

// s -> e = 2^(scale s - offset) in place; sum += sum e, weighted += sum e u.
void exponentiate(const Reduction& r, const Visit& visit, float* s) {
  const std::int64_t row = visit.strip * kLanes;
  Vector offset[kVectors], sum[kVectors], weighted[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    offset[v] = load(r.offset + row + v * kWidth);
    sum[v] = weighted[v] = Vector{};
  }
  const float scale = r.scale;
  // Group by group: beside one large weight the roundings of many small ones, equal ones at that,
  // would add up along one chain.
  for (std::int64_t first = 0; first < visit.rows; first += kGroupRows) {
    const std::int64_t end = smaller(first + kGroupRows, visit.rows);
    Vector group_sum[kVectors] = {}, group_weighted[kVectors] = {};
    for (std::int64_t j = first; j < end; ++j) {
      for (int v = 0; v < kVectors; ++v) {
        float* p = s + j * kLanes + v * kWidth;
        const Vector u = load(p) * scale - offset[v];
        const Vector e = exp2(u);
        group_sum[v] += e;
        group_weighted[v] += e * u;
        store(p, e);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      sum[v] += group_sum[v];
      weighted[v] += group_weighted[v];
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    for (int i = 0; i < kWidth; ++i) {
      r.sum[row + v * kWidth + i] += double(sum[v][i]);
      r.weighted[row + v * kWidth + i] += double(weighted[v][i]);
    }
  }
}

// Everything of S but its product, for one tile, strip and reduction. Leaves E in s.
void finish_tile(const Reduction& r, float* partial_mean, std::int64_t dim, const Visit& visit,
                 float* s) {
  const std::int64_t row = visit.strip * kLanes;
  if (r.positive != nullptr) {
    IntVector above[kVectors] = {};
    count_above(r.positive + row, s, visit.rows, above);
    for (int lane = 0; lane < kLanes; ++lane) {
      r.rank[row + lane] += above[lane / kWidth][lane % kWidth];
    }
  }
  if (!r.has_softmax && r.neighbors.k == 0) return;
  float groups[kMaxGroups][kLanes];
  Vector maximum[kVectors];
  tile_maxima(s, visit.rows, groups, maximum);
  if (r.neighbors.k > 0) {
    bool some = false;
    for (int v = 0; v < kVectors; ++v) {
      some |= any_greater(maximum[v], load(r.neighbors.threshold + row + v * kWidth));
    }
    if (__builtin_expect(some, 0)) collect(r.neighbors, visit, s, groups);
  }
  if (!r.has_softmax) return;
  bool exceeded = false;
  for (int v = 0; v < kVectors; ++v) {
    float* offset = r.offset + row + v * kWidth;
    if (visit.tiles == 0) store(offset, maximum[v] * r.scale);
    exceeded |= any_greater(maximum[v] * r.scale - load(offset), broadcast(kHeadroom));
  }
  if (__builtin_expect(exceeded, 0)) raise_offset(r, partial_mean, dim, visit, maximum);
  exponentiate(r, visit, s);
}

// Copies queue rows to fp32 and clears the rest of the tile's last group. Returns whether all are
// finite: x * 0 is NaN exactly if x is not, and NaN stays in a sum.
bool pack_tile(const SweepTask& task, std::int64_t first, std::int64_t rows) {
  const std::int64_t D = task.dim;
  const std::int64_t stride = tile_stride(D);
  Vector check = {};
  float check_rest = 0.0f;
  for (std::int64_t j = 0; j < rows; ++j) {
    float* out = task.tile + j * stride;
    if (task.queue_type == ElementType::kFloat32) {
      const float* row = static_cast<const float*>(task.queue) + (first + j) * D;
      std::memcpy(out, row, static_cast<std::size_t>(D) * sizeof(float));
    } else if (task.queue_type == ElementType::kBFloat16) {
      const auto* row = static_cast<const std::uint16_t*>(task.queue) + (first + j) * D;
      for (std::int64_t d = 0; d < D; ++d) out[d] = from_bfloat16(row[d]);
    } else {
      const auto* row = static_cast<const std::uint16_t*>(task.queue) + (first + j) * D;
      for (std::int64_t d = 0; d < D; ++d) out[d] = from_float16(row[d]);
    }
    std::int64_t d = 0;
    for (; d + kWidth <= D; d += kWidth) check += load(out + d) * 0.0f;
    for (; d < D; ++d) check_rest += out[d] * 0.0f;
  }
  const std::int64_t padded = (rows + kTileGranularity - 1) / kTileGranularity * kTileGranularity;
  for (std::int64_t j = rows; j < padded; ++j) {
    for (std::int64_t d = 0; d < D; ++d) task.tile[j * stride + d] = 0.0f;
  }
  for (int i = 0; i < kWidth; ++i) check_rest += check[i];
  return check_rest == 0.0f;
}

// mean {=, +=} partial_mean
void flush(const SweepTask& task, bool add) {
  const std::int64_t count = task.strips * task.dim * kLanes;
  for (int i = 0; i < task.num_reductions; ++i) {
    if (!task.reductions[i].has_mean) continue;
    double* mean = task.reductions[i].mean;
    const float* partial = task.partial_mean[i];
    if (add) {
      for (std::int64_t x = 0; x < count; ++x) mean[x] += double(partial[x]);
    } else {
      for (std::int64_t x = 0; x < count; ++x) mean[x] = double(partial[x]);
    }
  }
}

void reset(const SweepTask& task) {
  const std::int64_t rows = task.strips * kLanes;
  for (int i = 0; i < task.num_reductions; ++i) {
    const Reduction& r = task.reductions[i];
    for (std::int64_t row = 0; row < rows; ++row) {
      if (r.positive != nullptr) r.rank[row] = 0;
      if (r.has_softmax) r.sum[row] = r.weighted[row] = 0.0;
    }
    cpu::reset(r.neighbors, rows);
  }
}

// Asks for part `part` of `parts` of the rows after a tile: its reads overlap this tile's
// arithmetic.
void prefetch_next(const SweepTask& task, std::int64_t next, std::int64_t part,
                   std::int64_t parts) {
  const std::int64_t row_bytes = task.dim * size_of(task.queue_type);
  const std::int64_t bytes = smaller(task.tile_rows, task.end - next) * row_bytes;
  const char* rows = static_cast<const char*>(task.queue) + next * row_bytes;
  for (std::int64_t i = bytes * part / parts; i < bytes * (part + 1) / parts; i += 64) {
    __builtin_prefetch(rows + i, 0, 2);
  }
}

// The first tile writes the sums that the others add to; so does the first tile after a flush, and
// the first flush.
void sweep(SweepTask& task) {
  const std::int64_t D = task.dim;
  reset(task);
  task.finite = true;
  std::int64_t tiles = 0;
  for (std::int64_t first = task.begin; first < task.end; first += task.tile_rows) {
    const std::int64_t left = task.end - first;
    const std::int64_t rows = smaller(left, task.tile_rows);
    task.finite &= pack_tile(task, first, rows);
    const std::int64_t padded = (rows + kRows - 1) / kRows * kRows;
    for (std::int64_t strip = 0; strip < task.strips; ++strip) {
      if (rows < left) prefetch_next(task, first + rows, strip, task.strips);
      for (int i = 0; i < task.num_reductions; ++i) {
        const Reduction& r = task.reductions[i];
        float* partial_mean = task.partial_mean[i];
        similarities(task.tile, padded, r.rows + strip * D * kLanes, D, task.weights);
        finish_tile(r, partial_mean, D, {strip, rows, first, tiles}, task.weights);
        if (r.has_mean) {
          accumulate(task.tile, rows, task.weights, D, tiles % kFlushTiles > 0,
                     partial_mean + strip * D * kLanes);
        }
      }
    }
    ++tiles;
    if (tiles % kFlushTiles == 0) flush(task, tiles > kFlushTiles);
  }
  if (tiles % kFlushTiles > 0) flush(task, tiles > kFlushTiles);
}

}  // namespace

}  // namespace SOFTCL_ISA

}  // namespace softcl::cpu

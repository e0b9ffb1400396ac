// The sweep's kernels, written once; sweep_<isa>.cpp includes this with
//     SOFTCL_ISA            a name, also of the namespace that keeps the copies apart
//     SOFTCL_VECTOR_WIDTH   floats in a vector register
//     SOFTCL_VECTORS        vectors in a strip; lanes = width * vectors
//     SOFTCL_ROWS           queue rows (or dimensions) in a micro-kernel; divides kTileGranularity
// No function that another file could also emit may be called inline from here (see convert.h).
//
// Tiling. A tile of queue rows is copied to fp32 once per block of rows and serves both products:
//     S (tile_rows, lanes) = tile . strip      see products_kernel.h
//     E = 2^(scale S - offset) in place, with its sums, counts and candidates
//     O (D, lanes) += tile^T . E
// or, where the weights E are kept, O once for both reductions: see combine.
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

#include "search/candidates_kernel.h"  // includes products_kernel.h

constexpr float kHeadroom = 40.0f;
constexpr std::int64_t kFlushTiles = 16;

// Where the weights of the visit's tile are kept.
inline float* kept_weights(const SweepTask& task, const Reduction& r, const Visit& visit) {
  return r.kept + (visit.strip * task.kept_rows + visit.first - task.begin) * kLanes;
}

// Rare: moves the lanes whose maximum exceeds their offset by the headroom to a new offset.
void raise_offset(const SweepTask& task, const Reduction& r, float* partial_mean,
                  const Visit& visit, const Vector (&maximum)[kVectors]) {
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
    if (r.alignment != nullptr) r.alignment[row] *= factor;
    if (r.kept != nullptr) {
      float* kept = kept_weights(task, r, {visit.strip, 0, task.begin, 0}) + lane;
      for (std::int64_t j = 0; j < visit.first - task.begin; ++j) kept[j * kLanes] *= float(factor);
    }
    if (!r.has_mean) continue;
    const std::int64_t start = visit.strip * task.dim * kLanes + lane;
    for (std::int64_t d = 0; d < task.dim; ++d) {
      if (visit.tiles % kFlushTiles > 0) partial_mean[start + d * kLanes] *= float(factor);
      if (visit.tiles >= kFlushTiles) r.mean[start + d * kLanes] *= factor;
    }
  }
}

// e = 2^(scale s - offset), which may overwrite s; sum += sum e, weighted += sum e u.
void exponentiate(const Reduction& r, const Visit& visit, const float* s, float* e_out) {
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
        const std::int64_t x = j * kLanes + v * kWidth;
        const Vector u = load(s + x) * scale - offset[v];
        const Vector e = exp2(u);
        group_sum[v] += e;
        group_weighted[v] += e * u;
        store(e_out + x, e);
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

// alignment += sum e s of the other reduction.
void align(const Reduction& r, const Visit& visit, const float* e, const float* s) {
  const std::int64_t row = visit.strip * kLanes;
  Vector sum[kVectors] = {};
  for (std::int64_t first = 0; first < visit.rows; first += kGroupRows) {
    const std::int64_t end = smaller(first + kGroupRows, visit.rows);
    Vector group_sum[kVectors] = {};
    for (std::int64_t j = first; j < end; ++j) {
      for (int v = 0; v < kVectors; ++v) {
        const std::int64_t x = j * kLanes + v * kWidth;
        group_sum[v] += load(e + x) * load(s + x);
      }
    }
    for (int v = 0; v < kVectors; ++v) sum[v] += group_sum[v];
  }
  for (int v = 0; v < kVectors; ++v) {
    for (int i = 0; i < kWidth; ++i) r.alignment[row + v * kWidth + i] += double(sum[v][i]);
  }
}

// Calls f(lane, place in S) for the lanes whose excluded row is in the tile.
template <typename F>
inline void for_excluded(const SweepTask& task, const Visit& visit, F f) {
  if (task.excluded == nullptr) return;
  const std::int64_t* excluded = task.excluded + visit.strip * kLanes;
  for (std::int64_t lane = 0; lane < kLanes; ++lane) {
    const std::int64_t j = excluded[lane] - visit.first;
    if (j >= 0 && j < visit.rows) f(lane, j * kLanes + lane);
  }
}

// Everything of S but its product, for one tile, strip and reduction. Leaves E in e, which may be
// s; changes s where rows are excluded.
void finish_tile(const SweepTask& task, const Reduction& r, float* partial_mean, const Visit& visit,
                 float* s, float* e) {
  const std::int64_t row = visit.strip * kLanes;
  for_excluded(task, visit, [&](std::int64_t, std::int64_t x) { s[x] = -__builtin_inff(); });
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
  if (__builtin_expect(exceeded, 0)) raise_offset(task, r, partial_mean, visit, maximum);
  // Finite, and so low that its weight is 0 and nothing in the sums.
  for_excluded(task, visit, [&](std::int64_t lane, std::int64_t x) {
    s[x] = -1e30f;
    // The only row of a first tile, which then is the last one.
    if (r.offset[row + lane] < -1e37f) r.offset[row + lane] = -1e20f * r.scale;
  });
  exponentiate(r, visit, s, e);
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
      if (r.alignment != nullptr) r.alignment[row] = 0.0;
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
        const Visit visit{strip, rows, first, tiles};
        float* s = task.similarities[i];
        float* e = r.kept == nullptr ? task.weights[i] : kept_weights(task, r, visit);
        similarities(task.tile, padded, r.rows + strip * D * kLanes, D, s);
        finish_tile(task, r, task.partial_mean[i], visit, s, e);
        if (r.alignment != nullptr) align(r, visit, e, task.similarities[1 - i]);
        if (r.has_mean) {
          accumulate(task.tile, rows, e, D, tiles % kFlushTiles > 0,
                     task.partial_mean[i] + strip * D * kLanes);
        }
      }
    }
    ++tiles;
    if (tiles % kFlushTiles == 0) flush(task, tiles > kFlushTiles);
  }
  if (tiles % kFlushTiles > 0) flush(task, tiles > kFlushTiles);
}

// mean of the first reduction = sum_j (share_0 e_0j + share_1 e_1j) Q_j over the weights kept.
void combine(SweepTask& task) {
  const std::int64_t D = task.dim;
  const Reduction &student = task.reductions[0], &teacher = task.reductions[1];
  std::int64_t tiles = 0;
  for (std::int64_t first = task.begin; first < task.end; first += task.tile_rows) {
    const std::int64_t left = task.end - first;
    const std::int64_t rows = smaller(left, task.tile_rows);
    pack_tile(task, first, rows);
    for (std::int64_t strip = 0; strip < task.strips; ++strip) {
      if (rows < left) prefetch_next(task, first + rows, strip, task.strips);
      const Visit visit{strip, rows, first, tiles};
      const float* e0 = kept_weights(task, student, visit);
      const float* e1 = kept_weights(task, teacher, visit);
      for (int v = 0; v < kVectors; ++v) {
        const Vector share0 = load(student.share + strip * kLanes + v * kWidth);
        const Vector share1 = load(teacher.share + strip * kLanes + v * kWidth);
        for (std::int64_t x = v * kWidth; x < rows * kLanes; x += kLanes) {
          store(task.weights[0] + x, load(e0 + x) * share0 + load(e1 + x) * share1);
        }
      }
      accumulate(task.tile, rows, task.weights[0], D, tiles % kFlushTiles > 0,
                 task.partial_mean[0] + strip * D * kLanes);
    }
    ++tiles;
    if (tiles % kFlushTiles == 0) flush(task, tiles > kFlushTiles);
  }
  if (tiles % kFlushTiles > 0) flush(task, tiles > kFlushTiles);
}

}  // namespace

}  // namespace SOFTCL_ISA

}  // namespace softcl::cpu

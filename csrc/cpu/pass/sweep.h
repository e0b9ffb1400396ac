// The sweep: one block of rows visits a range of the queue. Compiled once per instruction set.
//
// Rows live in strips: `lanes` rows side by side, one per lane of the vector registers, stored as
// (D, lanes). Everything about a row then stays in its lane: no horizontal operation anywhere, and
// the queue, the same for all lanes, is broadcast element by element and needs no transposition.

#pragma once

#include <cstdint>

#include "search/neighbors.h"
#include "softcl/element_type.h"

namespace softcl::cpu {

/// One softmax reduction of a block of rows (the student's or the teacher's): what it reads and
/// what it leaves. With s_j = v . Q_j, u_j = scale s_j - offset and e_j = 2^u_j it leaves
///     sum = sum_j e_j    weighted = sum_j e_j u_j    mean = sum_j e_j Q_j
/// where offset is near the row's largest scale s_j, so that nothing over- or underflows.
struct Reduction {
  const float* rows = nullptr;      // (strips, D, lanes)
  const float* positive = nullptr;  // (strips, lanes) count the s_j above it; null: do not count
  float scale = 0.0f;               // log2(e) / temperature
  bool has_softmax = false;         // offset, sum and weighted are wanted
  bool has_mean = false;            // mean is wanted; implies has_softmax

  float* offset = nullptr;       // (strips, lanes)
  double* sum = nullptr;         // (strips, lanes)
  double* weighted = nullptr;    // (strips, lanes)
  double* mean = nullptr;        // (strips, D, lanes)
  std::int64_t* rank = nullptr;  // (strips, lanes)
  NeighborLists neighbors;       // of strips * lanes rows

  // Of the second reduction: its expectation of the first one's similarities, sum_j e_j s'_j.
  double* alignment = nullptr;  // (strips, lanes); null: not wanted

  // Short queues: the weights e_j stay, and `combine` makes one mean of both reductions'.
  float* kept = nullptr;         // (strips, kept_rows, lanes); null: not kept
  const float* share = nullptr;  // (strips, lanes) read by combine
};

inline constexpr int kMaxReductions = 2;
inline constexpr int kMaxLanes = 32;

struct SweepTask {
  const void* queue = nullptr;  // (K, D)
  ElementType queue_type = ElementType::kFloat32;
  std::int64_t dim = 0;    // D
  std::int64_t begin = 0;  // first queue row to visit
  std::int64_t end = 0;    // one past the last; begin < end
  std::int64_t strips = 0;
  int num_reductions = 0;
  Reduction reductions[kMaxReductions];
  // (strips, lanes) a queue row that takes no part for this row, or -1; null: there are none
  const std::int64_t* excluded = nullptr;
  std::int64_t kept_rows = 0;  // at least the rows to visit, a multiple of kTileGranularity

  // Workspace of the running thread.
  std::int64_t tile_rows =
      0;                  // queue rows in a tile, <= kMaxColumnRows, a multiple of kTileGranularity
  float* tile = nullptr;  // (tile_rows, tile_stride(D))
  // S and E of a tile: (tile_rows, lanes) each, or one for all. E may lie over S, but not over the
  // first reduction's S where an alignment with it is wanted.
  float* similarities[kMaxReductions];
  float* weights[kMaxReductions];
  float* partial_mean[kMaxReductions];  // (strips, D, lanes)

  bool finite = true;  // left: every queue row visited is finite
};

/// tile_rows must be a multiple of it: of the rows that every micro-kernel takes at a time.
inline constexpr std::int64_t kTileGranularity = 12;

/// Elements from one row of a tile to the next. An odd number of cache lines: rows at a stride that
/// is a large power of two would all fall into a few sets of the L1 cache.
static inline std::int64_t tile_stride(std::int64_t dim) {
  return ((dim + 15) / 16 | 1) * 16;
}

struct SweepKernels {
  const char* name;
  int lanes;
  void (*sweep)(SweepTask& task);
  /// After a sweep that kept the weights: mean of reductions[0], whose has_mean alone is set, is
  ///     sum_j (share_0 e_0j + share_1 e_1j) Q_j
  void (*combine)(SweepTask& task);
  /// s[j * lanes + i] = v_i . Q_j for one strip (D, lanes) and a tile of `tile_rows` rows, with the
  /// same operations in the same order as in the sweep: equal rows give equal bits.
  void (*similarities)(const float* tile, std::int64_t tile_rows, const float* strip,
                       std::int64_t dim, float* s);
};

extern const SweepKernels kPortableKernels;
#if defined(SOFTCL_X86)
extern const SweepKernels kAvx2Kernels;
extern const SweepKernels kAvx512Kernels;
#endif

}  // namespace softcl::cpu

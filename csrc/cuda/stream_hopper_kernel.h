// The streaming kernel for sm_90a: products of warpgroups, queue tiles by TMA.
//
// Tiling. Grid (row blocks, splits of the queue), row blocks fastest, one block of three warpgroups
// per multiprocessor. Of the third one thread copies queue tiles into a ring of stages. The other
// two multiply, each 64 rows: of the same 64 samples the students' rows and the teachers' (paired),
// or 128 rows of one kind (single), or, where nobody wants means, both rows of 64 samples each. A
// tile serves both products, v.Q with its rows as columns and w Q with its rows as rows.
//
//     D     tile rows   stages   shared memory     accumulators per thread, products + means
//     64    128         4        80 to 112 KB      64 + 32
//     128   128         4        160 to 192 KB     64 + 64
//     256   64          3, 4     192 to 224 KB     32 + 128
//
// Schedule, after FlashAttention-3. The two take turns in starting products: while one turns its
// products into weights, the other's run. Within a warpgroup the products of tile i run together
// with the means of tile i - 1, whose weights have stayed in registers: an accumulator of two
// neighbouring eights of columns is a fragment of a first operand.
//
// The student's warpgroup sends its products to the teacher's through shared memory where z.mu is
// wanted, thread by thread: the same thread of both holds the same row and column.
//
// fp16 weights would leave fp16's range, so they are relative to a running maximum, at which they
// are 2^15; bf16 weights are 2^x as they are.
//
// Traffic: K D 2 bytes of queue per row block, from L2; rows and sums once; with chunk maxima four
// bytes per row and chunk. Nothing of size N x K is written.
//
// Experimental: has not yet run on a GPU; csrc/cuda/host runs it on a CPU.

#pragma once

#include <type_traits>

#include "launch.h"
#include "rows.h"
#include "stream_hopper_state.h"
#include "stream_hopper_weights.h"

namespace softcl::cuda {

struct HopperParams {
  TensorMap queue;
  StreamParams stream;
};

#if defined(SOFTCL_HAS_WARPGROUPS)

/// The ring of stages, as one side sees it: tile i of the split lies in stage i modulo their
/// number.
template <typename S>
struct Ring {
  std::uint32_t memory;  // of the block

  SOFTCL_DEVICE std::uint32_t tile(int i) const {
    return memory + S::kStagesAt + i % S::kStages * S::kStageBytes;
  }
  /// Ends a phase when a tile has arrived.
  SOFTCL_DEVICE std::uint32_t full(int i) const {
    return memory + S::kBarriersAt + i % S::kStages * 8;
  }
  /// Ends a phase when all eight warps have done with a tile.
  SOFTCL_DEVICE std::uint32_t empty(int i) const { return full(i) + S::kStages * 8; }

  SOFTCL_DEVICE void initialize() const {
    for (int i = 0; i < S::kStages; ++i) {
      ptx::mbarrier_init(full(i), 1);
      ptx::mbarrier_init(empty(i), kConsumers / kWarp);
    }
    ptx::fence_async_proxy();
  }
  SOFTCL_DEVICE void wait_for(int i) const { ptx::mbarrier_wait(full(i), i / S::kStages % 2); }
  SOFTCL_DEVICE void release(int i) const {
    if (lane_index() == 0) ptx::mbarrier_arrive(empty(i));
  }
};

/// Copies all tiles of the split. By one thread.
template <typename S>
SOFTCL_DEVICE void produce(const HopperParams& p, const Ring<S>& ring, int first_tile, int tiles) {
  for (int i = 0; i < tiles; ++i) {
    // The stage's last tile was the one before in it: i - kStages.
    if (i >= S::kStages) ptx::mbarrier_wait(ring.empty(i), (i / S::kStages - 1) % 2);
    ptx::mbarrier_expect(ring.full(i), S::kStageBytes);
    for (int box = 0; box < S::kDim / kBoxColumns; ++box) {
      ptx::tma_load(ring.tile(i) + box * S::kTileRows * kBoxRowBytes, &p.queue, box * kBoxColumns,
                    (first_tile + i) * S::kTileRows, ring.full(i));
    }
  }
}

/// 64 rows of source (num_rows, D) from `first` on into a tile, zeros where there is none. By all
/// consumers; fence and synchronise.
template <typename T, int kDim>
SOFTCL_DEVICE void load_row_tile(std::uint32_t tile, const void* source, int first,
                                 const StreamParams& p) {
  constexpr int kPieces = kDim / 8;  // of a row
  const auto* elements = static_cast<const T*>(source);
  const int piece = threadIdx.x % kPieces;
  for (int i = threadIdx.x / kPieces; i < kWarpgroupRows; i += kConsumers / kPieces) {
    ptx::Vector v = {};
    if (first + i < p.num_rows) {
      v = load_piece(elements + std::int64_t(first + i) * p.dim, piece, p.dim, p.aligned);
    }
    if (p.normalize) v = unit_piece<T, kDim>(v);  // all lanes
    ptx::store_shared(tile + box_offset(kWarpgroupRows, i, piece * 8), v);
  }
}

/// Starts s (64, N) = rows (64, D) times N rows of a tile, transposed.
template <typename T, int kDim, int kEights>
SOFTCL_DEVICE void multiply_rows(float (&s)[kEights][4], std::uint32_t rows, std::uint32_t tile) {
  rows = ptx::opaque(rows);
  SOFTCL_UNROLL
  for (int k = 0; k < kDim / 16; ++k) {
    ptx::wgmma_rows<T>(s, row_descriptor(rows, kWarpgroupRows, k),
                       row_descriptor(tile, 8 * kEights, k), k > 0);
  }
}

/// Starts mean (64, D) += weights (64, rows of the tile) times the tile.
template <typename T, typename S, int kParts>
SOFTCL_DEVICE void multiply_weights(float (&mean)[S::kDim / 8][4],
                                    const Weights<S, kParts>& weights, std::uint32_t tile) {
  SOFTCL_UNROLL
  for (int part = 0; part < kParts; ++part) {
    SOFTCL_UNROLL
    for (int k = 0; k < S::kTileRows / 16; ++k) {
      ptx::wgmma_columns<T>(mean, weights.parts[part][k], column_descriptor(tile, S::kTileRows, k));
    }
  }
}

/// z.t of the warpgroup's rows, by the very products that z.Q takes: a queue row equal to t must
/// not count as better than t.
template <typename T, int kDim>
SOFTCL_DEVICE void find_positives(RowSums& sums, std::uint32_t rows, std::uint32_t keys) {
  float products[kWarpgroupRows / 8][4] = {};
  ptx::wgmma_fence();
  multiply_rows<T, kDim>(products, rows, keys);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::settle(products);
  // Of the diagonal one of a row's four lanes holds the element; the others add zeros.
  SOFTCL_UNROLL
  for (int i = 0; i < 2; ++i) {
    float positive = 0.0f;
    SOFTCL_UNROLL
    for (int n = 0; n < kWarpgroupRows / 8; ++n) {
      SOFTCL_UNROLL
      for (int e = 2 * i; e < 2 * i + 2; ++e) {
        if (8 * n + accumulator_column(lane_index(), e) == warpgroup_row(i)) {
          positive = products[n][e];
        }
      }
    }
    sums.positive[i] = quad_sum(positive);
  }
}

/// This warpgroup may start products; ends with pass_turn, but for the last turn of warpgroup 1.
SOFTCL_DEVICE void take_turn(int warpgroup) {
  ptx::named_barrier_sync(kTurn + warpgroup, kConsumers);
}
SOFTCL_DEVICE void pass_turn(int warpgroup, bool is_last) {
  if (warpgroup == 0 || !is_last) ptx::named_barrier_arrive(kTurn + 1 - warpgroup, kConsumers);
}

/// The whole split for kTiles tiles of rows, without means: both rows of the samples, or one.
template <typename T, typename S, bool kTeacher, int kTiles>
SOFTCL_DEVICE void sweep(const StreamParams& p, const Ring<S>& ring, RowSums (&sums)[kTiles],
                         int warpgroup, int first_tile, int tiles) {
  const int row_tile = warpgroup * kTiles;
  const std::uint32_t rows = ring.memory + row_tile * S::kRowTileBytes;
  float s[kTiles][S::kTileRows / 8][4] = {};
  float carry[2];
  for (int i = 0; i < tiles; ++i) {
    ring.wait_for(i);
    take_turn(warpgroup);
    ptx::wgmma_fence();
    SOFTCL_UNROLL
    for (int r = 0; r < kTiles; ++r) {
      multiply_rows<T, S::kDim>(s[r], rows + r * S::kRowTileBytes, ring.tile(i));
    }
    ptx::wgmma_commit();
    pass_turn(warpgroup, i + 1 == tiles);
    ptx::wgmma_wait<0>();
    SOFTCL_UNROLL
    for (int r = 0; r < kTiles; ++r) ptx::settle(s[r]);
    ring.release(i);
    const int tile = first_tile + i;
    count_products<S, kTeacher>(sums[0], s[0], p, row_tile, tile);
    if constexpr (kTiles == 2) {
      count_products<S, true>(sums[1], s[1], p, row_tile + 1, tile);
      // The teacher's first: they read the student's products.
      if (p.softmax) {
        add_weights<T, S, true>(sums[1], s[1], carry, p.scale[1], OwnProducts<S>{s[0]});
      }
      add_weights<T, S, false>(sums[0], s[0], carry, p.scale[0], NoProducts());
    } else if (p.softmax) {
      add_role_weights<T, S, kTeacher>(sums[0], s[0], carry, p);
    }
  }
  store_row_sums<S, kTeacher>(sums[0], p, row_tile, false);
  if constexpr (kTiles == 2) store_row_sums<S, true>(sums[1], p, row_tile + 1, false);
}

/// The whole split for one tile of rows, with its mean.
template <typename T, typename S, bool kTeacher, int kParts>
SOFTCL_DEVICE void sweep_with_mean(const StreamParams& p, const Ring<S>& ring, RowSums& sums,
                                   int warpgroup, int first_tile, int tiles) {
  const int row_tile = warpgroup;
  const std::uint32_t rows = ring.memory + row_tile * S::kRowTileBytes;
  float s[S::kTileRows / 8][4] = {};
  float mean[S::kDim / 8][4] = {};
  Weights<S, kParts> weights;
  float carry[2];

  ring.wait_for(0);
  take_turn(warpgroup);
  ptx::wgmma_fence();
  multiply_rows<T, S::kDim>(s, rows, ring.tile(0));
  ptx::wgmma_commit();
  pass_turn(warpgroup, tiles == 1);
  ptx::wgmma_wait<0>();
  ptx::settle(s);
  visit_products<T, S, kTeacher>(sums, s, carry, p, ring.memory, row_tile, first_tile, 0, tiles);
  pack_weights<T, S>(weights, sums, s);

  for (int i = 1; i < tiles; ++i) {
    ring.wait_for(i);
    take_turn(warpgroup);
    weights.settle();
    ptx::wgmma_fence();
    multiply_rows<T, S::kDim>(s, rows, ring.tile(i));
    ptx::wgmma_commit();
    multiply_weights<T, S>(mean, weights, ring.tile(i - 1));
    ptx::wgmma_commit();
    pass_turn(warpgroup, i + 1 == tiles);
    ptx::wgmma_wait<1>();
    ptx::settle(s);
    visit_products<T, S, kTeacher>(sums, s, carry, p, ring.memory, row_tile, first_tile, i, tiles);
    ptx::wgmma_wait<0>();
    ptx::settle(mean);
    ring.release(i - 1);
    carry_mean<T, S>(mean, sums, carry);
    pack_weights<T, S>(weights, sums, s);
  }

  weights.settle();
  ptx::wgmma_fence();
  multiply_weights<T, S>(mean, weights, ring.tile(tiles - 1));
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::settle(mean);
  store_row_sums<S, kTeacher>(sums, p, row_tile, true);
  store_means<S, kTeacher>(mean, p, row_tile);
}

/// Loads the rows, finds the positives, sweeps and stores. By both consuming warpgroups.
template <typename T, typename S, int kMeanRows>
SOFTCL_DEVICE void consume(const StreamParams& p, const Ring<S>& ring, int first_tile, int tiles) {
  const int warpgroup = warpgroup_index();
  const bool passes_keys = p.ranks != nullptr && !S::kPair;
  for (int r = 0; r < S::kRowTiles; ++r) {
    const int first = first_sample_of_tile<S>(r);
    load_row_tile<T, S::kDim>(ring.memory + r * S::kRowTileBytes, p.rows[S::kPair ? r % 2 : 0],
                              first, p);
    if (passes_keys) {
      load_row_tile<T, S::kDim>(ring.tile(0) + r * S::kRowTileBytes, p.rows[1], first, p);
    }
  }
  ptx::fence_async_proxy();
  ptx::named_barrier_sync(kRowsLoaded, kConsumers);

  constexpr int kTiles = S::kBoth ? 2 : 1;
  const int row_tile = warpgroup * kTiles;
  RowSums sums[kTiles];
  if (p.ranks != nullptr && (S::kBoth || !S::kPair || warpgroup == 0)) {
    const std::uint32_t rows = ring.memory + row_tile * S::kRowTileBytes;
    const std::uint32_t keys =
        S::kPair ? rows + S::kRowTileBytes : ring.tile(0) + row_tile * S::kRowTileBytes;
    find_positives<T, S::kDim>(sums[0], rows, keys);
  }
  if (passes_keys) ptx::named_barrier_arrive(kKeysRead, kHopperThreads);
  if (warpgroup == 1) ptx::named_barrier_arrive(kTurn, kConsumers);

  if constexpr (kMeanRows == 0) {
    sweep<T, S, false>(p, ring, sums, warpgroup, first_tile, tiles);
  } else if constexpr (S::kSends) {
    if (warpgroup == 0) {
      sweep_with_mean<T, S, false, 2>(p, ring, sums[0], 0, first_tile, tiles);
    } else {
      sweep_with_mean<T, S, true, 2>(p, ring, sums[0], 1, first_tile, tiles);
    }
  } else if (S::kPair && warpgroup == 1) {
    sweep<T, S, true>(p, ring, sums, 1, first_tile, tiles);
  } else if (p.weight_parts == 2) {
    sweep_with_mean<T, S, false, 2>(p, ring, sums[0], S::kPair ? 0 : warpgroup, first_tile, tiles);
  } else {
    sweep_with_mean<T, S, false, 1>(p, ring, sums[0], S::kPair ? 0 : warpgroup, first_tile, tiles);
  }
}

#endif

template <typename T, int kDim, Pairing kPairing, int kMeanRows>
__global__ void __launch_bounds__(kHopperThreads, 1)
    stream_hopper_kernel(const SOFTCL_GRID_CONSTANT HopperParams p) {
#if defined(SOFTCL_HAS_WARPGROUPS)
  using S = HopperShape<kDim, kPairing, kMeanRows>;
  const Ring<S> ring{ptx::tile_memory()};
  const int first_tile = blockIdx.y * p.stream.tiles_per_split;
  // Not the smaller of two numbers: that would not be a uniform register.
  const bool is_last = blockIdx.y + 1 == gridDim.y;
  const int tiles = is_last ? p.stream.num_tiles - first_tile : p.stream.tiles_per_split;
  if (threadIdx.x == 0) ring.initialize();
  ptx::sync_threads();
  if (warpgroup_index() == kConsumers / kWarpgroup) {
    ptx::decrease_registers<kProducerRegisters>();
    // The keys are read before the first tile takes their place.
    if (p.stream.ranks != nullptr && !S::kPair) {
      ptx::named_barrier_sync(kKeysRead, kHopperThreads);
    }
    if (threadIdx.x == kConsumers) produce<S>(p, ring, first_tile, tiles);
  } else {
    ptx::increase_registers<kConsumerRegisters>();
    consume<T, S, kMeanRows>(p.stream, ring, first_tile, tiles);
  }
#endif
}

}  // namespace softcl::cuda

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
// are 2^15; bf16 weights are 2^x as they are. Where bf16 is too coarse (kernel_type) the three idle
// warps of the third warpgroup turn tiles of bf16 into fp16 where they lie.
//
// fp32, of rows or of the queue, makes all of it two fp16 parts (rows.h), 22 bits: three products
// for one. A stage holds the bytes of the tile's fp32 numbers; the same warps take them apart where
// they lie, the high parts first, then the low ones. So the queue is read as it is, and needs no
// copy of its size. Two bf16 parts would need no running maximum, but have 16 bits: an error of
// 1e-5 in the gradient, where these have 2e-6; three bf16 parts, 24 bits, would be six products.
// Tensor cores cut their sums off, so sums are short: v.Q is added from two of 64 columns, a mean
// from those of 64 queue rows. That takes the registers in which the 16-bit schedule keeps a second
// tile: here one tile's products, weights and means follow each other, and the other warpgroup
// multiplies meanwhile. Nothing of that fits at D = 256.
//
//     D     tile rows   stages   shared memory     accumulators per thread
//     64    128         4        160 to 192 KB     64 + 32, and 32 of a sum of means
//     128   128, 64     2, 3     192 to 224 KB     64 + 64, and 64 of products or of means
//
// Shared memory, by which products would be bound: 128 bytes a clock, in which a multiprocessor
// multiplies (64, 16) by (16, N) in N / 2 clocks. Reading the rows from there with every tile, as
// it is done, takes 2 KB of each such product of v.Q; as fragments they would take D / 4 registers
// more, which only D = 64 has. Clocks per tile and block at D = 128, of both warpgroups, derived:
//
//                            products   shared memory   rows' part of it
//     hard labels            2048       1536            256
//     top-k labels           1536       1280            256
//     dense labels, fp16     2048       2048            256     512 of them the student's products
//     dense labels, bf16     2048       2560            256     512 more making tiles fp16
//     dense labels, fp32     6144       5888            768     1024 of them taking tiles apart
//
// The products bind, but of a bf16 queue with dense labels; the rows stay where they are.
//
// Traffic: K D 2 (fp32: 4) bytes of queue per row block, from L2; rows and sums once; with chunk
// maxima four bytes per row and chunk. Nothing of size N x K is written.
//
// Experimental: has not yet run on a GPU; tests/native/cuda runs it on a CPU.

#pragma once

#include "launch.h"
#include "rows.h"
#include "stream_hopper_products.h"
#include "stream_hopper_ring.h"
#include "stream_hopper_state.h"
#include "stream_hopper_weights.h"

namespace softcl::cuda {

#if defined(SOFTCL_HAS_WARPGROUPS)

/// 64 rows of source (num_rows, D) from `first` on into a tile, zeros where there is none. By all
/// consumers; fence and synchronise.
template <typename T, typename S>
SOFTCL_DEVICE void load_row_tile(std::uint32_t tile, const void* source, int first,
                                 const StreamParams& p) {
  constexpr int kPieces = S::kDim / 8;  // of a row
  const int piece = threadIdx.x % kPieces;
  for (int i = threadIdx.x / kPieces; i < kWarpgroupRows; i += kConsumers / kPieces) {
    const std::int64_t n = first + i;
    const std::uint32_t target = tile + box_offset(kWarpgroupRows, i, piece * 8);
    float x[8] = {};
    if (n < p.num_rows) load_floats(x, source, p.row_type, n, piece, p.dim, p.aligned);
    if (p.normalize) normalize_floats<S::kDim>(x, p.row_type);  // all lanes
    store_numbers<T>(target, S::kRowPartBytes, x);
  }
}

/// The whole split for kTiles tiles of rows, without means: both rows of the samples, or one.
template <typename T, typename S, bool kTeacher, int kTiles>
SOFTCL_DEVICE void sweep(const StreamParams& p, const Ring<S>& ring, RowSums (&sums)[kTiles],
                         int warpgroup, int first_tile, int tiles) {
  const int row_tile = warpgroup * kTiles;
  const std::uint32_t rows = ring.memory + row_tile * S::kRowTileBytes;
  float s[kTiles][S::kTileRows / 8][4] = {};
  float rest[kTiles][rest_eights<T, S::kDim>(S::kTileRows / 8)][4] = {};
  float carry[2];
  for (int i = 0; i < tiles; ++i) {
    ring.wait_for(i);
    take_turn(warpgroup);
    ptx::wgmma_fence();
    SOFTCL_UNROLL
    for (int r = 0; r < kTiles; ++r) {
      start_products<T, S::kDim>(s[r], rest[r], rows + r * S::kRowTileBytes, ring.tile(i),
                                 S::kTilePartBytes);
    }
    ptx::wgmma_commit();
    pass_turn(warpgroup, i + 1 == tiles);
    ptx::wgmma_wait<0>();
    SOFTCL_UNROLL
    for (int r = 0; r < kTiles; ++r) finish_products<T, S::kDim>(s[r], rest[r]);
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

/// The whole split for one tile of rows, with its mean, of 16-bit numbers.
template <typename T, typename S, bool kTeacher>
SOFTCL_DEVICE void sweep_with_mean(const StreamParams& p, const Ring<S>& ring, RowSums& sums,
                                   int warpgroup, int first_tile, int tiles) {
  const int row_tile = warpgroup;
  const std::uint32_t rows = ring.memory + row_tile * S::kRowTileBytes;
  float s[S::kTileRows / 8][4] = {}, rest[1][4];
  float mean[S::kDim / 8][4] = {};
  Weights<S, 1> weights;
  float carry[2];

  ring.wait_for(0);
  take_turn(warpgroup);
  ptx::wgmma_fence();
  start_products<T, S::kDim>(s, rest, rows, ring.tile(0), 0);
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
    start_products<T, S::kDim>(s, rest, rows, ring.tile(i), 0);
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

/// The same of numbers in two parts. The mean of some rows is a sum by itself, added to the others
/// by instructions that round: tensor cores would cut off more than the low parts hold. Nothing of
/// one tile runs beside another's; meanwhile the other warpgroup multiplies.
template <typename T, typename S, bool kTeacher>
SOFTCL_DEVICE void sweep_parts_with_mean(const StreamParams& p, const Ring<S>& ring, RowSums& sums,
                                         int warpgroup, int first_tile, int tiles) {
  const std::uint32_t rows = ring.memory + warpgroup * S::kRowTileBytes;
  constexpr int kEights = S::kTileRows / 8;
  float mean[S::kDim / 8][4] = {};
  for (int i = 0; i < tiles; ++i) {
    float s[kEights][4], rest[rest_eights<T, S::kDim>(kEights)][4], sum[S::kDim / 8][4];
    Weights<S, 2> weights;
    float carry[2];
    ring.wait_for(i);
    take_turn(warpgroup);
    ptx::wgmma_fence();
    start_products<T, S::kDim>(s, rest, rows, ring.tile(i), S::kTilePartBytes);
    ptx::wgmma_commit();
    pass_turn(warpgroup, i + 1 == tiles);
    ptx::wgmma_wait<0>();
    finish_products<T, S::kDim>(s, rest);
    visit_products<T, S, kTeacher>(sums, s, carry, p, ring.memory, warpgroup, first_tile, i, tiles);
    for (int j = 0; j < 2; ++j) sums.mean_weight[j] *= carry[j];
    pack_weights<T, S>(weights, sums, s);
    weights.settle();
    constexpr int kSteps = kQueueRowsAtOnce / 16;
    SOFTCL_UNROLL
    for (int k = 0; k < S::kTileRows / 16; k += kSteps) {
      ptx::wgmma_fence();
      multiply_parts<S>(sum, weights, ring.tile(i), k, k + kSteps);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::settle(sum);
      SOFTCL_UNROLL
      for (int n = 0; n < S::kDim / 8; ++n) {
        SOFTCL_UNROLL
        for (int e = 0; e < 4; ++e) {
          mean[n][e] = fmaf(mean[n][e], k == 0 ? carry[e / 2] : 1.0f, sum[n][e]);
        }
      }
    }
    ring.release(i);
  }
  store_row_sums<S, kTeacher>(sums, p, warpgroup, true);
  store_means<S, kTeacher>(mean, p, warpgroup);
}

/// Loads the rows, finds the positives, sweeps and stores. By both consuming warpgroups.
template <typename T, typename S, int kMeanRows>
SOFTCL_DEVICE void consume(const StreamParams& p, const Ring<S>& ring, int first_tile, int tiles) {
  const int warpgroup = warpgroup_index();
  const bool passes_keys = p.ranks != nullptr && !S::kPair;
  for (int r = 0; r < S::kRowTiles; ++r) {
    const int first = first_sample_of_tile<S>(r);
    load_row_tile<T, S>(ring.memory + r * S::kRowTileBytes, p.rows[S::kPair ? r % 2 : 0], first, p);
    if (passes_keys) {
      load_row_tile<T, S>(ring.tile(0) + r * S::kRowTileBytes, p.rows[1], first, p);
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
    find_positives<T, S>(sums[0], rows, keys);
  }
  if (passes_keys) ptx::named_barrier_arrive(kKeysRead, kHopperThreads);
  if (warpgroup == 1) ptx::named_barrier_arrive(kTurn, kConsumers);

  const int student = S::kPair ? 0 : warpgroup;
  if constexpr (kMeanRows == 0) {
    sweep<T, S, false>(p, ring, sums, warpgroup, first_tile, tiles);
  } else if (S::kPair && warpgroup == 1) {
    if constexpr (!S::kSends) {
      sweep<T, S, true>(p, ring, sums, 1, first_tile, tiles);
    } else if constexpr (kParts<T> == 2) {
      sweep_parts_with_mean<T, S, true>(p, ring, sums[0], 1, first_tile, tiles);
    } else {
      sweep_with_mean<T, S, true>(p, ring, sums[0], 1, first_tile, tiles);
    }
  } else if constexpr (kParts<T> == 2) {
    sweep_parts_with_mean<T, S, false>(p, ring, sums[0], student, first_tile, tiles);
  } else {
    sweep_with_mean<T, S, false>(p, ring, sums[0], student, first_tile, tiles);
  }
}

#endif

template <typename T, int kDim, Pairing kPairing, int kMeanRows>
__global__ void __launch_bounds__(kHopperThreads, 1)
    stream_hopper_kernel(const SOFTCL_GRID_CONSTANT HopperParams p) {
#if defined(SOFTCL_HAS_WARPGROUPS)
  using S = HopperShape<kDim, kPairing, kMeanRows, T>;
  const Ring<S> ring{ptx::tile_memory(), converts<T>(p.stream.queue_type)};
  const int first_tile = blockIdx.y * p.stream.tiles_per_split;
  // Not the smaller of two numbers: that would not be a uniform register.
  const bool is_last = blockIdx.y + 1 == gridDim.y;
  const int tiles = is_last ? p.stream.num_tiles - first_tile : p.stream.tiles_per_split;
  if (threadIdx.x == 0) ring.initialize();
  ptx::sync_threads();
  if (warpgroup_index() == kConsumers / kWarpgroup) {
    ptx::decrease_registers<S::kProducerRegisters>();
    // The keys are read before the first tile takes their place.
    if (p.stream.ranks != nullptr && !S::kPair) {
      ptx::named_barrier_sync(kKeysRead, kHopperThreads);
    }
    const int warp = threadIdx.x % kWarpgroup / kWarp;
    if (threadIdx.x == kConsumers) produce<S>(p, ring, first_tile, tiles);
    if (ring.converts && warp > 0) convert_tiles<S>(p.stream, ring, tiles, warp - 1);
  } else {
    ptx::increase_registers<S::kConsumerRegisters>();
    consume<T, S, kMeanRows>(p.stream, ring, first_tile, tiles);
  }
#endif
}

}  // namespace softcl::cuda

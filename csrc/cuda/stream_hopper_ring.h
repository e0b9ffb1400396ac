// The ring of stages through which queue tiles come to the Hopper streaming kernel's products, and
// the warpgroup that fills it. See stream_hopper_kernel.h.

#pragma once

#include "stream_hopper_state.h"

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
  bool converts;         // tiles are converted when they have arrived

  SOFTCL_DEVICE std::uint32_t tile(int i) const {
    return memory + S::kStagesAt + i % S::kStages * S::kStageBytes;
  }
  /// Ends a phase when a tile has arrived.
  SOFTCL_DEVICE std::uint32_t full(int i) const {
    return memory + S::kBarriersAt + i % S::kStages * 8;
  }
  /// Ends a phase when all eight warps have done with a tile.
  SOFTCL_DEVICE std::uint32_t empty(int i) const { return full(i) + S::kStages * 8; }
  /// Ends a phase when a tile has been converted.
  SOFTCL_DEVICE std::uint32_t converted(int i) const { return full(i) + 2 * S::kStages * 8; }
  static SOFTCL_DEVICE int parity(int i) { return i / S::kStages % 2; }

  SOFTCL_DEVICE void initialize() const {
    for (int i = 0; i < S::kStages; ++i) {
      ptx::mbarrier_init(full(i), 1);
      ptx::mbarrier_init(empty(i), kConsumers / kWarp);
      ptx::mbarrier_init(converted(i), kConvertingWarps);
    }
    ptx::fence_async_proxy();
  }
  SOFTCL_DEVICE void wait_for(int i) const {
    if (kHasMaximum<typename S::Number> && converts) {
      ptx::mbarrier_wait("tile converted", converted(i), parity(i));
    } else {
      ptx::mbarrier_wait("tile copied", full(i), parity(i));
    }
  }
  SOFTCL_DEVICE void release(int i) const {
    if (lane_index() == 0) ptx::mbarrier_arrive(empty(i));
  }
};

/// Copies all tiles of the split. By one thread. A box of fp32 has 32 columns, where one of 16-bit
/// numbers has 64: two of them fill the places of the high and of the low parts of 64 columns.
template <typename S>
SOFTCL_DEVICE void produce(const HopperParams& p, const Ring<S>& ring, int first_tile, int tiles) {
  const bool wide = S::kNumParts == 2 && p.stream.queue_type == ElementType::kFloat32;
  for (int i = 0; i < tiles; ++i) {
    // The stage's last tile was the one before in it: i - kStages.
    if (i >= S::kStages) ptx::mbarrier_wait("tile read", ring.empty(i), 1 - ring.parity(i));
    ptx::mbarrier_expect(ring.full(i), wide ? 2 * S::kTilePartBytes : S::kTilePartBytes);
    for (int box = 0; box < S::kDim / kBoxColumns; ++box) {
      const std::uint32_t target = ring.tile(i) + box * S::kTileRows * kBoxRowBytes;
      const int row = (first_tile + i) * S::kTileRows;
      ptx::tma_load(target, &p.queue, box * kBoxColumns, row, ring.full(i));
      if (wide) {
        ptx::tma_load(target + S::kTilePartBytes, &p.queue, box * kBoxColumns + kBoxColumns / 2,
                      row, ring.full(i));
      }
    }
  }
}

/// Converts a tile of the queue's numbers, in place. Eight lanes take 64 columns of a row; in fp32
/// these lie where parts will lie that other lanes of the warp write, so all read before any
/// writes.
template <typename S>
SOFTCL_DEVICE void convert_tile(std::uint32_t tile, ElementType type, int warp) {
  constexpr int kLines = S::kTileRows * S::kDim / kBoxColumns;  // of 64 columns
  const bool wide = S::kNumParts == 2 && type == ElementType::kFloat32;
  const int piece = split_piece(lane_index());
  SOFTCL_NO_UNROLL
  for (int i = warp; i < kLines / 4; i += kConvertingWarps) {
    const int line = i / 2 * 8 + split_line(lane_index(), i % 2);
    const std::uint32_t target = tile + line_offset(line, piece * 16);
    ptx::Vector first, second = {};
    if (wide) {
      const std::uint32_t source =
          tile + piece / 4 * S::kTilePartBytes + line_offset(line, piece % 4 * 32);
      first = ptx::load_shared<ptx::Vector>(source);
      second = ptx::load_shared<ptx::Vector>(source ^ 16);
    } else {
      first = ptx::load_shared<ptx::Vector>(target);
    }
    float x[8];
    to_floats(x, type, first, second);
    ptx::sync_warp();
    store_numbers<typename S::Number>(target, S::kTilePartBytes, x);
  }
}

/// Converts all tiles of the split as they arrive. By kConvertingWarps warps; `warp` of them.
template <typename S>
SOFTCL_DEVICE void convert_tiles(const StreamParams& p, const Ring<S>& ring, int tiles, int warp) {
  for (int i = 0; i < tiles; ++i) {
    ptx::mbarrier_wait("tile copied", ring.full(i), ring.parity(i));
    convert_tile<S>(ring.tile(i), p.queue_type, warp);
    ptx::fence_async_proxy();  // products read what each lane has written
    ptx::sync_warp();
    if (lane_index() == 0) ptx::mbarrier_arrive(ring.converted(i));
  }
}

/// This warpgroup may start products; ends with pass_turn, but for the last turn of warpgroup 1.
SOFTCL_DEVICE void take_turn(int warpgroup) {
  ptx::named_barrier_sync(kTurn + warpgroup, kConsumers);
}
SOFTCL_DEVICE void pass_turn(int warpgroup, bool is_last) {
  if (warpgroup == 0 || !is_last) ptx::named_barrier_arrive(kTurn + 1 - warpgroup, kConsumers);
}

#endif

}  // namespace softcl::cuda

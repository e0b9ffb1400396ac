// The streaming kernel for sm_90a: the interface of stream.h, by other means. See
// stream_hopper_kernel.h.

#pragma once

#include "stream.h"

namespace softcl::cuda {

/// kLongestPartsSplit of this kernel, which adds 64 rows at a time: 2.1e-6 of 8192 rows, 1.3e-6 of
/// these.
inline constexpr int kLongestHopperPartsSplit = 4096;

// Numbers in two parts have rows and stages of twice the bytes, and sums of a tile beside those of
// the split: of 256 dimensions neither shared memory nor registers would hold them.
inline constexpr int kMostPartsDimensions = 128;

/// Whether this kernel can run the call, or else the one of stream.h: on compute capability 9.0;
/// of 16-bit numbers (`kernel_type`, see stream.h), or of any with D <= kMostPartsDimensions; a
/// queue of which TMA can copy boxes.
bool can_stream_hopper(int device, const void* queue, int dim, ElementType kernel_type);

StreamShape hopper_shape(ElementType kernel_type, int dim, Pairing pairing, int mean_rows);

/// As launch_stream, with a queue whose rows begin at multiples of 16 bytes.
void launch_stream_hopper(const StreamParams& params, Pairing pairing, int mean_rows,
                          int row_blocks, int splits, void* stream);

}  // namespace softcl::cuda

// The streaming kernel for sm_90a: the interface of stream.h, by other means. See
// stream_hopper_kernel.h.

#pragma once

#include "stream.h"

namespace softcl::cuda {

// The tensor cores cut their sums off: 2^-24 or so of a sum each time that 16 rows of the queue are
// added to it. Means over more rows than this, in one split, would be off by more than 2e-4.
inline constexpr int kLongestSplit = 1 << 17;

/// Whether this kernel can run the call: rows and queue of one 16-bit type (`kernel_type`, see
/// stream.h); on compute capability 9.0; a queue of which TMA can copy
/// boxes; temperatures that need no running maximum for bf16 (for fp16 there always is one).
bool can_stream_hopper(int device, const void* queue, std::int64_t queue_size, int dim,
                       ElementType kernel_type, bool running_maximum);

StreamShape hopper_shape(int dim, Pairing pairing, int mean_rows);

/// As launch_stream, with a queue whose rows begin at multiples of 16 bytes.
void launch_stream_hopper(const StreamParams& params, Pairing pairing, int mean_rows,
                          int row_blocks, int splits, void* stream);

}  // namespace softcl::cuda

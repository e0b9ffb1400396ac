// The nearest rows of every vector and nothing else: a screen in 16-bit fixed point, then an exact
// comparison of what it leaves.

#pragma once

#include "softcl/call.h"

namespace softcl::cpu {

/// Writes neighbor_logits and neighbor_indices as queue_statistics does. False, and nothing is
/// written, if this call or this processor is not for it: there is no screen, the queue is short or
/// has rows that are longer than unit rows, or too many rows are too close to tell apart.
bool screened_search(const Call& call);

}  // namespace softcl::cpu

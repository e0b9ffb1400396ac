// The operator on a CUDA device: asynchronous, on a stream, in a workspace of the caller's.
//
// Experimental: has not yet run on a GPU.

#pragma once

#include <cstdint>

#include "softcl/call.h"

namespace softcl::cuda {

/// Where and with what a call runs.
struct Launch {
  int device = 0;
  void* stream = nullptr;     // a cudaStream_t of that device
  void* workspace = nullptr;  // device memory, aligned to 256 bytes, contents of no matter
  std::int64_t workspace_bytes = 0;
};

/// Whether calls may take the kernel for compute capability 9.0 where they can; by default they
/// may.
void allow_hopper(bool allowed);

/// The largest D that the device's shared memory has room for: 256, or 128 with fp32 on some.
std::int64_t most_dimensions(ElementType vector_type, ElementType queue_type, int device);

std::int64_t queue_statistics_workspace(const Call& call, int device);
std::int64_t soft_contrastive_workspace(const Call& call, int device);
void queue_statistics(const Call& call, const Launch& launch);
void soft_contrastive(const Call& call, const Launch& launch);

/// Bytes of workspace that the same call needs, with the same pointers; reads no memory.
inline std::int64_t workspace_bytes(const Call& call, int device) {
  return call.key == nullptr ? queue_statistics_workspace(call, device)
                             : soft_contrastive_workspace(call, device);
}

/// Rows and queue of any types, D <= most_dimensions, at most 1024 neighbours, none excluded.
/// num_threads is not read. Throws std::invalid_argument that names the argument and its value, or
/// std::runtime_error with CUDA's words. A row that is not finite gives NaN in its own results, a
/// queue row that is not finite gives NaN losses, gradients and sums; among the neighbours it comes
/// last. No allocation and no synchronisation: may be captured in a CUDA graph.
/// Same inputs, same device: same bits.
inline void run(const Call& call, const Launch& launch) {
  call.key == nullptr ? queue_statistics(call, launch) : soft_contrastive(call, launch);
}

}  // namespace softcl::cuda

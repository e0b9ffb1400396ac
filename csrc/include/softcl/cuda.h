// The operator on a CUDA device: asynchronous, on a stream, in a workspace of the caller's.
//
// Experimental: has not yet run on a GPU.

#pragma once

#include <cstdint>

#include "softcl/params.h"

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

/// Bytes of workspace that the same call needs, with the same pointers; reads no memory.
std::int64_t workspace_bytes(const QueueStatisticsParams& params, int device);
std::int64_t workspace_bytes(const SoftContrastiveParams& params, int device);

/// The largest D that the device's shared memory has room for: 256, or 128 with fp32 on some.
std::int64_t most_dimensions(ElementType vector_type, ElementType queue_type, int device);

// Rows and queue of any types, D <= most_dimensions, at most 1024 neighbours. num_threads is not
// read. Both throw std::invalid_argument that names the argument and its value, or
// std::runtime_error with CUDA's words. A row that is not finite gives NaN in its own results, a
// queue row that is not finite gives NaN losses, gradients and sums; among the neighbours it comes
// last. No allocation and no synchronisation: may be captured in a CUDA graph.
// Same inputs, same device: same bits.
void queue_statistics(const QueueStatisticsParams& params, const Launch& launch);
void soft_contrastive(const SoftContrastiveParams& params, const Launch& launch);

}  // namespace softcl::cuda

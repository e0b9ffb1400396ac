// What both finishing kernels take from the streaming kernel and from the call.

#pragma once

#include "arguments.h"
#include "merge.h"
#include "select.h"

namespace softcl::cuda {

/// Of one launch of a finishing kernel: one block of kFinishThreads per row, or blocks that take
/// several rows each where they need room for candidates.
struct FinishParams {
  Partial partial;
  Rows queue;  // (K, D)
  const float* maxima;
  float* candidates;  // (blocks, candidates_per_block)
  std::int64_t candidates_per_block;
  std::int64_t num_chunks;
  std::int64_t num_rows;
  Chunks chunks;
  int num_neighbors;
  ElementType row_type;
  double scale[2];
  double temperature[2];
};

inline FinishParams finish_params(const Work& work, const Plan& plan, const StreamParams& stream,
                                  void* workspace) {
  FinishParams p = {};
  p.partial = {stream.sums,
               stream.means,
               stream.num_sum_rows,
               stream.num_mean_rows,
               plan.splits,
               work.dim,
               has_running_maximum(work.kernel_type)};
  p.queue = {stream.queue, stream.queue_type, work.dim, is_aligned(stream.queue, work.dim)};
  p.maxima = stream.maxima;
  p.candidates = reinterpret_cast<float*>(static_cast<char*>(workspace) + plan.candidates);
  p.candidates_per_block = plan.candidates_per_block;
  p.num_chunks = plan.num_chunks;
  p.num_rows = work.num_rows;
  p.chunks = {plan.num_filled_chunks, plan.chunk_shift, work.queue_size};
  p.num_neighbors = static_cast<int>(work.num_neighbors);
  p.row_type = stream.row_type;
  for (int r = 0; r < 2; ++r) p.scale[r] = stream.scale[r];
  return p;
}

/// Shared memory: the reductions' scratch, then the selection's.
SOFTCL_HOST_DEVICE inline SelectMemory select_memory(std::uint32_t base, int num_neighbors) {
  return {base + kReduceBytes, num_neighbors};
}

inline std::size_t finish_shared_bytes(int num_neighbors) {
  return select_memory(0, num_neighbors).end();
}

/// The nearest queue rows of row n, whose elements are x, into memory.sorted(). By all threads.
/// No barrier here: the selection begins with one, before it reads the vector, and has had others
/// since the row before was read.
SOFTCL_DEVICE void find_neighbors(const FinishParams& p, const SelectMemory& memory, std::int64_t n,
                                  const float (&x)[kElements]) {
  SOFTCL_UNROLL
  for (int i = 0; i < kElements; ++i) {
    ptx::store_shared(memory.vector() + (threadIdx.x + i * kFinishThreads) * 4, x[i]);
  }
  select_neighbors(memory, p.maxima + n * p.num_chunks, p.chunks, p.queue,
                   p.candidates + blockIdx.x * p.candidates_per_block);
}

SOFTCL_DEVICE float not_a_number() {
  return ptx::float_of(0x7fffffffu);
}

}  // namespace softcl::cuda

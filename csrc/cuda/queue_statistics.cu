// Statistics of a softmax over the queue: the streaming kernel, then this one, which merges the
// splits and finds the exact neighbours.
//
// Tiling: one block of 128 threads per row. Traffic: the splits' sums (splits x D) once, the chunk
// maxima, k chunks of queue rows from L2, the results.
//
// Experimental: has not yet run on a GPU; tests/native/cuda runs it on a CPU.

#include "finish.h"

namespace softcl::cuda {

namespace {

struct StatisticsParams {
  FinishParams finish;
  const void* vectors;
  float* lse;
  float* mean;
  float* entropy;
  float* neighbor_logits;
  std::int64_t* neighbor_indices;
};

/// The sums of row n. Written by all threads; a queue row that is not finite gives NaN in all.
SOFTCL_DEVICE void store_sums(const StatisticsParams& p, std::int64_t n, std::uint32_t scratch) {
  const FinishParams& f = p.finish;
  const bool has_mean = p.mean != nullptr;
  const Merged merged =
      merge_sums(f.partial, n, f.scale[0], !has_mean || p.entropy != nullptr, false);
  const double lse = merged.log_sum * kLn2;
  // Where there is a mean, it is what has met a product of minus infinity; see stream_kernel.h.
  double total[1] = {has_mean ? 0.0 : merged.entropy};
  float mean[kElements];
  if (has_mean) {
    merge_mean(mean, f.partial, n, merged.maximum);
    SOFTCL_UNROLL
    for (int i = 0; i < kElements; ++i) total[0] += mean[i];
    block_sum(total, scratch);
  }
  total[0] += lse;
  const bool finite = total[0] - total[0] == 0.0;
  if (has_mean) {
    SOFTCL_UNROLL
    for (int i = 0; i < kElements; ++i) {
      const int d = threadIdx.x + i * kFinishThreads;
      if (d >= f.partial.dim) continue;
      ptx::store_global(p.mean + n * f.partial.dim + d, finite ? mean[i] : not_a_number());
    }
  }
  if (threadIdx.x != 0) return;
  const auto store = [&](float* target, double x) {
    if (target == nullptr) return;
    ptx::store_global(target + n, finite ? static_cast<float>(x) : not_a_number());
  };
  store(p.lse, lse);
  store(p.entropy, merged.entropy);
}

__global__ void __launch_bounds__(kFinishThreads) statistics_kernel(const StatisticsParams p) {
  ptx::wait_for_previous_grid();
  const FinishParams& f = p.finish;
  const SelectMemory memory = select_memory(ptx::shared_memory(), f.num_neighbors);
  for (std::int64_t n = blockIdx.x; n < f.num_rows; n += gridDim.x) {
    if (p.lse != nullptr || p.entropy != nullptr || p.mean != nullptr) {
      store_sums(p, n, ptx::shared_memory());
    }
    if (f.num_neighbors == 0) continue;
    float x[kElements];
    load_elements(x, p.vectors, f.row_type, n, f.partial.dim);
    find_neighbors(f, memory, n, x);
    for (int j = threadIdx.x; j < f.num_neighbors; j += kFinishThreads) {
      const auto key = ptx::load_shared<std::uint64_t>(memory.sorted() + j * 8);
      const float cosine = value_of(key);
      const std::int64_t place = n * f.num_neighbors + j;
      ptx::store_global(
          p.neighbor_logits + place,
          cosine > kWorst ? static_cast<float>(cosine / f.temperature[0]) : not_a_number());
      ptx::store_global(p.neighbor_indices + place, std::int64_t(index_of(key)));
    }
  }
}

bool has_sums(const Call& call) {
  return call.lse != nullptr || call.mean != nullptr || call.entropy != nullptr;
}

Work work_of(const Call& call, int device) {
  check_arguments(call, device);
  Work work = {};
  work.num_rows = call.num_queries;
  work.queue_size = call.queue_size;
  work.dim = static_cast<int>(call.dim);
  work.pairing = Pairing::kSingle;
  work.mean_rows = call.mean != nullptr ? 1 : 0;
  work.num_neighbors = call.rule.num_neighbors;
  const bool exact = call.mean != nullptr || call.temperature < kColdestWithoutMaximum;
  work.kernel_type = kernel_type(call.vector_type, call.queue_type, exact);
  work.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  work.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  work.hopper = can_stream_hopper(device, call.queue, work.dim, work.kernel_type);
  return work;
}

}  // namespace

std::int64_t queue_statistics_workspace(const Call& call, int device) {
  return make_plan(work_of(call, device)).workspace_bytes;
}

void queue_statistics(const Call& call, const Launch& where) {
  const Work work = work_of(call, where.device);
  const Plan plan = make_plan(work);
  check_launch(where, plan.workspace_bytes);
  if (!has_sums(call) && work.num_neighbors == 0) return;
  const DeviceGuard guard(where.device);

  StreamParams stream = stream_params(work, plan, where.workspace);
  stream.rows[0] = call.query;
  stream.queue = call.queue;
  stream.scale[0] = stream.scale[1] = static_cast<float>(kLog2E / call.temperature);
  stream.row_type = call.vector_type;
  stream.queue_type = call.queue_type;
  stream.aligned = is_aligned(call.query, work.dim) && is_aligned(call.queue, work.dim);
  stream.softmax = has_sums(call);
  stream.entropy = call.entropy != nullptr;
  launch_planned_stream(stream, work, plan, where.stream);

  StatisticsParams finish = {};
  finish.finish = finish_params(work, plan, stream, where.workspace);
  finish.finish.temperature[0] = call.temperature;
  finish.vectors = call.query;
  finish.lse = call.lse;
  finish.mean = call.mean;
  finish.entropy = call.entropy;
  finish.neighbor_logits = call.neighbor_logits;
  finish.neighbor_indices = call.neighbor_indices;
  launch(&statistics_kernel, dim3(plan.finish_blocks), kFinishThreads,
         finish_shared_bytes(finish.finish.num_neighbors), static_cast<cudaStream_t>(where.stream),
         finish, can_launch_early(&statistics_kernel));
}

}  // namespace softcl::cuda

// Statistics of a softmax over the queue: the streaming kernel, then this one, which merges the
// splits and finds the exact neighbours.
//
// Tiling: one block of 128 threads per row. Traffic: the splits' sums (splits x D) once, the chunk
// maxima, k chunks of queue rows from L2, the results.
//
// Experimental: has not yet run on a GPU; csrc/cuda/host runs it on a CPU.

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

bool has_sums(const QueueStatisticsParams& p) {
  return p.lse != nullptr || p.mean != nullptr || p.entropy != nullptr;
}

Work work_of(const QueueStatisticsParams& p, int device) {
  check_count("num_vectors", p.num_vectors, 1, kMostRows);
  check_count("queue_size", p.queue_size, 1, kMostRows);
  check_types(p.vector_type, p.queue_type);
  check_count("dim", p.dim, 1, most_dimensions(p.vector_type, p.queue_type, device));
  check_count("num_neighbors", p.num_neighbors, 0,
              p.queue_size < kMostNeighbors ? p.queue_size : kMostNeighbors);
  check_temperature("temperature", p.temperature);
  Work work = {};
  work.num_rows = p.num_vectors;
  work.queue_size = p.queue_size;
  work.dim = static_cast<int>(p.dim);
  work.pairing = Pairing::kSingle;
  work.mean_rows = p.mean != nullptr ? 1 : 0;
  work.num_neighbors = p.num_neighbors;
  work.kernel_type = kernel_type(p.vector_type, p.queue_type);
  work.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  work.hopper = can_stream_hopper(device, p.queue, p.queue_size, work.dim, work.kernel_type,
                                  p.temperature < kColdestWithoutMaximum);
  return work;
}

}  // namespace

std::int64_t workspace_bytes(const QueueStatisticsParams& params, int device) {
  return make_plan(work_of(params, device)).workspace_bytes;
}

void queue_statistics(const QueueStatisticsParams& params, const Launch& where) {
  const Work work = work_of(params, where.device);
  const Plan plan = make_plan(work);
  check_launch(where, plan.workspace_bytes);
  check_pointer("vectors", params.vectors);
  check_pointer("queue", params.queue);
  if (work.num_neighbors > 0) {
    check_pointer("neighbor_logits", params.neighbor_logits);
    check_pointer("neighbor_indices", params.neighbor_indices);
  }
  if (!has_sums(params) && work.num_neighbors == 0) return;
  const DeviceGuard guard(where.device);

  StreamParams stream = stream_params(work, plan, where.workspace);
  stream.rows[0] = params.vectors;
  stream.queue = params.queue;
  stream.scale[0] = stream.scale[1] = static_cast<float>(kLog2E / params.temperature);
  stream.row_type = params.vector_type;
  stream.queue_type = params.queue_type;
  stream.weight_parts = 2;
  stream.aligned = is_aligned(params.vectors, work.dim) && is_aligned(params.queue, work.dim);
  stream.softmax = has_sums(params);
  stream.entropy = params.entropy != nullptr;
  stream.running_maximum = params.temperature < kColdestWithoutMaximum || always_has_maximum(work);
  launch_planned_stream(stream, work, plan, where.stream);

  StatisticsParams finish = {};
  finish.finish = finish_params(work, plan, stream, where.workspace);
  finish.finish.temperature[0] = params.temperature;
  finish.vectors = params.vectors;
  finish.lse = params.lse;
  finish.mean = params.mean;
  finish.entropy = params.entropy;
  finish.neighbor_logits = params.neighbor_logits;
  finish.neighbor_indices = params.neighbor_indices;
  launch(&statistics_kernel, dim3(plan.finish_blocks), kFinishThreads,
         finish_shared_bytes(finish.finish.num_neighbors), static_cast<cudaStream_t>(where.stream),
         finish, can_launch_early(where.device));
}

}  // namespace softcl::cuda

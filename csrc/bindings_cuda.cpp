// The CUDA backend's part of the module: every call is a launch on a stream, in a workspace whose
// size another call tells. Also compiled into the module that runs the kernels on a CPU.

#include <pybind11/stl.h>

#include "bindings.h"
#include "softcl/cuda.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace softcl {

namespace {

cuda::Launch launch_on(int device, Address stream, Address workspace,
                       std::int64_t workspace_bytes) {
  return {device, pointer_to<void>(stream), pointer_to<void>(workspace), workspace_bytes};
}

// Launches, or with a workspace of no bytes tells how many it takes.
template <typename Params>
std::int64_t run(void (*operation)(const Params&, const cuda::Launch&), const Params& params,
                 const cuda::Launch& launch) {
  const py::gil_scoped_release release;
  if (launch.workspace_bytes == 0) return cuda::workspace_bytes(params, launch.device);
  operation(params, launch);
  return launch.workspace_bytes;
}

std::int64_t cuda_queue_statistics(Address vectors, Address queue, int vector_type, int queue_type,
                                   std::int64_t num_vectors, std::int64_t queue_size,
                                   std::int64_t dim, std::int64_t num_neighbors, double temperature,
                                   Address lse, Address mean, Address entropy,
                                   Address neighbor_logits, Address neighbor_indices, int device,
                                   Address stream, Address workspace,
                                   std::int64_t workspace_bytes) {
  const QueueStatisticsParams params = statistics_params(
      vectors, queue, vector_type, queue_type, num_vectors, queue_size, dim, num_neighbors,
      temperature, lse, mean, entropy, neighbor_logits, neighbor_indices);
  return run(&cuda::queue_statistics, params,
             launch_on(device, stream, workspace, workspace_bytes));
}

std::int64_t cuda_soft_contrastive(Address query, Address key, Address queue, int vector_type,
                                   int queue_type, std::int64_t num_queries,
                                   std::int64_t queue_size, std::int64_t dim, int rule,
                                   std::int64_t num_neighbors, double positive_weight,
                                   double temperature, double teacher_temperature, bool positive,
                                   bool normalize, Address loss, Address dquery, Address confidence,
                                   Address entropy, Address positive_rank, Address neighbor_indices,
                                   int device, Address stream, Address workspace,
                                   std::int64_t workspace_bytes) {
  const SoftContrastiveParams params =
      loss_params(query, key, queue, vector_type, queue_type, num_queries, queue_size, dim, rule,
                  num_neighbors, positive_weight, temperature, teacher_temperature, positive,
                  normalize, loss, dquery, confidence, entropy, positive_rank, neighbor_indices);
  return run(&cuda::soft_contrastive, params,
             launch_on(device, stream, workspace, workspace_bytes));
}

void cuda_enqueue(Address keys, Address queue, Address refused, std::int64_t num_keys,
                  std::int64_t queue_size, std::int64_t dim, std::int64_t pointer, int key_type,
                  int queue_type, bool normalize, int device, Address stream) {
  const EnqueueParams params = enqueue_params(keys, queue, refused, num_keys, queue_size, dim,
                                              pointer, key_type, queue_type, normalize);
  const py::gil_scoped_release release;
  cuda::enqueue(params, device, pointer_to<void>(stream));
}

}  // namespace

void bind_cuda(py::module_& module) {
  module.def(
      "cuda_most_dimensions",
      [](int vector_type, int queue_type, int device) {
        return cuda::most_dimensions(ElementType(vector_type), ElementType(queue_type), device);
      },
      "vector_type"_a, "queue_type"_a, "device"_a,
      "The largest D of such rows and queue that a CUDA device has shared memory for.");
  module.def("cuda_queue_statistics", &cuda_queue_statistics, py::kw_only(), "vectors"_a, "queue"_a,
             "vector_type"_a, "queue_type"_a, "num_vectors"_a, "queue_size"_a, "dim"_a,
             "num_neighbors"_a, "temperature"_a, "lse"_a, "mean"_a, "entropy"_a,
             "neighbor_logits"_a, "neighbor_indices"_a, "device"_a, "stream"_a, "workspace"_a,
             "workspace_bytes"_a,
             "Launches cpu_queue_statistics' work on a CUDA stream. With workspace_bytes=0 nothing "
             "runs: returns the bytes of device memory that it needs as workspace.");
  module.def("cuda_soft_contrastive", &cuda_soft_contrastive, py::kw_only(), "query"_a, "key"_a,
             "queue"_a, "vector_type"_a, "queue_type"_a, "num_queries"_a, "queue_size"_a, "dim"_a,
             "rule"_a, "num_neighbors"_a, "positive_weight"_a, "temperature"_a,
             "teacher_temperature"_a, "positive"_a, "normalize"_a, "loss"_a, "dquery"_a,
             "confidence"_a, "entropy"_a, "positive_rank"_a, "neighbor_indices"_a, "device"_a,
             "stream"_a, "workspace"_a, "workspace_bytes"_a,
             "Launches cpu_soft_contrastive's work on a CUDA stream; workspace as in "
             "cuda_queue_statistics.");
  module.def(
      "cuda_allow_hopper", &cuda::allow_hopper, "allowed"_a,
      "Whether calls may take the kernel for compute capability 9.0, where they can; True at "
      "first. For comparisons.");
  module.def("cuda_enqueue", &cuda_enqueue, py::kw_only(), "keys"_a, "queue"_a, "refused"_a,
             "num_keys"_a, "queue_size"_a, "dim"_a, "pointer"_a, "key_type"_a, "queue_type"_a,
             "normalize"_a, "device"_a, "stream"_a,
             "Launches cpu_enqueue's work on a CUDA stream; adds refused keys to an int64 on the "
             "device.");
}

}  // namespace softcl

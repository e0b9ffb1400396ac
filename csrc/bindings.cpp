// The module softcl._C: pointers and sizes in, status out. Knows no torch; releases the GIL while a
// kernel runs. std::invalid_argument becomes ValueError, every other exception RuntimeError.

#include "bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <utility>

#include "cpu/ceilings.h"
#include "cpu/isa.h"
#include "cpu/queue_pass.h"
#include "softcl/enqueue.h"
#include "softcl/params.h"
#include "softcl/views.h"

#if defined(_OPENMP)
  #include <omp.h>
#endif
#ifdef SOFTCL_WITH_CUDA
  #include "softcl/device.h"
#endif

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

using softcl::Address;
using softcl::pointer_to;

void cpu_queue_statistics(Address vectors, Address queue, int vector_type, int queue_type,
                          std::int64_t num_vectors, std::int64_t queue_size, std::int64_t dim,
                          std::int64_t num_neighbors, double temperature, int num_threads,
                          Address lse, Address mean, Address entropy, Address neighbor_logits,
                          Address neighbor_indices, Address excluded) {
  softcl::QueueStatisticsParams params = softcl::statistics_params(
      vectors, queue, vector_type, queue_type, num_vectors, queue_size, dim, num_neighbors,
      temperature, lse, mean, entropy, neighbor_logits, neighbor_indices);
  params.num_threads = num_threads;
  params.excluded = pointer_to<const std::int64_t>(excluded);
  const py::gil_scoped_release release;
  softcl::cpu::queue_statistics(params);
}

void cpu_soft_contrastive(Address query, Address key, Address queue, int vector_type,
                          int queue_type, std::int64_t num_queries, std::int64_t queue_size,
                          std::int64_t dim, int rule, std::int64_t num_neighbors,
                          double positive_weight, double temperature, double teacher_temperature,
                          bool positive, bool normalize, int num_threads, Address loss,
                          Address dquery, Address confidence, Address entropy,
                          Address positive_rank, Address neighbor_indices, Address excluded) {
  softcl::SoftContrastiveParams params = softcl::loss_params(
      query, key, queue, vector_type, queue_type, num_queries, queue_size, dim, rule, num_neighbors,
      positive_weight, temperature, teacher_temperature, positive, normalize, loss, dquery,
      confidence, entropy, positive_rank, neighbor_indices);
  params.num_threads = num_threads;
  params.excluded = pointer_to<const std::int64_t>(excluded);
  const py::gil_scoped_release release;
  softcl::cpu::soft_contrastive(params);
}

std::int64_t cpu_enqueue(Address keys, Address queue, std::int64_t num_keys,
                         std::int64_t queue_size, std::int64_t dim, std::int64_t pointer,
                         int key_type, int queue_type, bool normalize) {
  std::int64_t refused = 0;
  const softcl::EnqueueParams params =
      softcl::enqueue_params(keys, queue, reinterpret_cast<Address>(&refused), num_keys, queue_size,
                             dim, pointer, key_type, queue_type, normalize);
  const py::gil_scoped_release release;
  softcl::cpu::enqueue(params);
  return refused;
}

void cpu_views(Address images, Address table, Address constants, Address views,
               std::int64_t num_images, std::int64_t height, std::int64_t width, std::int64_t size,
               bool colors, int num_threads) {
  softcl::ViewsParams params;
  params.images = pointer_to<const std::uint8_t>(images);
  params.table = pointer_to<const float>(table);
  params.constants = pointer_to<const float>(constants);
  params.views = pointer_to<float>(views);
  params.num_images = num_images;
  params.height = height;
  params.width = width;
  params.size = size;
  params.colors = colors;
  params.num_threads = num_threads;
  const py::gil_scoped_release release;
  softcl::cpu::views(params);
}

int openmp_threads() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() =
      "softcl's compiled backends. Arrays are addresses; element types are 0 (float32), "
      "1 (bfloat16), 2 (float16). Call through softcl.ops and softcl.nn.";

  module.def(
      "isa", [] { return std::string(softcl::cpu::sweep_kernels().name); },
      "Instruction set in use: 'avx512', 'avx2' or 'portable'. SOFTCL_CPU_ISA forces one.");
  module.def("available_isas", &softcl::cpu::available_isas,
             "Instruction sets that run on this processor, best first.");
  module.def("openmp_threads", &openmp_threads,
             "Threads that OpenMP would use by itself; 1 if built without it.");

  module.def(
      "cpu_ceilings",
      [](int num_threads, double seconds) {
        const py::gil_scoped_release release;
        const auto ceilings = softcl::cpu::measure_ceilings(num_threads, seconds);
        return std::pair(ceilings.multiply_adds, ceilings.exponentials);
      },
      "num_threads"_a, "seconds"_a,
      "Measures how many fp32 multiply-adds and exponentials a second the threads can do.");
  module.def("cpu_queue_statistics", &cpu_queue_statistics, py::kw_only(), "vectors"_a, "queue"_a,
             "vector_type"_a, "queue_type"_a, "num_vectors"_a, "queue_size"_a, "dim"_a,
             "num_neighbors"_a, "temperature"_a, "num_threads"_a, "lse"_a, "mean"_a, "entropy"_a,
             "neighbor_logits"_a, "neighbor_indices"_a, "excluded"_a = 0,
             "Writes the softmax statistics of a queue; see QueueStatisticsParams in params.h.");
  module.def("cpu_soft_contrastive", &cpu_soft_contrastive, py::kw_only(), "query"_a, "key"_a,
             "queue"_a, "vector_type"_a, "queue_type"_a, "num_queries"_a, "queue_size"_a, "dim"_a,
             "rule"_a, "num_neighbors"_a, "positive_weight"_a, "temperature"_a,
             "teacher_temperature"_a, "positive"_a, "normalize"_a, "num_threads"_a, "loss"_a,
             "dquery"_a, "confidence"_a, "entropy"_a, "positive_rank"_a, "neighbor_indices"_a,
             "excluded"_a = 0,
             "Writes the loss of a label rule and its gradient; see SoftContrastiveParams in "
             "params.h.");
  module.def("cpu_keeps_weights", &softcl::cpu::keeps_weights, "num_queries"_a, "queue_size"_a,
             "dim"_a, "num_threads"_a,
             "Whether dense labels with a gradient take three products in place of four.");
  module.def("cpu_enqueue", &cpu_enqueue, py::kw_only(), "keys"_a, "queue"_a, "num_keys"_a,
             "queue_size"_a, "dim"_a, "pointer"_a, "key_type"_a, "queue_type"_a, "normalize"_a,
             "Writes keys into the ring queue; returns how many were refused. See enqueue.h.");
  module.def("cpu_views", &cpu_views, py::kw_only(), "images"_a, "table"_a, "constants"_a,
             "views"_a, "num_images"_a, "height"_a, "width"_a, "size"_a, "colors"_a,
             "num_threads"_a, "Writes a view of every image; see ViewsParams in views.h.");
  module.attr("view_columns") = int(softcl::ViewColumn::kCount);

#ifdef SOFTCL_WITH_CUDA
  module.def("has_cuda", [] { return true; }, "Compiled with CUDA.");
  module.def("cuda_device_count", &softcl::cuda::device_count, "Usable CUDA devices.");
  module.def("cuda_no_device_reason", &softcl::cuda::no_device_reason,
             "Why cuda_device_count() is 0; empty if it is not.");
  module.def(
      "cuda_device_name", [](int index) { return softcl::cuda::device(index).name; }, "index"_a,
      "Name of a CUDA device.");
  module.def(
      "cuda_compute_capability",
      [](int index) {
        const softcl::cuda::Device device = softcl::cuda::device(index);
        return std::pair(device.major, device.minor);
      },
      "index"_a, "Compute capability (major, minor) of a CUDA device.");
  softcl::bind_cuda(module);
#else
  module.def("has_cuda", [] { return false; }, "Compiled with CUDA.");
  module.def("cuda_device_count", [] { return 0; }, "Usable CUDA devices.");
  module.def(
      "cuda_no_device_reason", [] { return std::string("built without CUDA"); },
      "Why cuda_device_count() is 0; empty if it is not.");
#endif
}

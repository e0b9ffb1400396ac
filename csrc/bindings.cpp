// The module softcl._C: pointers and sizes in, status out. Knows no torch; releases the GIL while a
// kernel runs. std::invalid_argument becomes ValueError, every other exception of a kernel
// RuntimeError.

#include "bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "call_fields.h"
#include "cpu/isa.h"
#include "cpu/pass/queue_pass.h"
#include "softcl/crops.h"
#include "softcl/enqueue.h"
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

void cpu_run(const py::kwargs& fields) {
  const softcl::Call call = softcl::call_of(fields);
  const py::gil_scoped_release release;
  softcl::cpu::run(call);
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

// Of a box: top, left, height, width in pixels; rows, columns and address of the result.
using Box = std::tuple<double, double, double, double, std::int64_t, std::int64_t, Address>;

void cpu_crops(Address pixels, std::int64_t height, std::int64_t width,
               const std::vector<Box>& boxes) {
  softcl::CropsParams params;
  params.pixels = pointer_to<const std::uint8_t>(pixels);
  params.height = height;
  params.width = width;
  for (const auto& [top, left, box_height, box_width, rows, columns, result] : boxes) {
    params.crops.push_back(
        {top, left, box_height, box_width, rows, columns, pointer_to<std::uint8_t>(result)});
  }
  const py::gil_scoped_release release;
  softcl::cpu::crops(params);
}

// A column of the Arrow C data interface (arrow.apache.org/docs/format/CDataInterface.html).
struct ArrowArray {
  std::int64_t length, null_count, offset, n_buffers, n_children;
  const void** buffers;
  ArrowArray** children;
  ArrowArray* dictionary;
  void (*release)(ArrowArray*);
  void* private_data;
};

// Where the values of a list of lists of bytes lie, of which there are `count`.
Address arrow_bytes(const py::capsule& capsule, std::int64_t count) {
  const auto* const array =
      static_cast<const ArrowArray*>(PyCapsule_GetPointer(capsule.ptr(), "arrow_array"));
  if (array == nullptr) throw py::error_already_set();
  const ArrowArray* const values = array->n_children == 1 ? array->children[0] : nullptr;
  if (values == nullptr || array->offset != 0 || values->offset != 0 || values->n_buffers != 2 ||
      values->length != count) {
    throw std::invalid_argument("capsule holds no " + std::to_string(count) + " bytes in lists");
  }
  return reinterpret_cast<Address>(values->buffers[1]);
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

  module.def("cpu_run", &cpu_run,
             "Writes a loss and its gradient, or without a key the statistics of a queue. The "
             "keyword arguments are the fields of Call in call.h; see call_fields.h.");
  module.def("cpu_keeps_weights", &softcl::cpu::keeps_weights, "num_queries"_a, "queue_size"_a,
             "dim"_a, "num_threads"_a,
             "Whether dense labels with a gradient take three products in place of four.");
  module.def("cpu_enqueue", &cpu_enqueue, py::kw_only(), "keys"_a, "queue"_a, "num_keys"_a,
             "queue_size"_a, "dim"_a, "pointer"_a, "key_type"_a, "queue_type"_a, "normalize"_a,
             "Writes keys into the ring queue; returns how many were refused. See enqueue.h.");
  module.def("cpu_views", &cpu_views, py::kw_only(), "images"_a, "table"_a, "constants"_a,
             "views"_a, "num_images"_a, "height"_a, "width"_a, "size"_a, "colors"_a,
             "num_threads"_a, "Writes a view of every image; see ViewsParams in views.h.");
  module.def(
      "cpu_crops", &cpu_crops, py::kw_only(), "pixels"_a, "height"_a, "width"_a, "boxes"_a,
      "Writes crops of one image; a box is (top, left, height, width, rows, columns, address "
      "of the result). See crops.h.");
  module.def("arrow_bytes", &arrow_bytes, "capsule"_a, "count"_a,
             "Address of the bytes of an Arrow array of lists, which has so many of them.");
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

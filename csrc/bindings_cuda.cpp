// The CUDA backend's part of the module: every call is a launch on a stream, in a workspace whose
// size another call tells. Also compiled into the module that runs the kernels on a CPU.

#include <pybind11/stl.h>

#include "bindings.h"
#include "call_fields.h"
#include "softcl/cuda.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace softcl {

namespace {

std::int64_t cuda_run(int device, Address stream, Address workspace, std::int64_t workspace_bytes,
                      const py::kwargs& fields) {
  const Call call = call_of(fields);
  const cuda::Launch launch = {device, pointer_to<void>(stream), pointer_to<void>(workspace),
                               workspace_bytes};
  const py::gil_scoped_release release;
  if (workspace_bytes == 0) return cuda::workspace_bytes(call, device);
  cuda::run(call, launch);
  return workspace_bytes;
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
  module.def(
      "cuda_run", &cuda_run, py::kw_only(), "device"_a, "stream"_a, "workspace"_a,
      "workspace_bytes"_a,
      "Launches cpu_run's work on a CUDA stream. With workspace_bytes=0 nothing runs: returns "
      "the bytes of device memory that it needs as workspace.");
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

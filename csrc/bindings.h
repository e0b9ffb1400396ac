// What the bindings of all backends share: addresses, and the functions that fill in the module.

#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "softcl/enqueue.h"

namespace softcl {

/// What Tensor.data_ptr() gives; 0 is null, an output that is not wanted.
using Address = std::uintptr_t;

template <typename T>
T* pointer_to(Address address) {
  return reinterpret_cast<T*>(address);
}

inline EnqueueParams enqueue_params(Address keys, Address queue, Address refused,
                                    std::int64_t num_keys, std::int64_t queue_size,
                                    std::int64_t dim, std::int64_t pointer, int key_type,
                                    int queue_type, bool normalize) {
  EnqueueParams params;
  params.keys = pointer_to<const void>(keys);
  params.queue = pointer_to<void>(queue);
  params.refused = pointer_to<std::int64_t>(refused);
  params.num_keys = num_keys;
  params.queue_size = queue_size;
  params.dim = dim;
  params.pointer = pointer;
  params.key_type = softcl::ElementType(key_type);
  params.queue_type = softcl::ElementType(queue_type);
  params.normalize = normalize;
  return params;
}

/// The CUDA backend's functions (bindings_cuda.cpp).
void bind_cuda(pybind11::module_& module);

}  // namespace softcl

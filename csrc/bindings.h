// What the bindings of all backends share: addresses, and the functions that fill in the module.

#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "softcl/enqueue.h"
#include "softcl/params.h"

namespace softcl {

/// What Tensor.data_ptr() gives; 0 is null, an output that is not wanted.
using Address = std::uintptr_t;

template <typename T>
T* pointer_to(Address address) {
  return reinterpret_cast<T*>(address);
}

inline QueueStatisticsParams statistics_params(Address vectors, Address queue, int vector_type,
                                               int queue_type, std::int64_t num_vectors,
                                               std::int64_t queue_size, std::int64_t dim,
                                               std::int64_t num_neighbors, double temperature,
                                               Address lse, Address mean, Address entropy,
                                               Address neighbor_logits, Address neighbor_indices) {
  QueueStatisticsParams params;
  params.vectors = pointer_to<const void>(vectors);
  params.queue = pointer_to<const void>(queue);
  params.vector_type = ElementType(vector_type);
  params.queue_type = ElementType(queue_type);
  params.num_vectors = num_vectors;
  params.queue_size = queue_size;
  params.dim = dim;
  params.num_neighbors = num_neighbors;
  params.temperature = temperature;
  params.lse = pointer_to<float>(lse);
  params.mean = pointer_to<float>(mean);
  params.entropy = pointer_to<float>(entropy);
  params.neighbor_logits = pointer_to<float>(neighbor_logits);
  params.neighbor_indices = pointer_to<std::int64_t>(neighbor_indices);
  return params;
}

inline SoftContrastiveParams loss_params(Address query, Address key, Address queue, int vector_type,
                                         int queue_type, std::int64_t num_queries,
                                         std::int64_t queue_size, std::int64_t dim, int rule,
                                         std::int64_t num_neighbors, double positive_weight,
                                         double temperature, double teacher_temperature,
                                         bool positive, bool normalize, Address loss,
                                         Address dquery, Address confidence, Address entropy,
                                         Address positive_rank, Address neighbor_indices) {
  SoftContrastiveParams params;
  params.query = pointer_to<const void>(query);
  params.key = pointer_to<const void>(key);
  params.queue = pointer_to<const void>(queue);
  params.vector_type = ElementType(vector_type);
  params.queue_type = ElementType(queue_type);
  params.num_queries = num_queries;
  params.queue_size = queue_size;
  params.dim = dim;
  params.rule = {LabelKind(rule), num_neighbors, positive_weight};
  params.temperature = temperature;
  params.teacher_temperature = teacher_temperature;
  params.positive = positive;
  params.normalize = normalize;
  params.loss = pointer_to<float>(loss);
  params.dquery = pointer_to<float>(dquery);
  params.confidence = pointer_to<float>(confidence);
  params.entropy = pointer_to<float>(entropy);
  params.positive_rank = pointer_to<std::int64_t>(positive_rank);
  params.neighbor_indices = pointer_to<std::int64_t>(neighbor_indices);
  return params;
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

// Enqueue: write new keys into the ring queue. Normalise, cast, write, refuse, one visit per key.
//
// Key i goes to slot (pointer + i) mod K. A slot takes its keys in order (i, i + K, i + 2K, ...),
// so the outcome is that of enqueuing the keys one by one, also for N > K, on any number of
// threads.
//
// A key is refused, and its slot keeps the row it held, when
//   - it holds a NaN or an infinity: one such row would make every later loss NaN; or
//   - its norm is below kMinimumNorm: no unit row can be made of it.
// With normalize off both are judged on the values as stored (1e5 is infinite in fp16).
// Refused keys are counted and use up their slot's turn: the caller advances the pointer by N
// always.
//
// Both backends sum the squares in double, where no finite fp32 row overflows, in a fixed order;
// a normalised element is u * (1 / |u|) in double, rounded to fp32, then to the queue's type.

#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "softcl/element_type.h"

namespace softcl {

/// The operator divides by max(|u|, 1e-12); below this a "normalised" row is not of unit norm.
inline constexpr double kMinimumNorm = 1e-12;

struct EnqueueParams {
  const void* keys;         // (N, D) contiguous, of key_type
  void* queue;              // (K, D) contiguous, of queue_type; must not overlap keys
  std::int64_t* refused;    // one counter, in the memory the rows live in; refused keys add to it
  std::int64_t num_keys;    // N >= 0
  std::int64_t queue_size;  // K >= 1
  std::int64_t dim;         // D >= 1
  std::int64_t pointer;     // slot of the first key, 0 <= pointer < K
  ElementType key_type;
  ElementType queue_type;
  bool normalize;  // divide each key by its norm; otherwise write it as it is
};

/// Throws std::invalid_argument that names the argument and its value.
inline void check(const EnqueueParams& params) {
  const auto refuse = [](const char* name, std::int64_t value, const char* rule) {
    throw std::invalid_argument(std::string("enqueue: ") + name + "=" + std::to_string(value) +
                                ", must be " + rule);
  };
  if (params.num_keys < 0) refuse("num_keys", params.num_keys, ">= 0");
  if (params.queue_size < 1) refuse("queue_size", params.queue_size, ">= 1");
  if (params.dim < 1) refuse("dim", params.dim, ">= 1");
  if (params.pointer < 0 || params.pointer >= params.queue_size) {
    refuse("pointer", params.pointer,
           ("in [0, " + std::to_string(params.queue_size) + ")").c_str());
  }
  const bool has_rows = params.num_keys > 0;
  if (has_rows && params.keys == nullptr)
    throw std::invalid_argument("enqueue: keys is a null pointer");
  if (has_rows && params.queue == nullptr)
    throw std::invalid_argument("enqueue: queue is a null pointer");
  if (has_rows && params.refused == nullptr)
    throw std::invalid_argument("enqueue: refused is a null pointer");
}

namespace cpu {

void enqueue(const EnqueueParams& params);

}  // namespace cpu

#ifdef SOFTCL_WITH_CUDA
namespace cuda {

/// Launches on `stream` (a cudaStream_t) of `device` and returns without waiting. No allocation and
/// no synchronisation: may be captured in a CUDA graph. Experimental: has not yet run on a GPU.
void enqueue(const EnqueueParams& params, int device, void* stream);

}  // namespace cuda
#endif

}  // namespace softcl

// Enqueue on the CPU: normalise, cast and write new keys into the ring queue (softcl/enqueue.h).
//
// One piece of work is a slot and all the keys that go there, in order. A key is read twice, the
// second time from L1, and written once.

#include "softcl/enqueue.h"

#include <algorithm>
#include <cmath>

#include "check.h"
#include "convert.h"

namespace softcl::cpu {

void enqueue(const EnqueueParams& params) {
  softcl::check(params);
  check_type("key_type", params.key_type);
  check_type("queue_type", params.queue_type);
  const std::int64_t D = params.dim;
  const std::int64_t slots = std::min(params.num_keys, params.queue_size);
  std::int64_t refused = 0;
#if defined(_OPENMP)
  // A few thousand elements are written faster than threads are woken.
  #pragma omp parallel for schedule(static) reduction(+ : refused) if (slots * D > 65536)
#endif
  for (std::int64_t slot = 0; slot < slots; ++slot) {
    void* row = static_cast<char*>(params.queue) +
                (params.pointer + slot) % params.queue_size * D * size_of(params.queue_type);
    for (std::int64_t i = slot; i < params.num_keys; i += params.queue_size) {
      double squares = 0.0;
      for (std::int64_t d = 0; d < D; ++d) {
        float x = load_element(params.keys, params.key_type, i * D + d);
        if (!params.normalize) x = rounded_to(params.queue_type, x);
        squares += double(x) * double(x);
      }
      const double norm = std::sqrt(squares);
      // Finite exactly if every element is; the comparison is false for NaN.
      if (!(norm >= kMinimumNorm && std::isfinite(norm))) {
        ++refused;
        continue;
      }
      const double scale = params.normalize ? 1.0 / norm : 1.0;
      for (std::int64_t d = 0; d < D; ++d) {
        const double x = load_element(params.keys, params.key_type, i * D + d);
        store_element(row, params.queue_type, d, static_cast<float>(x * scale));
      }
    }
  }
  *params.refused += refused;
}

}  // namespace softcl::cpu

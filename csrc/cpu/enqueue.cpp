// Enqueue on the CPU: normalise, cast and write new keys into the ring queue (softcl/enqueue.h).
//
// One piece of work is a slot and all the keys that go there, in order. A key is read twice, the
// second time from L1, and written once.

#include "softcl/enqueue.h"

#include <algorithm>
#include <cmath>

#include "convert.h"
#include "softcl/checks.h"

namespace softcl::cpu {

namespace {

// Chains of additions side by side, then added in pairs: always in this order.
constexpr int kChains = 8;

template <ElementType kKey, ElementType kRow>
double sum_of_squares(const void* keys, std::int64_t first, std::int64_t dim, bool normalize) {
  const auto element = [&](std::int64_t d) {
    const float x = load_element(keys, kKey, first + d);
    return double(normalize ? x : rounded_to(kRow, x));
  };
  double sums[kChains] = {};
  std::int64_t d = 0;
  for (; d + kChains <= dim; d += kChains) {
    for (int c = 0; c < kChains; ++c) {
      const double x = element(d + c);
      sums[c] += x * x;
    }
  }
  for (int c = 0; d < dim; ++d, ++c) {
    const double x = element(d);
    sums[c] += x * x;
  }
  for (int half = kChains / 2; half > 0; half /= 2) {
    for (int c = 0; c < half; ++c) sums[c] += sums[c + half];
  }
  return sums[0];
}

// The keys of one slot, in order; returns how many are refused.
template <ElementType kKey, ElementType kRow>
std::int64_t fill_slot(const EnqueueParams& params, std::int64_t slot) {
  const std::int64_t D = params.dim;
  std::int64_t refused = 0;
  void* row = static_cast<char*>(params.queue) +
              (params.pointer + slot) % params.queue_size * D * size_of(kRow);
  for (std::int64_t i = slot; i < params.num_keys; i += params.queue_size) {
    const double norm =
        std::sqrt(sum_of_squares<kKey, kRow>(params.keys, i * D, D, params.normalize));
    // Finite exactly if every element is; the comparison is false for NaN.
    if (!(norm >= kMinimumNorm && std::isfinite(norm))) {
      ++refused;
      continue;
    }
    const double scale = params.normalize ? 1.0 / norm : 1.0;
    for (std::int64_t d = 0; d < D; ++d) {
      const double x = load_element(params.keys, kKey, i * D + d);
      store_element(row, kRow, d, static_cast<float>(x * scale));
    }
  }
  return refused;
}

template <ElementType kKey, ElementType kRow>
void fill(const EnqueueParams& params) {
  const std::int64_t slots = std::min(params.num_keys, params.queue_size);
  std::int64_t refused = 0;
#if defined(_OPENMP)
  // A few thousand elements are written faster than threads are woken.
  #pragma omp parallel for schedule(static) reduction(+ : refused) if (slots * params.dim > 65536)
#endif
  for (std::int64_t slot = 0; slot < slots; ++slot) refused += fill_slot<kKey, kRow>(params, slot);
  *params.refused += refused;
}

template <ElementType kKey>
void fill(const EnqueueParams& params) {
  switch (params.queue_type) {
    case ElementType::kFloat32:
      return fill<kKey, ElementType::kFloat32>(params);
    case ElementType::kBFloat16:
      return fill<kKey, ElementType::kBFloat16>(params);
    case ElementType::kFloat16:
      return fill<kKey, ElementType::kFloat16>(params);
  }
}

}  // namespace

void enqueue(const EnqueueParams& params) {
  softcl::check(params);
  check_type("key_type", params.key_type);
  check_type("queue_type", params.queue_type);
  switch (params.key_type) {
    case ElementType::kFloat32:
      return fill<ElementType::kFloat32>(params);
    case ElementType::kBFloat16:
      return fill<ElementType::kBFloat16>(params);
    case ElementType::kFloat16:
      return fill<ElementType::kFloat16>(params);
  }
}

}  // namespace softcl::cpu

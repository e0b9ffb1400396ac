#include "ceilings.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "isa.h"
#include "parallel.h"

namespace softcl::cpu {

namespace {

constexpr int kRuns = 10;
constexpr std::int64_t kFloats = 2048;

// Best rate of `loop(repeats, array)` on every thread at once, each with an array of its own.
template <typename Loop>
double best_rate(int num_threads, double seconds, const Loop& loop) {
  std::vector<std::vector<float>> arrays(num_threads);
  std::int64_t repeats = 1000;
  double best = 0.0, spent = 0.0;
  while (spent < seconds) {
    for (auto& array : arrays) array.assign(kFloats, 0.5f);
    std::vector<std::int64_t> done(num_threads, 0);
    const auto start = std::chrono::steady_clock::now();
    parallel_for(num_threads, num_threads,
                 [&](std::int64_t i, int) { done[i] = loop(repeats, arrays[i].data()); });
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    spent += taken.count();
    // Runs of a length that the start of the threads does not matter in.
    if (taken.count() < seconds / kRuns / 2) {
      repeats *= 2;
      continue;
    }
    std::int64_t total = 0;
    for (const std::int64_t count : done) total += count;
    best = std::max(best, double(total) / taken.count());
  }
  return best;
}

}  // namespace

Ceilings measure_ceilings(int num_threads, double seconds) {
  const SweepKernels& kernels = sweep_kernels();
  Ceilings ceilings;
  ceilings.multiply_adds = best_rate(num_threads, seconds / 2, kernels.multiply_add);
  ceilings.exponentials = best_rate(num_threads, seconds / 2, kernels.exponentials);
  return ceilings;
}

}  // namespace softcl::cpu

// parallel_for: independent pieces of work on a given number of threads.
//
// With OpenMP the threads are those of its runtime, which torch shares; without it, or where
// SOFTCL_STD_THREADS asks for them (ThreadSanitizer does not understand libgomp), std::thread.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace softcl::cpu {

/// Calls function(i, thread) for i in [0, count), each once, thread in [0, num_threads). Which
/// thread runs which i is left open: results must not depend on it. The function must not throw.
template <typename Function>
void parallel_for(int num_threads, std::int64_t count, const Function& function) {
  const int used = static_cast<int>(std::min<std::int64_t>(num_threads, count));
  if (used <= 1) {
    for (std::int64_t i = 0; i < count; ++i) function(i, 0);
    return;
  }
  std::atomic<std::int64_t> next{0};
  const auto work = [&](int thread) {
    for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      function(i, thread);
    }
  };
#if defined(_OPENMP) && !defined(SOFTCL_STD_THREADS)
  // A loop over threads and not over i: if the runtime grants fewer, the rest does all the work.
  #pragma omp parallel for num_threads(used) schedule(static, 1)
  for (int thread = 0; thread < used; ++thread) work(thread);
#else
  std::vector<std::thread> threads;
  for (int thread = 1; thread < used; ++thread) threads.emplace_back(work, thread);
  work(0);
  for (std::thread& thread : threads) thread.join();
#endif
}

}  // namespace softcl::cpu

// What this machine can do at most of the arithmetic that the CPU's sweep consists of. A library of
// one function, compiled and loaded by bench/ceilings.py for the instruction set in use.

#if defined(__x86_64__)
  #include <immintrin.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <vector>

#include "parallel.h"

// As many accumulators as the sweep's micro-kernel has.
#if defined(__AVX512F__)
  #define SOFTCL_VECTOR_WIDTH 16
#elif defined(__AVX2__)
  #define SOFTCL_VECTOR_WIDTH 8
#else
  #define SOFTCL_VECTOR_WIDTH 4
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kChains = 24;
#else
constexpr int kChains = 12;
#endif

namespace {

#include "simd.h"

constexpr int kRuns = 10;
constexpr std::int64_t kFloats = 2048;  // 8 KB, in L1

// FMAs in registers, in independent chains. Returns their number.
std::int64_t multiply_add(std::int64_t repeats, float* result) {
  Vector sum[kChains];
  for (int c = 0; c < kChains; ++c) sum[c] = broadcast(float(c));
  const Vector factor = broadcast(*result), term = broadcast(1.0f - *result);
  for (std::int64_t i = 0; i < repeats; ++i) {
    for (int c = 0; c < kChains; ++c) sum[c] = sum[c] * factor + term;
  }
  Vector total = {};
  for (int c = 0; c < kChains; ++c) total += sum[c];
  *result = total[0];
  return repeats * kChains * kWidth;
}

// exp2 of an array in L1, scaled, read and written back as between the two products: x becomes
// 2^(-(x + 1) / 2), which stays below 1. Returns their number.
std::int64_t exponentials(std::int64_t repeats, float* array) {
  for (std::int64_t i = 0; i < repeats; ++i) {
    for (std::int64_t x = 0; x < kFloats; x += kWidth) {
      store(array + x, exp2(load(array + x) * -0.5f - 0.5f));
    }
    asm volatile("" ::: "memory");
  }
  return repeats * kFloats;
}

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
    softcl::cpu::parallel_for(num_threads, num_threads, [&](std::int64_t i, int) {
      done[i] = loop(repeats, arrays[i].data());
    });
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

/// rates: fp32 multiply-adds and exp2 per second, of all threads together, each the best of several
/// short runs, about `seconds` in all.
extern "C" void softcl_measure_ceilings(int num_threads, double seconds, double* rates) {
  rates[0] = best_rate(num_threads, seconds / 2, multiply_add);
  rates[1] = best_rate(num_threads, seconds / 2, exponentials);
}

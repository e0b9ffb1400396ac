// The time of a call, by the device's own clock.

#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <vector>

#include "check.h"

namespace softcl::check {

/// Median time of a call in microseconds, from events around `repeat` calls each.
template <typename Call>
double microseconds(Call&& call, int repeat) {
  cudaEvent_t start, end;
  SOFTCL_CUDA_CHECK(cudaEventCreate(&start));
  SOFTCL_CUDA_CHECK(cudaEventCreate(&end));
  std::vector<double> times;
  for (int i = 0; i < 7; ++i) {  // the first two warm up
    SOFTCL_CUDA_CHECK(cudaEventRecord(start, nullptr));
    for (int j = 0; j < repeat; ++j) call();
    SOFTCL_CUDA_CHECK(cudaEventRecord(end, nullptr));
    SOFTCL_CUDA_CHECK(cudaEventSynchronize(end));
    float milliseconds = 0.0f;
    SOFTCL_CUDA_CHECK(cudaEventElapsedTime(&milliseconds, start, end));
    if (i >= 2) times.push_back(milliseconds * 1e3 / repeat);
  }
  SOFTCL_CUDA_CHECK(cudaEventDestroy(start));
  SOFTCL_CUDA_CHECK(cudaEventDestroy(end));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

}  // namespace softcl::check

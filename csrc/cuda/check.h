// SOFTCL_CUDA_CHECK: every CUDA call passes through it; a failure becomes a C++ exception.

#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace softcl::cuda {

inline void check_status(cudaError_t status, const char* call, const char* file, int line) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clears a non-sticky error, so that it is not reported twice
  throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": " + call + ": " +
                           cudaGetErrorName(status) + ": " + cudaGetErrorString(status));
}

}  // namespace softcl::cuda

#define SOFTCL_CUDA_CHECK(call) \
  ::softcl::cuda::check_status((call), #call, SOFTCL_SOURCE_NAME, __LINE__)

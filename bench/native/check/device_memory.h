// Arrays on the device, for the checks.

#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <vector>

#include "check.h"

namespace softcl::check {

/// Device memory, filled with NaN.
template <typename T>
class Device {
 public:
  explicit Device(std::size_t count) : count_(count) {
    SOFTCL_CUDA_CHECK(cudaMalloc(reinterpret_cast<void**>(&data_), bytes()));
    SOFTCL_CUDA_CHECK(cudaMemset(data_, 0xff, bytes()));
  }
  explicit Device(const std::vector<T>& values) : Device(values.size()) {
    SOFTCL_CUDA_CHECK(cudaMemcpy(data_, values.data(), bytes(), cudaMemcpyHostToDevice));
  }
  ~Device() { cudaFree(data_); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  T* get() const { return data_; }
  std::size_t bytes() const { return std::max<std::size_t>(count_, 1) * sizeof(T); }
  std::vector<T> download() const {
    std::vector<T> values(count_);
    SOFTCL_CUDA_CHECK(cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  std::size_t count_;
  T* data_ = nullptr;
};

}  // namespace softcl::check

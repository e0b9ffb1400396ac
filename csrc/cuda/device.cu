// Device query. Never fails for want of a driver: the module must import and report on any machine.
//
// Experimental: has not yet run on a GPU.

#include <stdexcept>

#include "check.h"
#include "softcl/device.h"

namespace softcl::cuda {

namespace {

// The status is returned and not thrown: "no driver" is an answer here.
cudaError_t count_devices(int* count) {
  const cudaError_t status = cudaGetDeviceCount(count);
  if (status != cudaSuccess) {
    *count = 0;
    cudaGetLastError();  // otherwise the next checked call would report this one
  }
  return status;
}

}  // namespace

int device_count() {
  int count = 0;
  count_devices(&count);
  return count;
}

std::string no_device_reason() {
  int count = 0;
  const cudaError_t status = count_devices(&count);
  if (count > 0) return "";
  return cudaGetErrorString(status == cudaSuccess ? cudaErrorNoDevice : status);
}

Device device(int index) {
  const int count = device_count();
  if (index < 0 || index >= count) {
    throw std::invalid_argument("cuda device index=" + std::to_string(index) + ", must be in [0, " +
                                std::to_string(count) + ")");
  }
  cudaDeviceProp properties;
  SOFTCL_CUDA_CHECK(cudaGetDeviceProperties(&properties, index));
  return {properties.name, properties.major, properties.minor, properties.multiProcessorCount};
}

}  // namespace softcl::cuda

// The runtime's calls, where kernels run on the CPU (block.h): one device, whose memory is any
// memory, and whose work is done when a launch returns.

#include <cuda_runtime.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "block.h"
#include "softcl/device.h"

cudaError_t cudaGetLastError() {
  return cudaSuccess;
}

const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "cudaErrorInvalidDevice" : "cudaErrorInvalidValue";
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "invalid device ordinal" : "invalid argument";
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

namespace {

int devices_set = 0;

}  // namespace

cudaError_t cudaSetDevice(int device) {
  ++devices_set;
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}

namespace {

// Ten times the compute capability; a program without set_capability says it in its environment.
int capability_at_first() {
  const char* value = std::getenv("SOFTCL_HOST_CAPABILITY");
  return value != nullptr ? std::atoi(value) : 80;
}

int capability = capability_at_first();
// Few, so that small problems have several splits and rows share a block.
int multiprocessors = 2;

}  // namespace

namespace softcl::cuda::host {

void set_capability(int value) {
  capability = value;
}

void set_multiprocessors(int value) {
  multiprocessors = value;
}

int loaded_version() {
  return capability == 90 ? 90 : 80;
}

int count_devices_set() {
  return devices_set;
}

}  // namespace softcl::cuda::host

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {softcl::cuda::host::loaded_version(), capability};
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return cudaErrorInvalidDevice;
  *value = attribute == cudaDevAttrMultiProcessorCount      ? multiprocessors
           : attribute == cudaDevAttrComputeCapabilityMajor ? capability / 10
           : attribute == cudaDevAttrComputeCapabilityMinor ? capability % 10
                                                            : 227 << 10;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** data, std::size_t bytes) {
  *data = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return *data != nullptr ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaFree(void* data) {
  std::free(data);
  return cudaSuccess;
}

cudaError_t cudaMemset(void* data, int value, std::size_t bytes) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* target, const void* source, std::size_t bytes, cudaMemcpyKind) {
  std::memcpy(target, source, bytes);
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  return cudaSuccess;
}

// ---- Events: the time of the CPU ----------------------------------------------------------------

struct CUevent_st {
  std::chrono::steady_clock::time_point time;
};

cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = new CUevent_st();
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  event->time = std::chrono::steady_clock::now();
  return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t) {
  return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  *milliseconds = std::chrono::duration<float, std::milli>(end->time - start->time).count();
  return cudaSuccess;
}

// ---- device.h: none where SOFTCL_HOST_DEVICES is 0 ----------------------------------------------

namespace softcl::cuda {

int device_count() {
  const char* count = std::getenv("SOFTCL_HOST_DEVICES");
  return count != nullptr && std::string(count) == "0" ? 0 : 1;
}

std::string no_device_reason() {
  return device_count() > 0 ? "" : "no CUDA-capable device is detected";
}

Device device(int index) {
  if (index < 0 || index >= device_count()) {
    throw std::invalid_argument("cuda device index=" + std::to_string(index));
  }
  return {"this CPU, thread by thread", capability / 10, capability % 10, multiprocessors};
}

}  // namespace softcl::cuda

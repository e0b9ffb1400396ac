// Launching a kernel, and choosing the device for it.

#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "check.h"
#if !defined(__CUDACC__)
  #include "block.h"
#endif

namespace softcl::cuda {

/// kernel(params) on `stream`; params by value, in constant memory. Returns without waiting.
/// `early` (programmatic dependent launch, see can_launch_early): the grid may start while the one
/// before it on the stream ends, so that its launch costs no time; the kernel then begins with
/// ptx::wait_for_previous_grid.
template <typename Params>
void launch(void (*kernel)(Params), dim3 grid, int threads, std::size_t shared_bytes,
            cudaStream_t stream, const Params& params, bool early = false) {
#if defined(__CUDACC__)
  constexpr std::size_t kUnasked = 48 << 10;
  if (shared_bytes > kUnasked) {
    SOFTCL_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                           cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(shared_bytes)));
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  SOFTCL_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, params));
#else
  static_cast<void>(stream);
  host::run_grid(grid, dim3(threads), shared_bytes, [&] { kernel(params); }, nullptr, early);
#endif
}

inline int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  SOFTCL_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

/// Of the PTX that a kernel was compiled from: the first that ptx::wait_for_previous_grid waits in.
inline constexpr int kFirstWaitingVersion = 90;

/// Whether a kernel that calls ptx::wait_for_previous_grid may be launched early: where the code of
/// it that the current device has loaded does wait. Not a question of the device: what later ones
/// than 9.0 run is made of sm_80's PTX, which has no such instruction.
template <typename Params>
bool can_launch_early(void (*kernel)(Params)) {
  cudaFuncAttributes attributes = {};
  SOFTCL_CUDA_CHECK(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)));
  return attributes.ptxVersion >= kFirstWaitingVersion;
}

/// Makes `device` current for the launches and puts the caller's device back. Sets nothing where it
/// is current already: cudaSetDevice makes a context on a device that has none yet.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    SOFTCL_CUDA_CHECK(cudaGetDevice(&previous_));
    if (device_ != previous_) SOFTCL_CUDA_CHECK(cudaSetDevice(device_));
  }
  // Unchecked, as a destructor cannot throw; the device was current a moment ago.
  ~DeviceGuard() {
    if (device_ != previous_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_;
  int previous_ = 0;
};

}  // namespace softcl::cuda

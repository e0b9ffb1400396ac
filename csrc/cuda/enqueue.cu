// Enqueue on the GPU: normalise, cast and write new keys into the ring queue, in one launch.
//
// Experimental: has not yet run on a GPU.
//
// Tiling: one warp per slot, min(N, K) slots, four warps per block. A warp walks its slot's keys
// (i, i + K, ...) in order, so no two warps ever write one row and no order between warps matters.
// Traffic: a key is read twice, the second time from L1 (D elements per warp), and written once:
// N D (sizeof(key) + sizeof(queue)) bytes. The work is launch bound at every size in use.
// Deterministic: lanes stride over D and meet in a butterfly of fixed order; the only atomic adds
// integers.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "check.h"
#include "softcl/enqueue.h"

namespace softcl::cuda {

namespace {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 4;
constexpr std::int64_t kMaximumBlocks = 65536;  // beyond it a warp takes several slots

__device__ float to_float(float x) {
  return x;
}
__device__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ float to_float(__half x) {
  return __half2float(x);
}

// Rounds to nearest even, as torch does.
template <typename T>
__device__ T from_float(float x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return x;
  }
}

// Sum over the warp; every lane gets the same bits.
__device__ double warp_sum(double x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, offset);
  }
  return x;
}

// params by value: it lies in constant memory. One warp per slot, see the top of the file.
template <typename Key, typename Row>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    enqueue_kernel(const EnqueueParams params) {
  const auto* keys = static_cast<const Key*>(params.keys);  // (N, D)
  auto* queue = static_cast<Row*>(params.queue);            // (K, D)
  const std::int64_t D = params.dim;
  const int lane = threadIdx.x % kWarp;
  const std::int64_t num_slots = min(params.num_keys, params.queue_size);
  const std::int64_t warp = std::int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  const std::int64_t num_warps = std::int64_t(gridDim.x) * kWarpsPerBlock;

  unsigned long long refused = 0;
  for (std::int64_t slot = warp; slot < num_slots; slot += num_warps) {
    Row* row = queue + (params.pointer + slot) % params.queue_size * D;
    for (std::int64_t i = slot; i < params.num_keys; i += params.queue_size) {
      const Key* key = keys + i * D;
      double squares = 0.0;
      for (std::int64_t d = lane; d < D; d += kWarp) {
        float x = to_float(key[d]);
        if (!params.normalize) x = to_float(from_float<Row>(x));
        squares += double(x) * double(x);
      }
      const double norm = sqrt(warp_sum(squares));
      // Finite exactly if every element is; the comparison is false for NaN.
      if (!(norm >= kMinimumNorm && isfinite(norm))) {
        ++refused;
        continue;
      }
      const double scale = params.normalize ? 1.0 / norm : 1.0;
      for (std::int64_t d = lane; d < D; d += kWarp) {
        row[d] = from_float<Row>(float(double(to_float(key[d])) * scale));
      }
    }
  }
  if (lane == 0 && refused > 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(params.refused), refused);
  }
}

template <typename Key, typename Row>
void launch(const EnqueueParams& params, cudaStream_t stream) {
  const std::int64_t num_slots = std::min(params.num_keys, params.queue_size);
  const std::int64_t num_blocks =
      std::min((num_slots + kWarpsPerBlock - 1) / kWarpsPerBlock, kMaximumBlocks);
  enqueue_kernel<Key, Row>
      <<<static_cast<unsigned>(num_blocks), kWarp * kWarpsPerBlock, 0, stream>>>(params);
  SOFTCL_CUDA_CHECK(cudaGetLastError());
}

template <typename Key>
void launch_for_queue_type(const EnqueueParams& params, cudaStream_t stream) {
  switch (params.queue_type) {
    case ElementType::kFloat32:
      return launch<Key, float>(params, stream);
    case ElementType::kBFloat16:
      return launch<Key, __nv_bfloat16>(params, stream);
    case ElementType::kFloat16:
      return launch<Key, __half>(params, stream);
  }
  throw std::invalid_argument(
      "enqueue: queue_type=" + std::to_string(static_cast<int>(params.queue_type)) +
      ", must be 0 (float32), 1 (bfloat16) or 2 (float16)");
}

// Makes `device` current for the launch and puts the caller's device back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    SOFTCL_CUDA_CHECK(cudaGetDevice(&previous_));
    if (device != previous_) SOFTCL_CUDA_CHECK(cudaSetDevice(device));
  }
  // Unchecked, as a destructor cannot throw; the device was current a moment ago.
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

}  // namespace

void enqueue(const EnqueueParams& params, int device, void* stream) {
  check(params);
  if (params.num_keys == 0) return;
  const DeviceGuard guard(device);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (params.key_type) {
    case ElementType::kFloat32:
      return launch_for_queue_type<float>(params, cuda_stream);
    case ElementType::kBFloat16:
      return launch_for_queue_type<__nv_bfloat16>(params, cuda_stream);
    case ElementType::kFloat16:
      return launch_for_queue_type<__half>(params, cuda_stream);
  }
  throw std::invalid_argument(
      "enqueue: key_type=" + std::to_string(static_cast<int>(params.key_type)) +
      ", must be 0 (float32), 1 (bfloat16) or 2 (float16)");
}

}  // namespace softcl::cuda

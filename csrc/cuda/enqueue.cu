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

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "elements.h"
#include "launch.h"
#include "ptx.h"
#include "softcl/enqueue.h"

namespace softcl::cuda {

namespace {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 4;
constexpr std::int64_t kMaximumBlocks = 65536;  // beyond it a warp takes several slots

// Sum over the warp; every lane gets the same bits.
SOFTCL_DEVICE double warp_sum(double x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += ptx::shuffle_xor(x, offset);
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

  std::int64_t refused = 0;
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
        ptx::store_global(row + d, from_float<Row>(float(double(to_float(key[d])) * scale)));
      }
    }
  }
  if (lane == 0 && refused > 0) ptx::atomic_add(params.refused, refused);
}

template <typename Key, typename Row>
void launch_for_types(const EnqueueParams& params, cudaStream_t stream) {
  const std::int64_t num_slots = std::min(params.num_keys, params.queue_size);
  const std::int64_t num_blocks =
      std::min((num_slots + kWarpsPerBlock - 1) / kWarpsPerBlock, kMaximumBlocks);
  launch(&enqueue_kernel<Key, Row>, dim3(static_cast<unsigned>(num_blocks)), kWarp * kWarpsPerBlock,
         0, stream, params);
}

template <typename Key>
void launch_for_queue_type(const EnqueueParams& params, cudaStream_t stream) {
  switch (params.queue_type) {
    case ElementType::kFloat32:
      return launch_for_types<Key, float>(params, stream);
    case ElementType::kBFloat16:
      return launch_for_types<Key, BFloat16>(params, stream);
    case ElementType::kFloat16:
      return launch_for_types<Key, Float16>(params, stream);
  }
  throw std::invalid_argument(
      "enqueue: queue_type=" + std::to_string(static_cast<int>(params.queue_type)) +
      ", must be 0 (float32), 1 (bfloat16) or 2 (float16)");
}

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
      return launch_for_queue_type<BFloat16>(params, cuda_stream);
    case ElementType::kFloat16:
      return launch_for_queue_type<Float16>(params, cuda_stream);
  }
  throw std::invalid_argument(
      "enqueue: key_type=" + std::to_string(static_cast<int>(params.key_type)) +
      ", must be 0 (float32), 1 (bfloat16) or 2 (float16)");
}

}  // namespace softcl::cuda

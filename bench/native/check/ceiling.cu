// Products alone: the loops that the ceilings are measured with.
//
// Tiling: of mma.sync two blocks of eight warps to a multiprocessor, each warp with eight sums
// (16, 8) that do not wait for one another, operands in registers. Of wgmma one block of two
// warpgroups, each with a sum (64, 128) and products in flight beyond the step that made them,
// operands in shared memory. Traffic: none, but one number a thread at the end.

#include <cmath>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "check/ceiling.h"
#include "check/device_memory.h"
#include "check/timing.h"
#include "hopper_ptx.h"
#include "launch.h"

namespace softcl::check {

namespace {

using cuda::BFloat16;
using cuda::Float16;
namespace ptx = cuda::ptx;

constexpr int kWarps = 8, kBlocksOfWarps = 2, kSums = 8;
constexpr int kGroups = 2, kColumns = 128, kSlices = cuda::kBoxColumns / 16;
constexpr int kBoxBytes = (cuda::kWarpgroupRows + kColumns) * cuda::kBoxRowBytes;

struct LoopParams {
  std::int64_t steps;
  bool ones;    // operands of 1; else such as cost the power that data do
  float* sums;  // of every thread
};

/// Two numbers of T in a register: both 1, or of either sign and magnitude 1 to 2.
template <typename T>
SOFTCL_DEVICE std::uint32_t operands(std::uint32_t number, bool ones) {
  constexpr bool kIsBFloat16 = std::is_same_v<T, BFloat16>;
  constexpr std::uint32_t kOnes = kIsBFloat16 ? 0x3f803f80u : 0x3c003c00u;
  constexpr std::uint32_t kSignAndFraction = kIsBFloat16 ? 0x807f807fu : 0x83ff83ffu;
  if (ones) return kOnes;
  std::uint32_t bits = (number + 1) * 0x9e3779b9u;
  bits = (bits ^ bits >> 15) * 0x85ebca6bu;
  return kOnes | ((bits ^ bits >> 13) & kSignAndFraction);
}

template <int kCount>
SOFTCL_DEVICE void keep_sum(const LoopParams& p, const float (&c)[kCount][4]) {
  float sum = 0.0f;
  SOFTCL_UNROLL
  for (int i = 0; i < kCount; ++i) sum += c[i][0] + c[i][1] + c[i][2] + c[i][3];
  ptx::store_global(p.sums + blockIdx.x * blockDim.x + threadIdx.x, sum);
}

template <typename T>
__global__ void __launch_bounds__(kWarps * 32) multiply_in_warps(LoopParams p) {
  const std::uint32_t first = threadIdx.x * (4 + 2 * kSums);
  ptx::Vector a;
  std::uint32_t b[kSums][2];
  float c[kSums][4] = {};
  SOFTCL_UNROLL
  for (int i = 0; i < 4; ++i) a.x[i] = operands<T>(first + i, p.ones);
  SOFTCL_UNROLL
  for (int i = 0; i < 2 * kSums; ++i) b[i / 2][i % 2] = operands<T>(first + 4 + i, p.ones);
  SOFTCL_NO_UNROLL
  for (std::int64_t step = 0; step < p.steps; ++step) {
    SOFTCL_UNROLL
    for (int i = 0; i < kSums; ++i) {
      if constexpr (std::is_same_v<T, BFloat16>) {
        ptx::mma_bf16(c[i], a, b[i][0], b[i][1]);
      } else {
        ptx::mma_fp16(c[i], a, b[i][0], b[i][1]);
      }
    }
  }
  keep_sum(p, c);
}

template <typename T>
__global__ void __launch_bounds__(kGroups* cuda::kWarpgroup) multiply_in_warpgroups(LoopParams p) {
#if defined(SOFTCL_HAS_WARPGROUPS)
  const std::uint32_t rows = ptx::tile_memory();
  const std::uint32_t tile = rows + cuda::kWarpgroupRows * cuda::kBoxRowBytes;
  for (int i = threadIdx.x; i < kBoxBytes / 4; i += kGroups * cuda::kWarpgroup) {
    ptx::store_shared(rows + 4 * i, operands<T>(i, p.ones));
  }
  ptx::fence_async_proxy();
  ptx::sync_threads();
  float c[kColumns / 8][4] = {};
  SOFTCL_NO_UNROLL
  for (std::int64_t step = 0; step < p.steps; ++step) {
    ptx::wgmma_fence();
    SOFTCL_UNROLL
    for (int k = 0; k < kSlices; ++k) {
      ptx::wgmma_rows<T>(c, cuda::row_descriptor(rows, cuda::kWarpgroupRows, k),
                         cuda::row_descriptor(tile, kColumns, k), true);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
  }
  ptx::wgmma_wait<0>();
  ptx::settle(c);
  keep_sum(p, c);
#endif
}

/// Runs a loop of T once, `steps` long.
template <typename T>
void run_loop(bool in_warpgroups, const Loop& loop, const LoopParams& p) {
  const dim3 grid(static_cast<unsigned>(loop.blocks));
  if (!in_warpgroups) {
    cuda::launch(&multiply_in_warps<T>, grid, kWarps * 32, 0, nullptr, p);
    return;
  }
#if defined(__CUDACC__)
  cuda::launch(&multiply_in_warpgroups<T>, grid, kGroups * cuda::kWarpgroup, kBoxBytes, nullptr, p);
#else
  cuda::host::run_warpgroups(grid, kGroups * cuda::kWarpgroup, kBoxBytes,
                             [&] { multiply_in_warpgroups<T>(p); });
#endif
}

/// Throws if the products of ones do not add up to the FLOP that are counted.
template <typename T>
void count(bool in_warpgroups, const Loop& loop, float* sums, const Device<float>& memory) {
  constexpr std::int64_t kSteps = 3;
  run_loop<T>(in_warpgroups, loop, {kSteps, true, sums});
  SOFTCL_CUDA_CHECK(cudaDeviceSynchronize());
  double total = 0.0;
  for (const float sum : memory.download()) total += sum;
  if (2.0 * total != loop.flop(kSteps)) {
    throw std::logic_error("the loop makes " + std::to_string(2.0 * total) + " FLOP, counted are " +
                           std::to_string(loop.flop(kSteps)));
  }
}

/// FLOP per second, in launches of half a millisecond and more.
template <typename T>
double measure(bool in_warpgroups, int multiprocessors) {
  const Loop loop =
      in_warpgroups
          ? Loop{cuda::kWarpgroupRows, kColumns, 16, kSlices, kGroups, multiprocessors}
          : Loop{16, 8, 16, kSums, kWarps, std::int64_t(kBlocksOfWarps) * multiprocessors};
  const int threads = in_warpgroups ? kGroups * cuda::kWarpgroup : kWarps * 32;
  const Device<float> sums(loop.blocks * threads);
  count<T>(in_warpgroups, loop, sums.get(), sums);
  constexpr double kEnough = 500.0;
  double time = 0.0;
  std::int64_t steps = 1;
  for (; steps < std::int64_t(1) << 24; steps *= 4) {
    time = microseconds([&] { run_loop<T>(in_warpgroups, loop, {steps, false, sums.get()}); }, 1);
    if (time >= kEnough) break;
  }
  return loop.flop(steps) / (time * 1e-6);
}

}  // namespace

Ceilings measure_ceilings(int device) {
  const cuda::DeviceGuard guard(device);
  const bool in_warpgroups = cuda::attribute(cudaDevAttrComputeCapabilityMajor, device) == 9;
  const int multiprocessors = cuda::attribute(cudaDevAttrMultiProcessorCount, device);
  const char* instruction = in_warpgroups ? "wgmma" : "mma.sync";
  const char* operands = in_warpgroups ? "shared memory" : "registers";
  return {{measure<BFloat16>(in_warpgroups, multiprocessors), instruction, operands},
          {measure<Float16>(in_warpgroups, multiprocessors), instruction, operands}};
}

}  // namespace softcl::check

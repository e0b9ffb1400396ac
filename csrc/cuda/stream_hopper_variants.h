// The variants of the Hopper streaming kernel for rows of up to kDim elements, and their launch.

#pragma once

#include "stream_hopper_kernel.h"
#include "stream_variants.h"

namespace softcl::cuda {

/// Defined for kDim = 64, 128, 256, each in a file of its own: they compile side by side.
template <int kDim>
void launch_stream_hopper_of(const HopperParams& p, ElementType type, Pairing pairing,
                             int mean_rows, dim3 grid, cudaStream_t stream);

template <int kDim>
inline void launch_hopper_variant(const HopperParams& p, ElementType type, Pairing pairing,
                                  int mean_rows, dim3 grid, cudaStream_t stream) {
  with_variant(pairing, mean_rows, [&](auto pairing_constant, auto mean_constant) {
    constexpr Pairing kPairing = decltype(pairing_constant)::value;
    constexpr int kMeanRows = decltype(mean_constant)::value;
    const auto launch_type = [&](auto element) {
      using T = decltype(element);
      using S = HopperShape<kDim, kPairing, kMeanRows, T>;
      const auto kernel = &stream_hopper_kernel<T, kDim, kPairing, kMeanRows>;
#if defined(__CUDACC__)
      launch(kernel, grid, kHopperThreads, S::kSharedBytes, stream, p);
#else
      static_cast<void>(stream);
      host::run_warpgroups(grid, kHopperThreads, S::kSharedBytes, [&] { kernel(p); });
#endif
    };
    if (type == ElementType::kBFloat16) return launch_type(BFloat16());
    if (type == ElementType::kFloat16) return launch_type(Float16());
    if constexpr (kDim <= kMostPartsDimensions) return launch_type(TwoParts());
    throw std::logic_error("see can_stream_hopper");
  });
}

}  // namespace softcl::cuda

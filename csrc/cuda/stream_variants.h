// The variants of the streaming kernel for rows of up to kDim elements, and their launch.

#pragma once

#include <stdexcept>
#include <string>

#include "stream_kernel.h"

namespace softcl::cuda {

template <int kDim, Pairing kPairing, int kMeanRows>
StreamShape shape_of_variant(bool parts) {
  const auto shape = [](auto s) -> StreamShape {
    using S = decltype(s);
    return {S::kSamples, S::kTileRows, S::kThreads, S::kBlocks, S::kSharedBytes};
  };
  return parts ? shape(Shape<kDim, kPairing, kMeanRows, 2>())
               : shape(Shape<kDim, kPairing, kMeanRows, 1>());
}

/// visit(std::integral_constant<Pairing, ...>, std::integral_constant<int, mean rows>).
template <typename Visit>
auto with_variant(Pairing pairing, int mean_rows, Visit visit) {
  using Single = std::integral_constant<Pairing, Pairing::kSingle>;
  using Paired = std::integral_constant<Pairing, Pairing::kPaired>;
  using std::integral_constant;
  if (pairing == Pairing::kSingle) {
    return mean_rows > 0 ? visit(Single(), integral_constant<int, 2>())
                         : visit(Single(), integral_constant<int, 0>());
  }
  return mean_rows == 2   ? visit(Paired(), integral_constant<int, 2>())
         : mean_rows == 1 ? visit(Paired(), integral_constant<int, 1>())
                          : visit(Paired(), integral_constant<int, 0>());
}

/// Defined for kDim = 64, 128, 256, each in a file of its own: they compile side by side.
template <int kDim>
void launch_stream_of(const StreamParams& p, Pairing pairing, int mean_rows, dim3 grid,
                      cudaStream_t stream);

template <int kDim>
inline void launch_variant(const StreamParams& p, Pairing pairing, int mean_rows, dim3 grid,
                           cudaStream_t stream) {
  with_variant(pairing, mean_rows, [&](auto pairing_constant, auto mean_constant) {
    constexpr Pairing kPairing = decltype(pairing_constant)::value;
    constexpr int kMeanRows = decltype(mean_constant)::value;
    const auto launch_type = [&](auto element) {
      using T = decltype(element);
      using S = Shape<kDim, kPairing, kMeanRows, kParts<T>>;
      launch(&stream_kernel<T, kDim, kPairing, kMeanRows>, grid, S::kThreads, S::kSharedBytes,
             stream, p);
    };
    switch (p.kernel_type) {
      case ElementType::kBFloat16:
        return launch_type(BFloat16());
      case ElementType::kFloat16:
        return launch_type(Float16());
      default:
        return launch_type(TwoParts());
    }
  });
}

}  // namespace softcl::cuda

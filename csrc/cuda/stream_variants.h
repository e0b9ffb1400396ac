// The variants of the streaming kernel for rows of up to kDim elements, and their launch.

#pragma once

#include <stdexcept>
#include <string>

#include "stream_kernel.h"

namespace softcl::cuda {

template <int kDim, Pairing kPairing, int kMeanRows>
StreamShape shape_of_variant() {
  using S = Shape<kDim, kPairing, kMeanRows>;
  return {S::kSamples, S::kTileRows, S::kThreads, S::kSharedBytes};
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
void launch_stream_of(const StreamParams& p, ElementType type, Pairing pairing, int mean_rows,
                      dim3 grid, cudaStream_t stream);

template <int kDim>
inline void launch_variant(const StreamParams& p, ElementType type, Pairing pairing, int mean_rows,
                           dim3 grid, cudaStream_t stream) {
  with_variant(pairing, mean_rows, [&](auto pairing_constant, auto mean_constant) {
    constexpr Pairing kPairing = decltype(pairing_constant)::value;
    constexpr int kMeanRows = decltype(mean_constant)::value;
    using S = Shape<kDim, kPairing, kMeanRows>;
    const auto kernel = type == ElementType::kFloat16
                            ? &stream_kernel<Float16, kDim, kPairing, kMeanRows>
                            : &stream_kernel<BFloat16, kDim, kPairing, kMeanRows>;
    launch(kernel, grid, S::kThreads, S::kSharedBytes, stream, p);
  });
}

}  // namespace softcl::cuda

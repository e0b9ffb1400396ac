// Which variant of the streaming kernel a call runs.

#include "softcl/cuda.h"
#include "stream_variants.h"

namespace softcl::cuda {

template <>
void launch_stream_of<64>(const StreamParams&, Pairing, int, dim3, cudaStream_t);
template <>
void launch_stream_of<128>(const StreamParams&, Pairing, int, dim3, cudaStream_t);
template <>
void launch_stream_of<256>(const StreamParams&, Pairing, int, dim3, cudaStream_t);

std::int64_t most_dimensions(ElementType vector_type, ElementType queue_type, int device) {
  const int room = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const ElementType type = kernel_type(vector_type, queue_type, true);
  int most = kMostDimensions;
  while (most > 64 && stream_shape(type, most, Pairing::kPaired, 2).shared_bytes > room) most /= 2;
  return most;
}

StreamShape stream_shape(ElementType kernel_type, int dim, Pairing pairing, int mean_rows) {
  return with_variant(pairing, mean_rows, [&](auto pairing_constant, auto mean_constant) {
    constexpr Pairing kPairing = decltype(pairing_constant)::value;
    constexpr int kMeanRows = decltype(mean_constant)::value;
    const bool parts = kernel_type == ElementType::kFloat32;
    return dim <= 64    ? shape_of_variant<64, kPairing, kMeanRows>(parts)
           : dim <= 128 ? shape_of_variant<128, kPairing, kMeanRows>(parts)
                        : shape_of_variant<256, kPairing, kMeanRows>(parts);
  });
}

void launch_stream(const StreamParams& params, Pairing pairing, int mean_rows, int row_blocks,
                   int splits, void* stream) {
  const dim3 grid(row_blocks, splits);
  const auto launch_it = params.dim <= 64    ? &launch_stream_of<64>
                         : params.dim <= 128 ? &launch_stream_of<128>
                                             : &launch_stream_of<256>;
  launch_it(params, pairing, mean_rows, grid, static_cast<cudaStream_t>(stream));
}

}  // namespace softcl::cuda

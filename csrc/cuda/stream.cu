// Which variant of the streaming kernel a call runs.

#include "stream_variants.h"

namespace softcl::cuda {

template <>
void launch_stream_of<64>(const StreamParams&, ElementType, Pairing, int, dim3, cudaStream_t);
template <>
void launch_stream_of<128>(const StreamParams&, ElementType, Pairing, int, dim3, cudaStream_t);
template <>
void launch_stream_of<256>(const StreamParams&, ElementType, Pairing, int, dim3, cudaStream_t);

StreamShape stream_shape(int dim, Pairing pairing, int mean_rows) {
  return with_variant(pairing, mean_rows, [&](auto pairing_constant, auto mean_constant) {
    constexpr Pairing kPairing = decltype(pairing_constant)::value;
    constexpr int kMeanRows = decltype(mean_constant)::value;
    return dim <= 64    ? shape_of_variant<64, kPairing, kMeanRows>()
           : dim <= 128 ? shape_of_variant<128, kPairing, kMeanRows>()
                        : shape_of_variant<256, kPairing, kMeanRows>();
  });
}

void launch_stream(const StreamParams& params, ElementType type, Pairing pairing, int mean_rows,
                   int row_blocks, int splits, void* stream) {
  const dim3 grid(row_blocks, splits);
  const auto launch_it = params.dim <= 64    ? &launch_stream_of<64>
                         : params.dim <= 128 ? &launch_stream_of<128>
                                             : &launch_stream_of<256>;
  launch_it(params, type, pairing, mean_rows, grid, static_cast<cudaStream_t>(stream));
}

}  // namespace softcl::cuda

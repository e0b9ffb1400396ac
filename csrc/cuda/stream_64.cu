// The streaming kernel for rows of up to 64 elements.

#include "stream_variants.h"

namespace softcl::cuda {

template <>
void launch_stream_of<64>(const StreamParams& p, Pairing pairing, int mean_rows, dim3 grid,
                          cudaStream_t stream) {
  launch_variant<64>(p, pairing, mean_rows, grid, stream);
}

}  // namespace softcl::cuda

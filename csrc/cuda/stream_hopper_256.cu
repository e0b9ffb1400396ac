// The Hopper streaming kernel for rows of up to 256 elements.

#include "stream_hopper_variants.h"

namespace softcl::cuda {

template <>
void launch_stream_hopper_of<256>(const HopperParams& p, ElementType type, Pairing pairing,
                                  int mean_rows, dim3 grid, cudaStream_t stream) {
  launch_hopper_variant<256>(p, type, pairing, mean_rows, grid, stream);
}

}  // namespace softcl::cuda

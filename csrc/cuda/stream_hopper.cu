// Which variant of the Hopper streaming kernel a call runs, and the map by which it copies tiles.

#include <atomic>

#include "arguments.h"
#include "softcl/cuda.h"
#include "stream_hopper.h"
#include "stream_hopper_variants.h"

namespace softcl::cuda {

template <>
void launch_stream_hopper_of<64>(const HopperParams&, ElementType, Pairing, int, dim3,
                                 cudaStream_t);
template <>
void launch_stream_hopper_of<128>(const HopperParams&, ElementType, Pairing, int, dim3,
                                  cudaStream_t);
template <>
void launch_stream_hopper_of<256>(const HopperParams&, ElementType, Pairing, int, dim3,
                                  cudaStream_t);

namespace {

std::atomic<bool> hopper_allowed{true};

#if defined(__CUDACC__)

/// The driver's function, found at run time: the module loads where there is no driver.
decltype(&cuTensorMapEncodeTiled) find_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  #if CUDART_VERSION >= 12050
  SOFTCL_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                     cudaEnableDefault, &result));
  #else
  SOFTCL_CUDA_CHECK(
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result));
  #endif
  if (result != cudaDriverEntryPointSuccess || function == nullptr) {
    throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled");
  }
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

constexpr CUtensorMapDataType kMapTypes[] = {CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
                                             CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                             CU_TENSOR_MAP_DATA_TYPE_FLOAT16};

TensorMap make_tensor_map(const StreamParams& p, int box_rows) {
  static const auto encode = find_encoder();
  TensorMap map;
  const cuuint64_t sizes[2] = {cuuint64_t(p.dim), cuuint64_t(p.queue_size)};
  const auto element_bytes = static_cast<cuuint32_t>(size_of(p.queue_type));
  const cuuint64_t row_bytes[1] = {cuuint64_t(p.dim) * element_bytes};
  const cuuint32_t box[2] = {kBoxRowBytes / element_bytes, cuuint32_t(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result =
      encode(&map, kMapTypes[static_cast<int>(p.queue_type)], 2, const_cast<void*>(p.queue), sizes,
             row_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: CUDA driver error " +
                             std::to_string(static_cast<int>(result)));
  }
  return map;
}

#else

TensorMap make_tensor_map(const StreamParams& p, int box_rows) {
  const auto bytes = static_cast<int>(size_of(p.queue_type));
  return {p.queue, p.queue_size, p.dim, bytes, p.dim * bytes, box_rows, kBoxRowBytes / bytes};
}

#endif

}  // namespace

void allow_hopper(bool allowed) {
  hopper_allowed = allowed;
}

bool can_stream_hopper(int device, const void* queue, int dim, ElementType kernel_type) {
  return hopper_allowed && (kernel_type != ElementType::kFloat32 || dim <= kMostPartsDimensions) &&
         attribute(cudaDevAttrComputeCapabilityMajor, device) == 9 &&
         attribute(cudaDevAttrComputeCapabilityMinor, device) == 0 && is_aligned(queue, dim);
}

StreamShape hopper_shape(ElementType kernel_type, int dim, Pairing pairing, int mean_rows) {
  const auto shape_of = [&](auto dim_constant) {
    return with_variant(pairing, mean_rows, [&](auto pairing_constant, auto mean_constant) {
      constexpr int kDim = decltype(dim_constant)::value;
      constexpr Pairing kPairing = decltype(pairing_constant)::value;
      constexpr int kMeanRows = decltype(mean_constant)::value;
      const auto shape = [](auto s) -> StreamShape {
        using S = decltype(s);
        return {S::kSamples, S::kTileRows, kHopperThreads, 1, S::kSharedBytes};
      };
      if constexpr (kDim <= kMostPartsDimensions) {
        if (kernel_type == ElementType::kFloat32) {
          return shape(HopperShape<kDim, kPairing, kMeanRows, TwoParts>());
        }
      }
      return shape(HopperShape<kDim, kPairing, kMeanRows, Float16>());
    });
  };
  return dim <= 64    ? shape_of(std::integral_constant<int, 64>())
         : dim <= 128 ? shape_of(std::integral_constant<int, 128>())
                      : shape_of(std::integral_constant<int, 256>());
}

void launch_stream_hopper(const StreamParams& params, Pairing pairing, int mean_rows,
                          int row_blocks, int splits, void* stream) {
  const ElementType type = params.kernel_type;
  HopperParams p;
  p.stream = params;
  p.queue = make_tensor_map(params, hopper_shape(type, params.dim, pairing, mean_rows).tile_rows);
  const auto launch_it = params.dim <= 64    ? &launch_stream_hopper_of<64>
                         : params.dim <= 128 ? &launch_stream_hopper_of<128>
                                             : &launch_stream_hopper_of<256>;
  launch_it(p, type, pairing, mean_rows, dim3(row_blocks, splits),
            static_cast<cudaStream_t>(stream));
}

}  // namespace softcl::cuda

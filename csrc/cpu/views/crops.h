// One crop of a decoded image, compiled once per instruction set; crops.cpp lays out its weights.

#pragma once

#include <cstdint>

namespace softcl::cpu {

/// Weights are whole numbers whose sum is 1 << kCropWeightBits for every output; two neighbours lie
/// in the low and the high half of 32 bits, as in the line, so that one instruction multiplies and
/// adds both.
inline constexpr int kCropWeightBits = 14;
/// Of a pixel of the line below the point: 15 bits and a sign hold 255.
inline constexpr int kCropLineBits = 7;
/// Pairs that a kernel takes from a line at a time, at most: column_pairs is a multiple of it.
inline constexpr std::int64_t kCropPairsAtOnce = 2;
/// Pixels of the line that a kernel may write beyond those of the box.
inline constexpr std::int64_t kCropPadding = 16;

struct CropTask {
  const std::uint8_t* corner = nullptr;  // the first pixel that the box touches
  const std::uint8_t* end = nullptr;     // of the image: nothing is read from here on
  std::int64_t stride = 0;               // bytes from a row of the image to the next
  std::int64_t width = 0;                // pixels of a row that the box touches

  std::int64_t rows = 0, columns = 0;  // R, C
  std::uint8_t* result = nullptr;      // (3, R, C)

  std::int64_t row_taps = 0;
  std::int32_t* first_row = nullptr;    // (R,) below the corner
  std::int32_t* row_weights = nullptr;  // (R, pairs_in(row_taps))

  std::int64_t column_pairs = 0;
  std::int32_t* first_pair = nullptr;  // (padded C,) of the line
  /// (padded C, column_pairs, 4): each four times, for the channels.
  std::int32_t* column_weights = nullptr;

  std::int32_t* line = nullptr;    // (pairs of pixels, 4) a row of the result, all columns
  std::uint8_t* pixels = nullptr;  // (padded C, 4) a row of the result
};

static inline std::int64_t pairs_in(std::int64_t taps) {
  return (taps + 1) / 2;
}

/// Outputs of a row that a kernel makes, of which it keeps the first `columns`.
static inline std::int64_t padded_columns(std::int64_t columns) {
  return (columns + 3) / 4 * 4;
}

using CropKernel = void (*)(const CropTask& task);

void portable_crop(const CropTask& task);
#if defined(SOFTCL_X86)
void avx2_crop(const CropTask& task);
void avx512_crop(const CropTask& task);
#endif

}  // namespace softcl::cpu

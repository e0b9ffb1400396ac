// Crops of one decoded image, each resized: uint8 in, uint8 out.
//
// The filter of Pillow, of torchvision's antialias=True and of crop_matrix in
// softcl/data/render.py: along an axis, with scale = length / size and reach = max(scale, 1),
// output i has its centre at start + (i + 1/2) scale and weighs input j by max(0, 1 - |j + 1/2 -
// centre| / reach), divided by the sum of its weights. The inputs are the whole pixels that the box
// touches, and no others.

#pragma once

#include <cstdint>
#include <vector>

namespace softcl {

struct Crop {
  double top = 0.0, left = 0.0;  // of the box in the image, in pixels; fractions count
  double height = 0.0, width = 0.0;
  std::int64_t rows = 0, columns = 0;  // R, C: of the result
  std::uint8_t* result = nullptr;      // (3, R, C)
};

struct CropsParams {
  const std::uint8_t* pixels = nullptr;  // (H, W, 4) red, green, blue and one that is not used
  std::int64_t height = 0;               // H >= 1
  std::int64_t width = 0;                // W >= 1
  std::vector<Crop> crops;
};

namespace cpu {

/// On the calling thread. Throws std::invalid_argument that names the argument and its value. The
/// sums are of integers: every instruction set gives the same bits, within 1 of the filter's value.
void crops(const CropsParams& params);

}  // namespace cpu

}  // namespace softcl

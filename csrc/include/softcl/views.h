// One view of a batch: crop, antialiased resize, mirror, colours, blur, normalise; uint8 in, fp32
// out.
//
// The mathematics of softcl/data/views.py, which is the reference, with one row of a table of
// parameters per sample: Parameters in softcl/data/recipe.py.
//
//     resize   a separable triangle filter, max(scale, 1) wide, over the pixels of the crop
//     colours  brightness, contrast and saturation in the sample's order, the hue among them; then
//              grey. Contrast mixes in the view's mean grey as it is at that moment.
//     blur     three box filters of a fractional radius along each axis
//     then     values from 128 / 255 up inverted where solarized, and (x - mean) / std

#pragma once

#include <cstdint>

namespace softcl {

/// A row of the table. Places are whole pixels; a flag is set where it is above 0.
struct ViewColumn {
  enum {
    kTop,
    kLeft,
    kHeight,
    kWidth,
    kMirror,             // flag
    kJittered,           // flag
    kOrder,              // in [0, 24), its whole part counts, see read_jitter in csrc/cpu
    kFactor,             // three columns: of brightness, contrast and saturation
    kHue = kFactor + 3,  // turns
    kGrayed,             // flag
    kBlurred,            // flag
    kSigma,              // of the blur, in pixels of the view
    kSolarized,          // flag
    kCount
  };
};

struct ViewsParams {
  const std::uint8_t* images = nullptr;  // (N, 3, H, W)
  const float* table = nullptr;          // (N, ViewColumn::kCount)
  const float* constants = nullptr;      // (2, 3) 1 / std and -mean / std
  float* views = nullptr;                // (N, 3, S, S)
  std::int64_t num_images = 0;           // N >= 0
  std::int64_t height = 0;               // H >= 1
  std::int64_t width = 0;                // W >= 1
  std::int64_t size = 0;                 // S >= 1
  bool colors = false;                   // without it the columns from kJittered on are not read
  int num_threads = 1;
};

namespace cpu {

/// Throws std::invalid_argument that names the argument and its value. A view's bits depend on its
/// own image and row and on the instruction set: not on the other samples, nor on the threads.
void views(const ViewsParams& params);

}  // namespace cpu

}  // namespace softcl

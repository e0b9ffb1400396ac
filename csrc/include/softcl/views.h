// One view of a batch: crop, antialiased resize, mirror, colours, blur, normalise; uint8 in, fp32
// out.
//
// The mathematics of softcl/data/{resample,color,views}.py, which is the reference, with one row of
// a table of parameters per sample: those of kernels/views.py and the two that follow it there.
//
//     resize   a separable triangle filter, max(scale, 1) wide, over the pixels of the crop
//     colours  brightness, contrast and saturation in the sample's order, the hue among them; then
//              grey. Contrast mixes in the view's mean grey as it is at that moment.
//     blur     three box filters of a fractional radius along each axis
//     then     values from 128 / 255 up inverted where solarized, and (x - mean) / std

#pragma once

#include <cstdint>

namespace softcl {

/// A row of the table. Places are whole pixels, flags 0 or not.
struct ViewColumn {
  enum {
    kTop,
    kLeft,
    kHeight,
    kWidth,
    kMirror,
    kJittered,
    kKind,  // three columns: 0 brightness, 1 contrast, 2 saturation, in the order they come
    kFactor = kKind + 3,  // three columns: theirs, in that order
    kHue = kFactor + 3,   // turns
    kHueSlot,             // how many of the three come before the hue
    kGrayed,
    kSigma,  // of the blur, in pixels of the view; 0: none
    kSolarized,
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

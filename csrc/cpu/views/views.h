// One sample's view, compiled once per instruction set; views.cpp reads its row of the table.

#pragma once

#include <cstdint>

namespace softcl::cpu {

enum class ColorKind { kBrightness, kContrast, kSaturation, kHue, kGray };

struct ColorStep {
  ColorKind kind;
  float amount;  // the factor of a blend; turns of the hue
};

inline constexpr int kMostColorSteps = 5;

/// A row of the table, checked. Channels and the pixels of a channel are contiguous.
struct ViewTask {
  const std::uint8_t* image = nullptr;  // (3, H, W)
  const float* constants = nullptr;     // (2, 3)
  float* view = nullptr;                // (3, S, S)
  std::int64_t height = 0;              // H
  std::int64_t width = 0;               // W
  std::int64_t size = 0;                // S

  std::int64_t top = 0, left = 0;
  std::int64_t crop_height = 0, crop_width = 0;
  bool mirror = false;
  int num_steps = 0;
  int contrast_at = -1;  // which of the steps it is, or -1
  ColorStep steps[kMostColorSteps];
  std::int64_t box_radius = -1;  // whole pixels of a box of the blur, or -1: no blur
  float box_part = 0.0f;         // weight of the next pixels on either side, in [0, 1)
  bool solarized = false;
};

/// Of one output along one axis: the inputs first[i] .. first[i] + taps - 1 of the crop.
struct ViewAxis {
  std::int32_t* first = nullptr;  // (padded(size),)
  float* fraction = nullptr;      // (padded(size),) scratch
  float* weights = nullptr;       // (taps, padded(size))
};

/// Of one thread; every array ends with kViewPadding more.
struct ViewWorkspace {
  ViewAxis rows, columns;
  float* lines = nullptr;    // (3, line_stride) a row of the view, not yet resized along columns
  float* pixels = nullptr;   // (3, plane_stride)
  float* blurred = nullptr;  // (plane_stride,)
  float* boxes[2] = {};      // (size, box_stride)
  std::int64_t line_stride = 0;
  std::int64_t plane_stride = 0;
};

/// Floats beyond the last one that a kernel may read or write in the arrays of a workspace, and a
/// multiple of the floats in its vectors: axes are padded to it.
inline constexpr std::int64_t kViewPadding = 32;

static inline std::int64_t padded(std::int64_t count) {
  return (count + kViewPadding - 1) / kViewPadding * kViewPadding;
}

/// Inputs that an output of a resize from `length` to `size` depends on, at most: the open interval
/// of 2 max(length / size, 1) holds so many middles of pixels.
static inline std::int64_t most_taps(std::int64_t length, std::int64_t size) {
  const std::int64_t taps = length > size ? (2 * length + size - 1) / size : 2;
  return taps < length ? taps : length;
}

/// Floats from one line of a blur's boxes to the next.
static inline std::int64_t box_stride(std::int64_t size, std::int64_t radius) {
  return size + 2 * (radius + 1) + kViewPadding;
}

using ViewKernel = void (*)(const ViewTask& task, const ViewWorkspace& workspace);

void portable_view(const ViewTask& task, const ViewWorkspace& workspace);
#if defined(SOFTCL_X86)
void avx2_view(const ViewTask& task, const ViewWorkspace& workspace);
void avx512_view(const ViewTask& task, const ViewWorkspace& workspace);
#endif

}  // namespace softcl::cpu

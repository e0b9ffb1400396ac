// One sample's view, written once; views_<isa>.cpp includes this with
//     SOFTCL_ISA            a name, also of the namespace that keeps the copies apart
//     SOFTCL_VECTOR_WIDTH   floats in a vector register
// No function that another file could also emit may be called inline from here (see convert.h).
//
// Tiling. Vectors run over the pixels of a line. A row of the view at a time: the image's rows
// under its filter are added up (uint8 loads, one weight each), and the three lines that gives are
// resized along the columns, where every output picks its own inputs, out of two registers wherever
// the filter's reach allows. Colours are two sweeps over the pixels, the second from the contrast
// on, because the contrast needs the mean of what the first leaves; the three channels of a vector
// go through a sweep's steps in registers. A blur is three boxes down the columns and three along
// the rows, a channel at a time.
//
// Traffic. A byte of the crop is read taps * size / crop_height times, from L1; the view's pixels,
// 12 size^2 bytes, are written and read once by the resize, each sweep and the last step, and by a
// blur 12 times: up to 56 px they stay in L1, up to 400 px in 2 MB of L2.

namespace softcl::cpu {

namespace SOFTCL_ISA {

namespace {

#include "simd.h"
// After it: its vectors.
#include "views/views_vectors.h"

static_assert(kViewPadding >= 2 * kWidth && kViewPadding % kWidth == 0, "windows are padding");

constexpr std::int64_t kVectorsInSum = 64;  // of fp32 greys, before their sum is made double

// ------------------------------------------------------------------------------------- resize

/// The weights of one axis, as softcl.data.views.crop_matrix has them, times `multiplier`. The
/// inputs are counted from the crop's first, and all lie within the crop.
void fill_axis(std::int64_t length, std::int64_t size, bool mirror, float multiplier,
               const ViewAxis& axis) {
  // The centre of output i, (2 i + 1) length / (2 size), as a whole number and a fraction: exact,
  // where a float would lose bits of the fraction in large images.
  const std::int64_t whole_step = length / size, rest_step = 2 * (length % size);
  std::int64_t whole = length / (2 * size), rest = length % (2 * size);
  for (std::int64_t i = 0; i < size; ++i) {
    const std::int64_t at = mirror ? size - 1 - i : i;
    axis.first[at] = std::int32_t(whole);
    axis.fraction[at] = float(rest) / float(2 * size);
    whole += whole_step;
    rest += rest_step;
    if (rest >= 2 * size) rest -= 2 * size, ++whole;
  }
  const std::int64_t end = padded(size);
  for (std::int64_t i = size; i < end; ++i) {
    axis.first[i] = axis.first[size - 1];
    axis.fraction[i] = axis.fraction[size - 1];
  }
  const std::int64_t taps = most_taps(length, size);
  const std::int32_t last = std::int32_t(length - taps);
  const float reach = length > size ? float(length) / float(size) : 1.0f;
  const float inverse = 1.0f / reach;
  const std::int32_t bias = std::int32_t(reach) + 2;  // makes positive what is cut to an integer
  for (std::int64_t i = 0; i < end; i += kWidth) {
    const IntVector centre = load_ints(axis.first + i);
    const Vector fraction = load(axis.fraction + i);
    // The first input whose middle is within reach. Where rounding misses it, its weight is nearly
    // nothing.
    const Vector shifted = fraction + (float(bias) - reach - 0.5f);
    IntVector first = centre + __builtin_convertvector(shifted, IntVector) - (bias - 1);
    first = first > 0 ? first : IntVector{};
    first = first < last ? first : IntVector{} + last;
    const Vector distance = __builtin_convertvector(first - centre, Vector) + 0.5f - fraction;
    Vector total = {};
    for (std::int64_t t = 0; t < taps; ++t) {
      const Vector weight = max(1.0f - absolute(distance + float(t)) * inverse, Vector{});
      store(axis.weights + t * end + i, weight);
      total += weight;
    }
    const Vector factor = multiplier / total;
    for (std::int64_t t = 0; t < taps; ++t) {
      float* weight = axis.weights + t * end + i;
      store(weight, load(weight) * factor);
    }
    store_ints(axis.first + i, first);
  }
}

/// Row y of the view before its columns are resized: lines (3, crop_width).
template <int kTaps>
void resize_rows(const ViewTask& task, const ViewWorkspace& w, std::int64_t y, std::int64_t taps) {
  const std::int64_t channel = task.height * task.width, stride = padded(task.size);
  const std::uint8_t* const end = task.image + 3 * channel;
  const std::uint8_t* corner = task.image + (task.top + w.rows.first[y]) * task.width + task.left;
  if (kTaps > 0) taps = kTaps;
  for (int c = 0; c < 3; ++c, corner += channel) {
    for (std::int64_t x = 0; x < task.crop_width; x += kWidth) {
      Vector sum = {};
      for (std::int64_t t = 0; t < taps; ++t) {
        sum += load_bytes(corner + t * task.width + x, end) * w.rows.weights[t * stride + y];
      }
      store(w.lines + c * w.line_stride + x, sum);
    }
  }
}

/// Whether the inputs of every vector of outputs lie in one window.
bool inputs_are_near(const ViewAxis& axis, std::int64_t size, std::int64_t taps) {
  for (std::int64_t x = 0; x < size; x += kWidth) {
    const std::int64_t span = axis.first[x + kWidth - 1] - axis.first[x];
    if ((span < 0 ? -span : span) + taps > kWindow) return false;
  }
  return true;
}

/// Row y of the pixels from the lines. It writes up to a vector past the row's end: rows come in
/// ascending order, and the next one overwrites it.
template <int kTaps, bool kNear>
void resize_columns(const ViewTask& task, const ViewWorkspace& w, std::int64_t y,
                    std::int64_t taps) {
  const std::int64_t stride = padded(task.size);
  const float* lines[3] = {w.lines, w.lines + w.line_stride, w.lines + 2 * w.line_stride};
  if (kTaps > 0) taps = kTaps;
  for (std::int64_t x = 0; x < task.size; x += kWidth) {
    const std::int32_t left = w.columns.first[x], right = w.columns.first[x + kWidth - 1];
    const std::int32_t low = !kNear ? 0 : left < right ? left : right;  // mirrored: descending
    const IntVector first = load_ints(w.columns.first + x) - low;
    Window windows[3] = {};
    for (int c = 0; kNear && c < 3; ++c) windows[c] = window_at(lines[c] + low);
    Vector sums[3] = {};
    for (std::int64_t t = 0; t < taps; ++t) {
      const Vector weight = load(w.columns.weights + t * stride + x);
      const IntVector index = first + std::int32_t(t);
      for (int c = 0; c < 3; ++c) {
        sums[c] += weight * (kNear ? pick(windows[c], index) : gather(lines[c], index));
      }
    }
    for (int c = 0; c < 3; ++c) store(w.pixels + c * w.plane_stride + y * task.size + x, sums[c]);
  }
}

/// The crop, resized and mirrored: pixels (3, size, size) in [0, 1].
void resize(const ViewTask& task, const ViewWorkspace& w) {
  fill_axis(task.crop_height, task.size, false, 1.0f / 255.0f, w.rows);
  fill_axis(task.crop_width, task.size, task.mirror, 1.0f, w.columns);
  const std::int64_t row_taps = most_taps(task.crop_height, task.size);
  const std::int64_t column_taps = most_taps(task.crop_width, task.size);
  const bool near = inputs_are_near(w.columns, task.size, column_taps);
  for (std::int64_t y = 0; y < task.size; ++y) {
    row_taps == 2 ? resize_rows<2>(task, w, y, row_taps) : resize_rows<0>(task, w, y, row_taps);
    if (near && column_taps == 2) {
      resize_columns<2, true>(task, w, y, column_taps);
    } else if (near) {
      resize_columns<0, true>(task, w, y, column_taps);
    } else {
      resize_columns<0, false>(task, w, y, column_taps);
    }
  }
}

// ------------------------------------------------------------------------------------ colours

struct Pixels {
  Vector red, green, blue;
};

inline Vector gray(const Pixels& p) {
  return 0.299f * p.red + 0.587f * p.green + 0.114f * p.blue;
}

inline Pixels blended(const Pixels& p, float factor, Vector reference) {
  const Vector rest = (1.0f - factor) * reference;
  return {clamp01(factor * p.red + rest), clamp01(factor * p.green + rest),
          clamp01(factor * p.blue + rest)};
}

/// The channel that peaks `turns` before the hue: the smallest, and of the spread what is left.
inline Vector hue_peak(Vector turns, Vector smallest, Vector spread) {
  return smallest + clamp01(2.0f - 6.0f * absolute(turns - rounded(turns))) * spread;
}

/// softcl.data.views.shift_hue, the circle's length being 1.
inline Pixels shifted_hue(const Pixels& p, float shift) {
  const Vector largest = max(max(p.red, p.green), p.blue);
  const Vector smallest = min(min(p.red, p.green), p.blue);
  const Vector spread = largest - smallest;
  const IntVector is_red = largest == p.red, is_green = largest == p.green;
  Vector difference = is_green ? p.blue - p.red : p.red - p.green;
  difference = is_red ? p.green - p.blue : difference;
  Vector offset = is_green ? broadcast(1.0f / 3.0f) : broadcast(2.0f / 3.0f);
  offset = is_red ? Vector{} : offset;
  // A grey pixel has spread 0 and any hue.
  const Vector hue = difference / (6.0f * max(spread, broadcast(1e-12f))) + (offset + shift);
  return {hue_peak(hue, smallest, spread), hue_peak(hue - 1.0f / 3.0f, smallest, spread),
          hue_peak(hue - 2.0f / 3.0f, smallest, spread)};
}

inline Pixels colored(const Pixels& p, const ColorStep& step, float mean) {
  switch (step.kind) {
    case ColorKind::kBrightness:
      return blended(p, step.amount, Vector{});
    case ColorKind::kContrast:
      return blended(p, step.amount, broadcast(mean));
    case ColorKind::kSaturation:
      return blended(p, step.amount, gray(p));
    case ColorKind::kHue:
      return shifted_hue(p, step.amount);
    case ColorKind::kGray:
      break;
  }
  const Vector shade = gray(p);
  return {shade, shade, shade};
}

inline double sum_of_lanes(Vector x, std::int64_t lanes) {
  double sum = 0.0;
  for (int i = 0; i < lanes; ++i) sum += double(x[i]);
  return sum;
}

/// The steps [begin, end) on all pixels; returns the sum of the greys that they leave.
double sweep_colors(const ViewTask& task, const ViewWorkspace& w, int begin, int end, float mean) {
  const std::int64_t count = task.size * task.size;
  double total = 0.0;
  Vector sum = {};
  for (std::int64_t i = 0, summed = 0; i < count; i += kWidth) {
    float* const red = w.pixels + i;
    float* const green = red + w.plane_stride;
    float* const blue = green + w.plane_stride;
    Pixels p = {load(red), load(green), load(blue)};
    for (int step = begin; step < end; ++step) p = colored(p, task.steps[step], mean);
    store(red, p.red);
    store(green, p.green);
    store(blue, p.blue);
    if (count - i < kWidth)
      return total + sum_of_lanes(sum, kWidth) + sum_of_lanes(gray(p), count - i);
    sum += gray(p);
    if (++summed % kVectorsInSum == 0) {
      total += sum_of_lanes(sum, kWidth);
      sum = Vector{};
    }
  }
  return total + sum_of_lanes(sum, kWidth);
}

void change_colors(const ViewTask& task, const ViewWorkspace& w) {
  if (task.num_steps == 0) return;
  float mean = 0.0f;
  int begin = 0;
  if (task.contrast_at >= 0) {
    begin = task.contrast_at;
    mean = float(sweep_colors(task, w, 0, begin, 0.0f) / double(task.size * task.size));
  }
  sweep_colors(task, w, begin, task.num_steps, mean);
}

// --------------------------------------------------------------------------------------- blur

/// One box of the blur: (..., -1, 0, 1, ...) times `step` floats away, both ends by a part.
struct Box {
  std::int64_t radius;
  float inner, outer;
};

/// Down the columns, past the border the border's row: both (size, size), not the same.
void box_down(const Box& box, const float* in, float* out, std::int64_t size) {
  const auto row = [&](std::int64_t y) {
    return in + (y < 0 ? 0 : y < size ? y : size - 1) * size;
  };
  for (std::int64_t y = 0; y < size; ++y, out += size) {
    const float* const before = row(y - box.radius - 1);
    const float* const after = row(y + box.radius + 1);
    for (std::int64_t x = 0; x < size; x += kWidth) {
      Vector sum = {};
      for (std::int64_t d = -box.radius; d <= box.radius; ++d) sum += load(row(y + d) + x);
      store(out + x, sum * box.inner + (load(before + x) + load(after + x)) * box.outer);
    }
  }
}

/// Along lines that have `margin` = radius + 1 numbers before and after; out without them.
void box_along(const Box& box, const float* in, std::int64_t in_stride, float* out,
               std::int64_t out_stride, std::int64_t size) {
  const std::int64_t margin = box.radius + 1;
  for (std::int64_t y = 0; y < size; ++y, in += in_stride, out += out_stride) {
    for (std::int64_t x = 0; x < size; x += kWidth) {
      const float* const p = in + margin + x;
      Vector sum = {};
      for (std::int64_t d = -box.radius; d <= box.radius; ++d) sum += load(p + d);
      store(out + x, sum * box.inner + (load(p - margin) + load(p + margin)) * box.outer);
    }
  }
}

void fill_margins(float* lines, std::int64_t stride, std::int64_t margin, std::int64_t size) {
  for (std::int64_t y = 0; y < size; ++y, lines += stride) {
    const float first = lines[margin], last = lines[margin + size - 1];
    for (std::int64_t i = 0; i < margin; ++i) lines[i] = first, lines[margin + size + i] = last;
  }
}

/// softcl.data.views.blur_matrix on both axes, box by box.
void blur(const ViewTask& task, const ViewWorkspace& w) {
  const std::int64_t size = task.size, radius = task.box_radius, margin = radius + 1;
  const float share = 1.0f / (2.0f * (float(radius) + task.box_part) + 1.0f);
  const Box box = {radius, share, share * task.box_part};
  const std::int64_t stride = box_stride(size, radius);
  for (int c = 0; c < 3; ++c) {
    float* const pixels = w.pixels + c * w.plane_stride;
    box_down(box, pixels, w.blurred, size);
    box_down(box, w.blurred, pixels, size);
    box_down(box, pixels, w.blurred, size);
    // Whole channels at a time, and not a line: reading what was only just written would wait.
    for (std::int64_t y = 0; y < size; ++y) {
      float* const line = w.boxes[0] + y * stride + margin;
      for (std::int64_t x = 0; x < size; x += kWidth) {
        store(line + x, load(w.blurred + y * size + x));
      }
    }
    fill_margins(w.boxes[0], stride, margin, size);
    box_along(box, w.boxes[0], stride, w.boxes[1] + margin, stride, size);
    fill_margins(w.boxes[1], stride, margin, size);
    box_along(box, w.boxes[1], stride, w.boxes[0] + margin, stride, size);
    fill_margins(w.boxes[0], stride, margin, size);
    box_along(box, w.boxes[0], stride, pixels, size, size);
  }
}

// ---------------------------------------------------------------------------------------- end

inline Vector finished(Vector x, bool solarized, float scale, float offset) {
  if (solarized) x = x < 128.0f / 255.0f ? x : 1.0f - x;
  return x * scale + offset;
}

/// The view from the pixels: solarized, normalised. Writes not a float more than the view has.
void finish(const ViewTask& task, const ViewWorkspace& w) {
  const std::int64_t count = task.size * task.size, rest = count % kWidth;
  for (int c = 0; c < 3; ++c) {
    const float* const pixels = w.pixels + c * w.plane_stride;
    float* const view = task.view + c * count;
    const float scale = task.constants[c], offset = task.constants[3 + c];
    for (std::int64_t i = 0; i < count - rest; i += kWidth) {
      store(view + i, finished(load(pixels + i), task.solarized, scale, offset));
    }
    if (rest == 0) continue;
    const Vector last = finished(load(pixels + count - rest), task.solarized, scale, offset);
    for (int lane = 0; lane < rest; ++lane) view[count - rest + lane] = last[lane];
  }
}

void make_view(const ViewTask& task, const ViewWorkspace& workspace) {
  resize(task, workspace);
  change_colors(task, workspace);
  if (task.box_radius >= 0) blur(task, workspace);
  finish(task, workspace);
}

}  // namespace

}  // namespace SOFTCL_ISA

}  // namespace softcl::cpu

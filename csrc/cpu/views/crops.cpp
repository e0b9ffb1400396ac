// Crops of a decoded image on the CPU: checks the boxes, lays out the weights of both axes.
//
// The weights are found here, in double precision and by code that all instruction sets share: the
// kernels only add up whole numbers, and give the same bits.

#include "softcl/crops.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "arena.h"
#include "isa.h"
#include "softcl/checks.h"
#include "views/crops.h"

namespace softcl::cpu {

namespace {

constexpr std::int64_t kLargestSide = std::int64_t{1} << 30;
constexpr std::int64_t kLargestSize = std::int64_t{1} << 15;

/// One axis of a crop. Inputs are counted from the first pixel that the box touches.
struct Axis {
  std::int64_t begin;   // that pixel
  std::int64_t inputs;  // pixels that the box touches
  std::int64_t size;    // outputs
  std::int64_t taps;    // inputs of an output: no more lie in an open interval of 2 reach
  double start, scale, reach;

  Axis(double box_start, double box_length, std::int64_t outputs, std::int64_t limit)
      : begin(std::min(static_cast<std::int64_t>(box_start), limit - 1)), size(outputs) {
    const auto end = static_cast<std::int64_t>(std::ceil(box_start + box_length));
    inputs = std::clamp(end, begin + 1, limit) - begin;
    start = box_start - double(begin);
    scale = box_length / double(size);
    reach = std::max(scale, 1.0);
    taps = std::min(static_cast<std::int64_t>(std::ceil(2.0 * reach)), inputs);
  }

  /// The weights (taps,) of output i; returns its first input.
  std::int64_t weigh(std::int64_t i, std::int32_t* weights) const {
    const double centre = start + (double(i) + 0.5) * scale - 0.5;  // 0 is the middle of input 0
    const auto low = static_cast<std::int64_t>(std::max(centre - reach + 1.0, 0.0));
    const std::int64_t first = std::min(low, inputs - taps);
    const double inverse = 1.0 / reach, before = double(first) - centre;
    const auto weight = [&](std::int64_t t) {
      return std::max(1.0 - std::abs(before + double(t)) * inverse, 0.0);
    };
    double total = 0.0;
    for (std::int64_t t = 0; t < taps; ++t) total += weight(t);
    const double unit = double(1 << kCropWeightBits) / total;
    // The running sum is rounded and not the weight: however many there are, their sum is right.
    double sum = 0.0;
    std::int32_t given = 0;
    for (std::int64_t t = 0; t < taps; ++t) {
      sum += weight(t);
      const auto reached = static_cast<std::int32_t>(sum * unit + 0.5);
      weights[t] = reached - given;
      given = reached;
    }
    return first;
  }
};

void check(const CropsParams& p) {
  check_count("height", p.height, 1, kLargestSide);
  check_count("width", p.width, 1, kLargestSide);
  check_pointer("pixels", p.pixels);
  for (const Crop& crop : p.crops) {
    check_count("rows", crop.rows, 1, kLargestSize);
    check_count("columns", crop.columns, 1, kLargestSize);
    check_pointer("result", crop.result);
    check_number("top", crop.top, 0.0, double(p.height));
    check_number("left", crop.left, 0.0, double(p.width));
    // A box of a fraction of the image may end past it by rounding.
    constexpr double kLeast = 1e-3, kRounding = 1e-6;
    check_number("height of a box", crop.height, kLeast, double(p.height) - crop.top + kRounding);
    check_number("width of a box", crop.width, kLeast, double(p.width) - crop.left + kRounding);
  }
}

/// Two weights in the halves of 32 bits; the second may lie beyond the last.
std::int32_t pair_at(const std::int32_t* weights, std::int64_t t, std::int64_t taps) {
  const std::int32_t low = t >= 0 ? weights[t] : 0;
  const std::int32_t high = t + 1 < taps ? weights[t + 1] : 0;
  return low | high << 16;
}

struct Workspace {
  std::int32_t* weights;  // (taps,) of one output of either axis
  CropTask task;
};

Workspace lay_out(Arena& arena, const Axis& rows, const Axis& columns) {
  Workspace w;
  w.weights = arena.take<std::int32_t>(std::max(rows.taps, columns.taps));
  CropTask& task = w.task;
  task.row_taps = rows.taps;
  task.first_row = arena.take<std::int32_t>(rows.size);
  task.row_weights = arena.take<std::int32_t>(rows.size * pairs_in(rows.taps));
  // An output whose first input is odd begins half a pair earlier.
  task.column_pairs = pairs_in(columns.taps + 1);
  task.column_pairs += task.column_pairs % kCropPairsAtOnce;
  const std::int64_t outputs = padded_columns(columns.size);
  task.first_pair = arena.take<std::int32_t>(outputs);
  task.column_weights = arena.take<std::int32_t>(outputs * task.column_pairs * 4);
  const std::int64_t pairs = pairs_in(columns.inputs + kCropPadding) + task.column_pairs;
  task.line = arena.take<std::int32_t>(pairs * 4);
  task.pixels = arena.take<std::uint8_t>(outputs * 4);
  return w;
}

void fill_rows(const Axis& axis, const Workspace& w) {
  std::int32_t* pairs = w.task.row_weights;
  for (std::int64_t i = 0; i < axis.size; ++i) {
    w.task.first_row[i] = static_cast<std::int32_t>(axis.weigh(i, w.weights));
    for (std::int64_t t = 0; t < axis.taps; t += 2) *pairs++ = pair_at(w.weights, t, axis.taps);
  }
}

void fill_columns(const Axis& axis, const Workspace& w) {
  std::int32_t* pairs = w.task.column_weights;
  for (std::int64_t i = 0; i < axis.size; ++i) {
    const std::int64_t first = axis.weigh(i, w.weights), odd = first % 2;
    w.task.first_pair[i] = static_cast<std::int32_t>(first / 2);
    for (std::int64_t p = 0; p < w.task.column_pairs; ++p, pairs += 4) {
      const std::int64_t t = 2 * p - odd;
      std::fill_n(pairs, 4, t < axis.taps ? pair_at(w.weights, t, axis.taps) : 0);
    }
  }
  const std::int64_t beyond = padded_columns(axis.size) - axis.size;
  std::fill_n(w.task.first_pair + axis.size, beyond, 0);
  std::fill_n(pairs, beyond * w.task.column_pairs * 4, 0);
}

void make_crop(const CropsParams& p, const Crop& crop, CropKernel kernel) {
  const Axis rows(crop.top, crop.height, crop.rows, p.height);
  const Axis columns(crop.left, crop.width, crop.columns, p.width);
  Arena measure;
  lay_out(measure, rows, columns);
  Arena arena(measure.used());
  Workspace w = lay_out(arena, rows, columns);
  fill_rows(rows, w);
  fill_columns(columns, w);
  w.task.stride = p.width * 4;
  w.task.corner = p.pixels + rows.begin * w.task.stride + columns.begin * 4;
  w.task.end = p.pixels + p.height * w.task.stride;
  w.task.width = columns.inputs;
  w.task.rows = crop.rows;
  w.task.columns = crop.columns;
  w.task.result = crop.result;
  kernel(w.task);
}

}  // namespace

void crops(const CropsParams& params) {
  check(params);
  const CropKernel kernel = crop_kernel();
  for (const Crop& crop : params.crops) make_crop(params, crop, kernel);
}

}  // namespace softcl::cpu

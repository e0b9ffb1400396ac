// The views of a batch on the CPU: reads and checks the table, then one piece of work is a sample.

#include "softcl/views.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "arena.h"
#include "isa.h"
#include "parallel.h"
#include "softcl/checks.h"
#include "views/views.h"

namespace softcl::cpu {

namespace {

constexpr std::int64_t kLargestSide = std::int64_t{1} << 24;  // whole numbers are exact in fp32
constexpr std::int64_t kLargestSize = std::int64_t{1} << 15;
constexpr double kLargestSigma = 1000.0;

void check(const ViewsParams& p) {
  check_count("num_images", p.num_images, 0, std::int64_t{1} << 40);
  check_count("height", p.height, 1, kLargestSide);
  check_count("width", p.width, 1, kLargestSide);
  check_count("size", p.size, 1, kLargestSize);
  check_count("num_threads", p.num_threads, 1, kMostThreads);
  if (p.num_images == 0) return;
  check_pointer("images", p.images);
  check_pointer("table", p.table);
  check_pointer("constants", p.constants);
  check_pointer("views", p.views);
}

// Reads one row of the table.
class Row {
 public:
  Row(const ViewsParams& params, std::int64_t sample)
      : row_(params.table + sample * ViewColumn::kCount), sample_(sample) {}

  float number(int column, const char* name, double least, double most) const {
    const float value = row_[column];
    if (!(value >= least && value <= most)) refuse(name, value, least, most);  // NaN too
    return value;
  }
  std::int64_t count(int column, const char* name, std::int64_t least, std::int64_t most) const {
    const float value = number(column, name, double(least), double(most));
    if (value != std::floor(value)) refuse(name, value, double(least), double(most));
    return static_cast<std::int64_t>(value);
  }
  bool flag(int column) const { return row_[column] > 0.0f; }

  [[noreturn]] void refuse(const char* name, double value, double least, double most) const {
    const auto shown = [](double x) {
      std::string digits = std::to_string(x);
      return x == std::floor(x) ? digits.substr(0, digits.find('.')) : digits;
    };
    throw std::invalid_argument("table: " + std::string(name) + "=" + shown(value) + " of sample " +
                                std::to_string(sample_) + ", must be in [" + shown(least) + ", " +
                                shown(most) + "]" +
                                (value != std::floor(value) ? " and whole" : ""));
  }

 private:
  const float* row_;
  std::int64_t sample_;
};

// order % 3 is the first blend, order / 3 % 2 whether the other two follow it in cyclic order, and
// order / 6 how many of the three come before the hue.
void read_jitter(const Row& row, ViewTask& task) {
  const int order = static_cast<int>(row.number(ViewColumn::kOrder, "order", 0.0, 23.999999));
  const int first = order % 3, second = (first + 1 + order / 3 % 2) % 3;
  const int kinds[] = {first, second, 3 - first - second};
  for (int i = 0; i <= 3; ++i) {
    if (i == order / 6) {
      task.steps[task.num_steps++] = {ColorKind::kHue,
                                      row.number(ViewColumn::kHue, "hue", -1.0, 1.0)};
    }
    if (i == 3) break;
    const float factor = row.number(ViewColumn::kFactor + kinds[i], "factor", 0.0, 1e6);
    if (kinds[i] == 1) task.contrast_at = task.num_steps;
    task.steps[task.num_steps++] = {ColorKind(kinds[i]), factor};
  }
}

// A box's radius such that three of them have the variance sigma^2, see blur_matrix in
// softcl/data/views.py.
void set_box(double sigma, ViewTask& task) {
  const double variance = sigma * sigma / 3.0;
  const double whole = std::floor((std::sqrt(12.0 * variance + 1.0) - 1.0) / 2.0);
  const double part = (2.0 * whole + 1.0) * (whole * (whole + 1.0) - 3.0 * variance) /
                      (6.0 * (variance - (whole + 1.0) * (whole + 1.0)));
  task.box_radius = static_cast<std::int64_t>(whole);
  task.box_part = static_cast<float>(part);
}

ViewTask read_task(const ViewsParams& p, std::int64_t sample) {
  const Row row(p, sample);
  ViewTask task;
  task.image = p.images + sample * 3 * p.height * p.width;
  task.constants = p.constants;
  task.view = p.views + sample * 3 * p.size * p.size;
  task.height = p.height;
  task.width = p.width;
  task.size = p.size;
  task.crop_height = row.count(ViewColumn::kHeight, "height", 1, p.height);
  task.crop_width = row.count(ViewColumn::kWidth, "width", 1, p.width);
  task.top = row.count(ViewColumn::kTop, "top", 0, p.height - task.crop_height);
  task.left = row.count(ViewColumn::kLeft, "left", 0, p.width - task.crop_width);
  task.mirror = row.flag(ViewColumn::kMirror);
  if (!p.colors) return task;
  if (row.flag(ViewColumn::kJittered)) read_jitter(row, task);
  if (row.flag(ViewColumn::kGrayed)) task.steps[task.num_steps++] = {ColorKind::kGray, 0.0f};
  if (row.flag(ViewColumn::kBlurred)) {
    set_box(row.number(ViewColumn::kSigma, "sigma", 0.0, kLargestSigma), task);
  }
  task.solarized = row.flag(ViewColumn::kSolarized);
  return task;
}

ViewAxis lay_out_axis(Arena& arena, std::int64_t length, std::int64_t size) {
  ViewAxis axis;
  const std::int64_t most = std::max<std::int64_t>(most_taps(length, size), 2);
  axis.first = arena.take<std::int32_t>(padded(size));
  axis.fraction = arena.take<float>(padded(size));
  axis.weights = arena.take<float>(most * padded(size));
  return axis;
}

// The workspace of every thread, for the largest crop that there can be and the widest blur.
std::vector<ViewWorkspace> lay_out(Arena& arena, const ViewsParams& p, int num_threads,
                                   std::int64_t box_radius) {
  std::vector<ViewWorkspace> workspaces(num_threads);
  for (ViewWorkspace& w : workspaces) {
    w.rows = lay_out_axis(arena, p.height, p.size);
    w.columns = lay_out_axis(arena, p.width, p.size);
    w.line_stride = padded(p.width) + kViewPadding;
    w.plane_stride = padded(p.size * p.size) + kViewPadding;
    w.lines = arena.take<float>(3 * w.line_stride);
    w.pixels = arena.take<float>(3 * w.plane_stride);
    if (box_radius < 0) continue;
    w.blurred = arena.take<float>(w.plane_stride);
    for (float*& box : w.boxes) box = arena.take<float>(p.size * box_stride(p.size, box_radius));
  }
  return workspaces;
}

}  // namespace

void views(const ViewsParams& params) {
  check(params);
  const ViewKernel kernel = view_kernel();
  // All of the table before the first view: threads must not throw.
  std::vector<ViewTask> tasks;
  tasks.reserve(params.num_images);
  std::int64_t radius = -1;
  for (std::int64_t i = 0; i < params.num_images; ++i) {
    tasks.push_back(read_task(params, i));
    radius = std::max(radius, tasks.back().box_radius);
  }
  const int threads =
      static_cast<int>(std::min<std::int64_t>(params.num_threads, params.num_images));
  Arena measure;
  lay_out(measure, params, threads, radius);
  Arena arena(measure.used());
  const std::vector<ViewWorkspace> workspaces = lay_out(arena, params, threads, radius);
  parallel_for(threads, params.num_images,
               [&](std::int64_t i, int thread) { kernel(tasks[i], workspaces[thread]); });
}

}  // namespace softcl::cpu

#include "rows.h"

#include <algorithm>
#include <cmath>

#include "convert.h"

namespace softcl::cpu {

void read_row(const void* matrix, ElementType type, std::int64_t row, std::int64_t dim,
              float* out) {
  if (type == ElementType::kFloat32) {
    std::copy_n(static_cast<const float*>(matrix) + row * dim, dim, out);
    return;
  }
  const auto* halves = static_cast<const std::uint16_t*>(matrix) + row * dim;
  if (type == ElementType::kBFloat16) {
    for (std::int64_t d = 0; d < dim; ++d) out[d] = from_bfloat16(halves[d]);
  } else {
    for (std::int64_t d = 0; d < dim; ++d) out[d] = from_float16(halves[d]);
  }
}

namespace {

// Sum of squares, in double, where no finite fp32 row overflows. Four chains: one would wait for
// every addition.
double sum_of_squares(const float* row, std::int64_t dim) {
  double sums[4] = {};
  std::int64_t d = 0;
  for (; d + 4 <= dim; d += 4) {
    for (int i = 0; i < 4; ++i) sums[i] += double(row[d + i]) * double(row[d + i]);
  }
  for (; d < dim; ++d) sums[0] += double(row[d]) * double(row[d]);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

}  // namespace

void read_strip(const void* matrix, ElementType type, std::int64_t num_rows, std::int64_t dim,
                bool normalize, std::int64_t first, int lanes, float* scratch, const Rows& rows) {
  float* strip = rows.strips + first * dim;  // (D, lanes)
  for (int lane = 0; lane < lanes; ++lane) {
    const std::int64_t row = first + lane;
    rows.norm[row] = 1.0;
    rows.finite[row] = true;
    if (row >= num_rows) {
      for (std::int64_t d = 0; d < dim; ++d) strip[d * lanes + lane] = 0.0f;
      continue;
    }
    read_row(matrix, type, row, dim, scratch);
    const double squares = sum_of_squares(scratch, dim);
    rows.finite[row] = std::isfinite(squares);
    if (normalize) {
      rows.norm[row] = std::max(std::sqrt(squares), kNormFloor);
      const double inverse = 1.0 / rows.norm[row];
      for (std::int64_t d = 0; d < dim; ++d) {
        scratch[d] = static_cast<float>(double(scratch[d]) * inverse);
      }
      if (type != ElementType::kFloat32) {
        for (std::int64_t d = 0; d < dim; ++d) scratch[d] = rounded_to(type, scratch[d]);
      }
    }
    for (std::int64_t d = 0; d < dim; ++d) strip[d * lanes + lane] = scratch[d];
  }
}

void read_excluded(const std::int64_t* excluded, std::int64_t num_rows, std::int64_t strip,
                   int lanes, std::int64_t* out) {
  for (std::int64_t row = strip * lanes; row < (strip + 1) * lanes; ++row) {
    out[row] = row < num_rows ? excluded[row] : -1;
  }
}

}  // namespace softcl::cpu

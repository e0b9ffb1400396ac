#include "rows.h"

#include <algorithm>
#include <cmath>

#include "convert.h"

namespace softcl::cpu {

void read_strip(const void* matrix, ElementType type, std::int64_t num_rows, std::int64_t dim,
                bool normalize, std::int64_t first, int lanes, const Rows& rows) {
  float* strip = rows.strips + first * dim;  // (D, lanes)
  for (int lane = 0; lane < lanes; ++lane) {
    const std::int64_t row = first + lane;
    rows.norm[row] = 1.0;
    rows.finite[row] = true;
    if (row >= num_rows) {
      for (std::int64_t d = 0; d < dim; ++d) strip[d * lanes + lane] = 0.0f;
      continue;
    }
    double squares = 0.0;  // in double no finite fp32 row overflows
    for (std::int64_t d = 0; d < dim; ++d) {
      const float x = load_element(matrix, type, row * dim + d);
      squares += double(x) * double(x);
      strip[d * lanes + lane] = x;
    }
    rows.finite[row] = std::isfinite(squares);
    if (!normalize) continue;
    const double norm = std::max(std::sqrt(squares), kNormFloor);
    rows.norm[row] = norm;
    for (std::int64_t d = 0; d < dim; ++d) {
      float& x = strip[d * lanes + lane];
      x = rounded_to(type, static_cast<float>(double(x) / norm));
    }
  }
}

}  // namespace softcl::cpu

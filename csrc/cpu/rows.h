// Rows of query, key or vectors, read from their storage type into strips (see sweep.h).

#pragma once

#include <cstdint>

#include "softcl/element_type.h"

namespace softcl::cpu {

/// max(norm, kNormFloor) divides a row under normalize.
inline constexpr double kNormFloor = 1e-12;

struct Rows {
  float* strips = nullptr;  // (strips, D, lanes); lanes past the last row are 0
  double* norm = nullptr;   // (strips * lanes,) max(norm, kNormFloor) if normalised, else 1
  bool* finite = nullptr;   // (strips * lanes,) every element read is finite
};

/// Row `row` of a matrix (N, D) in fp32.
void read_row(const void* matrix, ElementType type, std::int64_t row, std::int64_t dim, float* out);

/// Reads rows [first, first + lanes) of a matrix (N, D) into one strip, fewer at its end.
/// `scratch` holds D floats.
/// normalize: divides by max(norm, kNormFloor) and rounds to fp32, then to `type`.
void read_strip(const void* matrix, ElementType type, std::int64_t num_rows, std::int64_t dim,
                bool normalize, std::int64_t first, int lanes, float* scratch, const Rows& rows);

/// Each lane's excluded queue row (N,) of one strip into `out` (strips, lanes): -1 past the last
/// row.
void read_excluded(const std::int64_t* excluded, std::int64_t num_rows, std::int64_t strip,
                   int lanes, std::int64_t* out);

}  // namespace softcl::cpu

// What products can be at most on a device, measured on it, and how the FLOP of a call are counted.

#pragma once

#include <cstdint>

#include "softcl/element_type.h"
#include "softcl/labels.h"

namespace softcl::check {

/// FLOP of a loss and its gradient, as performance is counted: 4 N K D for hard labels, 6 with
/// neighbours, 8 with the teacher's mean.
inline double loss_flop(std::int64_t N, std::int64_t K, std::int64_t D, const LabelRule& rule) {
  const double products = needs_mean(rule) ? 8.0 : rule.num_neighbors > 0 ? 6.0 : 4.0;
  return products * static_cast<double>(N) * static_cast<double>(K) * static_cast<double>(D);
}

/// Products of 16-bit numbers for each one counted: of numbers in two parts three, low x low is
/// left out.
inline double products_of_one(bool in_parts) {
  return in_parts ? 3.0 : 1.0;
}

/// A loop of products C(rows, columns) += A(rows, depth) B(depth, columns) and nothing else:
/// `groups` in a block (warps or warpgroups), each with `products` in a step.
struct Loop {
  std::int64_t rows, columns, depth;
  std::int64_t products, groups, blocks;

  double flop(std::int64_t steps) const {
    return 2.0 * static_cast<double>(rows * columns * depth) *
           static_cast<double>(products * groups * blocks) * static_cast<double>(steps);
  }
};

struct Ceiling {
  double flop_per_second;
  const char* instruction;
  const char* operands;  // where they lie
};

struct Ceilings {
  Ceiling bf16, fp16;

  const Ceiling& of(ElementType type) const { return type == ElementType::kBFloat16 ? bf16 : fp16; }
};

/// The rates of mma.sync, or on a device of compute capability 9.0 of wgmma, whose kernel the fast
/// calls take there. Each loop is first run on ones, and counts its own products.
///
/// Throws std::logic_error if a loop makes other than Loop::flop says.
Ceilings measure_ceilings(int device);

}  // namespace softcl::check

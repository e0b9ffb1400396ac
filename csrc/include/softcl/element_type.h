// The storage types of a row's elements, and their sizes.

#pragma once

#include <cstdint>

namespace softcl {

/// Storage of a row's elements. The values are those that Python passes.
enum class ElementType : std::int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

static inline std::int64_t size_of(ElementType type) {
  return type == ElementType::kFloat32 ? 4 : 2;
}

}  // namespace softcl

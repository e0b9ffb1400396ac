// Argument checks: what is refused gets the argument's name and value into the message.

#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "softcl/element_type.h"
#include "softcl/labels.h"

namespace softcl::cpu {

inline void check_count(const char* name, std::int64_t value, std::int64_t least,
                        std::int64_t most) {
  if (value >= least && value <= most) return;
  throw std::invalid_argument(std::string(name) + "=" + std::to_string(value) + ", must be in [" +
                              std::to_string(least) + ", " + std::to_string(most) + "]");
}

inline void check_temperature(const char* name, double value) {
  if (value > 0.0 && std::isfinite(value)) return;
  throw std::invalid_argument(std::string(name) + "=" + std::to_string(value) +
                              ", must be positive and finite");
}

inline void check_pointer(const char* name, const void* value) {
  if (value == nullptr) throw std::invalid_argument(std::string(name) + " is a null pointer");
}

inline void check_type(const char* name, ElementType type) {
  check_count(name, static_cast<std::int64_t>(type), 0, 2);
}

}  // namespace softcl::cpu

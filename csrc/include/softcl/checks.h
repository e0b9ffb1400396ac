// Argument checks: what is refused gets the argument's name and value into the message.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>

#include "softcl/call.h"

namespace softcl {

inline void check_count(const char* name, std::int64_t value, std::int64_t least,
                        std::int64_t most) {
  if (value >= least && value <= most) return;
  throw std::invalid_argument(std::string(name) + "=" + std::to_string(value) + ", must be in [" +
                              std::to_string(least) + ", " + std::to_string(most) + "]");
}

inline void check_number(const char* name, double value, double least, double most) {
  if (value >= least && value <= most) return;  // not NaN
  char text[128];
  std::snprintf(text, sizeof text, "=%g, must be in [%g, %g]", value, least, most);
  throw std::invalid_argument(name + std::string(text));
}

inline void check_pointer(const char* name, const void* value) {
  if (value == nullptr) throw std::invalid_argument(std::string(name) + " is a null pointer");
}

inline void check_type(const char* name, ElementType type) {
  check_count(name, static_cast<std::int64_t>(type), 0, 2);
}

// Beyond these a logit, or the stand-in for an excluded one, leaves the range of fp32.
inline constexpr double kLeastTemperature = 1e-6, kMostTemperature = 1e6;

inline void check_temperature(const char* name, double value) {
  check_number(name, value, kLeastTemperature, kMostTemperature);
}

inline void check_rule(const LabelRule& rule) {
  constexpr double kMost = 1e30;
  check_number("rule.positive", rule.positive, 0.0, kMost);
  check_number("rule.mean", rule.mean, 0.0, kMost);
  check_number("rule.confident_mean", rule.confident_mean, 0.0, kMost);
  check_number("rule.neighbor", rule.neighbor, 0.0, kMost);
  check_number("rule.confident_neighbor", rule.confident_neighbor, 0.0, kMost);
  check_count("rule.teacher_positive", static_cast<std::int64_t>(rule.teacher_positive), 0, 2);
}

inline constexpr std::int64_t kMostThreads = 4096;

/// The largest sizes that a backend takes.
struct Limits {
  std::int64_t rows = std::int64_t{1} << 48;
  std::int64_t dim = std::int64_t{1} << 48;
  std::int64_t neighbors = std::int64_t{1} << 48;
};

inline void check_call(const Call& call, const Limits& limits) {
  check_count("num_queries", call.num_queries, 1, limits.rows);
  check_count("queue_size", call.queue_size, 1, limits.rows);
  check_count("dim", call.dim, 1, limits.dim);
  check_type("vector_type", call.vector_type);
  check_type("queue_type", call.queue_type);
  const std::int64_t others = call.queue_size - (call.excluded != nullptr ? 1 : 0);
  const std::int64_t n = call.rule.num_neighbors;
  check_count("rule.num_neighbors", n, 0, std::min(others, limits.neighbors));
  check_temperature("temperature", call.temperature);
  check_pointer("query", call.query);
  check_pointer("queue", call.queue);
  if (call.key == nullptr) {
    if (call.loss != nullptr) check_pointer("key", call.key);
    if (n > 0) check_pointer("neighbor_logits", call.neighbor_logits);
    if (n > 0) check_pointer("neighbor_indices", call.neighbor_indices);
    return;
  }
  check_rule(call.rule);
  check_temperature("teacher_temperature", call.teacher_temperature);
  check_pointer("loss", call.loss);
}

}  // namespace softcl

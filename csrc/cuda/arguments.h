// Checks of the arguments, and what both operators make of them.

#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "launch.h"
#include "plan.h"
#include "select.h"
#include "softcl/cuda.h"

namespace softcl::cuda {

inline constexpr double kLog2E = 1.44269504088896340736;

// 2^x of unit rows stays in fp32's range for |x| <= log2(e) / temperature <= 63.
inline constexpr double kColdestWithoutMaximum = 0.023;

template <typename Value>
[[noreturn]] void refuse(const char* name, Value value, const std::string& rule) {
  throw std::invalid_argument(std::string(name) + "=" + std::to_string(value) + ", must be " +
                              rule);
}

inline void check_count(const char* name, std::int64_t value, std::int64_t least,
                        std::int64_t most) {
  if (value < least || value > most) {
    refuse(name, value, "in [" + std::to_string(least) + ", " + std::to_string(most) + "]");
  }
}

inline void check_temperature(const char* name, double value) {
  if (!(value > 0.0 && value < 1e30)) refuse(name, value, "positive and finite");
}

inline void check_pointer(const char* name, const void* pointer) {
  if (pointer == nullptr) throw std::invalid_argument(std::string(name) + " is a null pointer");
}

inline void check_type(const char* name, ElementType type) {
  const auto value = static_cast<std::int32_t>(type);
  if (value < 0 || value > 2) refuse(name, value, "0 (float32), 1 (bfloat16) or 2 (float16)");
}

inline void check_types(ElementType vector_type, ElementType queue_type) {
  check_type("vector_type", vector_type);
  check_type("queue_type", queue_type);
}

inline constexpr std::int64_t kMostRows = std::int64_t(1) << 30;

inline void check_launch(const Launch& launch, std::int64_t workspace_bytes) {
  check_pointer("workspace", launch.workspace);
  if (launch.workspace_bytes < workspace_bytes) {
    refuse("workspace_bytes", launch.workspace_bytes,
           "at least " + std::to_string(workspace_bytes));
  }
}

inline bool is_aligned(const void* pointer, int dim) {
  return dim % 8 == 0 && reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
}

/// What follows from the plan alone. rows, scale and the flags are the operator's to fill in.
inline StreamParams stream_params(const Work& work, const Plan& plan, void* workspace) {
  auto* bytes = static_cast<char*>(workspace);
  StreamParams p = {};
  p.sums = reinterpret_cast<float*>(bytes + plan.sums);
  p.means = reinterpret_cast<float*>(bytes + plan.means);
  p.maxima = work.num_neighbors > 0 ? reinterpret_cast<float*>(bytes + plan.maxima) : nullptr;
  p.ranks = work.ranks ? reinterpret_cast<std::int32_t*>(bytes + plan.ranks) : nullptr;
  p.has_maxima = p.maxima != nullptr;
  p.has_ranks = p.ranks != nullptr;
  p.num_rows = work.num_rows;
  p.queue_size = work.queue_size;
  p.num_chunks = plan.num_chunks;
  p.num_sum_rows = plan.num_sum_rows;
  p.num_mean_rows = plan.num_mean_rows;
  p.dim = work.dim;
  p.num_tiles = plan.num_tiles;
  p.tiles_per_split = plan.tiles_per_split;
  p.steps_per_chunk = plan.steps_per_chunk;
  return p;
}

/// fp16 weights always are relative to a running maximum: those of rows in two parts, and the
/// Hopper kernel's of fp16 rows.
inline bool always_has_maximum(const Work& work) {
  return work.kernel_type == ElementType::kFloat32 ||
         (work.hopper && work.kernel_type == ElementType::kFloat16);
}

/// The streaming kernel that the plan is for.
inline void launch_planned_stream(const StreamParams& params, const Work& work, const Plan& plan,
                                  void* stream) {
  (work.hopper ? launch_stream_hopper : launch_stream)(params, work.pairing, work.mean_rows,
                                                       plan.row_blocks, plan.splits, stream);
}

}  // namespace softcl::cuda

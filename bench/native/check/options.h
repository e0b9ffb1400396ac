// What the command line of softcl_cuda_check says.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>

namespace softcl::check {

inline constexpr const char* kHelp =
    "softcl_cuda_check: the CUDA kernels against double precision on the host, then their times.\n"
    "  --rows N --queue K --dim D   one shape in place of several small ones\n"
    "  --neighbors n                of the rules that have any (5)\n"
    "  --seed S  --device I         of the inputs (0); which device (0)\n"
    "  --tolerance F                multiplies all tolerances (1)\n"
    "  --time  --repeat R           times every rule, R calls between two events (20), beside the\n"
    "                               rate of tensor cores that do nothing else, measured there\n"
    "Status: 0 all within tolerances, 1 not all, 2 an unusable argument, 77 no CUDA device.\n";

struct Options {
  std::int64_t rows = 0, queue = 0, dim = 0, neighbors = 5;  // without shapes: small ones
  std::uint64_t seed = 0;
  int device = 0;
  int repeat = 20;
  double tolerance = 1.0;  // factor of all tolerances
  bool time = false;
  bool help = false;
};

/// Throws std::invalid_argument with the word that is wrong.
inline Options parse(int count, char** words) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    if (word == "--time" || word == "--help") {
      (word == "--time" ? options.time : options.help) = true;
      continue;
    }
    const std::map<std::string, std::int64_t*> numbers = {{"--rows", &options.rows},
                                                          {"--queue", &options.queue},
                                                          {"--dim", &options.dim},
                                                          {"--neighbors", &options.neighbors}};
    char* end = nullptr;
    const double value = i + 1 < count ? std::strtod(words[i + 1], &end) : -1.0;
    if (end == nullptr || end == words[i + 1] || *end != 0 || value < 0) {
      throw std::invalid_argument(word + " needs a number after it");
    }
    ++i;
    if (numbers.count(word) > 0) {
      *numbers.at(word) = static_cast<std::int64_t>(value);
    } else if (word == "--seed") {
      options.seed = static_cast<std::uint64_t>(value);
    } else if (word == "--device") {
      options.device = static_cast<int>(value);
    } else if (word == "--repeat") {
      options.repeat = std::max(1, static_cast<int>(value));
    } else if (word == "--tolerance") {
      options.tolerance = value;
    } else {
      throw std::invalid_argument(word +
                                  " is not an option: --rows --queue --dim --neighbors "
                                  "--seed --device --repeat --tolerance (numbers) --time --help");
    }
  }
  if ((options.rows > 0) != (options.queue > 0) || (options.rows > 0) != (options.dim > 0)) {
    throw std::invalid_argument("--rows, --queue and --dim come together");
  }
  return options;
}

}  // namespace softcl::check

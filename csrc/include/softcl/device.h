// What CUDA devices there are. Answers without a driver too: there are none, and why.
//
// Every function starts the driver, and in a process that is forked after that CUDA does not work:
// ask only where something is on a device already.

#pragma once

#include <string>

namespace softcl::cuda {

struct Device {
  std::string name;
  int major;  // compute capability major.minor
  int minor;
  int multiprocessors;
};

/// Number of usable devices; 0, not an error, where there is no driver, an old one, or no device.
int device_count();

/// Why device_count() is 0, in CUDA's words; empty when there are devices.
std::string no_device_reason();

/// Throws std::invalid_argument if `index` is not in [0, device_count()).
Device device(int index);

}  // namespace softcl::cuda

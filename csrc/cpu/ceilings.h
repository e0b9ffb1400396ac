// What this machine can do at most of the arithmetic that the operator consists of. For bench/.

#pragma once

namespace softcl::cpu {

struct Ceilings {
  double multiply_adds = 0.0;  // fp32, per second, of all threads together
  double exponentials = 0.0;   // exp2, per second, of all threads together
};

/// The best of several short runs of each, about `seconds` in all, with the instructions in use.
Ceilings measure_ceilings(int num_threads, double seconds);

}  // namespace softcl::cpu

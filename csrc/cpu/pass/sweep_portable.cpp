// The sweep in the compiler's portable vectors: SSE2 on x86-64, NEON on aarch64.

#include <cstdint>
#include <cstring>

#include "convert.h"
#include "pass/sweep.h"
#include "search/neighbors.h"

#define SOFTCL_ISA portable
#define SOFTCL_VECTOR_WIDTH 4
#if defined(__aarch64__)
  #define SOFTCL_VECTORS 4  // 24 of NEON's 32 registers accumulate
#else
  #define SOFTCL_VECTORS 2  // 12 of SSE's 16
#endif
#define SOFTCL_ROWS 6
#include "pass/sweep_kernel.h"

namespace softcl::cpu {

const SweepKernels kPortableKernels = {"portable", portable::kLanes, portable::sweep,
                                       portable::combine, portable::similarities};

}  // namespace softcl::cpu

// The sweep for AVX-512F: 12 x 32, 24 of 32 registers accumulate. Compiled with -mavx512f -mfma.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "convert.h"
#include "pass/sweep.h"
#include "search/neighbors.h"

#define SOFTCL_ISA avx512
#define SOFTCL_VECTOR_WIDTH 16
#define SOFTCL_VECTORS 2
#define SOFTCL_ROWS 12
#include "pass/sweep_kernel.h"

namespace softcl::cpu {

const SweepKernels kAvx512Kernels = {"avx512", avx512::kLanes, avx512::sweep, avx512::combine,
                                     avx512::similarities};

}  // namespace softcl::cpu

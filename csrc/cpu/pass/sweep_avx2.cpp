// The sweep for AVX2 and FMA: 6 x 16, 12 of 16 registers accumulate. Compiled with -mavx2 -mfma.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "convert.h"
#include "pass/sweep.h"
#include "search/neighbors.h"

#define SOFTCL_ISA avx2
#define SOFTCL_VECTOR_WIDTH 8
#define SOFTCL_VECTORS 2
#define SOFTCL_ROWS 6
#include "pass/sweep_kernel.h"

namespace softcl::cpu {

const SweepKernels kAvx2Kernels = {"avx2", avx2::kLanes, avx2::sweep, avx2::combine,
                                   avx2::similarities};

}  // namespace softcl::cpu

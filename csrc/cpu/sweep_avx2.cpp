// The sweep for AVX2 and FMA: 6 x 16, 12 of 16 registers accumulate. Compiled with -mavx2 -mfma.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "convert.h"
#include "neighbors.h"
#include "sweep.h"

#define SOFTCL_ISA avx2
#define SOFTCL_VECTOR_WIDTH 8
#define SOFTCL_VECTORS 2
#define SOFTCL_ROWS 6
#include "sweep_kernel.h"
// After it: the same macros.
#include "ceiling_kernel.h"

namespace softcl::cpu {

const SweepKernels kAvx2Kernels = {"avx2",
                                   avx2::kLanes,
                                   avx2::sweep,
                                   avx2::combine,
                                   avx2::similarities,
                                   avx2::multiply_add,
                                   avx2::exponentials};

}  // namespace softcl::cpu

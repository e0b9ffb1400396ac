// The screen for AVX-512 with VNNI: 12 x 32. Compiled with -mavx512f -mavx512vnni -mfma.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "convert.h"
#include "search/screen.h"

#define SOFTCL_ISA screen_avx512
#define SOFTCL_VECTOR_WIDTH 16
#define SOFTCL_VECTORS 2
#define SOFTCL_ROWS 12
#include "search/screen_kernel.h"

namespace softcl::cpu {

const ScreenKernels kAvx512Screen = {screen_avx512::kLanes, screen_avx512::fix_strip,
                                     screen_avx512::screen, screen_avx512::compare};

}  // namespace softcl::cpu

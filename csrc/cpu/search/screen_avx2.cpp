// The screen for AVX2: 6 x 16. Compiled with -mavx2 -mfma.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "convert.h"
#include "search/screen.h"

#define SOFTCL_ISA screen_avx2
#define SOFTCL_VECTOR_WIDTH 8
#define SOFTCL_VECTORS 2
#define SOFTCL_ROWS 6
#include "search/screen_kernel.h"

namespace softcl::cpu {

const ScreenKernels kAvx2Screen = {screen_avx2::kLanes, screen_avx2::fix_strip, screen_avx2::screen,
                                   screen_avx2::compare};

}  // namespace softcl::cpu

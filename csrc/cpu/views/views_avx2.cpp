// A sample's view for AVX2 and FMA. Compiled with -mavx2 -mfma.

#include <immintrin.h>

#include <cstdint>

#include "views/views.h"

#define SOFTCL_ISA views_avx2
#define SOFTCL_VECTOR_WIDTH 8
#include "views/views_kernel.h"

namespace softcl::cpu {

void avx2_view(const ViewTask& task, const ViewWorkspace& workspace) {
  views_avx2::make_view(task, workspace);
}

}  // namespace softcl::cpu

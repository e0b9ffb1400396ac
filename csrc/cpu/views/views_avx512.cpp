// A sample's view for AVX-512F. Compiled with -mavx512f -mfma.

#include <immintrin.h>

#include <cstdint>

#include "views/views.h"

#define SOFTCL_ISA views_avx512
#define SOFTCL_VECTOR_WIDTH 16
#include "views/views_kernel.h"

namespace softcl::cpu {

void avx512_view(const ViewTask& task, const ViewWorkspace& workspace) {
  views_avx512::make_view(task, workspace);
}

}  // namespace softcl::cpu

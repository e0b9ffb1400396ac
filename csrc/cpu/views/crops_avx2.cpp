// Crops for AVX2. Compiled with -mavx2 -mfma.

#include <immintrin.h>

#include <cstdint>

#include "views/crops.h"

#define SOFTCL_ISA crops_avx2
#define SOFTCL_VECTOR_WIDTH 8
#include "views/crops_kernel.h"

namespace softcl::cpu {

void avx2_crop(const CropTask& task) {
  crops_avx2::make_crop(task);
}

}  // namespace softcl::cpu

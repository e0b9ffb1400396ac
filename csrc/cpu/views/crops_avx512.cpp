// Crops for AVX-512. Compiled with -mavx512f -mavx512bw -mavx512vnni -mfma.

#include <immintrin.h>

#include <cstdint>

#include "views/crops.h"

#define SOFTCL_ISA crops_avx512
#define SOFTCL_VECTOR_WIDTH 16
#include "views/crops_kernel.h"

namespace softcl::cpu {

void avx512_crop(const CropTask& task) {
  crops_avx512::make_crop(task);
}

}  // namespace softcl::cpu

// Crops in the compiler's portable vectors: SSE2 on x86-64, NEON on aarch64.

#include <cstdint>

#include "views/crops.h"

#define SOFTCL_ISA crops_portable
#define SOFTCL_VECTOR_WIDTH 4
#include "views/crops_kernel.h"

namespace softcl::cpu {

void portable_crop(const CropTask& task) {
  crops_portable::make_crop(task);
}

}  // namespace softcl::cpu

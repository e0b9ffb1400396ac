// A sample's view in the compiler's portable vectors: SSE2 on x86-64, NEON on aarch64.

#include <cstdint>

#include "views/views.h"

#define SOFTCL_ISA views_portable
#define SOFTCL_VECTOR_WIDTH 4
#include "views/views_kernel.h"

namespace softcl::cpu {

void portable_view(const ViewTask& task, const ViewWorkspace& workspace) {
  views_portable::make_view(task, workspace);
}

}  // namespace softcl::cpu

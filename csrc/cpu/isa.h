// Which instruction set the kernels run on: the best one here, or the one SOFTCL_CPU_ISA names.

#pragma once

#include <string>
#include <vector>

#include "pass/sweep.h"
#include "search/screen.h"
#include "views/crops.h"
#include "views/views.h"

namespace softcl::cpu {

/// The kernels in use. SOFTCL_CPU_ISA ("portable", "avx2", "avx512") is read at the first call;
/// throws std::invalid_argument, at every call, if it names none or one that this processor lacks.
const SweepKernels& sweep_kernels();

/// The screen that goes with them; null where there is none.
const ScreenKernels* screen_kernels();

/// The kernel of the views that goes with them.
ViewKernel view_kernel();

/// The kernel of the crops that goes with them; AVX2's where AVX-512 lacks what it needs.
CropKernel crop_kernel();

/// Names of the instruction sets that run here, best first.
std::vector<std::string> available_isas();

}  // namespace softcl::cpu

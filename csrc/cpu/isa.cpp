#include "isa.h"

#include <cstdlib>
#include <stdexcept>

namespace softcl::cpu {

namespace {

std::vector<const SweepKernels*> available_kernels() {
  std::vector<const SweepKernels*> kernels;
#if defined(SOFTCL_X86)
  // __builtin_cpu_supports also asks whether the operating system saves the registers.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) kernels.push_back(&kAvx512Kernels);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    kernels.push_back(&kAvx2Kernels);
  }
#endif
  kernels.push_back(&kPortableKernels);
  return kernels;
}

// Null if the environment names an instruction set that is not here.
const SweepKernels* chosen_kernels() {
  const std::vector<const SweepKernels*> kernels = available_kernels();
  const char* wanted = std::getenv("SOFTCL_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return kernels.front();
  for (const SweepKernels* candidate : kernels) {
    if (std::string(candidate->name) == wanted) return candidate;
  }
  return nullptr;
}

}  // namespace

const SweepKernels& sweep_kernels() {
  static const SweepKernels* const chosen = chosen_kernels();
  if (chosen != nullptr) return *chosen;
  std::string names;
  for (const std::string& name : available_isas()) names += (names.empty() ? "" : ", ") + name;
  const char* wanted = std::getenv("SOFTCL_CPU_ISA");
  throw std::invalid_argument(std::string("SOFTCL_CPU_ISA=") + (wanted == nullptr ? "" : wanted) +
                              ", must be one of those available here: " + names);
}

const ScreenKernels* screen_kernels() {
#if defined(SOFTCL_X86)
  const SweepKernels* kernels = &sweep_kernels();
  if (kernels == &kAvx512Kernels && __builtin_cpu_supports("avx512vnni")) return &kAvx512Screen;
  // A processor with AVX-512 has AVX2.
  if (kernels != &kPortableKernels) return &kAvx2Screen;
#endif
  return nullptr;
}

ViewKernel view_kernel() {
#if defined(SOFTCL_X86)
  const SweepKernels* kernels = &sweep_kernels();
  if (kernels == &kAvx512Kernels) return &avx512_view;
  if (kernels == &kAvx2Kernels) return &avx2_view;
#else
  sweep_kernels();  // throws where the environment names what is not here
#endif
  return &portable_view;
}

CropKernel crop_kernel() {
  const SweepKernels* kernels = &sweep_kernels();  // throws where the environment asks too much
#if defined(SOFTCL_X86)
  if (kernels == &kAvx512Kernels && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vnni")) {
    return &avx512_crop;
  }
  if (kernels != &kPortableKernels) return &avx2_crop;
#endif
  (void)kernels;
  return &portable_crop;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const SweepKernels* kernels : available_kernels()) names.emplace_back(kernels->name);
  return names;
}

}  // namespace softcl::cpu

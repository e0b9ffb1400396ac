// Loops that do nothing but the sweep's two kinds of arithmetic, as fast as the processor can, for
// the floors of bench/. Included like sweep_kernel.h, after it.

namespace softcl::cpu {

namespace SOFTCL_ISA {

namespace {

constexpr std::int64_t kCeilingFloats = 2048;  // 8 KB, in L1

// FMAs in registers, in as many independent chains as the micro-kernel has. Returns their number.
std::int64_t multiply_add(std::int64_t repeats, float* result) {
  Vector sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sum[r][v] = broadcast(float(r + v));
  }
  Vector factor = broadcast(*result), term = broadcast(1.0f - *result);
  for (std::int64_t i = 0; i < repeats; ++i) {
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) sum[r][v] = sum[r][v] * factor + term;
    }
  }
  Vector total = {};
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) total += sum[r][v];
  }
  *result = total[0];
  return repeats * kRows * kLanes;
}

// exp2 of an array in L1, scaled, read and written back as between the two products: x becomes
// 2^(-(x + 1) / 2), which stays below 1. Returns their number.
std::int64_t exponentials(std::int64_t repeats, float* array) {
  for (std::int64_t i = 0; i < repeats; ++i) {
    for (std::int64_t x = 0; x < kCeilingFloats; x += kWidth) {
      store(array + x, exp2(load(array + x) * -0.5f - 0.5f));
    }
    asm volatile("" ::: "memory");
  }
  return repeats * kCeilingFloats;
}

}  // namespace

}  // namespace SOFTCL_ISA

}  // namespace softcl::cpu

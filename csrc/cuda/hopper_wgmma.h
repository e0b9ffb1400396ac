// wgmma.mma_async with fp32 sums, for the shapes that the kernels take. See hopper_ptx.h.
//
// The operand lists are long and nothing else: N / 2 accumulators a thread, then the operands.

#pragma once

#include <cstdint>

#include "elements.h"
#include "ptx.h"

#define SOFTCL_REGISTERS_32                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "           \
  "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"

#define SOFTCL_REGISTERS_64                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "           \
  "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, " \
  "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, " \
  "%60, %61, %62, %63"

#define SOFTCL_REGISTERS_128                                                 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "                       \
  "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "             \
  "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "             \
  "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "             \
  "%60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, "             \
  "%72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, "             \
  "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, "     \
  "%108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, " \
  "%120, %121, %122, %123, %124, %125, %126, %127"

#define SOFTCL_EIGHT(c, n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define SOFTCL_EIGHTS_8(c, n)                                                                 \
  SOFTCL_EIGHT(c, n), SOFTCL_EIGHT(c, n + 1), SOFTCL_EIGHT(c, n + 2), SOFTCL_EIGHT(c, n + 3), \
      SOFTCL_EIGHT(c, n + 4), SOFTCL_EIGHT(c, n + 5), SOFTCL_EIGHT(c, n + 6),                 \
      SOFTCL_EIGHT(c, n + 7)
#define SOFTCL_EIGHTS_16(c, n) SOFTCL_EIGHTS_8(c, n), SOFTCL_EIGHTS_8(c, n + 8)
#define SOFTCL_EIGHTS_32(c, n) SOFTCL_EIGHTS_16(c, n), SOFTCL_EIGHTS_16(c, n + 16)

// A from shared memory, B with its rows as N; not `add`: the sums start at 0.
#define SOFTCL_DEFINE_WGMMA_ROWS(type, ptx_type, n, eights, count, a, b, add)                \
  template <>                                                                                \
  struct WgmmaRows<type, n> {                                                                \
    static SOFTCL_DEVICE void run(float (&c)[eights][4], std::uint64_t x, std::uint64_t y,   \
                                  bool adds) {                                               \
      asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, %" #add                           \
                   ", 0;\n"                                                                  \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." ptx_type "." ptx_type   \
                   " {" SOFTCL_REGISTERS_##count "}, %" #a ", %" #b ", adds, 1, 1, 0, 0;\n}" \
                   : SOFTCL_EIGHTS_##eights(c, 0)                                            \
                   : "l"(x), "l"(y), "r"(static_cast<int>(adds)));                           \
    }                                                                                        \
  }

// A from registers, B with its columns as N.
#define SOFTCL_DEFINE_WGMMA_COLUMNS(type, ptx_type, n, eights, count, a0, a1, a2, a3, b, add) \
  template <>                                                                                 \
  struct WgmmaColumns<type, n> {                                                              \
    static SOFTCL_DEVICE void run(float (&c)[eights][4], const Vector& a, std::uint64_t y,    \
                                  bool adds) {                                                \
      asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, %" #add                            \
                   ", 0;\n"                                                                   \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." ptx_type "." ptx_type    \
                   " {" SOFTCL_REGISTERS_##count "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3    \
                                                 "}, %" #b ", adds, 1, 1, 1;\n}"              \
                   : SOFTCL_EIGHTS_##eights(c, 0)                                             \
                   : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "l"(y),              \
                     "r"(static_cast<int>(adds)));                                            \
    }                                                                                         \
  }

namespace softcl::cuda::ptx {

template <typename T, int kColumns>
struct WgmmaRows;
template <typename T, int kColumns>
struct WgmmaColumns;

SOFTCL_DEFINE_WGMMA_ROWS(BFloat16, "bf16", 64, 8, 32, 32, 33, 34);
SOFTCL_DEFINE_WGMMA_ROWS(BFloat16, "bf16", 128, 16, 64, 64, 65, 66);
SOFTCL_DEFINE_WGMMA_COLUMNS(BFloat16, "bf16", 64, 8, 32, 32, 33, 34, 35, 36, 37);
SOFTCL_DEFINE_WGMMA_COLUMNS(BFloat16, "bf16", 128, 16, 64, 64, 65, 66, 67, 68, 69);
SOFTCL_DEFINE_WGMMA_COLUMNS(BFloat16, "bf16", 256, 32, 128, 128, 129, 130, 131, 132, 133);
SOFTCL_DEFINE_WGMMA_ROWS(Float16, "f16", 64, 8, 32, 32, 33, 34);
SOFTCL_DEFINE_WGMMA_ROWS(Float16, "f16", 128, 16, 64, 64, 65, 66);
SOFTCL_DEFINE_WGMMA_COLUMNS(Float16, "f16", 64, 8, 32, 32, 33, 34, 35, 36, 37);
SOFTCL_DEFINE_WGMMA_COLUMNS(Float16, "f16", 128, 16, 64, 64, 65, 66, 67, 68, 69);
SOFTCL_DEFINE_WGMMA_COLUMNS(Float16, "f16", 256, 32, 128, 128, 129, 130, 131, 132, 133);

/// Starts C(64, N) = A B + (add ? C : 0): 16 columns of 64 rows, 16 columns of N rows, both of T in
/// shared memory, named by row_descriptor.
template <typename T, int kEights>
SOFTCL_DEVICE void wgmma_rows(float (&c)[kEights][4], std::uint64_t a, std::uint64_t b, bool add) {
  WgmmaRows<T, 8 * kEights>::run(c, a, b, add);
}

/// Starts C(64, N) = A B + (add ? C : 0): A (64, 16) of T in registers, B 16 rows of N columns in
/// shared memory, named by column_descriptor.
template <typename T, int kEights>
SOFTCL_DEVICE void wgmma_columns(float (&c)[kEights][4], const Vector& a, std::uint64_t b,
                                 bool add) {
  WgmmaColumns<T, 8 * kEights>::run(c, a, b, add);
}

}  // namespace softcl::cuda::ptx

#undef SOFTCL_DEFINE_WGMMA_ROWS
#undef SOFTCL_DEFINE_WGMMA_COLUMNS
#undef SOFTCL_EIGHTS_32
#undef SOFTCL_EIGHTS_16
#undef SOFTCL_EIGHTS_8
#undef SOFTCL_EIGHT
#undef SOFTCL_REGISTERS_128
#undef SOFTCL_REGISTERS_64
#undef SOFTCL_REGISTERS_32

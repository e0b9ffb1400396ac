// The instructions of csrc/cuda/hopper_ptx.h as functions of a host compiler. What they do together
// is in warpgroup.h.

#pragma once

#include <cstdint>

#include "warpgroup.h"

#define SOFTCL_GRID_CONSTANT

namespace softcl::cuda {

using TensorMap = host::TensorMap;

}  // namespace softcl::cuda

namespace softcl::cuda::ptx {

inline int uniform(int x) {
  return x;
}

inline std::uint32_t opaque(std::uint32_t x) {
  return x;
}

inline Vector load_shared_here(std::uint32_t address) {
  return load_shared<Vector>(address);
}

inline std::uint32_t tile_memory() {
  return 0;
}

template <int kRegisters>
void decrease_registers() {
  host::set_registers(kRegisters, false);
}

template <int kRegisters>
void increase_registers() {
  host::set_registers(kRegisters, true);
}

// ---- Barriers
// ------------------------------------------------------------------------------------

inline void mbarrier_init(std::uint32_t barrier, int count) {
  host::mbarrier_init(barrier, count);
}

inline void mbarrier_arrive(std::uint32_t barrier, const char* file = __builtin_FILE(),
                            int line = __builtin_LINE()) {
  host::mbarrier_arrive({file, line}, barrier, 0);
}

inline void mbarrier_expect(std::uint32_t barrier, int bytes, const char* file = __builtin_FILE(),
                            int line = __builtin_LINE()) {
  host::mbarrier_arrive({file, line}, barrier, bytes);
}

inline void mbarrier_wait(const char*, std::uint32_t barrier, int parity,
                          const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host::mbarrier_wait({file, line}, barrier, parity);
}

inline void fence_async_proxy(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host::fence_async_proxy({file, line});
}

inline void named_barrier_sync(int id, int count, const char* file = __builtin_FILE(),
                               int line = __builtin_LINE()) {
  host::named_barrier({file, line}, id, count, true);
}

inline void named_barrier_arrive(int id, int count, const char* file = __builtin_FILE(),
                                 int line = __builtin_LINE()) {
  host::named_barrier({file, line}, id, count, false);
}

// ---- Copies and products
// -------------------------------------------------------------------------

inline void tma_load(std::uint32_t target, const TensorMap* map, int column, int row,
                     std::uint32_t barrier) {
  host::copy_box(target, map, column, row, barrier);
}

inline void wgmma_fence(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host::fence_products({file, line});
}

inline void wgmma_commit(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host::commit_products({file, line});
}

template <int kPending>
void wgmma_wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host::wait_for_products({file, line}, kPending);
}

template <int kEights>
void settle(float (&c)[kEights][4], const char* file = __builtin_FILE(),
            int line = __builtin_LINE()) {
  host::settle({file, line}, &c[0][0]);
}

template <int kCount>
void settle(Vector (&)[kCount]) {}

inline float float_of_fp16_bits(std::uint16_t bits) {
  return float_of_fp16(bits);
}

template <typename T>
inline constexpr auto to_float_of = float_of_bf16;
template <>
inline constexpr auto to_float_of<Float16> = float_of_fp16_bits;

template <typename T, int kEights>
void wgmma_rows(float (&c)[kEights][4], std::uint64_t a, std::uint64_t b, bool add) {
  host::start_product({&c[0][0], 8 * kEights, nullptr, a, b, false, add, to_float_of<T>});
}

template <typename T, int kEights>
void wgmma_columns(float (&c)[kEights][4], const Vector& a, std::uint64_t b, bool add) {
  host::start_product({&c[0][0], 8 * kEights, a.x, 0, b, true, add, to_float_of<T>});
}

}  // namespace softcl::cuda::ptx

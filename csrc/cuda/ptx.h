// Every instruction of the kernels that C++ has no word for, by name. Kernels write no assembly.
//
// Compiled by nvcc these are the instructions; compiled by a host compiler they are the functions
// of tests/native/cuda/emulated_ptx.h, written from the PTX ISA, so that the same kernels run on
// a CPU, thread by thread.
//
// Shared memory is addressed by 32-bit numbers and never by pointers, in both.

#pragma once

#if !defined(__CUDACC__)

  #include "emulated_ptx.h"

#else

  #include <cuda_runtime.h>

  #include <cstdint>

  #define SOFTCL_DEVICE __device__ __forceinline__
  #define SOFTCL_UNROLL _Pragma("unroll")
  #define SOFTCL_UNROLL_BY_4 _Pragma("unroll 4")
  #define SOFTCL_PRAGMA(text) _Pragma(#text)
  #define SOFTCL_UNROLL_BY(constant) SOFTCL_PRAGMA(unroll constant)
  #define SOFTCL_NO_UNROLL _Pragma("unroll 1")

namespace softcl::cuda::ptx {

struct alignas(16) Vector {
  std::uint32_t x[4];
};

// ---- Threads -----------------------------------------------------------------------------------

SOFTCL_DEVICE void sync_threads() {
  __syncthreads();
}

/// The lanes of the warp wait for each other, and see what each has written or is yet to overwrite.
SOFTCL_DEVICE void sync_warp() {
  __syncwarp();
}

/// Loads from shared memory do not move across. For ptxas, which otherwise starts so many early
/// that it runs out of registers.
SOFTCL_DEVICE void keep_order() {
  __syncwarp();
}

template <typename T>
SOFTCL_DEVICE T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}

/// x of the lane `delta` below this one; its own in the first `delta` lanes.
template <typename T>
SOFTCL_DEVICE T shuffle_up(T x, int delta) {
  return __shfl_up_sync(0xffffffffu, x, delta);
}

/// Waits until the grid before this one on the stream has ended and what it wrote is seen, if this
/// one was launched early (launch.h); otherwise that was so from the start. Asked by every thread,
/// before all else.
SOFTCL_DEVICE void wait_for_previous_grid() {
  #if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900  // kFirstWaitingVersion of launch.h
  asm volatile("griddepcontrol.wait;" ::: "memory");
  #endif
}

// ---- Shared memory -----------------------------------------------------------------------------

/// Where the block's dynamic shared memory begins: a multiple of 128.
SOFTCL_DEVICE std::uint32_t shared_memory() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(dynamic_shared_memory));
}

template <typename T>
SOFTCL_DEVICE T load_shared(std::uint32_t address) {
  return *static_cast<const T*>(__cvta_shared_to_generic(address));
}

template <typename T>
SOFTCL_DEVICE void store_shared(std::uint32_t address, T value) {
  *static_cast<T*>(__cvta_shared_to_generic(address)) = value;
}

/// Adds to an integer in shared memory and returns what it was.
SOFTCL_DEVICE std::uint32_t atomic_add_shared(std::uint32_t address, std::uint32_t value) {
  return atomicAdd(static_cast<unsigned*>(__cvta_shared_to_generic(address)), value);
}

SOFTCL_DEVICE void atomic_add(std::int64_t* counter, std::int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(counter), static_cast<unsigned long long>(value));
}

// ---- Global memory that kernels write -----------------------------------------------------------
// Plain accesses; on the host they are watched as those of shared memory are. All results and all
// of the workspace pass through here; what no kernel writes, its inputs, is read without.

template <typename T>
SOFTCL_DEVICE T load_global(const T* address) {
  return *address;
}

template <typename T>
SOFTCL_DEVICE void store_global(T* address, T value) {
  *address = value;
}

/// Starts copying `bytes` (0 to 16) from global to shared memory and zeroing the rest of the 16.
/// Both addresses are multiples of 16, also where nothing is read.
SOFTCL_DEVICE void cp_async(std::uint32_t target, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target),
               "l"(__cvta_generic_to_global(source)), "r"(bytes)
               : "memory");
}

/// Closes the group of this thread's copies since the last one.
SOFTCL_DEVICE void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

/// Waits until at most kPending of this thread's groups, the latest, are under way.
template <int kPending>
SOFTCL_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- Matrices of 16-bit numbers
// ------------------------------------------------------------------
//
// With g = lane / 4 and t = lane % 4 a thread holds of
//     A (16, 16)   x[0], x[1]: columns 2t, 2t+1 of rows g, g+8      x[2], x[3]: columns 2t+8, 2t+9
//     B (16, 8)    b0: rows 2t, 2t+1 of column g                    b1: rows 2t+8, 2t+9
//     C (16, 8)    c[0], c[1]: columns 2t, 2t+1 of row g            c[2], c[3]: of row g+8

/// Four 8x8 matrices; lane i gives the address of row i % 8 of matrix i / 8 (16 bytes).
/// x[m] is elements 2t, 2t+1 of row g of matrix m.
SOFTCL_DEVICE Vector ldmatrix(std::uint32_t address) {
  Vector v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x[0]), "=r"(v.x[1]), "=r"(v.x[2]), "=r"(v.x[3])
               : "r"(address)
               : "memory");
  return v;
}

/// The same, transposed: x[m] is rows 2t, 2t+1 of column g of matrix m.
SOFTCL_DEVICE Vector ldmatrix_transposed(std::uint32_t address) {
  Vector v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x[0]), "=r"(v.x[1]), "=r"(v.x[2]), "=r"(v.x[3])
               : "r"(address)
               : "memory");
  return v;
}

/// C += A B with fp32 sums.
SOFTCL_DEVICE void mma_bf16(float (&c)[4], const Vector& a, std::uint32_t b0, std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b0), "r"(b1));
}

SOFTCL_DEVICE void mma_fp16(float (&c)[4], const Vector& a, std::uint32_t b0, std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b0), "r"(b1));
}

// ---- Numbers
// -------------------------------------------------------------------------------------

/// 2^x within 2^-22 of itself; results below 2^-126 are 0.
SOFTCL_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

SOFTCL_DEVICE std::uint32_t bits_of(float x) {
  return __float_as_uint(x);
}

SOFTCL_DEVICE float float_of(std::uint32_t bits) {
  return __uint_as_float(bits);
}

/// Two bf16 in one register, `low` in the lower half; both rounded to nearest, ties to even.
SOFTCL_DEVICE std::uint32_t pack_bf16(float low, float high) {
  std::uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

/// Two fp16 in one register, likewise.
SOFTCL_DEVICE std::uint32_t pack_fp16(float low, float high) {
  std::uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

SOFTCL_DEVICE float float_of_fp16(std::uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

SOFTCL_DEVICE std::uint16_t fp16_of(float x) {
  std::uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

}  // namespace softcl::cuda::ptx

#endif

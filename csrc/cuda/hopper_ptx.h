// The instructions of ptx.h's kind that only sm_90a has: barriers with phases, tile copies,
// products of whole warpgroups. Compiled by a host compiler they are the functions of
// tests/native/cuda/emulated_hopper_ptx.h.
//
// A kernel that uses them has a body only where SOFTCL_HAS_WARPGROUPS is defined: not in the code
// for other devices.

#pragma once

#include "elements.h"
#include "hopper_layout.h"
#include "ptx.h"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  #define SOFTCL_HAS_WARPGROUPS
#endif

#if !defined(__CUDACC__)

  #include "emulated_hopper_ptx.h"

#else

  #include <cuda.h>

  #include <cstdio>

  // A tensor map lies among the kernel's parameters, where the copy engine reads it.
  #define SOFTCL_GRID_CONSTANT __grid_constant__

namespace softcl::cuda {

using TensorMap = CUtensorMap;

}  // namespace softcl::cuda

  #if defined(SOFTCL_HAS_WARPGROUPS)

    #include "hopper_wgmma.h"

namespace softcl::cuda::ptx {

/// x, alike in all lanes, where the compiler can tell that it is.
SOFTCL_DEVICE int uniform(int x) {
  return __shfl_sync(0xffffffffu, x, 0);
}

/// x, of which the compiler knows nothing: what is made of it stays where it is made, and takes no
/// registers in between.
SOFTCL_DEVICE std::uint32_t opaque(std::uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

/// As load_shared, in its place in the program: many of them do not all move to the front, to wait
/// in registers.
SOFTCL_DEVICE Vector load_shared_here(std::uint32_t address) {
  Vector v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x[0]), "=r"(v.x[1]), "=r"(v.x[2]), "=r"(v.x[3])
               : "r"(address)
               : "memory");
  return v;
}

/// As shared_memory(), at a multiple of 1024.
SOFTCL_DEVICE std::uint32_t tile_memory() {
  extern __shared__ __align__(1024) unsigned char dynamic_tile_memory[];
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(dynamic_tile_memory));
}

/// Of the warpgroup's threads: how many registers each has from now on.
template <int kRegisters>
SOFTCL_DEVICE void decrease_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

/// The same; waits until there are so many.
template <int kRegisters>
SOFTCL_DEVICE void increase_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- Barriers
// ------------------------------------------------------------------------------------
//
// A barrier in shared memory (8 bytes) runs through phases 0, 1, 2, ..: one ends when `count`
// arrivals have come and all bytes that were expected have been written.

SOFTCL_DEVICE void mbarrier_init(std::uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

SOFTCL_DEVICE void mbarrier_arrive(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/// Arrives, and makes the phase expect so many bytes more.
SOFTCL_DEVICE void mbarrier_expect(std::uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

    #ifdef SOFTCL_BOUND_WAITS
SOFTCL_DEVICE std::uint64_t nanoseconds() {
  std::uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

static __device__ __noinline__ void give_up(const char* name, int parity) {
  std::printf("softcl: block (%u, %u), thread %u waited 2 s for barrier '%s', parity %d\n",
              blockIdx.x, blockIdx.y, threadIdx.x, name, parity);
  __trap();
}
    #endif

/// Waits until the last phase of this parity has ended, which is the current phase or the one
/// before it. The phase before the first one has parity 1. In a build with SOFTCL_BOUND_WAITS a
/// wait of two seconds names the barrier and ends the kernel.
SOFTCL_DEVICE void mbarrier_wait([[maybe_unused]] const char* name, std::uint32_t barrier,
                                 int parity) {
    #ifdef SOFTCL_BOUND_WAITS
  const std::uint64_t started = nanoseconds();
    #endif
  std::uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    #ifdef SOFTCL_BOUND_WAITS
    if (done == 0 && nanoseconds() - started > 2000000000) give_up(name, parity);
    #endif
  } while (done == 0);
}

/// Orders this thread's accesses to shared memory, and those it knows of, before what the copy
/// engine and warpgroup products access there later.
SOFTCL_DEVICE void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/// Barrier `id` (1 to 15) of `count` threads, this one among them.
SOFTCL_DEVICE void named_barrier_sync(int id, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}

/// Counts at it, and goes on.
SOFTCL_DEVICE void named_barrier_arrive(int id, int count) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(count) : "memory");
}

// ---- Copies
// --------------------------------------------------------------------------------------

/// Starts copying the map's box at (column, row) to `target`, a multiple of 1024; what lies outside
/// is 0. All bytes of the box count at the barrier.
SOFTCL_DEVICE void tma_load(std::uint32_t target, const TensorMap* map, int column, int row,
                            std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(target),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// ---- Products of warpgroups
// ----------------------------------------------------------------------
//
// Asynchronous: between the fence and the end of a wait, accumulators and fragments belong to the
// product. A fence comes first, after the last access to those registers by other instructions;
// products then form groups, and a wait leaves at most kPending groups, the latest, under way.

SOFTCL_DEVICE void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

SOFTCL_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending>
SOFTCL_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// Accumulators whose product is done are read from here on, and no sooner: no instruction, but an
/// order for the compiler, to which they seemed ready at once.
template <int kEights>
SOFTCL_DEVICE void settle(float (&c)[kEights][4]) {
  SOFTCL_UNROLL
  for (int n = 0; n < kEights; ++n) {
    SOFTCL_UNROLL
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(c[n][e])::"memory");
  }
}

/// Fragments of a product are written before here, and no later; the fence comes next.
template <int kCount>
SOFTCL_DEVICE void settle(Vector (&a)[kCount]) {
  SOFTCL_UNROLL
  for (int k = 0; k < kCount; ++k) {
    SOFTCL_UNROLL
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[k].x[i])::"memory");
  }
}

}  // namespace softcl::cuda::ptx

  #endif
#endif

// The hardware that Hopper's asynchronous instructions talk to, on a CPU: barriers with phases, the
// engine that copies tiles, products of warpgroups. Written from the PTX ISA; what it shows:
//
//   - Copies and products take effect late: a tile is NaN from the start of its copy to its
//   arrival,
//     accumulators are NaN from the start of a product until they are waited for and settled.
//   - Every access to shared memory is watched by vector clocks, those of copies and products
//     among them: two that touch a location, one of them writing, are reported unless a chain of
//     barriers leads from the first to the second, whatever the order was.
//   - Between plain accesses and those of copies and products ("Proxies") the chain must hold a
//     fence.proxy.async.
//   - Barriers used before their initialisation is known, with more arrivals than they count, or
//     never reached again; products without a fence, on registers that are in use, or left behind;
//     registers asked for that are not there: all are reported.

#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "block.h"

namespace softcl::cuda::host {

/// A matrix (rows, columns) in memory, and the box that one copy moves.
struct TensorMap {
  const void* base;
  std::int64_t rows;
  std::int64_t columns;
  int element_bytes;  // 2 or 4
  std::int64_t row_bytes;
  int box_rows;
  int box_columns;  // the 128 bytes of the swizzle

  int box_bytes() const { return box_rows * box_columns * element_bytes; }
};

/// run_grid with this hardware.
void run_warpgroups(dim3 grid, int threads, std::size_t shared_bytes,
                    const std::function<void()>& kernel);

void set_registers(int count, bool increase);

void mbarrier_init(std::uint32_t address, int count);
void mbarrier_arrive(Site site, std::uint32_t address, int expected_bytes);
void mbarrier_wait(Site site, std::uint32_t address, int parity);
void named_barrier(Site site, int id, int count, bool waits);
void fence_async_proxy(Site site);

void copy_box(std::uint32_t target, const TensorMap* map, int column, int row,
              std::uint32_t barrier);

/// One thread's part of C(64, columns) = A B + (add ? C : 0).
struct Product {
  float* c;
  int columns;
  const std::uint32_t* fragment;  // of A; null: A lies in shared memory
  std::uint64_t a, b;             // descriptors
  bool transposed;                // B's columns are N
  bool add;
  float (*to_float)(std::uint16_t);
};

void start_product(const Product& product);
void fence_products(Site site);
void commit_products(Site site);
void wait_for_products(Site site, int pending);
void settle(Site site, float* c);

}  // namespace softcl::cuda::host

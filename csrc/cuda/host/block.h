// Runs thread blocks on a CPU: every thread is a fiber, and only what the program synchronises is
// in order. What that shows:
//
//   - Fibers run in an order drawn from a seed, warps far ahead of one another: a missing barrier
//     gives wrong numbers.
//   - Shared memory is NaN before every block, and is watched: two threads that touch a location,
//     one of them writing, with no barrier between them are reported, whatever the order was.
//   - Of global memory, what kernels access through load_global and store_global is watched too, by
//     its first byte: between the threads of a block, and between the blocks of a grid.
//   - Asynchronous copies destroy their target when they are issued and deliver when they are
//     waited for.
//   - Accesses outside shared memory or off their alignment, warps whose lanes part before a
//     collective instruction, blocks whose threads part before a barrier: all are reported.
//
// A site is one place in the source that synchronises; a test can leave one out and see that the
// rest notices.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace softcl::cuda::host {

struct Site {
  const char* file;
  int line;
};

/// How kernels run from now on.
struct Options {
  std::uint64_t seed = 0;
  std::string omit;  // "file:line" of a site that has no effect; empty: none
};
void set_options(const Options& options);

/// "file:line" of every barrier and wait met since the options were set, in order of appearance.
std::vector<std::string> sites();

/// Runs `kernel` in every thread of every block, blocks in an order drawn from the seed. Throws
/// std::runtime_error with the first thing that was reported.
void run_grid(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& kernel);

// ---- For the instructions, within a thread
// -------------------------------------------------------

/// Stops the grid: run_grid throws.
[[noreturn]] void report(const std::string& what);

/// All threads of the block.
void barrier(Site site);

/// All 32 lanes meet; the last one runs `act` with what each of them gave, by lane.
void collect(Site site, void* mine, void (*act)(void* const* lanes));

/// Whether the site takes effect, after noting it.
bool is_kept(Site site);

enum class Access { kRead, kWrite, kAtomic };

/// The bytes at a shared address, after the checks.
char* shared_bytes(std::uint32_t address, int size, int alignment, Access access);

/// Notes an access to one element of global memory; blocks of one grid may not share it at all.
void watch_global(const void* address, Access access);

/// This thread's copies under way.
void start_copy(std::uint32_t target, const void* source, int bytes);
void commit_copies();
void wait_for_copies(int pending);

}  // namespace softcl::cuda::host

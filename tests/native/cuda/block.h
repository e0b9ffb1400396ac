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

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace softcl::cuda::host {

struct Site {
  const char* file;
  int line;
};

enum class Access { kRead, kWrite, kAtomic };

/// How kernels run from now on.
struct Options {
  std::uint64_t seed = 0;
  std::string omit;  // "file:line" of a site that has no effect; empty: none
  std::string flip;  // of one that waits for the other phase
};
void set_options(const Options& options);

/// The device's compute capability from now on, ten times: 80 at first.
void set_capability(int value);

/// Its multiprocessors: 2 at first.
void set_multiprocessors(int value);

/// The PTX that its code was compiled from, as the build has it: sm_90a's on 9.0, otherwise
/// sm_80's.
int loaded_version();

/// Calls of cudaSetDevice so far.
int count_devices_set();

/// "file:line" of every barrier and wait met since the options were set, in order of appearance.
std::vector<std::string> sites();

/// What a block has beside its threads, where a kernel uses it: see warpgroup.h. It watches shared
/// memory in place of the rule above, as barriers are no longer all that orders accesses.
class Hardware {
 public:
  virtual ~Hardware() = default;
  virtual void begin_block(char* shared, std::size_t bytes, int threads) = 0;
  virtual void end_block() = 0;
  virtual void end_thread() = 0;
  virtual void access(std::uint32_t address, int size, Access access) = 0;
  virtual void meet_at_barrier() = 0;               // all threads have
  virtual void meet_in_warp(int first_thread) = 0;  // those of one warp
  virtual bool advance() = 0;         // does something that was under way; false: nothing is
  virtual std::string waiting() = 0;  // who waits for what
};

/// Runs `kernel` in every thread of every block, blocks in an order drawn from the seed. Throws
/// std::runtime_error with the first thing that was reported. Of a grid that was launched early
/// every thread has to wait for the grid before it, before anything else that is watched.
void run_grid(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& kernel,
              Hardware* hardware = nullptr, bool early = false);

// ---- For the instructions, within a thread
// -------------------------------------------------------

/// Stops the grid: run_grid throws.
[[noreturn]] void report(const std::string& what);

/// All threads of the block.
void barrier(Site site);

/// All lanes of the warp. Known to the hardware that watches shared memory, where a kernel has it.
void sync_warp(Site site);

/// Nothing to wait for: grids run one after the other. But it is noted who has waited.
void wait_for_previous_grid(Site site);

/// All 32 lanes meet; the last one runs `act` with what each of them gave, by lane.
void collect(Site site, void* mine, void (*act)(void* const* lanes));

/// Whether the site takes effect, after noting it.
bool is_kept(Site site);

/// Whether it waits for the other phase.
bool is_flipped(Site site);

/// The bytes at a shared address, after the checks.
char* shared_bytes(std::uint32_t address, int size, int alignment, Access access);

/// Notes an access to one element of global memory; blocks of one grid may not share it at all.
void watch_global(const void* address, Access access);

/// This thread's copies under way.
void start_copy(std::uint32_t target, const void* source, int bytes);
void commit_copies();
void wait_for_copies(int pending);

// ---- For the hardware beside the threads
// ---------------------------------------------------------

int current_thread();
std::uint64_t draw();

/// Runs other threads until one of them resumes this one.
void suspend();
void resume(int thread);

}  // namespace softcl::cuda::host

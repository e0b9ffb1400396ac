// See block.h.

#include "block.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <unordered_map>

#include "context.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace softcl::cuda::host {

namespace {

constexpr int kWarp = 32;
constexpr std::size_t kStack = 128 << 10;
constexpr int kMostThreads = 1024;
constexpr int kNobody = -1, kAtomics = -2;

struct Copy {
  std::uint32_t target;
  const void* source;
  int bytes;
};

struct Thread {
  Context context;
  std::vector<Copy> open;                 // since the last commit
  std::vector<std::vector<Copy>> groups;  // oldest first
  bool finished = false;
  bool may_go_on = true;  // the grid before has ended, as far as this thread can know
};

struct Warp {
  std::uint32_t runnable = 0;  // lanes
  int arrived = 0;
  Site site{};
  void* lanes[kWarp];
};

// The last accesses of two bytes of shared memory, or of one element of global memory, by the
// number of barriers before them.
struct Shadow {
  std::uint64_t write_time = 0, read_time = 0;
  int writer = kNobody, reader = kNobody;
  bool several_readers = false;
};

struct GlobalShadow {
  Shadow shadow;
  std::uint64_t block_time = 0;  // when the block began that accessed it
  bool written = false;
};

struct KnownSite {
  Site site;
  bool kept;
};

struct Machine {
  Options options;
  std::vector<KnownSite> sites;
  std::mt19937_64 random;

  std::unique_ptr<char[]> stacks;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<int> priority;  // warps, the first runnable one runs
  Context main;
  int current = 0;
  int unfinished = 0;
  int at_barrier = 0;
  Site barrier_site{};
  std::uint64_t time = 0;  // barriers ever completed
  std::vector<char> shared;
  std::vector<Shadow> shadow;
  std::unordered_map<const void*, GlobalShadow> global;  // of this grid
  std::uint64_t block_time = 0;
  const std::function<void()>* kernel = nullptr;
  Hardware* hardware = nullptr;
  bool early = false;  // launched before the grid before it has ended
  std::string reported;
};

Machine m;

std::string name_of(Site site) {
  const std::string file = site.file;
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(site.line);
}

bool same(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

// The next fiber to run: a lane of the first warp that has one. Now and then the warps change
// places, so that each is far ahead of the others for a while.
int pick() {
  const std::uint64_t draw = m.random();
  if (draw % 64 == 0) std::shuffle(m.priority.begin(), m.priority.end(), m.random);
  for (const int w : m.priority) {
    const std::uint32_t lanes = m.warps[w].runnable;
    if (lanes == 0) continue;
    const int shift = draw >> 32 & 31;
    const std::uint32_t rotated = lanes >> shift | (shift > 0 ? lanes << (32 - shift) : 0);
    return w * kWarp + (__builtin_ctz(rotated) + shift) % kWarp;
  }
  return kNobody;
}

// Runs another fiber, after this one was made to wait or has ended.
void yield() {
  Context& here = m.threads[m.current].context;
  if (m.hardware != nullptr && m.random() % 16 == 0) m.hardware->advance();
  int next = pick();
  while (next == kNobody && m.hardware != nullptr && m.hardware->advance()) next = pick();
  if (next == kNobody) {
    if (m.unfinished > 0) {
      std::string what = "deadlock: ";
      what += m.at_barrier > 0
                  ? std::to_string(m.at_barrier) + " threads wait at " + name_of(m.barrier_site)
                  : "lanes wait for others of their warp";
      for (const Warp& warp : m.warps) {
        if (warp.arrived > 0) what += ", lanes of a warp at " + name_of(warp.site);
      }
      if (m.hardware != nullptr) what += m.hardware->waiting();
      m.reported = what + "; the other threads have ended or wait elsewhere";
    }
    switch_context(here, m.main);
    return;
  }
  if (next == m.current) return;  // what it waited for has come meanwhile
  m.current = next;
  threadIdx = dim3(next);
  switch_context(here, m.threads[next].context);
}

void set_runnable(bool runnable) {
  const std::uint32_t lane = 1u << m.current % kWarp;
  std::uint32_t& lanes = m.warps[m.current / kWarp].runnable;
  lanes = runnable ? lanes | lane : lanes & ~lane;
}

void run_thread() {
  (*m.kernel)();
  if (m.hardware != nullptr) m.hardware->end_thread();
  m.threads[m.current].finished = true;
  --m.unfinished;
  set_runnable(false);
  yield();
  __builtin_unreachable();
}

void run_block(int num_threads) {
  std::memset(m.shared.data(), 0xff, m.shared.size());  // NaN in every format
  m.warps.assign(num_threads / kWarp, Warp{});
  m.priority.resize(m.warps.size());
  std::iota(m.priority.begin(), m.priority.end(), 0);
  std::shuffle(m.priority.begin(), m.priority.end(), m.random);
  m.threads.resize(num_threads);
  for (int i = 0; i < num_threads; ++i) {
    Thread& thread = m.threads[i];
    thread.open.clear();
    thread.groups.clear();
    thread.finished = false;
    thread.may_go_on = !m.early;
    make_context(thread.context, m.stacks.get() + i * kStack, kStack, run_thread);
  }
  for (Warp& warp : m.warps) warp.runnable = 0xffffffffu;
  m.unfinished = num_threads;
  m.at_barrier = 0;
  m.block_time = ++m.time;
  if (m.hardware != nullptr) m.hardware->begin_block(m.shared.data(), m.shared.size(), num_threads);
  m.current = pick();
  threadIdx = dim3(m.current);
  switch_context(m.main, m.threads[m.current].context);
}

}  // namespace

void set_options(const Options& options) {
  m.options = options;
  m.sites.clear();
}

std::vector<std::string> sites() {
  std::vector<std::string> names;
  for (const KnownSite& known : m.sites) names.push_back(name_of(known.site));
  return names;
}

void run_grid(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& kernel,
              Hardware* hardware, bool early) {
  if (block.y != 1 || block.z != 1 || block.x % kWarp != 0 || block.x > kMostThreads) {
    throw std::runtime_error("blocks are whole warps along x, at most 1024 threads");
  }
  if (!m.stacks) m.stacks.reset(new char[kMostThreads * kStack]);
  m.kernel = &kernel;
  m.hardware = hardware;
  m.early = early;
  m.reported.clear();
  m.random.seed(m.options.seed);
  m.shared.resize(shared_bytes);
  m.shadow.resize(shared_bytes / 2 + 1);
  m.global.clear();
  gridDim = grid;
  blockDim = block;
  std::vector<std::uint64_t> blocks(std::uint64_t(grid.x) * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), m.random);
  for (const std::uint64_t b : blocks) {
    blockIdx = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
    run_block(block.x);
    if (m.reported.empty() && hardware != nullptr) hardware->end_block();
    if (!m.reported.empty()) throw std::runtime_error(m.reported);
  }
}

void report(const std::string& what) {
  m.reported = what + " (thread " + std::to_string(m.current) + " of block " +
               std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ")";
  switch_context(m.threads[m.current].context, m.main);
  __builtin_unreachable();
}

bool is_kept(Site site) {
  for (const KnownSite& known : m.sites) {
    if (same(known.site, site)) return known.kept;
  }
  m.sites.push_back({site, name_of(site) != m.options.omit});
  return m.sites.back().kept;
}

bool is_flipped(Site site) {
  return !m.options.flip.empty() && name_of(site) == m.options.flip;
}

// Code of older PTX has no such instruction.
void wait_for_previous_grid(Site site) {
  if (m.early && loaded_version() >= 90 && is_kept(site)) m.threads[m.current].may_go_on = true;
}

// At everything that is watched.
void check_waited() {
  if (!m.threads[m.current].may_go_on) report("went on while the grid before may still run");
}

void barrier(Site site) {
  check_waited();
  if (!is_kept(site)) return;
  if (m.at_barrier > 0 && !same(site, m.barrier_site)) {
    report("threads wait at " + name_of(m.barrier_site) + " and at " + name_of(site));
  }
  m.barrier_site = site;
  if (++m.at_barrier < static_cast<int>(m.threads.size())) {
    set_runnable(false);
    yield();
    return;
  }
  m.at_barrier = 0;
  ++m.time;
  if (m.hardware != nullptr) m.hardware->meet_at_barrier();
  for (Warp& warp : m.warps) warp.runnable = 0xffffffffu;
}

void collect(Site site, void* mine, void (*act)(void* const* lanes)) {
  check_waited();
  Warp& warp = m.warps[m.current / kWarp];
  if (warp.arrived > 0 && !same(site, warp.site)) {
    report("lanes of one warp are at " + name_of(warp.site) + " and at " + name_of(site));
  }
  warp.site = site;
  warp.lanes[m.current % kWarp] = mine;
  if (++warp.arrived < kWarp) {
    set_runnable(false);
    yield();
    return;
  }
  warp.arrived = 0;
  act(warp.lanes);
  warp.runnable = 0xffffffffu;
}

void sync_warp(Site site) {
  if (!is_kept(site)) return;
  collect(site, nullptr, [](void* const*) {
    if (m.hardware != nullptr) m.hardware->meet_in_warp(m.current / kWarp * kWarp);
  });
}

namespace {

// Reports an access that races with an earlier one; notes it otherwise.
void watch(Shadow& s, Access access, const char* memory, std::uintptr_t address) {
  const int self = access == Access::kAtomic ? kAtomics : m.current;
  const bool written = s.write_time == m.time && s.writer != self;
  const bool read = s.read_time == m.time && (s.several_readers || s.reader != self);
  if (written || (read && access != Access::kRead)) {
    report(std::string("race: ") + memory + (access == Access::kRead ? " read" : " written") +
           " at " + std::to_string(address) + " with no barrier since thread " +
           std::to_string(written ? s.writer : s.reader) + (written ? " wrote" : " read") + " it");
  }
  if (access == Access::kRead) {
    s.several_readers = s.read_time == m.time && (s.several_readers || s.reader != self);
    s.read_time = m.time;
    s.reader = self;
  } else {
    s.write_time = m.time;
    s.writer = self;
  }
}

}  // namespace

void watch_global(const void* address, Access access) {
  check_waited();
  GlobalShadow& global = m.global[address];
  if (global.block_time != m.block_time) {
    if (global.block_time != 0 && (global.written || access != Access::kRead)) {
      report("race: two blocks share global memory that one of them writes");
    }
    global.block_time = m.block_time;
  }
  global.written |= access != Access::kRead;
  watch(global.shadow, access, "global memory", reinterpret_cast<std::uintptr_t>(address));
}

char* shared_bytes(std::uint32_t address, int size, int alignment, Access access) {
  check_waited();
  if (std::uint64_t(address) + size > m.shared.size()) {
    report("shared memory has " + std::to_string(m.shared.size()) + " bytes, accessed at " +
           std::to_string(address));
  }
  if (address % alignment != 0) {
    report("shared memory accessed at " + std::to_string(address) + ", no multiple of " +
           std::to_string(alignment));
  }
  if (m.hardware != nullptr) {
    m.hardware->access(address, size, access);
    return m.shared.data() + address;
  }
  for (std::uint32_t i = address / 2; i < (address + size + 1) / 2; ++i) {
    watch(m.shadow[i], access, "shared memory", address);
  }
  return m.shared.data() + address;
}

void start_copy(std::uint32_t target, const void* source, int bytes) {
  // It may be written from now on.
  std::memset(shared_bytes(target, 16, 16, Access::kWrite), 0xff, 16);
  if (bytes < 0 || bytes > 16 || reinterpret_cast<std::uintptr_t>(source) % 16 != 0) {
    report("cp.async: source and size");
  }
  m.threads[m.current].open.push_back({target, source, bytes});
}

void commit_copies() {
  Thread& thread = m.threads[m.current];
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}

void wait_for_copies(int pending) {
  auto& groups = m.threads[m.current].groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const Copy& copy : groups.front()) {
      char* target = shared_bytes(copy.target, 16, 16, Access::kWrite);
      std::memset(target, 0, 16);
      std::memcpy(target, copy.source, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

int current_thread() {
  return m.current;
}

std::uint64_t draw() {
  return m.random();
}

void suspend() {
  set_runnable(false);
  yield();
}

void resume(int thread) {
  m.warps[thread / kWarp].runnable |= 1u << thread % kWarp;
}

}  // namespace softcl::cuda::host

#if defined(__x86_64__)
// Saves what a function must keep, changes stacks, and returns into the other one.
asm(R"(
.text
.globl softcl_switch_context
.type softcl_switch_context, @function
softcl_switch_context:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size softcl_switch_context, . - softcl_switch_context
.section .note.GNU-stack, "", @progbits
.text
)");
#endif

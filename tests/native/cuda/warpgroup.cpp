// See warpgroup.h: barriers, copies, and the watch over shared memory. Products are in
// products.cpp.

#include "warpgroup.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "hopper_state.h"

namespace softcl::cuda::host {

Hopper h;

namespace {

void wake(std::vector<int>& threads) {
  for (const int thread : threads) resume(thread);
  threads.clear();
}

}  // namespace

void Hopper::begin_block(char* shared, std::size_t bytes, int threads) {
  shared_ = shared;
  bytes_ = bytes;
  const int groups = threads / kWarpgroup;
  agents_ = threads + groups + kMostMbarriers;
  threads_.assign(threads, ThreadState{});
  // The register file shared evenly, in units of eight.
  total_registers_ = kRegisterFile / threads / 8 * 8 * threads;
  for (int i = 0; i < threads; ++i) {
    threads_[i].knowledge.reset(agents_);
    threads_[i].knowledge.known[i] = 1;
    threads_[i].registers = total_registers_ / threads;
  }
  warpgroups_.assign(groups, WarpgroupState{});
  locations_.resize(bytes / 4);
  for (Location& location : locations_) location.reset();
  mbarriers_.clear();
  for (NamedBarrier& b : named_) {
    b = NamedBarrier{};
    b.knowledge.reset(agents_);
  }
  copies_.clear();
  wanting_registers_.clear();
}

void Hopper::end_block() {
  if (!copies_.empty()) throw std::runtime_error("a copy is under way when its block has ended");
}

void Hopper::end_thread() {
  if (!self().owned.empty()) report("a thread ends, and a product still owns its registers");
}

void Hopper::visit(std::uint32_t address, int size, const Visit& v) {
  if (std::uint64_t(address) + size > bytes_) {
    report(place(address) + ", which has " + std::to_string(bytes_) + " bytes");
  }
  for (std::uint32_t i = address / 4; i < (address + size + 3) / 4; ++i) {
    const char* wrong = locations_[i].visit(v);
    if (wrong != nullptr) {
      report("race: " + place(i * 4) + (v.writes ? " written" : " read") +
             (v.is_async ? " by a copy or product: " : ": ") + wrong);
    }
  }
}

void Hopper::access(std::uint32_t address, int size, Access access) {
  const Knowledge& own = self().knowledge;
  visit(address, size,
        {current_thread(), own.known[current_thread()], access != Access::kRead, false, &own});
}

void Hopper::meet_at_barrier() {
  Knowledge all;
  all.reset(agents_);
  for (const ThreadState& thread : threads_) all.acquire(thread.knowledge);
  for (std::size_t i = 0; i < threads_.size(); ++i) {
    threads_[i].knowledge.acquire(all);
    ++threads_[i].knowledge.known[i];
  }
}

void Hopper::meet_in_warp(int first_thread) {
  static Knowledge all;
  all = threads_[first_thread].knowledge;
  for (int i = 1; i < 32; ++i) all.acquire(threads_[first_thread + i].knowledge);
  for (int i = 0; i < 32; ++i) {
    threads_[first_thread + i].knowledge.acquire(all);
    ++threads_[first_thread + i].knowledge.known[first_thread + i];
  }
}

Mbarrier& Hopper::mbarrier(std::uint32_t address) {
  const auto found = mbarriers_.find(address);
  if (found == mbarriers_.end()) report("no barrier initialised: " + place(address));
  Mbarrier& b = found->second;
  if (self().knowledge.known[b.initializer] < b.initialized) {
    report("the initialisation of a barrier is not known here: " + place(address));
  }
  return b;
}

void Hopper::end_phase_if_due(Mbarrier& b) {
  if (b.pending > 0 || b.bytes != 0) return;
  ++b.phase;
  b.pending = b.count;
  b.left = b.arriving;
  wake(b.waiting);
}

bool Hopper::advance() {
  if (copies_.empty()) return false;
  const std::size_t chosen = draw() % copies_.size();
  const BoxCopy copy = copies_[chosen];
  copies_.erase(copies_.begin() + static_cast<std::ptrdiff_t>(chosen));
  const TensorMap& map = *copy.map;
  for (int r = 0; r < map.box_rows; ++r) {
    for (int c = 0; c < map.box_columns; ++c) {
      const std::int64_t row = std::int64_t(copy.row) + r, column = std::int64_t(copy.column) + c;
      const int size = map.element_bytes;
      std::uint32_t x = 0;
      if (row >= 0 && row < map.rows && column >= 0 && column < map.columns) {
        const auto* from = static_cast<const char*>(map.base) + row * map.row_bytes;
        std::memcpy(&x, from + column * size, size);
      }
      std::memcpy(shared_ + swizzled(copy.target + (r * map.box_columns + c) * size), &x, size);
    }
  }
  Mbarrier& b = mbarriers_.at(copy.barrier);
  b.bytes -= map.box_bytes();
  std::uint32_t& arrived = b.arriving.known[b.agent];
  arrived = std::max(arrived, copy.time);
  end_phase_if_due(b);
  return true;
}

std::string Hopper::waiting() {
  std::string what;
  for (const auto& [address, b] : mbarriers_) {
    if (b.waiting.empty()) continue;
    what += ", " + std::to_string(b.waiting.size()) + " threads at the barrier at " +
            std::to_string(address) + " in its phase " + std::to_string(b.phase);
  }
  for (int id = 0; id < kNamedBarriers; ++id) {
    if (named_[id].waiting.empty()) continue;
    what += ", " + std::to_string(named_[id].waiting.size()) + " threads at barrier " +
            std::to_string(id);
  }
  for (const WarpgroupState& group : warpgroups_) {
    if (group.arrived > 0) what += ", a part of a warpgroup at a product";
  }
  if (!wanting_registers_.empty()) what += ", threads for registers";
  return what;
}

void run_warpgroups(dim3 grid, int threads, std::size_t shared_bytes,
                    const std::function<void()>& kernel) {
  run_grid(grid, dim3(threads), shared_bytes, kernel, &h);
}

void set_registers(int count, bool increase) {
  int& own = h.self().registers;
  if (count % 8 != 0 || count < 24 || count > 256) report("setmaxnreg: " + std::to_string(count));
  if (increase ? count < own : count > own) report("setmaxnreg in the wrong direction");
  while (h.total_registers_ - own + count > kRegisterFile) {
    h.wanting_registers_.push_back(current_thread());
    suspend();
  }
  h.total_registers_ += count - own;
  own = count;
  if (!increase) wake(h.wanting_registers_);
}

// ---- Barriers
// ------------------------------------------------------------------------------------

void mbarrier_init(std::uint32_t address, int count) {
  shared_bytes(address, 8, 8, Access::kWrite);
  if (h.mbarriers_.size() == kMostMbarriers) report("too many barriers");
  Mbarrier b;
  b.count = b.pending = count;
  b.agent = static_cast<int>(h.threads_.size() + h.warpgroups_.size() + h.mbarriers_.size());
  b.initializer = current_thread();
  b.initialized = h.self().knowledge.known[current_thread()];
  b.arriving.reset(h.agents_);
  b.left.reset(h.agents_);
  h.mbarriers_[address] = b;
}

void mbarrier_arrive(Site site, std::uint32_t address, int expected_bytes) {
  if (!is_kept(site)) return;
  Mbarrier& b = h.mbarrier(address);
  if (b.pending == 0) report("more arrivals than the barrier counts: " + place(address));
  b.arriving.acquire(h.self().knowledge);
  h.step();
  b.bytes += expected_bytes;
  --b.pending;
  h.end_phase_if_due(b);
}

void mbarrier_wait(Site site, std::uint32_t address, int parity) {
  if (!is_kept(site)) return;
  if (is_flipped(site)) parity = 1 - parity;
  Mbarrier& b = h.mbarrier(address);
  while (static_cast<int>(b.phase & 1) == parity) {
    b.waiting.push_back(current_thread());
    suspend();
  }
  h.self().knowledge.acquire(b.left);
}

void named_barrier(Site site, int id, int count, bool waits) {
  if (!is_kept(site)) return;
  if (id < 1 || id >= kNamedBarriers || count % 32 != 0) report("named barrier: id and count");
  NamedBarrier& b = h.named_[id];
  if (b.arrived > 0 && b.count != count) report("a named barrier with two counts");
  b.count = count;
  b.knowledge.acquire(h.self().knowledge);
  h.step();
  const bool last = ++b.arrived == count;
  if (last) {
    for (const int thread : b.waiting) h.threads_[thread].knowledge.acquire(b.knowledge);
    if (waits) h.self().knowledge.acquire(b.knowledge);
    wake(b.waiting);
    b = NamedBarrier{};
    b.knowledge.reset(h.agents_);
  } else if (waits) {
    b.waiting.push_back(current_thread());
    suspend();
  }
}

void fence_async_proxy(Site site) {
  if (!is_kept(site)) return;
  Knowledge& own = h.self().knowledge;
  join(own.fenced, own.known);
  h.step();
}

// ---- Copies
// --------------------------------------------------------------------------------------

void copy_box(std::uint32_t target, const TensorMap* map, int column, int row,
              std::uint32_t barrier) {
  const int bytes = map->box_bytes();
  if (target % 1024 != 0) report("a copy with 128-byte swizzle to " + place(target));
  if (map->box_columns * map->element_bytes != 128 || map->box_rows > 256 ||
      map->row_bytes % 16 != 0 || reinterpret_cast<std::uintptr_t>(map->base) % 16 != 0) {
    report("a tensor map that no device takes");
  }
  Mbarrier& b = h.mbarrier(barrier);
  const Knowledge& own = h.self().knowledge;
  if (own.fenced[b.initializer] < b.initialized) {
    report("no fence.proxy.async since the barrier was initialised: " + place(barrier));
  }
  const std::uint32_t time = ++b.copies;
  h.visit(target, bytes, {b.agent, time, true, true, &own});
  std::memset(h.shared_ + target, 0xff, bytes);
  h.copies_.push_back({target, map, column, row, barrier, time});
}

}  // namespace softcl::cuda::host

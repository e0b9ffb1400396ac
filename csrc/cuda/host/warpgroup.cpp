// See warpgroup.h.

#include "warpgroup.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "clocks.h"
#include "hopper_layout.h"
#include "ptx.h"

namespace softcl::cuda::host {

namespace {

constexpr int kRegisterFile = 65536;
constexpr int kNamedBarriers = 16;
constexpr int kMostMbarriers = 32;

struct Mbarrier {
  int count = 0, pending = 0;
  std::int64_t bytes = 0;  // expected and not yet written; below 0 while they come early
  std::uint64_t phase = 0;
  int agent = 0;  // the copies that count here
  std::uint32_t copies = 0;
  int initializer = 0;
  std::uint32_t initialized = 0;
  Knowledge arriving, left;  // of the phase under way, and of those that have ended
  std::vector<int> waiting;
};

struct NamedBarrier {
  int count = 0, arrived = 0;
  Knowledge knowledge;
  std::vector<int> waiting;
};

struct Copy {
  std::uint32_t target;
  const TensorMap* map;
  int column, row;
  std::uint32_t barrier;
  std::uint32_t time;
};

// Accumulators that a product owns: their values, until they are settled.
struct Owned {
  float* c;
  int columns;
  std::uint64_t group;
  std::vector<float> values;
};

struct Fragment {
  const std::uint32_t* registers;
  std::uint32_t values[4];
  std::uint64_t group;
};

struct ThreadState {
  Knowledge knowledge;
  int registers = 0;
  bool fenced = false;
  std::uint64_t committed = 0, done = 0;  // groups
  std::uint64_t open = 0;                 // products of the group that is not committed
  std::vector<Owned> owned;
  std::vector<Fragment> fragments;
};

struct WarpgroupState {
  int arrived = 0;
  const Product* lanes[kWarpgroup];
  std::uint32_t products = 0;                  // ever started: the time of its agent
  std::vector<std::uint32_t> last_of_group{};  // group -> products started by its end
};

std::string place(std::uint32_t address) {
  return "shared memory at " + std::to_string(address);
}

class Hopper final : public Hardware {
 public:
  void begin_block(char* shared, std::size_t bytes, int threads) override;
  void end_block() override;
  void end_thread() override;
  void access(std::uint32_t address, int size, Access access) override;
  void meet_at_barrier() override;
  bool advance() override;
  std::string waiting() override;

  ThreadState& self() { return threads_[current_thread()]; }
  WarpgroupState& group() { return warpgroups_[current_thread() / kWarpgroup]; }
  int product_agent() const { return static_cast<int>(threads_.size()) + current_thread() / 128; }

  /// This thread's accesses so far are released: later ones have another number.
  void step() { ++self().knowledge.known[current_thread()]; }
  void visit(std::uint32_t address, int size, const Visit& v);
  Mbarrier& mbarrier(std::uint32_t address);
  void end_phase_if_due(Mbarrier& b);

  char* shared_ = nullptr;
  std::size_t bytes_ = 0;
  int agents_ = 0;
  int total_registers_ = 0;
  std::vector<ThreadState> threads_;
  std::vector<WarpgroupState> warpgroups_;
  std::vector<Location> locations_;
  std::unordered_map<std::uint32_t, Mbarrier> mbarriers_;
  NamedBarrier named_[kNamedBarriers];
  std::vector<Copy> copies_;
  std::vector<int> wanting_registers_;
};

Hopper h;

void wake(std::vector<int>& threads) {
  for (const int thread : threads) resume(thread);
  threads.clear();
}

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
  const Copy copy = copies_[chosen];
  copies_.erase(copies_.begin() + static_cast<std::ptrdiff_t>(chosen));
  const TensorMap& map = *copy.map;
  for (int r = 0; r < map.box_rows; ++r) {
    for (int c = 0; c < map.box_columns; ++c) {
      const std::int64_t row = std::int64_t(copy.row) + r, column = std::int64_t(copy.column) + c;
      std::uint16_t x = 0;
      if (row >= 0 && row < map.rows && column >= 0 && column < map.columns) {
        std::memcpy(&x, static_cast<const char*>(map.base) + row * map.row_bytes + column * 2, 2);
      }
      std::memcpy(shared_ + swizzled(copy.target + (r * map.box_columns + c) * 2), &x, 2);
    }
  }
  Mbarrier& b = mbarriers_.at(copy.barrier);
  b.bytes -= map.box_rows * map.box_columns * 2;
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

}  // namespace

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
  const int bytes = map->box_rows * map->box_columns * 2;
  if (target % 1024 != 0) report("a copy with 128-byte swizzle to " + place(target));
  if (map->box_columns * 2 != 128 || map->box_rows > 256 || map->row_bytes % 16 != 0 ||
      reinterpret_cast<std::uintptr_t>(map->base) % 16 != 0) {
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

// ---- Products
// ------------------------------------------------------------------------------------

namespace {

// A matrix of 16-bit numbers in shared memory, as its descriptor has it.
struct SharedMatrix {
  std::uint32_t start, leading, stride;

  explicit SharedMatrix(std::uint64_t descriptor)
      : start((descriptor & 0x3fff) << 4),
        leading((descriptor >> 16 & 0x3fff) << 4),
        stride((descriptor >> 32 & 0x3fff) << 4) {
    if (descriptor >> 62 != 1) report("a descriptor without 128-byte swizzle");
    if ((descriptor >> 49 & 7) != 0) report("a descriptor with a base offset");
  }

  // T = 8 elements of 16 bytes. K-major: Swizzle<3,4,3> o ((8,m),(T,2k)):((8T,SBO),(1,T)).
  std::uint32_t k_major(int row, int k) const {
    return swizzled(start + row / 8 * stride + row % 8 * 128 + k * 2);
  }
  // MN-major: Swizzle<3,4,3> o ((T,8,m),(8,k)):((1,T,LBO),(8T,SBO)).
  std::uint32_t mn_major(int n, int k) const {
    return swizzled(start + n / 64 * leading + n % 64 * 2 + k / 8 * stride + k % 8 * 128);
  }
};

// Reads all elements, two at a time where they are neighbours, and watches the reads.
template <typename Address, typename Take>
void read_matrix(int rows, int columns, const Visit& visit, Address address, Take take) {
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < columns; j += 2) {
      const std::uint32_t first = address(i, j);
      h.visit(first, 4, visit);
      std::uint16_t x[2];
      std::memcpy(x, h.shared_ + first, 4);
      take(i, j, x[0]);
      take(i, j + 1, x[1]);
    }
  }
}

float* accumulators_of(ThreadState& thread, const Product& p) {
  for (Owned& owned : thread.owned) {
    if (owned.c != p.c) continue;
    if (owned.columns != p.columns) report("two shapes of products on the same accumulators");
    owned.group = thread.committed + 1;
    return owned.values.data();
  }
  const int count = p.columns / 2;
  thread.owned.push_back({p.c, p.columns, thread.committed + 1, {p.c, p.c + count}});
  std::memset(p.c, 0xff, count * sizeof(float));
  return thread.owned.back().values.data();
}

// The last of the warpgroup's threads runs the product.
void multiply(WarpgroupState& group, int first_thread) {
  const Product& p = *group.lanes[0];
  // It reads what all of the threads know to be there.
  static Knowledge common;
  common = h.threads_[first_thread].knowledge;
  for (int t = 1; t < kWarpgroup; ++t) {
    const Knowledge& other = h.threads_[first_thread + t].knowledge;
    for (int i = 0; i < h.agents_; ++i) {
      common.known[i] = std::min(common.known[i], other.known[i]);
      common.fenced[i] = std::min(common.fenced[i], other.fenced[i]);
    }
  }
  const Visit visit{h.product_agent(), ++group.products, false, true, &common};
  static float a[64][16], b[32][16][8], c[256];  // b: by eight columns
  if (p.fragment == nullptr) {
    const SharedMatrix matrix(p.a);
    read_matrix(
        64, 16, visit, [&](int i, int k) { return matrix.k_major(i, k); },
        [&](int i, int k, std::uint16_t x) { a[i][k] = p.to_float(x); });
  } else {
    for (int t = 0; t < kWarpgroup; ++t) {
      const int row = t / 32 * 16 + t % 32 / 4;
      for (int i = 0; i < 8; ++i) {
        a[row + i / 2 % 2 * 8][t % 4 * 2 + i / 4 * 8 + i % 2] =
            p.to_float(static_cast<std::uint16_t>(group.lanes[t]->fragment[i / 2] >> i % 2 * 16));
      }
    }
  }
  const SharedMatrix matrix(p.b);
  if (p.transposed) {
    read_matrix(
        16, p.columns, visit, [&](int k, int n) { return matrix.mn_major(n, k); },
        [&](int k, int n, std::uint16_t x) { b[n / 8][k][n % 8] = p.to_float(x); });
  } else {
    read_matrix(
        p.columns, 16, visit, [&](int n, int k) { return matrix.k_major(n, k); },
        [&](int n, int k, std::uint16_t x) { b[n / 8][k][n % 8] = p.to_float(x); });
  }
  // Four threads hold a row: element 4 n + 2 i + e of thread t is column 8 n + 2 (t % 4) + e.
  for (int row = 0; row < 64; ++row) {
    const int i = row / 8 % 2, first = row / 16 * 32 + row % 8 * 4;
    float* held[4];
    for (int t = 0; t < 4; ++t) {
      held[t] = accumulators_of(h.threads_[first_thread + first + t], *group.lanes[first + t]);
    }
    for (int n = 0; n < p.columns / 8; ++n) {
      for (int j = 0; j < 8; ++j) c[j] = p.add ? held[j / 2][4 * n + 2 * i + j % 2] : 0.0f;
      ptx::add_products(c, a[row], b[n]);
      ptx::add_products(c, a[row] + 8, b[n] + 8);
      for (int j = 0; j < 8; ++j) held[j / 2][4 * n + 2 * i + j % 2] = c[j];
    }
  }
}

}  // namespace

void start_product(const Product& product) {
  ThreadState& self = h.self();
  const bool owned = std::any_of(self.owned.begin(), self.owned.end(),
                                 [&](const Owned& o) { return o.c == product.c; });
  if (!self.fenced && !(owned && product.fragment == nullptr)) {
    report("a product without wgmma.fence since its registers were accessed");
  }
  ++self.open;
  if (product.fragment != nullptr) {
    Fragment fragment{product.fragment, {}, self.committed + 1};
    std::memcpy(fragment.values, product.fragment, sizeof(fragment.values));
    self.fragments.push_back(fragment);
  }
  WarpgroupState& group = h.group();
  const int first = current_thread() / kWarpgroup * kWarpgroup;
  group.lanes[current_thread() - first] = &product;
  if (++group.arrived < kWarpgroup) {
    suspend();
    return;
  }
  group.arrived = 0;
  for (int t = 0; t < kWarpgroup; ++t) {
    const Product& p = *group.lanes[t];
    if (p.a != product.a || p.b != product.b || p.columns != product.columns ||
        p.add != product.add || p.transposed != product.transposed) {
      report("threads of one warpgroup start different products");
    }
  }
  multiply(group, first);
  for (int t = 0; t < kWarpgroup; ++t) resume(first + t);
}

void fence_products(Site site) {
  if (is_kept(site)) h.self().fenced = true;
}

void commit_products(Site site) {
  if (!is_kept(site)) return;
  ThreadState& self = h.self();
  ++self.committed;
  self.open = 0;
  auto& last = h.group().last_of_group;
  if (last.size() <= self.committed) last.resize(self.committed + 1);
  last[self.committed] = h.group().products;
}

void wait_for_products(Site site, int pending) {
  if (!is_kept(site)) return;
  ThreadState& self = h.self();
  self.fenced = false;
  if (self.committed <= static_cast<std::uint64_t>(pending)) return;
  self.done = std::max(self.done, self.committed - pending);
  std::uint32_t& known = self.knowledge.known[h.product_agent()];
  known = std::max(known, h.group().last_of_group[self.done]);
  auto& fragments = self.fragments;
  for (const Fragment& f : fragments) {
    if (f.group <= self.done && std::memcmp(f.registers, f.values, sizeof(f.values)) != 0) {
      report("a fragment was overwritten while its product ran");
    }
  }
  fragments.erase(std::remove_if(fragments.begin(), fragments.end(),
                                 [&](const Fragment& f) { return f.group <= self.done; }),
                  fragments.end());
}

void settle(Site site, float* c) {
  if (!is_kept(site)) return;
  ThreadState& self = h.self();
  for (std::size_t i = 0; i < self.owned.size(); ++i) {
    const Owned& owned = self.owned[i];
    if (owned.c != c) continue;
    if (owned.group > self.done) report("accumulators settled while a product owns them");
    std::memcpy(c, owned.values.data(), owned.values.size() * sizeof(float));
    self.owned.erase(self.owned.begin() + static_cast<std::ptrdiff_t>(i));
    return;
  }
}

}  // namespace softcl::cuda::host

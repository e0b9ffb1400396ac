// The state behind warpgroup.h: barriers, copies under way, and what products own. For
// warpgroup.cpp and products.cpp alone.

#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "clocks.h"
#include "hopper_layout.h"
#include "warpgroup.h"

namespace softcl::cuda::host {

inline constexpr int kRegisterFile = 65536;
inline constexpr int kNamedBarriers = 16;
inline constexpr int kMostMbarriers = 32;

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

struct BoxCopy {
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

inline std::string place(std::uint32_t address) {
  return "shared memory at " + std::to_string(address);
}

class Hopper final : public Hardware {
 public:
  void begin_block(char* shared, std::size_t bytes, int threads) override;
  void end_block() override;
  void end_thread() override;
  void access(std::uint32_t address, int size, Access access) override;
  void meet_at_barrier() override;
  void meet_in_warp(int first_thread) override;
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
  std::vector<BoxCopy> copies_;
  std::vector<int> wanting_registers_;
};

extern Hopper h;

}  // namespace softcl::cuda::host

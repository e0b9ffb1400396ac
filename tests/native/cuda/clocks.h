// Who may know of whose accesses to shared memory: vector clocks, and a watch over every location.
//
// Agents are the threads, and everything that reads and writes on its own. An agent's accesses are
// numbered by its own clock; whoever acquires from a barrier knows all that was known to those who
// released to it.

#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace softcl::cuda::host {

using Clock = std::vector<std::uint32_t>;  // by agent

inline void join(Clock& into, const Clock& from) {
  for (std::size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], from[i]);
}

/// What one agent knows: the accesses that came before, and of the plain ones among them those that
/// copies and products see, too.
struct Knowledge {
  Clock known;
  Clock fenced;

  void reset(int agents) {
    known.assign(agents, 0);
    fenced.assign(agents, 0);
  }
  void acquire(const Knowledge& from) {
    join(known, from.known);
    join(fenced, from.fenced);
  }
};

/// One access by `agent`, its number `time`, by one who knows `knowledge`.
struct Visit {
  int agent;
  std::uint32_t time;
  bool writes;
  bool is_async;
  const Knowledge* knowledge;
};

/// The last accesses to four bytes.
class Location {
 public:
  /// What is wrong with this access, or null.
  const char* visit(const Visit& v) {
    if (writer_ >= 0 && writer_ != v.agent) {
      if (v.knowledge->known[writer_] < write_time_) return "no barrier since it was written";
      if (v.is_async && !async_writer_ && v.knowledge->fenced[writer_] < write_time_) {
        return "no fence.proxy.async since it was written";
      }
    }
    if (v.writes) {
      for (const auto& [agent, time] : readers_) {
        if (agent != v.agent && v.knowledge->known[agent] < time) {
          return "no barrier since it was read";
        }
      }
      readers_.clear();
      writer_ = v.agent;
      write_time_ = v.time;
      async_writer_ = v.is_async;
      return nullptr;
    }
    for (auto& [agent, time] : readers_) {
      if (agent == v.agent) {
        time = v.time;
        return nullptr;
      }
    }
    readers_.emplace_back(v.agent, v.time);
    return nullptr;
  }

  void reset() {
    writer_ = -1;
    readers_.clear();
  }

 private:
  int writer_ = -1;
  std::uint32_t write_time_ = 0;
  bool async_writer_ = false;
  std::vector<std::pair<int, std::uint32_t>> readers_;
};

}  // namespace softcl::cuda::host

// All workspace of a call, handed out in cache-line-aligned arrays of one block of memory.
//
// A layout function runs twice: on a measuring arena, which hands out null pointers, and on the
// real one.
//
// The blocks stay with the calling thread, which takes the same ones again: no page faults, and no
// holes in the heap. From malloc a block would come back to the heap after every call, and whatever
// small result is kept of it would take its place: the next block would need new memory.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace softcl::cpu {

/// The calling thread's blocks. An operator's arena and its pass's exist at once, the second one
/// within the first one's lifetime, so they form a stack.
class ArenaBlocks {
 public:
  static constexpr std::int64_t kAlignment = 64;
  /// A larger block goes back after its call.
  static constexpr std::int64_t kMostKept = std::int64_t{64} << 20;

  static ArenaBlocks& of_this_thread() {
    static thread_local ArenaBlocks blocks;
    return blocks;
  }

  /// At least `size` bytes, a multiple of kAlignment, until `give_back`.
  char* take(std::int64_t size) {
    if (depth_ == kMostNested) throw std::bad_alloc();
    Block& block = blocks_[depth_];
    if (block.size < size) {
      block.release();
      block.base = static_cast<char*>(std::aligned_alloc(kAlignment, size));
      if (block.base == nullptr) throw std::bad_alloc();
      block.size = size;
    }
    ++depth_;
    return block.base;
  }

  /// The block that was taken last.
  void give_back() {
    Block& block = blocks_[--depth_];
    if (block.size > kMostKept) block.release();
  }

 private:
  static constexpr int kMostNested = 2;

  struct Block {
    char* base = nullptr;
    std::int64_t size = 0;

    ~Block() { release(); }
    void release() {
      std::free(base);
      base = nullptr;
      size = 0;
    }
  };

  Block blocks_[kMostNested];
  int depth_ = 0;
};

class Arena {
 public:
  Arena() = default;
  explicit Arena(std::int64_t size) : base_(ArenaBlocks::of_this_thread().take(round_up(size))) {}
  ~Arena() {
    if (base_ != nullptr) ArenaBlocks::of_this_thread().give_back();
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  /// `count` elements, uninitialised; null while measuring.
  template <typename T>
  T* take(std::int64_t count) {
    T* array = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += round_up(count * static_cast<std::int64_t>(sizeof(T)));
    return array;
  }

  std::int64_t used() const { return used_; }

 private:
  static std::int64_t round_up(std::int64_t size) {
    constexpr std::int64_t kAlignment = ArenaBlocks::kAlignment;
    return (size + kAlignment) / kAlignment * kAlignment;  // never 0
  }

  char* base_ = nullptr;
  std::int64_t used_ = 0;
};

}  // namespace softcl::cpu

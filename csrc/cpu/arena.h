// One allocation for all workspace of a call, handed out in cache-line-aligned arrays.
//
// A layout function runs twice: on a measuring arena, which hands out null pointers, and on the
// real one. One allocation of a steady size stays in malloc's hands between calls: no page faults.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace softcl::cpu {

class Arena {
 public:
  static constexpr std::int64_t kAlignment = 64;

  Arena() = default;
  explicit Arena(std::int64_t size)
      : base_(static_cast<char*>(std::aligned_alloc(kAlignment, round_up(size)))) {
    if (base_ == nullptr) throw std::bad_alloc();
  }
  ~Arena() { std::free(base_); }
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
    return (size + kAlignment) / kAlignment * kAlignment;  // never 0
  }

  char* base_ = nullptr;
  std::int64_t used_ = 0;
};

}  // namespace softcl::cpu

// Fibers: several stacks in one thread, switched by hand.

#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
  #include <ucontext.h>
#endif

namespace softcl::cuda::host {

#if defined(__x86_64__)

/// A stack that is not running: where it goes on.
struct Context {
  void* stack_pointer = nullptr;
};

extern "C" void softcl_switch_context(void** from, void* to);

inline void switch_context(Context& from, Context& to) {
  softcl_switch_context(&from.stack_pointer, to.stack_pointer);
}

/// Makes `context` start `entry`, which must not return, on a stack of its own.
inline void make_context(Context& context, char* stack, std::size_t size, void (*entry)()) {
  auto top = (reinterpret_cast<std::uintptr_t>(stack) + size) / 16 * 16;
  auto* slots = reinterpret_cast<void**>(top);
  slots[-1] = nullptr;  // where a caller's address would be
  slots[-2] = reinterpret_cast<void*>(entry);
  for (int i = 3; i <= 8; ++i) slots[-i] = nullptr;  // rbp, rbx, r12 to r15
  context.stack_pointer = slots - 8;
}

#else

struct Context {
  ucontext_t context;
};

inline void switch_context(Context& from, Context& to) {
  swapcontext(&from.context, &to.context);
}

inline void make_context(Context& context, char* stack, std::size_t size, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = size;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}

#endif

}  // namespace softcl::cuda::host

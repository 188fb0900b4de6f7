// Threads that run one at a time: each has a stack of its own, and changes to another where it says so.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "emulation.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fastwrs::emulation {

#if defined(__x86_64__)
// Saves what a call keeps, goes to another stack, and restores what was kept there.
extern "C" void fastwrs_switch_stack(void** from, void* to);
asm(R"(
.text
.type fastwrs_switch_stack, @function
fastwrs_switch_stack:
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
.size fastwrs_switch_stack, .-fastwrs_switch_stack
)");
#endif

// One fiber, or the thread that runs all of them.
class Fiber {
 public:
  static constexpr size_t kStack = 128 * 1024;

  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() {
#if defined(__SANITIZE_THREAD__)
    if (stack_ && tsan_) __tsan_destroy_fiber(tsan_);
#endif
  }

  // Makes this the thread that runs.
  FASTWRS_MACHINERY void adopt() {
#if defined(__SANITIZE_THREAD__)
    tsan_ = __tsan_get_current_fiber();
#endif
  }

  // The next switch to this fiber begins `body`, which never returns.
  FASTWRS_MACHINERY void start(void (*body)()) {
    if (!stack_) {
      stack_.reset(new char[kStack]);
#if defined(__SANITIZE_THREAD__)
      tsan_ = __tsan_create_fiber(0);
#endif
    }
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_.get(), kStack);  // what the fiber before has left, which never returned
#endif
#if defined(__x86_64__)
    uintptr_t top = reinterpret_cast<uintptr_t>(stack_.get() + kStack) & ~uintptr_t(15);
    void** at = reinterpret_cast<void**>(top);
    *--at = nullptr;  // where a call would have put its return address: keeps the stack aligned
    *--at = reinterpret_cast<void*>(body);
    for (int i = 0; i < 6; ++i) *--at = nullptr;
    at_ = at;
#else
    getcontext(&context_);
    context_.uc_stack = {stack_.get(), 0, kStack};
    context_.uc_link = nullptr;
    makecontext(&context_, body, 0);
#endif
  }

  FASTWRS_MACHINERY void switch_to(Fiber& other) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, other.bottom(), other.size());
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(other.tsan_, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
    fastwrs_switch_stack(&at_, other.at_);
#else
    swapcontext(&context_, &other.context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    finish_switch(fake);
#endif
  }

#if defined(__SANITIZE_ADDRESS__)
  // Where a fiber goes on; `fake` is null where it begins.
  static void finish_switch(void* fake) {
    const void* bottom = nullptr;
    size_t size = 0;
    __sanitizer_finish_switch_fiber(fake, &bottom, &size);
    if (!home_bottom_) {
      home_bottom_ = bottom;
      home_size_ = size;
    }
  }
#endif

 private:
  const void* bottom() const { return stack_ ? static_cast<const void*>(stack_.get()) : home_bottom_; }
  size_t size() const { return stack_ ? kStack : home_size_; }

  std::unique_ptr<char[]> stack_;
#if defined(__x86_64__)
  void* at_ = nullptr;
#else
  ucontext_t context_;
#endif
#if defined(__SANITIZE_THREAD__)
  void* tsan_ = nullptr;
#endif
  // The stack of the thread that began, as the first switch away from it tells.
  inline static const void* home_bottom_ = nullptr;
  inline static size_t home_size_ = 0;
};

}  // namespace fastwrs::emulation

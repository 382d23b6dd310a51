// Fibers: stacks that take turns within one thread of the operating system.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <memory>
#include <new>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cotnet::emulator::fibers {

// Forbids memory to AddressSanitizer, or allows it again.
inline void mark_memory([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes, [[maybe_unused]] bool forbidden) {
#if defined(__SANITIZE_ADDRESS__)
  if (forbidden) __asan_poison_memory_region(memory, bytes);
  else __asan_unpoison_memory_region(memory, bytes);
#endif
}

struct Fiber {
  char* memory = nullptr;  // a page that may not be touched, then the stack
  char* stack = nullptr;
  void (*body)(void*) = nullptr;
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* shadow = nullptr;  // AddressSanitizer's
};

constexpr size_t kStackBytes = 256 * 1024;
inline const size_t kPageBytes = size_t(sysconf(_SC_PAGESIZE));

// The context of whoever calls resume().
struct Caller {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* shadow = nullptr;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
};
inline Caller caller;
inline Fiber* running = nullptr;

#if defined(__x86_64__)
// Saves what a called function must keep, and the stack pointer; takes those of another stack. In assembly because
// swapcontext makes a system call each time, which is ten times slower.
extern "C" void cotnet_switch_stack(void** save, void* load);
asm(R"(
.text
.weak cotnet_switch_stack
.hidden cotnet_switch_stack
.type cotnet_switch_stack, @function
cotnet_switch_stack:
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
.size cotnet_switch_stack, .-cotnet_switch_stack
)");
#endif

inline void to_fiber(Fiber* fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&caller.shadow, fiber->stack, kStackBytes);
#endif
#if defined(__x86_64__)
  cotnet_switch_stack(&caller.stack_pointer, fiber->stack_pointer);
#else
  swapcontext(&caller.context, &fiber->context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(caller.shadow, nullptr, nullptr);
#endif
}

inline void arrived() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(running->shadow, &caller.stack, &caller.stack_bytes);
#endif
}

// Back to the caller of resume(); returns at the next resume().
inline void pause(Fiber* fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fiber->shadow, caller.stack, caller.stack_bytes);
#endif
#if defined(__x86_64__)
  cotnet_switch_stack(&fiber->stack_pointer, caller.stack_pointer);
#else
  swapcontext(&fiber->context, &caller.context);
#endif
  arrived();
}

[[noreturn]] inline void leave_for_good(Fiber* fiber) {
  for (;;) pause(fiber);
}

inline void resume(Fiber* fiber) {
  running = fiber;
  to_fiber(fiber);
  running = nullptr;
}

// The first function on every stack: a fiber whose body returned runs the next one it is taken for.
inline void bottom() {
  arrived();
  for (;;) {
    running->body(nullptr);
    pause(running);
  }
}

// Owns the fibers, so that all stacks are freed in the end, those left for good included.
class Pool {
 public:
  Pool() = default;
  Pool(const Pool&) = delete;
  ~Pool() {
    for (auto& fiber : all_) {
      mark_memory(fiber->stack, kStackBytes, false);  // frames that were left for good
      munmap(fiber->memory, kPageBytes + kStackBytes);
    }
  }
  Fiber* take(void (*body)(void*)) {
    if (free_.empty()) free_.push_back(make());
    Fiber* const fiber = free_.back();
    free_.pop_back();
    fiber->body = body;
    return fiber;
  }
  void give_back(Fiber* fiber) { free_.push_back(fiber); }

 private:
  Fiber* make() {
    auto fiber = std::make_unique<Fiber>();
    void* const memory = mmap(nullptr, kPageBytes + kStackBytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kPageBytes, PROT_NONE);
    fiber->memory = static_cast<char*>(memory);
    fiber->stack = fiber->memory + kPageBytes;
#if defined(__x86_64__)
    // As if bottom() had been called: the return address of a call that was never made keeps the stack aligned.
    void** top = reinterpret_cast<void**>(fiber->stack + kStackBytes) - 1;
    *--top = reinterpret_cast<void*>(&bottom);
    fiber->stack_pointer = top - 6;  // six registers, zero
#else
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack;
    fiber->context.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber->context, bottom, 0);
#endif
    all_.push_back(std::move(fiber));
    return all_.back().get();
  }
  std::vector<std::unique_ptr<Fiber>> all_;
  std::vector<Fiber*> free_;
};

}  // namespace cotnet::emulator::fibers

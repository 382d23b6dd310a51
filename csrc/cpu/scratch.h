// Scratch memory of a thread. Taken anew for every call it would cost more than the kernels: the allocator gives freed
// pages back to the system, and touching them again means a page fault each.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace cotnet {

constexpr size_t kScratchBytes = size_t(4) << 20;  // kept per thread once touched; larger requests are allocated and freed

// A piece of the thread's scratch, 64-byte aligned, given back in reverse order of taking by scoping.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : bytes_((bytes + 63) / 64 * 64) {
    Stack& stack = mine();
    kept_ = stack.used + bytes_ <= kScratchBytes;
    if (kept_) {
      if (!stack.memory) stack.memory.reset(new (std::align_val_t(64)) unsigned char[kScratchBytes]);
      data_ = stack.memory.get() + stack.used;
      stack.used += bytes_;
    } else {
      data_ = new (std::align_val_t(64)) unsigned char[bytes_];
    }
  }
  ~Scratch() {
    if (kept_)
      mine().used -= bytes_;
    else
      Free()(data_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  struct Free {
    void operator()(unsigned char* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
  };
  struct Stack {
    std::unique_ptr<unsigned char[], Free> memory;
    size_t used = 0;
  };
  static Stack& mine() {
    static thread_local Stack stack;
    return stack;
  }

  size_t bytes_;
  bool kept_;
  unsigned char* data_;
};

}  // namespace cotnet

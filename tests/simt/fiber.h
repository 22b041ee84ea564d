// Stacks that a thread jumps between. x86-64: 13 instructions a switch; other processors, or -DSIMT_UCONTEXT:
// swapcontext, whose system call per switch (the signal mask) makes it about ten times slower.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if !defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_UCONTEXT
#endif
#ifdef SIMT_UCONTEXT
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

#ifdef __SANITIZE_ADDRESS__
inline constexpr std::size_t stack_bytes = 256 << 10;  // its frames are several times larger
#else
inline constexpr std::size_t stack_bytes = 64 << 10;
#endif

// Memory is committed page by page as it is touched; an overflow hits a page without access below the stack.
class Stack {
 public:
  Stack() : page_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))) {
    void* memory =
        mmap(nullptr, page_ + stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<char*>(memory);
    mprotect(base_, page_, PROT_NONE);
  }
  Stack(const Stack&) = delete;
  ~Stack() { munmap(base_, page_ + stack_bytes); }
  char* bottom() const { return base_ + page_; }

 private:
  std::size_t page_;
  char* base_;
};

// Where a suspended fiber (or the scheduler, which has the thread's own stack) goes on.
struct Context {
#ifdef SIMT_UCONTEXT
  ucontext_t state;
#else
  void* stack_pointer = nullptr;
#endif
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  std::size_t size = 0;
#endif
};

#ifndef SIMT_UCONTEXT
// Saves the registers that a call preserves, by the System V ABI, and takes up another stack where it did the same.
asm(R"(
  .pushsection .text.simt_switch, "axG", @progbits, simt_switch, comdat
  .weak simt_switch
  .hidden simt_switch
  .type simt_switch, @function
simt_switch:
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
  .size simt_switch, .-simt_switch
  .popsection
)");
extern "C" __attribute__((visibility("hidden"))) void simt_switch(void** save, void* load);
#endif

// `entry` never returns: it switches away for good.
inline void prepare(Context& context, const Stack& stack, unsigned colour, void (*entry)()) {
#ifdef SIMT_UCONTEXT
  (void)colour;
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack.bottom();
  context.state.uc_stack.ss_size = stack_bytes;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
#else
  // Stacks that start at different cache lines of a page do not evict each other.
  auto top = reinterpret_cast<std::uintptr_t*>(stack.bottom() + stack_bytes - 64 * (colour % 32));
  *--top = 0;  // the return address of `entry`, at 8 modulo 16 as after a call
  *--top = reinterpret_cast<std::uintptr_t>(entry);
  for (int i = 0; i < 6; ++i) *--top = 0;
  context.stack_pointer = top;
#endif
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stack.bottom(), stack_bytes);  // frames that were left for good
  context.bottom = stack.bottom();
  context.size = stack_bytes;
#endif
}

inline void jump(Context& from, Context& to) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.size);
#endif
#ifdef SIMT_UCONTEXT
  swapcontext(&from.state, &to.state);
#else
  simt_switch(&from.stack_pointer, to.stack_pointer);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// A fiber's first act; it learns where the stack of the thread that launches lies.
inline void arrive([[maybe_unused]] Context& launcher) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &launcher.bottom, &launcher.size);
#endif
}

}  // namespace simt

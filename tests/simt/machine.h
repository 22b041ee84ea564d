// The scheduler: one block at a time, one fiber per CUDA thread, in an order that the settings choose.
#pragma once

#include <array>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "core/cuda/simt.h"
#include "simt/fiber.h"
#include "simt/ready_queue.h"
#include "simt/shared_memory.h"
#include "simt/watch.h"

namespace simt {

class Machine {
 public:
  static constexpr unsigned most_threads = 1024, warp_size = 32;

  void run(const Launch& launch, const Settings& settings, std::size_t dynamic_allowed);
  int barrier(Barrier kind, const char* name, int predicate, const Where& where);
  std::uint64_t warp_operation(const WarpOperation& operation, unsigned mask, std::uint64_t value, unsigned source,
                               const Where& where);
  void* shared_bytes(const char* site, const char* name, std::size_t bytes, std::size_t alignment);
  SharedMemory& shared() { return shared_; }
  const Counters& counters() const { return counters_; }  // of the last launch
  unsigned thread() const { return current_; }
  Error error(const std::string& what) const;  // with thread, block and kernel
  [[noreturn]] void stop(const std::string& what);  // ends the current fiber where it is: its destructors do not run

 private:
  enum class State : unsigned char { fresh, running, at_barrier, at_warp, done, stopped };  // running: or ready to
  struct Thread {
    Context context;
    State state = State::fresh;
    uint3 index{};
    // What it brings to the warp operation that it waits in, and takes away.
    const WarpOperation* operation = nullptr;
    unsigned mask = 0, source = 0;
    std::uint64_t value = 0, result = 0;
    Where where;
    Stack stack;
  };
  struct Warp {
    unsigned waiting = 0, gone = 0;  // lanes; gone: exited, or not in the block at all
    std::uint32_t sync = 0;
  };
  struct Arrived {  // at the block's barrier
    unsigned threads = 0, first = 0, counted = 0;
    const char* name = nullptr;
    Where where;
  };
  struct Abandoned {};  // thrown in suspended fibers after an error elsewhere, to unwind them

  void check_launch() const;
  void check_opt_in(std::size_t static_bytes) const;
  void add_thread();
  void start(unsigned index);
  void run_blocks();
  void run_block(uint3 index);
  void abandon();
  static void live();  // a fiber's whole life: a CUDA thread of every block
  void end_thread();
  void become(unsigned thread);
  void switch_away();
  void suspend();
  void release_barrier(Barrier kind);
  void complete(unsigned first, unsigned mask);
  void check_same(unsigned other) const;
  Error bad_mask() const;
  Error warp_error(const std::string& how) const;
  Error deadlock() const;
  Error error_in_block(const std::string& what) const;
  std::string whereabouts(unsigned thread) const;
  std::string kernel_name() const;

  std::vector<std::unique_ptr<Thread>> threads_;  // grows to the largest block so far; their stacks are kept
  std::array<Warp, most_threads / warp_size> warps_;
  Arrived arrived_;
  int barrier_result_ = 0;
  ReadyQueue ready_;
  Random random_;
  Context launcher_;
  uint3& thread_index_ = threadIdx;  // this host thread's own, without a look-up at every switch
  Watch& watch_ = watch;
  SharedMemory shared_;
  Settings settings_;
  Counters counters_;
  const Launch* launch_ = nullptr;
  unsigned size_ = 0, current_ = 0, exited_ = 0, last_exited_ = 0;
  bool abandoning_ = false;
  std::size_t dynamic_allowed_ = 0;
  std::exception_ptr failure_;
};

extern constinit thread_local Machine* running;  // null: this host thread runs no kernel

std::string point(const uint3& p, const dim3& size);  // "5", or "(5, 0, 2)" where there is more than one dimension
std::string place(const Where& where);                // "cuda.cu:12"

}  // namespace simt

// What race.cpp knows of the running kernel, and how it stops it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace simt {

class SharedMemory;

// Every barrier, __syncwarp() and start of a block has a moment of its own, in increasing order.
struct Watch {
  char* arena;               // shared memory; null: no kernel runs
  unsigned thread;           // of the block, linear
  std::uint32_t now;         // the latest moment
  std::uint32_t block_sync;  // the block's last barrier
  std::uint32_t warp_sync;   // the last __syncwarp() of the thread's warp
  bool races;                // look for them
};
extern constinit thread_local Watch watch;

const SharedMemory& shared_memory();
[[noreturn]] void stop(const std::string& what);
inline std::string misaligned(std::size_t off, std::size_t bytes) {
  return "a " + std::to_string(bytes) + "-byte access is misaligned: its address is " + std::to_string(off) + " modulo " +
         std::to_string(bytes);
}

}  // namespace simt

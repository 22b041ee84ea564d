// What kernels and intrinsics ask of the host's scheduler (tests/simt/machine.cpp). Included by csrc/core/cuda/simt.h only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include "types.h"

using cudaStream_t = struct CUstream_st*;

namespace simt {

using Where = std::source_location;

// A kernel broke a rule of CUDA. One sentence; names kernel, block and thread.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The device that kernels believe to run on; the defaults are an H100's.
struct Device {
  int compute_major = 9, compute_minor = 0;
  int multiprocessors = 132;
  int threads_per_multiprocessor = 2048;
  int shared_optin = 227 << 10;             // bytes of shared memory that a block may ask for
  int shared_per_multiprocessor = 228 << 10;
  int l2_bytes = 50 << 20;
};

struct Settings {
  // 0: threads and blocks in order. Odd n: a random ready thread at every switch. Even n: random order in which a
  // released warp runs on as far as it can before the others. Blocks in random order in both. n is the seed.
  std::uint64_t schedule = 0;
  bool races = true;  // look for races in shared memory, where the source was compiled for that
  Device device;
};

struct Counters {
  std::uint64_t launches = 0, blocks = 0, barriers = 0, warp_operations = 0, switches = 0;
};

// For all host threads; a launch reads the settings when it starts and adds its counts when it ends.
Settings settings();
void configure(const Settings&);
Counters counters();
void reset_counters();

struct Launch {
  const char* name;          // as written at the launch
  const void* kernel;        // tells kernels apart in cudaFuncSetAttribute
  dim3 grid, block;
  std::size_t dynamic_bytes;
  void (*body)(const void*);  // one CUDA thread's whole life
  const void* arguments;
};
void launch(const Launch&);  // blocking: a stream is only carried through
void allow_dynamic_shared(const void* kernel, std::size_t bytes);

enum class Barrier { sync, count, all, any };
int barrier(Barrier, const char* name, int predicate, const Where&);

struct WarpOperation {
  const char* name;
  enum How { synchronise, gather, ballot, fold } how;
  std::uint64_t (*combine)(std::uint64_t, std::uint64_t) = nullptr;  // of fold
};
// gather: the value of lane `source`; ballot: the lanes whose value is not 0; fold: all values combined.
std::uint64_t warp_operation(const WarpOperation&, unsigned mask, std::uint64_t value, unsigned source, const Where&);
unsigned lane();

void* shared_bytes(const char* site, const char* name, std::size_t bytes, std::size_t alignment);
void* dynamic_shared(const char* name);
void check_aligned(const void* pointer, std::size_t bytes);
[[noreturn]] void fail(const std::string& what);  // "simt: WHAT, in thread .. of block .. of kernel .."

template <class T, std::size_t n>
auto shared_array(const char* site, const char* name) -> T (&)[n] {
  static_assert(std::is_trivially_destructible_v<T>);
  return *static_cast<T(*)[n]>(shared_bytes(site, name, sizeof(T[n]), alignof(T)));
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t dynamic_bytes, cudaStream_t,
            Arguments&&... arguments) {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...), "CUDA copies a kernel's parameters bytewise");
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  };
  const Call call{kernel, std::tuple<Parameters...>(static_cast<Arguments&&>(arguments)...)};
  auto body = [](const void* p) {
    const auto& c = *static_cast<const Call*>(p);
    std::apply(c.kernel, c.parameters);
  };
  launch(Launch{name, reinterpret_cast<const void*>(kernel), grid, block, dynamic_bytes, body, &call});
}

}  // namespace simt
